"""Process frame of a command: signals to exceptions, closed pipes, exit status, final message."""

import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .errors import AquilaError

INTERRUPTED = 128 + signal.SIGINT  # what a shell reports for Ctrl-C


class Stopped(KeyboardInterrupt):
    """A terminating signal as the exception that Ctrl-C raises, so that the same cleanup runs."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Stopped inside the block, unless they are handled or ignored already (as by nohup)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    ours = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]

    def stop(number: int, frame: object) -> None:
        for other in ours:  # a second one must not stop the cleaning up
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    try:
        for number in ours:
            signal.signal(number, stop)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def run(work: Callable[[], int | None], *, left: str = "") -> int:
    """Run a command's work and return its exit status: what the work returns, 0 for None.

    1 for an error a person can mend, said in one message; 128 + n when signal n stopped it: 130 for Ctrl-C, 143 for
    SIGTERM, 129 for SIGHUP, 141 when the reading end of the output pipe is closed.
    left: what is left behind after an error that has no notes about it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path or token that the terminal cannot show is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with stoppable():
            status = work()
            if sys.stdout:
                sys.stdout.flush()
    except AquilaError as error:
        return end(" ".join([f"error: {error}", *_notes(error)]), 1)
    except BrokenPipeError as error:
        _drop_stdout()
        return end(f"Nobody reads the output any more. {_left(error, left)}", 128 + signal.SIGPIPE)
    except OSError as error:  # a file of the source that may not be read, a disk that fails
        return end(f"error: {error}. {_left(error, left)}", 1)
    except Stopped as error:
        return end(f"Stopped by {error}. {_left(error, left)}", 128 + error.number)
    except KeyboardInterrupt as error:
        return end(f"Interrupted. {_left(error, left)}", INTERRUPTED)
    return status or 0


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))


def _left(error: BaseException, left: str) -> str:
    return " ".join(_notes(error)) or left


def end(message: str, status: int) -> int:
    """Print the final message on stderr and return the status."""
    with suppress(OSError):  # the terminal may be gone
        print(message.rstrip(), file=sys.stderr, flush=True)
    return status


def _drop_stdout() -> None:
    """Redirect buffered stdout to /dev/null, or the interpreter reports the closed pipe at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
