"""How far a long run has come: a bar on a terminal, calm lines elsewhere."""

import sys
import time

from .units import counted, duration

SECONDS = 10  # between lines of a run whose output goes to a file


class Progress:
    """Counts bytes and things of a known total. title: the step; what: one thing, "tensor"."""

    def __init__(self, title: str, *, total: int, tensors: int, what: str = "tensor"):
        self.title, self.total, self.tensors, self.what = title, total, tensors, what
        self.bytes = self.count = 0
        self.start = self._said = time.monotonic()
        self._bar = _bar(title, total) if sys.stderr and sys.stderr.isatty() else None

    def advance(self, nbytes: int, count: int = 1) -> None:
        """nbytes more are done, and with them so many things."""
        self.bytes += nbytes
        self.count += count
        if self._bar is not None:
            self._bar.update(nbytes)
        elif self._done or time.monotonic() - self._said >= SECONDS:
            self._said = time.monotonic()
            print(self.line(), flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def _done(self) -> bool:
        return self.count == self.tensors and self.bytes == self.total

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.start, 1e-6)

    def line(self) -> str:
        rate = self.bytes / self.seconds
        left = "" if self._done else f", {duration((self.total - self.bytes) / max(rate, 1))} left"
        done = f"{self.count}/{counted(self.tensors, self.what)}"
        return f"  {self.title:<8}  {done}, {self.bytes / 1e6:,.1f} MB, {rate / 1e6:,.0f} MB/s{left}"


def _bar(title: str, total: int):
    from tqdm import tqdm

    return tqdm(desc=f"  {title:<8}", total=total, unit="B", unit_scale=True, leave=False, dynamic_ncols=True)
