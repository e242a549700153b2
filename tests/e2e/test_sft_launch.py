"""Ranks are started together and end together, whoever is killed, and none of them goes on alone."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT

from aquila_pd.sft.command import main

RANK = """
import os, pathlib, signal, sys, time
rank = os.environ["PADDLE_TRAINER_ID"]
def told(number, frame):
    pathlib.Path(f"told-{rank}").write_text(str(number))
    time.sleep(0 if rank == "1" else 0.5)  # rank 1 ends first
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, told)
pathlib.Path(f"here-{rank}").write_text(str(os.getpid()))
time.sleep(60)
"""
PARENT = """
import fcntl, pathlib, sys
from aquila_pd.sft.run.launch import run_together
held = open("lock", "w")
fcntl.flock(held, fcntl.LOCK_EX)
command = [sys.executable, "-c", pathlib.Path("rank.py").read_text()]
sys.exit(run_together(command, 2, on_gpus=False, logs=pathlib.Path("logs"), held=[held.fileno()]))
"""


def wait_for(what: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def is_free(lock: Path) -> bool:
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.fixture
def parent(tmp_path):
    """A process with two ranks that wait; all are in tmp_path."""
    (tmp_path / "rank.py").write_text(RANK)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len([path for path in tmp_path.glob("here-*") if path.read_text()]) == 2)
    yield process
    process.kill()
    process.wait()
    for path in tmp_path.glob("here-*"):
        try:
            os.kill(int(path.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of a parent's death on Linux alone")
def test_ranks_whose_parent_is_killed_are_asked_to_stop_and_hold_the_lock_until_then(parent, tmp_path):
    assert not is_free(tmp_path / "lock")
    ranks = [int(path.read_text()) for path in sorted(tmp_path.glob("here-*"))]
    os.kill(ranks[1], signal.SIGSTOP)  # still there when the parent is not
    parent.kill()
    parent.wait()
    wait_for((tmp_path / "told-0").exists)
    assert not is_free(tmp_path / "lock")
    os.kill(ranks[1], signal.SIGCONT)
    wait_for((tmp_path / "told-1").exists)
    wait_for(lambda: is_free(tmp_path / "lock"))
    assert {(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)} == {str(int(signal.SIGTERM))}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_goes_on_to_all_ranks_and_is_no_failure(parent, tmp_path, number):
    parent.send_signal(number)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode == 128 + number and "failed" not in said
    assert [(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)] == [str(int(number))] * 2


DYING = """
import atexit, os, sys
from aquila_pd.sft.run.launch import leave
atexit.register(os.abort)  # as threads and sockets that are taken down in an unlucky order
print("all is done", end="")
{end}
"""


@pytest.mark.parametrize(("end", "status"), [("leave(0)", 0), ("leave(7)", 7), ("sys.exit(0)", -signal.SIGABRT)])
def test_a_rank_leaves_with_its_status_and_its_words_whatever_its_teardown_does(end, status):
    done = subprocess.run([sys.executable, "-c", DYING.format(end=end)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == status
    assert done.stdout == "all is done" or status < 0


def test_a_rank_leaves_when_nobody_reads_its_output_any_more():
    code = "import sys; from aquila_pd.sft.run.launch import leave; sys.stdin.read(); print('all is done'); leave(5)"
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}  # nothing is written before leave() writes it
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=buffered, **pipes)
    process.stdout.close()
    process.stdin.close()
    assert process.wait(60) == 5


def test_the_command_of_a_rank_ends_by_leaving(tmp_path, monkeypatch, capsys):
    left = []
    monkeypatch.setattr("aquila_pd.sft.run.launch.leave", left.append)
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    main([str(tmp_path)])
    assert left == [1] and "error: " in capsys.readouterr().err
