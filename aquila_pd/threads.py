"""How many threads Paddle's products take on a CPU. Paddle can set that and not tell it, so it is set here."""

from contextlib import contextmanager

import paddle

_count = 1  # Paddle's own default


def use(count: int) -> None:
    """Set the number for the whole process (MKL) and for this thread (OpenMP)."""
    global _count
    paddle.base.core.set_num_threads(count)
    _count = count


def count() -> int:
    """What use() was given last."""
    return _count


@contextmanager
def one():
    """One thread for what is done inside: a product of some thousand numbers is done before a second one is awake."""
    if _count == 1:
        yield
        return
    paddle.base.core.set_num_threads(1)
    try:
        yield
    finally:
        paddle.base.core.set_num_threads(_count)
