"""The benchmarks' arithmetic, and that a side which fails, or computes something else, is told and not averaged."""

import json
import sys
from pathlib import Path

import pytest
from benchmarks_factory import run_part
from paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # last: none of its names hides another

import bench
import operations
from chart import draw_ratios
from parts import NLP, OURS, PARTS, RATIOS, SMOKE, TORCH, Case, Part, loads, sides, starts, tokenizing
from ratios import HIGH, LOW, MET, MET_MEDIAN, MISSED, MISSED_MEDIAN, Of, Ratio, bars_table, spread, summary, verdict
from smoke import compared
from workers import SideFailed

SCRIPTED = ("load ", "start", "tokenizer")  # cases that come out of benchmarks with commands of their own
SECONDS = Ratio("ours / theirs", Of("case", "ours"), Of("case", "theirs"), 0.6)


def rounds(ours: list, theirs: list) -> dict:
    """Figures of two sides; None is a round that failed."""
    named = {"ours": ours, "theirs": theirs}
    return {"case": {name: [v and {"seconds": v} for v in values] for name, values in named.items()}}


# ------------------------------------------------------------------------------------------------ arithmetic


def test_ratios_are_taken_within_a_round():
    busy = rounds([1.0, 10.0, 1.0], [2.0, 20.0, 4.0])  # the machine was ten times slower in one round
    assert SECONDS.values(busy) == [0.5, 0.5, 0.25]
    found = summary((SECONDS,), busy)["ours / theirs"]
    assert (found["median"], found["min"], found["max"], found["verdict"]) == (0.5, 0.25, 0.5, MET)
    assert SECONDS.values(rounds([1.0, 1.0, 10.0], [2.0, 20.0, 4.0])) != SECONDS.values(busy)  # control: order counts


def test_a_round_in_which_a_side_failed_is_left_out():
    assert SECONDS.values(rounds([1.0, None, 3.0], [2.0, 2.0, 4.0])) == [0.5, 0.75]
    assert SECONDS.values(rounds([1.0, 2.0], [2.0])) == [0.5]  # interrupted between the two
    assert summary((SECONDS,), rounds([None], [2.0])) == {}


@pytest.mark.parametrize(
    ("values", "best", "expected"),
    [
        ([0.5, 0.6, 0.6], LOW, MET),
        ([0.5, 0.6, 0.7], LOW, MET_MEDIAN),
        ([0.6, 0.7, 0.7], LOW, MISSED_MEDIAN),
        ([0.61, 0.7, 0.7], LOW, MISSED),
        ([0.6, 0.7, 0.7], HIGH, MET),
        ([0.5, 0.6, 0.7], HIGH, MET_MEDIAN),
        ([0.5, 0.5, 0.6], HIGH, MISSED_MEDIAN),
        ([0.5, 0.5, 0.59], HIGH, MISSED),
    ],
)
def test_a_verdict_says_whether_the_rounds_agree(values, best, expected):
    assert verdict(spread(values), 0.6, best) == expected


def test_the_table_has_every_ratio_with_its_bar():
    text = bars_table(summary((SECONDS,), rounds([1.0, 1.4], [2.0, 2.0])))
    assert "| ours / theirs " in text and "0.60 (0.50 to 0.70)" in text and "at most 0.60" in text
    assert MET_MEDIAN in text


def test_every_ratio_names_what_some_part_measures():
    measured = {}
    for part in PARTS:
        if isinstance(part, Part):
            measured |= {case.name: {side.name for side in part.sides} for case in part.cases}
    for ratio in RATIOS:
        for of in filter(None, (ratio.over, ratio.under)):
            assert of.case.startswith(SCRIPTED) or of.side in measured[of.case], ratio.name
    assert len({ratio.name for ratio in RATIOS}) == len(RATIOS)
    assert len({part.name for part in PARTS}) == len(PARTS)


def test_what_load_py_writes_becomes_figures_of_rounds():
    runs = {"aquila_pd": [{"seconds": 3.0, "peak": 5e8}, {"seconds": 4.0, "peak": 5e8}]}
    table = {"dtype": "bfloat16", "state": "warm", "weights": 400_000_000, "runs": runs}
    found = loads({"tables": [table]})
    (case,) = found
    assert {of.case for ratio in RATIOS for of in (ratio.over, ratio.under) if of} >= {case}
    assert [one["seconds"] for one in found[case][OURS]] == [3.0, 4.0]
    (memory,) = (ratio for ratio in RATIOS if ratio.name == f"{case}, memory / weights")
    assert memory.values(found) == [1.25, 1.25]


def test_what_start_py_writes_is_beyond_an_empty_python():
    def runs(*walls: float) -> list[dict]:
        return [{"wall": wall, "cpu": wall, "peak_mb": 9.0, "anonymous_mb": 9.0} for wall in walls]

    whole = {"import aquila_pd": runs(0.05, 0.4), "aquila-pd generate": runs(3.0, 3.0), "transformers": runs(4.0, 6.0)}
    found = summary(RATIOS, starts({"runs": {"python -c pass": runs(0.01, 0.35), **whole}}))
    assert [round(found["start, import aquila_pd"][key], 3) for key in ("min", "max")] == [0.04, 0.05]
    assert found["start, first token / transformers"]["max"] == 0.75


def test_what_tokenizer_py_writes_becomes_ratios():
    row = {"MB/s": {}, "ratio": {"min": 0.9, "median": 1.2, "max": 3.0}}
    results = {"AquilaTokenizer, ids": row, "GPT2TokenizerFast, ids": row}
    once = {"loading AquilaTokenizer": {"min": 0.8, "median": 0.9, "max": 0.9}, "building the twin": row["ratio"]}
    found = summary(RATIOS, tokenizing({"results": results, "once": once}))
    ids, loading = found.values()
    assert (ids["median"], ids["min"], ids["max"], ids["verdict"]) == (1.2, 0.9, 3.0, MET_MEDIAN)
    assert (loading["median"], loading["verdict"]) == (0.9, MET)
    assert "0.90 (0.80 to 0.90) s" in bars_table(found)


# ------------------------------------------------------------------------------------------------ smoke


def test_smoke_marks_what_moved_by_more_than_the_recorded_rounds_lay_apart():
    old = {"median": 0.6, "min": 0.55, "max": 0.65, "rounds": 5, "best": LOW}
    recorded = {"less": old, "more": {**old, "best": HIGH}, "gone": old}

    def marks(median: float) -> dict[str, str]:
        now = {name: {**recorded[name], "median": median} for name in ("less", "more")}
        return {row[0]: row[-1] for row in compared(recorded, now)}

    assert marks(0.69) == {"less": "", "more": ""}
    assert marks(0.72) == {"less": "WORSE", "more": "better"}
    assert marks(0.48) == {"less": "better", "more": "WORSE"}
    assert compared(recorded, {"new": old}) == [["new", "not recorded", "0.60", "", ""]]
    assert compared(recorded, {"less": {**old, "median": 0.72}})[0][3] == "+20%"


def test_smoke_asks_for_ratios_that_are_recorded_under_the_same_names():
    parts = {part.name: part for part in PARTS}
    for part in (part for part in SMOKE if isinstance(part, Part)):
        assert {case.name for case in part.cases} < {case.name for case in parts[part.name].cases}
    assert parts.keys() > {part.name for part in SMOKE}


# ------------------------------------------------------------------------------------------------ one run

PART = Part("part", "", "tiny", sides(OURS, TORCH, NLP), (Case("case", {"do": "prefill"}),), TORCH)


@pytest.fixture
def fake(monkeypatch):
    """Processes replaced by functions: fake[side] answers a side's requests; a side without one cannot be started."""
    answers: dict = {}

    class Fake:
        def __init__(self, asked, *, environment):
            if asked["side"] not in answers:
                raise SideFailed("does not start")
            self.ask = answers[asked["side"]]

        def close(self) -> None:
            pass

    monkeypatch.setattr(bench, "Worker", Fake)
    monkeypatch.setattr(bench, "make_folder", lambda *_: Path("nowhere"))
    return answers


def answer(seconds: float, tokens: int = 7):
    return lambda request: {"seconds": seconds, "cpu": seconds, "peak_mb": 1.0, "tokens": [[tokens]]}


def test_a_side_that_fails_is_told_and_the_others_go_on(fake, tmp_path, capsys):
    def fails(request):
        raise SideFailed("out of memory")

    fake.update({"aquila_pd": answer(1.0), "transformers": fails})
    results = run_part(tmp_path / "bench.json", PART)
    assert results.errors == {"case, transformers": "out of memory", "case, PaddleNLP": "does not start"}
    assert [found["seconds"] for found in results.measured["case"][OURS]] == [1.0, 1.0]  # the first round warms up
    assert results.measured["case"][TORCH] == [None, None]
    bench.report(results)
    told = capsys.readouterr().out
    assert "FAILED case, PaddleNLP: does not start" in told
    assert json.loads((tmp_path / "bench.json").read_text())["errors"] == results.errors


def test_a_side_that_computes_something_else_is_no_comparison(fake, tmp_path):
    fake.update({"aquila_pd": answer(1.0), "transformers": answer(2.0), "PaddleNLP": answer(2.0, tokens=8)})
    assert list(run_part(tmp_path / "bench.json", PART).errors) == ["case, PaddleNLP"]


def test_a_command_that_fails_is_told_and_what_it_wrote_is_kept(monkeypatch, tmp_path):
    runs = {OURS: [{"seconds": 1.0, "peak": 5e6}]}
    written = {"tables": [{"dtype": "float32", "state": "warm", "weights": 4, "runs": runs}]}

    def fails(command, environment):
        Path(command[-1]).write_text(json.dumps(written))
        raise SystemExit("load.py failed:\nTraceback\nValueError: no weights\n")

    monkeypatch.setattr(bench, "run", fails)
    script = next(part for part in PARTS if part.name == "load")
    results = run_part(tmp_path / "bench.json", script)
    assert results.errors == {"load, load.py": "ValueError: no weights"}
    assert results.measured["load float32, warm"][OURS][0]["seconds"] == 1.0
    written.clear()
    assert "not what was expected" in run_part(tmp_path / "bench.json", script).errors["load, load.py"]


def test_an_interrupted_run_keeps_what_was_measured(fake, tmp_path):
    asked = []

    def interrupted(request):
        asked.append(request)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer(1.0)(request)

    fake.update({"aquila_pd": interrupted, "transformers": answer(2.0), "PaddleNLP": answer(2.0)})
    with pytest.raises(KeyboardInterrupt):
        run_part(tmp_path / "bench.json", PART)
    kept = json.loads((tmp_path / "bench.json").read_text())["measured"]["case"]
    assert {side: len(found) for side, found in kept.items()} == {OURS: 1, TORCH: 1, NLP: 1}


def test_recording_a_part_leaves_the_others_as_they_were(tmp_path):
    def content(name: str, median: float) -> dict:
        keys = {"date": str(median), "machine": "m", "threads": 2, "dtype": "float32", "MKL_DEBUG_CPU_TYPE": "5"}
        return {**keys, "versions": {"aquila_pd": "1"}, "ratios": {name: {"median": median}}}

    path = tmp_path / "recorded.json"
    for name, median in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        bench.record(content(name, median), path)
    assert {n: r["median"] for n, r in json.loads(path.read_text())["ratios"].items()} == {"a": 3.0, "b": 2.0}


def test_the_chart_shows_every_ratio(tmp_path):
    rows = summary((SECONDS, Ratio("told", Of("case", "theirs"), Of("case", "ours"))), rounds([1.0, 1.4], [2.0, 2.0]))
    setting = {"date": "2026-01-01", "machine": "m", "versions": {"aquila_pd": "0"}, "threads": 1, "rounds": 2}
    content = {**setting, "dtype": "float32", "MKL_DEBUG_CPU_TYPE": "", "load_average": {"min": 0.0, "max": 1.0}}
    draw_ratios({**content, "ratios": rows}, tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text()
    assert "ours / theirs" in drawn and "told" in drawn and "MKL_DEBUG_CPU_TYPE=not set" in drawn


# ------------------------------------------------------------------------------------------------ single commands


def test_every_operation_is_measured_beside_its_plain_twin(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["operations.py", "--tokens", "8", "--rounds", "1"])
    operations.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {twins.name}" for twins in operations.TWINS]
    if operations.paddle.device.get_device() == "cpu":  # where every operation has a twin
        assert not any("not available" in row for row in rows), rows


def test_arguments_that_an_operation_does_not_take_end_the_measuring():
    """They were once shown as a kernel that is not there."""
    with pytest.raises(TypeError):
        operations.ratio(operations.TWINS[0], (), backward=False, rounds=1)
