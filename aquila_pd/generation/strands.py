"""One forward pass in several threads, each with a part of the flat row, one layer behind the other.

Paddle's CPU kernels use one core for all but matrix products, and wait for each other after every one of these. So the
row of a long prompt is cut in as many parts as there are cores, and each part goes through all layers on its own with
products on one core. A token looks at keys of tokens before it: a part waits, in each layer, until the parts before it
have written theirs.

    layer     0    1    2    3 ..
    part 0    x----x----x----x
    part 1      x----x----x----x      begins to attend in layer i when part 0 has written its keys of layer i
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Condition

import paddle

from .. import threads

LEAST = 64  # tokens of a part; with fewer, matrix products are not at full speed


def parts(tokens: int, decoding: int, count: int) -> list[tuple[int, int]]:
    """[begin, end) of about equal parts of a flat row, the first with all decoding tokens; one part where more are
    not worth it."""
    count = min(count, (tokens - decoding) // LEAST, tokens // max(decoding, 1))
    if count < 2:
        return [(0, tokens)]
    ends = [tokens * (i + 1) // count for i in range(count)]
    return list(zip([0, *ends], ends, strict=False))


class Order:
    """Who may attend: part i in a layer whose keys all parts before it have written."""

    def __init__(self, count: int):
        self._written = [0] * count  # layers, by part
        self._failed = False
        self._changed = Condition()

    def gate(self, part: int) -> Callable[[int], None]:
        """What a part calls with the number of a layer when it has written its keys; returns when it may go on."""

        def keys_written(layer: int) -> None:
            with self._changed:
                self._written[part] = layer + 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._failed or all(done > layer for done in self._written[:part]))
                if self._failed:
                    raise Abandoned

        return keys_written

    def fail(self) -> None:
        """Nobody waits any longer."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()


class Abandoned(Exception):
    """Another part of the same pass has failed."""


def run(works: list[Callable[[Order], object]]) -> list:
    """Results of works, each called with the pass's Order in a thread of its own; the first error is raised when all
    have ended."""
    order = Order(len(works))

    def guarded(work):
        try:
            with paddle.no_grad():  # a thread has a setting of its own
                return work(order)
        except BaseException:
            order.fail()
            raise

    with threads.one():
        futures = [_pool(len(works) - 1).submit(guarded, work) for work in works[1:]]
        errors, results = [], []
        for outcome in (lambda: guarded(works[0]), *(future.result for future in futures)):
            try:
                results.append(outcome())
            except BaseException as error:
                errors.append(error)
    for error in sorted(errors, key=lambda error: isinstance(error, Abandoned)):
        raise error
    return results


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    # A thread's own number of OpenMP threads is that of the machine until somebody says otherwise.
    return ThreadPoolExecutor(count, "forward", initializer=lambda: paddle.base.core.set_num_threads(1))


def cuts(spans: list[tuple[int, int, int]], begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The spans (first position, count, key length) of the tokens [begin, end) of a flat row."""
    at = 0
    for first, count, keys in spans:
        low, high = max(begin, at), min(end, at + count)
        if low < high:
            yield first + low - at, high - low, keys
        at += count
