"""Intra-op threads of Paddle's CPU products, and work shared among Python threads.

Paddle can set the number and not tell it, so it is set here. Its CPU kernels use one core for all but matrix products,
and wait for each other after every one of these.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise

import paddle

_count = 1  # Paddle's own default
_now = 1  # less than _count inside one()


def use(count: int) -> None:
    """Set the number for the whole process (MKL) and for this thread (OpenMP)."""
    global _count, _now
    paddle.base.core.set_num_threads(count)
    _count = _now = count


def count() -> int:
    """The number of threads use() was last called with."""
    return _count


@contextmanager
def one():
    """One thread for what is done inside: a product of some thousand numbers is done before a second one is awake.

    Inside of another one() it does nothing, also in other threads: what ends first must not give all of them more.
    """
    global _now
    if _now == 1:
        yield
        return
    paddle.base.core.set_num_threads(1)
    _now = 1
    try:
        yield
    finally:
        paddle.base.core.set_num_threads(_count)
        _now = _count


def together(works: Sequence[Callable[[], object]]) -> list:
    """The results of works, each done in a thread of its own, without gradients and with products on one core.

    The first error, in order of works, is raised when all have ended.
    """
    if len(works) == 1:
        with paddle.no_grad():
            return [works[0]()]

    def without_gradients(work):
        with paddle.no_grad():  # a thread has a setting of its own
            return work()

    with one():
        futures = [_pool(len(works) - 1).submit(without_gradients, work) for work in works[1:]]
        errors, results = [], []
        for outcome in (lambda: without_gradients(works[0]), *(future.result for future in futures)):
            try:
                results.append(outcome())
            except BaseException as error:
                errors.append(error)
    for error in errors:
        raise error
    return results


@cache
def _pool(size: int) -> ThreadPoolExecutor:
    # A thread's own number of OpenMP threads is that of the machine until it is set.
    return ThreadPoolExecutor(size, "aquila_pd", initializer=lambda: paddle.base.core.set_num_threads(1))


def shares(size: int) -> list[slice]:
    """[0, size) in as many about equal parts as there are threads, or as there are things."""
    parts = max(1, min(_now, size))
    ends = [size * part // parts for part in range(parts + 1)]
    return [slice(begin, end) for begin, end in pairwise(ends)]
