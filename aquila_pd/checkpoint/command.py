"""The converter's command line, for convert/torch2paddle.py and `aquila-pd convert`. Arguments only."""

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import AquilaError
from ..families import AUTO, FAMILIES
from ..shards import DEFAULT_SHARD_SIZE
from .convert import VERIFICATIONS, convert
from .plan import TAGS

DESCRIPTION = "Convert a Hugging Face folder or a GGUF file into a folder that PaddleNLP loads."
INTERRUPTED = 128 + signal.SIGINT  # what a shell reports for Ctrl-C


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=DESCRIPTION)
    made.add_argument("--input", required=True, type=Path, help="folder with config.json and weights, or a .gguf file")
    made.add_argument("--output", required=True, type=Path, help="folder to make")
    made.add_argument("--dtype", choices=list(TAGS), help="of the output (default: as stored; quantized: float32)")
    made.add_argument(
        "--max-shard-size", default=DEFAULT_SHARD_SIZE, metavar="SIZE", help="such as 5GB, 500MB, 2GiB (default: 5GB)"
    )
    made.add_argument(
        "--family", default=AUTO, choices=[AUTO, *FAMILIES], help="how to read config.json (default: auto, by itself)"
    )
    made.add_argument(
        "--verify",
        default="content",
        choices=VERIFICATIONS,
        help="content: read every value again and compare (default); logits: that, and run torch beside Paddle, both "
        "in float32 (needs memory for a float32 model); none",
    )
    made.add_argument("--report", type=Path, metavar="FILE.json", help="write what was done as JSON (default: no file)")
    made.add_argument("--overwrite", action="store_true", help="replace an earlier output once the new one is complete")
    made.add_argument("--dry-run", action="store_true", help="print the plan, check everything, write nothing")
    return made


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end, turned into what Ctrl-C raises, so that the same is cleaned up."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Stopped inside the block, where nobody handles or ignores them (nohup does)."""
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


def main(argv: list[str] | None = None) -> int:
    """0 when converted and verified, 1 for an error a person can mend, 2 for wrong arguments.

    128 + n when signal n stopped it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP, 141 when the output is a pipe
    that nobody reads any more.
    """
    args = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path or token that the terminal cannot show is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with stoppable():
            _convert(args)
            if sys.stdout:
                sys.stdout.flush()
    except AquilaError as error:
        return _end(f"error: {error}", 1)
    except BrokenPipeError as error:
        _drop_stdout()
        return _end(f"Nobody reads the output any more. {_what_is_left(error, args.output)}", 128 + signal.SIGPIPE)
    except OSError as error:  # a file of the source that may not be read, a disk that fails
        return _end(f"error: {error}. {_what_is_left(error, args.output)}", 1)
    except Stopped as error:
        return _end(f"Stopped by {error}. {_what_is_left(error, args.output)}", 128 + error.number)
    except KeyboardInterrupt as error:
        return _end(f"Interrupted. {_what_is_left(error, args.output)}", INTERRUPTED)
    return 0


def _convert(args: argparse.Namespace) -> None:
    convert(
        args.input,
        args.output,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        family=args.family,
        verify=args.verify,
        report_file=args.report,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
    )


def _what_is_left(error: BaseException, output: Path) -> str:
    """The note of an error that came when the output was complete, else what holds for all others."""
    notes = getattr(error, "__notes__", None)
    return " ".join(notes) if notes else f"Nothing was left behind; {output} is as it was before."


def _end(message: str, status: int) -> int:
    with suppress(OSError):  # the terminal may be gone
        print(message, file=sys.stderr, flush=True)
    return status


def _drop_stdout() -> None:
    """Send what is still buffered nowhere, or the interpreter complains about the closed pipe when it ends."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
