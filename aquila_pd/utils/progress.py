"""Progress of long work: a rich bar at the bottom of a terminal, plain lines at intervals elsewhere.

rich is imported once something is drawn: neither the help nor a run whose output goes to a file pays for it.
"""

import os
import sys
import time
from typing import TextIO

from .units import counted, duration

SECONDS = 10  # between lines of a run whose output goes to a file
PER_SECOND = 8  # times a bar is drawn at most
LEAST_TITLE, TITLE_WIDTH = 8, 20  # characters


def can_draw(stream: TextIO | None) -> bool:
    """Whether the stream is a terminal whose cursor can be moved."""
    try:
        is_terminal = stream is not None and stream.isatty()
    except ValueError:  # a closed stream
        return False
    return is_terminal and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


class Timer:
    """Seconds since it was made, and whether SECONDS have passed since it was last due."""

    def __init__(self):
        self._begin = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._begin, 1e-6)

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._last < SECONDS:
            return False
        self._last = now
        return True


class Display:
    """A live region at the bottom of a terminal (see can_draw); what is printed meanwhile scrolls above it.

    transient: it disappears when closed. close() has to be called: until then the cursor is hidden.
    """

    def __init__(self, stream: TextIO, *, transient: bool):
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream, highlight=False, force_terminal=True, force_interactive=True)
        # rich prints what it captures on its own stream: one that goes to a file is left alone
        captured = {"redirect_stdout": can_draw(sys.stdout), "redirect_stderr": can_draw(sys.stderr)}
        self._live = Live(console=self._console, auto_refresh=False, transient=transient, **captured)
        self._drawn = float("-inf")

    @property
    def is_due(self) -> bool:
        """Whether the last drawing is long enough ago."""
        return time.monotonic() - self._drawn >= 1 / PER_SECOND

    def show(self, renderable: object) -> None:
        """Replace what is shown; it is drawn when that is due, or at the end."""
        is_due = self.is_due
        self._live.start()
        self._live.update(renderable, refresh=is_due)
        self._drawn = time.monotonic() if is_due else self._drawn

    def print(self, text: str) -> None:
        """Plain lines above the live region."""
        if self._live.is_started:
            self._live.refresh()  # or the region below the text would be the one drawn last
        self._console.print(text, markup=False, emoji=False)

    def close(self) -> None:
        """Draw the last state, or remove it if transient, and restore the cursor."""
        if self._live.is_started:
            self._live.refresh()
            self._live.stop()


def bar_row(title: str, done: float, total: float, words: str):
    """A renderable line: title, bar, words. The bar takes the width that the words leave."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    bar = ProgressBar(total=total, completed=done, complete_style="cyan", finished_style="green", style="bright_black")
    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(min_width=min(len(title), LEAST_TITLE), max_width=TITLE_WIDTH, no_wrap=True, overflow="ellipsis")
    row.add_column(ratio=1, no_wrap=True)
    row.add_column(no_wrap=True, overflow="ellipsis")
    row.add_row(title, bar, words)
    return row


class Bar:
    """A transient bar on stderr; nothing (is_drawn is False) where that is no terminal, or `draw` is False.

    total: in the unit of update(); None for work of unknown size, which has words and no bar.
    close() has to be called: until then the cursor is hidden.
    """

    def __init__(self, title: str, total: float | None = None, *, draw: bool = True):
        self._title, self._total = title, total
        self._display = Display(sys.stderr, transient=True) if draw and can_draw(sys.stderr) else None

    @property
    def is_drawn(self) -> bool:
        return self._display is not None

    def update(self, words: str, done: float = 0) -> None:
        if self._display is not None and self._display.is_due:
            self._display.show(self._line(words, done))

    def _line(self, words: str, done: float):
        if self._total is not None:
            return bar_row(f"  {self._title}", done, self._total, f" {words}")
        from rich.text import Text

        return Text(f"  {self._title} {words}", no_wrap=True, overflow="ellipsis")

    def close(self) -> None:
        if self._display is not None:
            self._display.close()


class Progress:
    """Bytes and items of a known total: a bar on stderr, or lines on stdout.

    title: the step; tensors: the number of items, `what` the noun for one. A context manager; leaving closes the bar.
    """

    def __init__(self, title: str, *, total: int, tensors: int, what: str = "tensor"):
        self.title, self.total, self.tensors, self.what = title, total, tensors, what
        self.bytes = self.count = 0
        self._timer, self._bar = Timer(), Bar(title, total)
        self._bar.update(self._words())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def advance(self, nbytes: int, count: int = 1) -> None:
        """Count nbytes more, and with them `count` items."""
        self.bytes += nbytes
        self.count += count
        if self._bar.is_drawn:
            self._bar.update(self._words(), self.bytes)
        elif self._done or self._timer.due():
            print(f"  {self.title:<8}  {self._words()}", flush=True)

    @property
    def _done(self) -> bool:
        return self.count == self.tensors and self.bytes == self.total

    def _words(self) -> str:
        rate = self.bytes / self._timer.seconds
        left = "" if self._done or not self.bytes else f", {duration((self.total - self.bytes) / max(rate, 1))} left"
        done = f"{self.count}/{counted(self.tensors, self.what)}"
        return f"{done}, {self.bytes / 1e6:,.1f} MB, {rate / 1e6:,.0f} MB/s{left}"
