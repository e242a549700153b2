"""Wavefront-parallel prefill on a CPU: threads share one forward pass, each on a part of the flat row, a layer apart.

Operations other than matrix products use one core (threads.py). So the row of a long prompt is split into as many parts
as there are cores, later ones shorter since their tokens attend to more keys; each part runs through all layers in a
thread of its own with products on one core. Attention is causal: in each layer a part waits until all parts before it
have written their keys.

    layer     0    1    2    3 ..
    part 0    x----x----x----x
    part 1      x----x----x----x      begins to attend in layer i when part 0 has written its keys of layer i
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from threading import Condition

import numpy as np

from ..ops import threads

LEAST = 64  # tokens of a part; with fewer, matrix products are not at full speed


def parts(costs: np.ndarray, decoding: int, count: int) -> list[tuple[int, int]]:
    """Split a flat row into [begin, end) of about equal cost, all decode tokens in the first part; a single part where
    more are not worth it. costs [T]: of each token, in any unit."""
    tokens = len(costs)
    count = min(count, (tokens - decoding) // LEAST, tokens // max(decoding, 1))
    if count < 2:
        return [(0, tokens)]
    done = np.cumsum(costs)
    ends = np.searchsorted(done, done[-1] * np.arange(1, count) / count, side="right")
    ends = [0, *np.unique(np.clip(ends, max(decoding, 1), tokens - 1)).tolist(), tokens]
    return list(pairwise(ends))


class Wavefront:
    """Synchronises the parts of one pass: part i may attend in a layer once parts 0..i-1 have written its keys."""

    def __init__(self, count: int):
        self._written = [0] * count  # layers, by part
        self.failure: BaseException | None = None
        self._changed = Condition()

    def gate(self, part: int) -> Callable[[int], None]:
        """The `keys_written` callback of a part: blocks until the part may attend in that layer."""

        def keys_written(layer: int) -> None:
            with self._changed:
                self._written[part] = layer + 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self.failure or all(done > layer for done in self._written[:part]))
                if self.failure:
                    raise Abandoned

        return keys_written

    def fail(self, error: BaseException) -> None:
        """Wake all parts that wait; they raise Abandoned."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()


class Abandoned(Exception):
    """Raised in a waiting part when another part of the pass has failed."""


def run(works: list[Callable[[Wavefront], object]]) -> list:
    """Results of works, each called with the pass's Wavefront in a thread of its own; the first error is raised when
    all have ended."""
    wavefront = Wavefront(len(works))

    def guarded(work):
        try:
            return work(wavefront)
        except BaseException as error:
            wavefront.fail(error)
            raise

    try:
        return threads.together([partial(guarded, work) for work in works])
    except Abandoned:
        raise wavefront.failure from None


def cuts(spans: list[tuple[int, int, int]], begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Spans (first position, count, key length) of a flat row, restricted to its tokens [begin, end)."""
    at = 0
    for first, count, keys in spans:
        low, high = max(begin, at), min(end, at + count)
        if low < high:
            yield first + low - at, high - low, keys
        at += count
