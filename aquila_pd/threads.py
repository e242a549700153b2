"""How many threads Paddle's products take on a CPU. Paddle can set that and not tell it, so it is set here."""

from contextlib import contextmanager

import paddle

_count = 1  # Paddle's own default
_now = 1  # less than _count while somebody has asked for one


def use(count: int) -> None:
    """Set the number for the whole process (MKL) and for this thread (OpenMP)."""
    global _count, _now
    paddle.base.core.set_num_threads(count)
    _count = _now = count


def count() -> int:
    """What use() was given last."""
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
