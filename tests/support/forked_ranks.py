"""`aquila-pd ARGUMENTS` in a warm process, whose ranks are forks of it: python forked_ranks.py ARGUMENTS.

Of what subprocess.Popen does for a rank, everything happens but the new interpreter: its parent is the command, its
session and its output are its own, it is told of its parent's death, and files that are handed on stay open.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

from paddle.distributed import parallel

from aquila_pd import cli
from aquila_pd.sft.run import launch


class Rank:
    """What launch uses of subprocess.Popen."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdout,
        stderr: object,
        start_new_session: bool,
        preexec_fn: Callable[[], None],
        pass_fds: Sequence[int],  # a fork has them all
    ):
        self.returncode = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        assert start_new_session and list(command[1:3]) == ["-m", "aquila_pd.cli"]
        os.setsid()
        preexec_fn()
        _train(command[3:], env, stdout and stdout.fileno())

    def poll(self) -> int | None:
        return self.wait(os.WNOHANG)

    def wait(self, how: int = 0) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, how)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _train(arguments: Sequence[str], environment: Mapping[str, str], output: int | None) -> None:
    """In the fork: the command of a rank, as in a process of its own."""
    status = 1
    try:
        for number in launch.ASKS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if output is not None:
            os.dup2(output, 1)
            os.dup2(output, 2)
        os.environ.clear()
        os.environ.update(environment)
        parallel._global_parallel_env = None  # read when Paddle was loaded, before this rank's environment
        status = cli.main(list(arguments))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    launch.leave(status)


if __name__ == "__main__":
    launch.subprocess = SimpleNamespace(Popen=Rank, STDOUT=subprocess.STDOUT)
    sys.exit(cli.main(sys.argv[1:]))
