"""Logs of a run: what is derived from a step, what a resumed run finds in its log, and what a person sees."""

import io
import json
import math
import mmap
import re
from pathlib import Path

import numpy as np
import pytest
from pseudo_terminal import lines_shown, on_a_terminal

from aquila_pd.sft.logs import EvalRecord, Reporter, Silent, StageInfo, StepRecord, open_reporter
from aquila_pd.sft.logs import curve as curves
from aquila_pd.sft.logs.jsonl import read_log
from aquila_pd.sft.logs.memory import memory_reader
from aquila_pd.sft.logs.peaks import TERA, peak_flops
from aquila_pd.sft.logs.records import Clock
from aquila_pd.sft.logs.words import number
from aquila_pd.utils.errors import TrainingError

STAGES = ("one", "two")


def record(step: int, *, stage: str = "one", steps: int = 10, loss: float = 1.5, **changes) -> StepRecord:
    fields = dict(epoch=step / steps, lr=1e-4, grad_norm=0.5, valid_tokens=600, tokens=990, positions=1000, seconds=2.0)
    return StepRecord(stage=stage, step=step, steps=steps, loss=loss, **{**fields, **changes})


def run(folder: Path, *events, resume=None, stream=None) -> str:
    """Report StageInfos, StepRecords, EvalRecords and texts; what was printed."""
    stream = stream or io.StringIO()
    with Reporter(folder, stages=STAGES, resume=resume, stream=stream) as reporter:
        say = {StageInfo: reporter.start, StepRecord: reporter.step, EvalRecord: reporter.evaluated, str: reporter.said}
        for event in events:
            say[type(event)](event)
    return stream.getvalue()


def steps_in(folder: Path) -> list[tuple[str, int]]:
    return [(line["stage"], line["step"]) for line in read_log(folder / "log.jsonl") if line["kind"] == "step"]


# ------------------------------------------------------------------------------------------ derived numbers


def test_rates_are_of_one_device_and_of_what_is_trained_on():
    step = record(1, devices=4)
    assert step.tokens_per_s == 600 / 4 / 2.0
    assert step.padding == pytest.approx(0.01)


def test_mfu_counts_real_tokens_and_is_unknown_without_a_peak():
    step = record(1, devices=4)
    info = StageInfo("one", 10, flops_per_token=2e9, peak_flops=1e12)
    assert step.mfu(info) == pytest.approx(2e9 * 990 / 2.0 / 4e12)
    assert step.mfu(StageInfo("one", 10, flops_per_token=2e9)) is None
    assert step.mfu(StageInfo("one", 10, peak_flops=1e12)) is None


@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-PCIE-40GB", "float32", 156),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA L40S", "float16", 362),
        ("NVIDIA L40", "float16", 181),
        ("NVIDIA A10G", "bfloat16", 70),
        ("NVIDIA A10", "bfloat16", 125),
        ("Tesla V100-SXM2-32GB", "float16", 125),
        ("Tesla V100-SXM2-32GB", "float32", None),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("CPU", "float32", None),
        ("NVIDIA A1000", "bfloat16", None),
    ],
)
def test_peaks_are_found_by_the_drivers_names(name, dtype, teraflops):
    found = peak_flops(name, dtype)
    assert found == (teraflops and pytest.approx(teraflops * TERA))


def test_the_time_left_follows_recent_steps_and_not_pauses():
    clock = Clock(step=0)
    assert clock.left(record(1, steps=100, seconds=50.0)) is None, "the first step compiles kernels"
    for step in range(2, 100):
        left = clock.left(record(step, steps=100, seconds=2.0))
    assert left == pytest.approx(2.0, rel=0.2)
    assert clock.left(record(100, steps=100)) == 0


def test_a_clock_that_goes_on_counts_from_where_it_goes_on():
    clock = Clock(step=50)
    clock.left(record(60, steps=100, seconds=20.0))  # ten steps in one record
    assert clock.left(record(61, steps=100, seconds=2.0)) == pytest.approx(39 * 2.0)


def test_memory_of_this_process_is_measured():
    before = memory_reader("cpu")()["resident"]
    with mmap.mmap(-1, 50 << 20) as fresh:  # from the system itself: numpy's may be memory the process holds already
        fresh.write(b"1" * len(fresh))
        assert memory_reader("cpu")()["resident"] - before > 40


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00012345, "0.000123"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (1234.5, "1234"),
        (0, "0"),
        (math.nan, "nan"),
        (1e9, "1.00e+09"),
    ],
)
def test_numbers_have_three_digits_that_count(value, text):
    assert number(value) == text


# --------------------------------------------------------------------------------------------- log.jsonl


def test_every_step_is_in_the_log_with_all_digits(tmp_path):
    losses = [0.1 + 0.2, 1 / 3, np.float32(1.1), math.nan]
    run(tmp_path, StageInfo("one", 4, log_every=100), *(record(i + 1, steps=4, loss=x) for i, x in enumerate(losses)))
    found = [line["loss"] for line in read_log(tmp_path / "log.jsonl") if line["kind"] == "step"]
    assert found == [0.1 + 0.2, 1 / 3, float(np.float32(1.1)), "nan"]
    text = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in text and "0.30000000000000004" in text
    assert all(json.loads(line)["kind"] for line in text.splitlines())


def test_a_resumed_run_leaves_the_log_as_if_nothing_had_happened(tmp_path):
    whole = [StageInfo("one", 10), *map(record, range(1, 11))]
    run(tmp_path / "whole", *whole)
    run(tmp_path / "killed", *whole[:8])
    said = run(tmp_path / "killed", StageInfo("one", 10, step=4), *whole[5:], resume=("one", 4))
    assert "3 lines after step 4 of stage one are cut off" in said
    assert steps_in(tmp_path / "killed") == steps_in(tmp_path / "whole") == [("one", i) for i in range(1, 11)]


def test_a_stage_that_goes_on_from_before_the_newest_checkpoint_cuts_the_log_once_more(tmp_path):
    run(tmp_path, StageInfo("one", 10), *map(record, range(1, 9)))
    said = run(tmp_path, "the newest is damaged", StageInfo("one", 10, step=3), record(4), resume=("one", 6))
    assert steps_in(tmp_path) == [("one", i) for i in range(1, 5)]
    assert "2 lines after step 6" in said and "lines after step 3 of stage one are cut off" in said


def test_a_run_that_goes_on_in_its_first_stage_forgets_the_second(tmp_path):
    two = [record(i, stage="two") for i in (1, 2)]
    run(tmp_path, StageInfo("one", 10), *map(record, range(1, 11)), StageInfo("two", 10), *two)
    run(tmp_path, resume=("two", 1))
    assert steps_in(tmp_path)[-2:] == [("one", 10), ("two", 1)]
    run(tmp_path, resume=("one", 10))
    assert steps_in(tmp_path)[-1] == ("one", 10)
    assert {line["stage"] for line in read_log(tmp_path / "log.jsonl")} == {"", "one"}


@pytest.mark.parametrize("torn", [b'{"kind": "st', b"\x00" * 40, b'{"kind": "step"}', b"[1]\n", b"\xff\n"])
def test_a_torn_last_line_is_mended_and_that_is_said(tmp_path, torn):
    run(tmp_path, StageInfo("one", 10), record(1), record(2))
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(torn)
    assert len(list(read_log(tmp_path / "log.jsonl"))) == 3
    said = run(tmp_path, StageInfo("one", 10, step=2), record(3), resume=("one", 2))
    assert "torn off" in said
    assert steps_in(tmp_path) == [("one", 1), ("one", 2), ("one", 3)]


def test_damage_in_the_middle_is_no_torn_line(tmp_path):
    run(tmp_path, StageInfo("one", 10), record(1), record(2))
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    with pytest.raises(TrainingError, match=r"log\.jsonl, line 2, is no record"):
        run(tmp_path, resume=("one", 2))


# ------------------------------------------------------------------------------------------------ a person's eyes


def test_without_a_terminal_there_is_one_plain_line_every_so_often(tmp_path):
    info = StageInfo("one", 10, log_every=4, facts={"method": "full"}, flops_per_token=2e9, peak_flops=1e12)
    said = run(tmp_path, info, *map(record, range(1, 11)), EvalRecord("one", 10, 1.25, 100, 3.0, best=True))
    lines = said.splitlines()
    assert "\x1b" not in said and "\r" not in said
    assert lines[:2] == ["Stage one: 10 steps", "  method  full"]
    assert [re.search(r"(\d+)/10", line)[1] for line in lines[2:6]] == ["1", "4", "8", "10"]
    assert re.sub(r"RAM [\d.]+ [GM]iB", "RAM", lines[3]) == (
        "one   4/10  epoch 0.40  loss 1.5000  lr 1.00e-04  grad 0.500  300 tok/s  pad 1.0%  MFU 99%  RAM  12 s left"
    )
    assert lines[6] == "one  step 10: evaluation loss 1.2500, the best so far (3 s)"


def test_what_is_saved_is_named_from_the_run_folder_on(tmp_path):
    stream = io.StringIO()
    with Reporter(tmp_path, stages=STAGES, stream=stream) as reporter:
        reporter.start(StageInfo("one", 10))
        reporter.saved(tmp_path / "stages" / "one")
        reporter.saved(Path("/elsewhere"))
    assert stream.getvalue().splitlines()[-2:] == ["one  step 0: saved stages/one", "one  step 0: saved /elsewhere"]
    saved = [line["path"] for line in read_log(tmp_path / "log.jsonl") if line["kind"] == "saved"]
    assert saved == ["stages/one", "/elsewhere"]


def test_without_a_peak_nothing_is_said_of_mfu(tmp_path):
    assert "MFU" not in run(tmp_path, StageInfo("one", 10, flops_per_token=2e9), record(1))


BAR = """
import sys, io
from pathlib import Path
from test_logs import *
with Reporter(Path(sys.argv[1]), stages=["a-stage-with-a-rather-long-name"]) as reporter:
    reporter.start(StageInfo("a-stage-with-a-rather-long-name", 10, flops_per_token=2e9, peak_flops=1e12))
    for step in range(1, 8):
        reporter.step(record(step, stage="a-stage-with-a-rather-long-name", devices=8, seconds=4e4))
    reporter.said("[red]a line between[/red]")
    reporter.step(record(10, stage="a-stage-with-a-rather-long-name", devices=8))
    if len(sys.argv) > 2:
        raise KeyboardInterrupt
"""


def test_on_a_terminal_a_bar_fits_the_width_and_lines_go_above_it(tmp_path):
    plain = "\n".join(lines_shown(on_a_terminal(BAR, str(tmp_path))))
    assert "[red]a line between[/red]" in plain, "what is said is no markup"
    assert "━" in plain and "7/10" in plain and "10/10" in plain and "loss 1.5000" in plain
    assert "33 h 20 min left" in plain and "MFU" in plain
    assert max(map(len, plain.splitlines())) <= 80


def test_the_terminal_gets_its_cursor_back_when_the_run_is_interrupted(tmp_path):
    said = on_a_terminal(BAR, str(tmp_path), "interrupt")
    assert "\x1b[?25l" in said and said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l")


def test_a_terminal_that_is_gone_does_not_end_the_run(tmp_path):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            if "2/10" in text:
                raise BrokenPipeError("nobody reads")
            return super().write(text)

    run(tmp_path, StageInfo("one", 10), *map(record, range(1, 11)), stream=Gone())
    assert steps_in(tmp_path) == [("one", i) for i in range(1, 11)]
    assert any("terminal is gone" in line.get("text", "") for line in read_log(tmp_path / "log.jsonl"))


def test_only_the_first_rank_reports(tmp_path):
    silent = open_reporter(tmp_path, rank=1, stages=STAGES)
    assert isinstance(silent, Silent) and isinstance(open_reporter(tmp_path, rank=0, stages=STAGES), Reporter)
    public = {name for name in vars(Reporter) if not name.startswith("_")}
    assert public <= set(dir(silent)), "whatever a reporter does, the silent one takes"


# ------------------------------------------------------------------------------------------ VisualDL and picture


def test_visualdl_holds_each_step_once_also_after_a_resume(tmp_path):
    from visualdl import LogReader

    info = StageInfo("one", 4, visualdl=True)
    run(tmp_path, info, *(record(i, steps=4, loss=float(i)) for i in (1, 2, 3)), EvalRecord("one", 3, 9.0, 1, 1.0))
    run(
        tmp_path,
        StageInfo("one", 4, step=2, visualdl=True),
        *(record(i, steps=4, loss=float(i)) for i in (3, 4)),
        EvalRecord("one", 4, 0.5, 1, 1.0),
        resume=("one", 2),
    )
    (file,) = (tmp_path / "visualdl" / "one").iterdir()
    reader = LogReader(file_path=str(file))
    points = {
        tag: [(one.id, one.value) for one in reader.get_data("scalar", tag)] for tag in reader.get_tags()["scalar"]
    }
    assert points["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert points["eval_loss"] == [(4, 0.5)]
    assert set(points) == {"loss", "lr", "grad_norm", "tokens_per_s", "eval_loss"}


def test_the_curve_counts_steps_through_all_stages(tmp_path):
    run(
        tmp_path,
        StageInfo("one", 3),
        *(record(i, steps=3, loss=3.0 - i) for i in (1, 2, 3)),
        EvalRecord("one", 3, 0.25, 1, 1.0),
        StageInfo("two", 2),
        *(record(i, stage="two", steps=2, loss=float(i)) for i in (1, 2)),
        record(3, stage="two", loss=math.nan),
    )
    found = curves.read_curves(tmp_path / "log.jsonl", STAGES)
    assert (found["one"].begin, found["one"].steps, found["one"].evals) == (0, {1: 2.0, 2: 1.0, 3: 0.0}, {3: 0.25})
    assert (found["two"].begin, found["two"].steps) == (3, {4: 1.0, 5: 2.0})


def test_a_picture_is_drawn_at_the_end_whole_or_not_at_all(tmp_path):
    with Reporter(tmp_path, stages=STAGES, stream=io.StringIO()) as reporter:
        reporter.start(StageInfo("one", 2))
        reporter.step(record(1, steps=2))
        reporter.finish()
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.png", "log.jsonl"]
    assert not curves.draw_curve(tmp_path / "log.jsonl", tmp_path / "none.png", stages=("other",))


def test_the_smoothed_line_is_an_average_from_its_first_point_on():
    assert curves.smoothed([4.0, 4.0, 4.0], 0.9) == pytest.approx([4.0, 4.0, 4.0])
    assert curves.smoothed([0.0, 1.0], 0.5) == pytest.approx([0.0, 2 / 3])
