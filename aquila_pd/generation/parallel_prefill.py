"""One forward pass in several threads, each with a part of the flat row, one layer behind the other.

Other than matrix products, operations use one core (threads.py). So the row of a long prompt is cut in as many parts as
there are cores, later ones shorter, as their tokens look at more keys; each goes through all layers on its own with
products on one core. A token looks at keys of tokens before it: a part waits, in each layer, until the parts before it
have written theirs.

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
    """[begin, end) of parts of a flat row that take about as long, the first with all decoding tokens; one part where
    more are not worth it. costs [T]: how long each token takes, in any unit."""
    tokens = len(costs)
    count = min(count, (tokens - decoding) // LEAST, tokens // max(decoding, 1))
    if count < 2:
        return [(0, tokens)]
    done = np.cumsum(costs)
    ends = np.searchsorted(done, done[-1] * np.arange(1, count) / count, side="right")
    ends = [0, *np.unique(np.clip(ends, max(decoding, 1), tokens - 1)).tolist(), tokens]
    return list(pairwise(ends))


class Order:
    """Who may attend: part i in a layer whose keys all parts before it have written."""

    def __init__(self, count: int):
        self._written = [0] * count  # layers, by part
        self.failure: BaseException | None = None
        self._changed = Condition()

    def gate(self, part: int) -> Callable[[int], None]:
        """What a part calls with the number of a layer when it has written its keys; returns when it may go on."""

        def keys_written(layer: int) -> None:
            with self._changed:
                self._written[part] = layer + 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self.failure or all(done > layer for done in self._written[:part]))
                if self.failure:
                    raise Abandoned

        return keys_written

    def fail(self, error: BaseException) -> None:
        """Nobody waits any longer."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()


class Abandoned(Exception):
    """Another part of the same pass has failed."""


def run(works: list[Callable[[Order], object]]) -> list:
    """Results of works, each called with the pass's Order in a thread of its own; the first error is raised when all
    have ended."""
    order = Order(len(works))

    def guarded(work):
        try:
            return work(order)
        except BaseException as error:
            order.fail(error)
            raise

    try:
        return threads.together([partial(guarded, work) for work in works])
    except Abandoned:
        raise order.failure from None


def cuts(spans: list[tuple[int, int, int]], begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The spans (first position, count, key length) of the tokens [begin, end) of a flat row."""
    at = 0
    for first, count, keys in spans:
        low, high = max(begin, at), min(end, at + count)
        if low < high:
            yield first + low - at, high - low, keys
        at += count
