"""Access and error log: one line per request, exceptions with traceback; a writer thread behind a bounded queue.

A full disk or a pipe without a reader costs lines, which are counted, and never blocks a request.
"""

import os
import queue
import sys
import threading
import time
import traceback
from pathlib import Path

from ..utils.errors import OutputError, printable

LONGEST_QUEUE = 10_000  # lines
APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC


def stderr() -> int:
    """The descriptor of stderr, or of nothing when the process was started without one."""
    return sys.__stderr__.fileno() if sys.__stderr__ else os.open(os.devnull, os.O_WRONLY)


class Log:
    """Lines to a file, or to stderr. Raises OutputError when the file cannot be opened."""

    def __init__(self, file: Path | None = None):
        try:
            self._out = stderr() if file is None else os.open(file, APPEND, 0o640)
        except OSError as error:
            raise OutputError(f"The log {file} cannot be opened: {error.strerror}. Name another --log-file.") from error
        self.lost = 0
        self._lines: queue.Queue[str | None] = queue.Queue(LONGEST_QUEUE)
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def line(self, text: str) -> None:
        """One line, with the time in front; whatever it repeats cannot begin another."""
        self._put(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}\n")

    def exception(self, where: str, error: BaseException) -> None:
        """An exception with its traceback, each line of it marked as belonging to it."""
        self.line(f"error in {where}: {type(error).__name__}: {error}")
        for part in "".join(traceback.format_exception(error)).splitlines():
            self._put(f"    {printable(part)}\n")

    def close(self) -> None:
        """Write what is left, as long as that goes fast."""
        try:
            self._lines.put(None, timeout=1)
        except queue.Full:
            return
        self._thread.join(timeout=2)

    def _put(self, line: str) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.lost += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            data = line.encode("utf-8", "backslashreplace")
            try:
                while data:
                    data = data[os.write(self._out, data) :]
            except OSError:
                self.lost += 1
