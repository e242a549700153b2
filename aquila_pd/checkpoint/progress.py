"""How far a long run has come: a bar on a terminal, calm lines elsewhere."""

import sys
import time

SECONDS = 5  # between lines of a run whose output goes to a file


def counted(number: int, what: str) -> str:
    """A number and its noun: 1 tensor, 1,234 tensors."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


class Progress:
    """Counts bytes and tensors of a known total."""

    def __init__(self, what: str, *, total: int, tensors: int):
        self.what, self.total, self.tensors = what, total, tensors
        self.bytes = self.count = 0
        self.start = self._said = time.monotonic()
        self._bar = _bar(what, total) if sys.stderr and sys.stderr.isatty() else None

    def advance(self, nbytes: int) -> None:
        self.bytes += nbytes
        self.count += 1
        if self._bar is not None:
            self._bar.update(nbytes)
        elif self.count == self.tensors or time.monotonic() - self._said >= SECONDS:
            self._said = time.monotonic()
            print(self.line(), flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.start, 1e-6)

    def line(self) -> str:
        rate = self.bytes / self.seconds / 1e6
        done = f"{self.count}/{counted(self.tensors, 'tensor')}"
        return f"  {self.what:<8}  {done}, {self.bytes / 1e6:,.1f} MB, {rate:,.0f} MB/s"


def _bar(what: str, total: int):
    from tqdm import tqdm

    return tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False)
