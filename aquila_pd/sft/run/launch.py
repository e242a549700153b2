"""Launcher: the ranks of one run on this machine, started and ended together.

Over several machines Paddle's own launcher does it; a process it started is recognized by its environment.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

from ...utils.errors import TrainingError

PATIENCE = 20.0  # seconds the others get to notice that one has failed
ASKS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # by which a run is asked to stop
PR_SET_PDEATHSIG = 1  # of Linux' prctl()


def rank() -> int:
    """This process's number in the run it belongs to; 0 alone."""
    return int(os.environ.get("PADDLE_TRAINER_ID", "0"))


def ranks() -> int:
    """How many processes the run has that this one was started for; 1 alone."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def asks() -> list[signal.Signals]:
    """The signals by which this process can be asked to stop: not those it ignores, as under nohup."""
    return [number for number in ASKS if signal.getsignal(number) is not signal.SIG_IGN]


def leave(status: int) -> NoReturn:
    """End this rank at once with an exit status; what it had to write is written.

    A common exit can abort rank 0 (signal 6, without a word) when all its work is done: the thread that serves Paddle's
    TCPStore hears that another rank has hung up while the objects it needs for that are being taken down.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # no reader any more; closed; None
            stream.flush()
    os._exit(status)


def run_together(command: Sequence[str], processes: int, *, on_gpus: bool, logs: Path, held: Sequence[int] = ()) -> int:
    """Run a command as so many ranks and return an exit status: that of the first which failed, else 0.

    Rank 0 has this terminal; the others write to logs/rank-N.log. What asks() goes on to all of them, and then it
    is theirs to end: they may have a checkpoint to write. Where this process is killed, they get SIGTERM (on Linux).
    held: descriptors of files that ranks keep open too; a lock on one lasts until the last of them has ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    endpoints = [f"127.0.0.1:{port}" for port in _free_ports(processes + 1)]
    with ExitStack() as stack:
        started: list[subprocess.Popen] = []
        told: list[int] = []

        def tell(number: int, frame: object) -> None:
            told.append(number)
            for process in started:
                process.send_signal(number)

        for number in asks():
            stack.callback(signal.signal, number, signal.signal(number, tell))
        for number in range(processes):
            output = None if number == 0 else stack.enter_context((logs / f"rank-{number}.log").open("wb"))
            environment = _environment(number, endpoints, on_gpus=on_gpus)
            # a session of its own: Ctrl-C reaches each rank once, through this process
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=output,
                stderr=output and subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
                pass_fds=held,
            )
            started.append(process)
        return _wait(started, logs, told)


_C = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a process just forked must not


def _end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent is gone: alone, ranks would go on unnoticed."""
    if _C is not None:
        _C.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def _wait(started: list[subprocess.Popen], logs: Path, told: Sequence[int]) -> int:
    """Wait for all ranks, or end the others when some fail; the exit status. told: signals passed on to them."""
    running = dict(enumerate(started))
    while running:
        ended = {number: status for number, one in running.items() if (status := one.poll()) is not None}
        running = {number: one for number, one in running.items() if number not in ended}
        failed = {number: status for number, status in ended.items() if status}
        if failed:
            _end(running)
            for number in failed if not told else ():
                if number:  # rank 0 writes to this terminal itself
                    print(f"Rank {number} failed; what it said is in {logs / f'rank-{number}.log'}.", file=sys.stderr)
            # Of several at once, the one that a signal has ended (a negative status) is why the others failed.
            status = min(failed.values())
            return status if status > 0 else 128 - status
        time.sleep(0.1)
    return 0


def _end(running: dict[int, subprocess.Popen]) -> None:
    """The others wait for one that will not come: they get a while to fail by themselves, then they are ended."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and any(process.poll() is None for process in running.values()):
        time.sleep(0.1)
    for process in running.values():
        process.kill()
        process.wait()


def _environment(number: int, endpoints: list[str], *, on_gpus: bool) -> dict[str, str]:
    """What Paddle's own launcher sets for a rank. endpoints: the meeting point, then one for each rank."""
    meeting, *own = endpoints
    found = {
        "TOKENIZERS_PARALLELISM": "false",  # or it warns of every fork
        "GLOG_minloglevel": "2",  # errors alone
        **os.environ,
        "PADDLE_MASTER": meeting,
        "PADDLE_GLOBAL_SIZE": str(len(own)),
        "PADDLE_LOCAL_SIZE": str(len(own)),
        "PADDLE_GLOBAL_RANK": str(number),
        "PADDLE_LOCAL_RANK": str(number),
        "PADDLE_RANK_IN_NODE": str(number),
        "PADDLE_NNODES": "1",
        "PADDLE_CURRENT_ENDPOINT": own[number],
        "PADDLE_TRAINER_ENDPOINTS": ",".join(own),
        "PADDLE_TRAINER_ID": str(number),
        "PADDLE_TRAINERS_NUM": str(len(own)),
    }
    return found | ({"FLAGS_selected_gpus": str(number)} if on_gpus else {"PADDLE_DISTRI_BACKEND": "gloo"})


def _free_ports(count: int) -> list[int]:
    """Free ports."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def check_processes(processes: int, *, gpus: int) -> None:
    """Raise TrainingError for a number of processes this machine cannot start. gpus: how many it has, 0 for none."""
    if processes < 1:
        raise TrainingError(f"--processes is {processes}; one is the least.")
    if gpus and processes > gpus:
        raise TrainingError(f"--processes is {processes}, and this machine has {gpus} GPUs: one process for each.")
