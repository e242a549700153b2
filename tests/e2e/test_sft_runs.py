"""Runs of `aquila-pd sft` that are killed anywhere, in one process and in two, and are the same run in the end.

Each attempt is a process of its own, forked from one that has loaded paddle, so that it costs a second and not ten;
so is a command that starts two ranks, and its ranks are forked from it. Where an attempt is killed is counted in
events: the n-th file or folder that it makes, opens to write, renames or removes.
"""

import os
import random
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from chat_factory import tiny_chat_folder
from effort import tries
from fork_server import Forked, warm
from paths import SUPPORT
from sft_command_factory import (
    call,
    curve,
    distance,
    evaluations,
    loss_of,
    losses,
    manifest,
    records,
    refused,
    rows,
    sft,
    stage,
    tensors,
    trained,
    tree,
    weights_of,
    write_recipe,
    write_rows,
)

ROUNDING = 1e-5  # float32 sums in another order; losses near 6
LORA = {"r": 4, "alpha": 16, "dropout": 0.1, "targets": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model and two files of rows."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_chat_folder(folder / "base", "aquila-v1")
    for seed, name in enumerate("ab"):
        write_rows(folder / f"{name}.jsonl", rows(24, seed=seed))
    return folder


def two_stages(place: Path, file: Path, one: dict, two: dict, **more) -> Path:
    """A recipe of five and six steps with evaluations and checkpoints, in which each stage is more than given."""
    common = dict(epochs=4, save_every=2, eval_every=2, keep=2)
    stages = [
        stage("one", place / "a.jsonl", **{**common, "max_steps": 5, "data": {"held_out": 0.2}, **one}),
        stage("two", place / "b.jsonl", **{**common, "max_steps": 6, "data": {"held_out": 0.2}, **two}),
    ]
    return write_recipe(file, stages, model=str(place / "base"), **more)


# ------------------------------------------------------------------------------------------- attempts, and their ends


class Attempts:
    """Runs of one recipe in one folder."""

    def __init__(self, file: Path, run: Path):
        self.file, self.run, self.log = file, run, run.with_name(f"{run.name}.txt")

    def start(self, *arguments: str, kill_at: int = 0, path: str = "") -> Forked:
        counted = [SUPPORT / "killed_at.py", self.run, kill_at, path]
        words = ["sft", self.file, f"output={self.run}", *arguments, "--threads", "1", "--workers", "1"]
        with self.log.open("ab") as output:
            return warm().start([*counted, *words], stdout=output, stderr=output)

    def once(self, *arguments: str, kill_at: int = 0, path: str = "") -> int:
        """Its exit status; -9 for one that was killed, at an event on a path in which that pattern is."""
        return self.start(*arguments, kill_at=kill_at, path=path).wait(300)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def events(self) -> int:
        """Of the last attempt that was not killed."""
        return int(re.findall(r"^events (\d+)$", self.said, re.MULTILINE)[-1])

    def killed_after(self, steps: int, *, pause: float) -> int:
        """Killed a moment after so many more steps are logged; its exit status, 0 if it was done before."""
        steps += self.steps()
        process = self.start()
        while process.poll() is None and self.steps() < steps:
            time.sleep(0.005)
        with suppress(subprocess.TimeoutExpired):
            process.wait(pause)
        process.kill()
        return process.wait()

    def steps(self) -> int:
        """Logged until now."""
        log = self.run / "log.jsonl"
        return log.read_text().count('"kind": "step"') if log.exists() else 0

    def wait_for(self, steps: int) -> None:
        """Until so many steps are logged."""
        for _ in range(12000):
            if self.steps() >= steps:
                return
            time.sleep(0.005)
        raise AssertionError(self.said)


def results(run: Path) -> tuple:
    """What two runs of one recipe have in common, to the last bit."""
    return curve(run), evaluations(run), weights_of(run)


# --------------------------------------------------------------------------------------------------- killed anywhere


RUINOUS = {"lr": 1.0, "schedule": "constant", "warmup_steps": 6}  # the best evaluation is not the last
CHAINS = {
    "full": (dict(method="full", neftune=5.0), dict(method="full", keep_best=True, eval_every=1, optim=RUINOUS)),
    "lora": (dict(method="lora", lora=LORA), dict(method="lora", lora=LORA)),
    "lora-full": (dict(method="lora", lora={**LORA, "dora": True}), dict(method="full")),
    "qlora-lora": (dict(method="qlora", lora=LORA), dict(method="lora", lora={**LORA, "r": 2}, recompute=True)),
}


# Two chains have every method and kind of optimizer state but DoRA's, which the next test kills at each kind of file.
# In a thorough run all of them are killed at random places too.
@pytest.mark.parametrize("chain", tries(["full", "qlora-lora"], [*CHAINS]))
def test_killed_again_and_again_at_any_place_it_is_the_same_run(place, tmp_path, chain):
    file = two_stages(place, tmp_path / "r.yaml", *CHAINS[chain])
    whole = Attempts(file, tmp_path / "whole")
    assert whole.once() == 0, whole.said
    broken, rng = Attempts(file, tmp_path / "broken"), random.Random(chain)
    kills = []
    while len(kills) < 60:
        if len(kills) % 3 == 2:
            kills.append(f"{rng.randint(1, 3)} steps")
            status = broken.killed_after(int(kills[-1].split()[0]), pause=rng.random() / 20)
        else:
            kills.append(rng.randint(1, whole.events // 4))
            status = broken.once(kill_at=kills[-1])
        if status == 0:
            break
        assert status == -signal.SIGKILL, broken.said
    assert status == 0 and len(kills) > 3, kills
    assert results(broken.run) == results(whole.run), kills
    assert "Traceback" not in broken.said


# In the order in which they are reached: of each the second event, in the middle of what is written or removed there.
WRITTEN = (
    r"one-plans/train/\.epoch-0", r"data/two\.partial", r"two-plans/train/\.epoch-1", r"one/.*step-00000002\.partial",
    r"one/.*step-00000002\.going", r"one/\.result", r"one/merged\.partial", r"one/merged/conversion",
    r"two/.*step-00000004\.partial", r"two/\.result", r"\.curve", r"/\.model",
)  # fmt: skip


@pytest.fixture(scope="module")
def killed_while_writing(place, tmp_path_factory):
    """A run killed while each kind of thing was written or removed, and the same run uninterrupted."""
    folder = tmp_path_factory.mktemp("writing")
    file = two_stages(place, folder / "r.yaml", *CHAINS["lora-full"])
    whole, run = Attempts(file, folder / "whole"), Attempts(file, folder / "run")
    for path in WRITTEN:
        assert run.once(kill_at=2, path=path) == -signal.SIGKILL, f"nothing on {path}: {run.said}"
    assert run.once() == whole.once() == 0, run.said
    return run.run, whole.run


def test_killed_while_something_is_written_it_is_the_same_run(killed_while_writing):
    run, whole = killed_while_writing
    assert results(run) == results(whole)
    assert tree(whole).keys() <= tree(run).keys()


def test_nothing_is_left_of_what_was_being_written_or_removed(killed_while_writing):
    run, whole = ([name for name in tree(run) if "/conversion-" not in name] for run in killed_while_writing)
    assert run == whole


def test_nothing_of_a_merge_is_left_in_models(killed_while_writing):
    run, whole = ([name for name in tree(run) if "/conversion" in name] for run in killed_while_writing)
    assert run == whole


def test_a_run_folder_in_use_is_refused_and_ctrl_c_ends_the_one_that_uses_it(place, tmp_path):
    """A process in a group of its own, without a terminal; Ctrl-C goes to the whole group, as a terminal sends it."""
    slow = dict(max_steps=10, epochs=100, global_batch=8, save_every=20, eval_every=20)
    file = two_stages(place, tmp_path / "r.yaml", slow, {})
    used, whole = Attempts(file, tmp_path / "used"), Attempts(file, tmp_path / "whole")
    command = Command(file, f"output={used.run}")
    used.wait_for(1)
    os.killpg(command.process.pid, signal.SIGSTOP)  # it waits, however long the others take to be refused
    before = manifest(used.run)
    refused(sft(file, f"output={used.run}"), str(used.run))
    refused(sft(used.run), str(used.run))
    assert manifest(used.run)["resumed"] == before["resumed"]
    os.killpg(command.process.pid, signal.SIGINT)
    os.killpg(command.process.pid, signal.SIGCONT)
    assert command.ended() == 128 + signal.SIGINT, command.said
    assert f"aquila-pd sft {used.run}" in command.said and "Traceback" not in command.said
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", command.said), "control characters in a pipe"
    assert len(curve(used.run)) < 10
    assert used.once() == whole.once() == 0
    assert results(used.run) == results(whole.run)


# ------------------------------------------------------------------------------------------------- two processes


class Command:
    """`aquila-pd sft` as a process of its own, in a group of its own, with its ranks as processes."""

    def __init__(self, *arguments: object):
        self.log = Path(str(arguments[0])).with_suffix(".txt")
        words = [SUPPORT / "forked_ranks.py", "sft", *arguments, "--threads", "1", "--workers", "1"]
        with self.log.open("ab") as output:
            self.process = warm().start(words, stdout=output, stderr=output, start_new_session=True)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def ended(self, patience: float = 300) -> int:
        return self.process.wait(patience)

    def ranks(self) -> list[int]:
        """Processes that it has started, as they are now."""
        return [one for one in map(int, filter(str.isdigit, os.listdir("/proc"))) if parent(one) == self.process.pid]


def parent(process: int) -> int | None:
    """Of a process that is alive, None for one that is not."""
    try:
        state, found = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state in "ZX" else int(found)


def ended_after(seconds: float, processes: list[int]) -> bool:
    """Whether processes have all ended in time."""
    end = time.monotonic() + seconds
    while any(map(parent, processes)) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(map(parent, processes))


def two_going(file: Path, broken: Attempts, steps: int) -> tuple[Command, list[int]]:
    """Start two ranks and wait until so many steps are logged, or all; the command and its ranks.

    Gloo, by which ranks on a CPU talk, now and then refuses their very first connection; that is not judged here.
    """
    for _ in range(3):
        command = Command(file, f"output={broken.run}", "--processes", "2")
        while command.process.poll() is None and broken.steps() < steps:
            time.sleep(0.005)
        if command.process.poll() in (None, 0):
            return command, command.ranks()
        logs = command.said + (broken.run / "ranks" / "rank-1.log").read_text(errors="replace")
        assert "gloo" in logs and "Connection refused" in logs, logs
    raise AssertionError(logs)


def test_two_processes_killed_each_in_its_way_are_the_same_run(place, tmp_path):
    """One rank is killed in the first stage, then what started them in the second; then they are asked to stop."""
    one, two = dict(sharding="stage1"), dict(method="lora", lora=LORA, epochs=20, max_steps=20)
    file = two_stages(place, tmp_path / "r.yaml", one, two)
    alone, whole, broken = (Attempts(file, tmp_path / name) for name in ("alone", "whole", "broken"))

    command, ranks = two_going(file, whole, 1)
    assert command.ended() == 0 and len(ranks) >= 2, command.said
    assert alone.once() == 0 and losses(alone.run, "one") == pytest.approx(losses(whole.run, "one"), abs=ROUNDING)

    command, ranks = two_going(file, broken, 3)
    os.kill(max(ranks), signal.SIGKILL)
    assert command.ended() not in (0, None) and ended_after(20, ranks)
    assert re.search(r"Rank \d failed", command.said), command.said

    command, ranks = two_going(file, broken, 8)
    command.process.kill()
    command.ended()
    assert ended_after(20, ranks), "ranks go on without what started them"

    command, ranks = two_going(file, broken, 12)
    command.process.terminate()
    assert command.ended() == 128 + signal.SIGTERM and ended_after(20, ranks), command.said
    assert f"aquila-pd sft {broken.run}" in command.said

    command, ranks = two_going(file, broken, 14)
    assert command.ended() == 0, command.said
    assert results(broken.run) == results(whole.run)
    assert records(broken.run)[-1]["devices"] == 2 and manifest(broken.run)["stages"]["two"]["state"] == "done"


# ------------------------------------------------------------------------------------------- from stage to stage


PLAIN = {**LORA, "dropout": 0.0}
CARRIED = {
    "lora-lora": (dict(method="lora", lora=PLAIN), dict(method="lora", lora=PLAIN)),
    "lora-other-lora": (dict(method="lora", lora=PLAIN), dict(method="lora", lora={**PLAIN, "r": 2})),
    "lora-full": (dict(method="lora", lora=PLAIN), dict(method="full")),
    "qlora-lora": (dict(method="qlora", lora=PLAIN), dict(method="lora", lora=PLAIN)),
    "full-qlora": (dict(method="full"), dict(method="qlora", lora=PLAIN)),
}


@pytest.mark.parametrize("pair", CARRIED)
def test_what_the_first_stage_learned_is_where_the_second_begins(place, tmp_path, pair):
    """The second stage is one step over all its rows with hardly a learning rate: its loss is that of the first one's
    export by transformers, and so is that of its own result. NF4 is coarse: quantized weights are judged by less."""
    one, two = CARRIED[pair]
    run = tmp_path / "run"
    everything = dict(epochs=1, max_steps=None, global_batch=64, eval_every=0, data={})
    everything["optim"] = {"lr": 1e-9, "warmup_steps": 0}
    strong = {"lr": 3e-2, "warmup_steps": 1}
    file = two_stages(place, tmp_path / "r.yaml", {"optim": strong, **one}, {**everything, **two})
    trained(file, f"output={run}")
    assert call("export", run, "--stage", "one", "--output", tmp_path / "first").status == 0
    (begin,) = losses(run, "two")
    judge = [
        loss_of(folder, place / "b.jsonl", "aquila-v1", tmp_path / "torch")
        for folder in (tmp_path / "first", run / "model", place / "base")
    ]
    assert abs(begin - judge[2]) > 0.1, "control: the first stage has learned"
    exact = two["method"] != "qlora"
    assert begin == pytest.approx(judge[0], abs=ROUNDING if exact else 0.05)
    assert begin == pytest.approx(judge[1], abs=ROUNDING)
    assert not [name for name in tensors(run / "model") if "lora" in name]
    if pair == "lora-lora":
        first, second = (tensors(run / "stages" / name / "result") for name in ("one", "two"))
        assert distance(first, second) < 1e-6 and any("lora_B" in name for name in second)
