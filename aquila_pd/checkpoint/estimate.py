"""Estimated CPU time of a conversion, from a measured sample of the streaming copy; disk speed is left out."""

import time

import numpy as np

from ..utils.units import duration
from .io.pipeline import in_order
from .io.stream_copy import move
from .plan import Plan

SAMPLE = (1024, 4096)  # of 16-bit values, 8 MB; large enough to leave the caches of a core
ROUNDS = 4  # samples per worker
HASHING = 2.0  # moving and then hashing and writing a value takes about this many times as long as moving it


def estimate(plan: Plan, *, workers: int) -> str:
    """One line: the CPU time a plan will take."""
    source = np.ones(SAMPLE, np.uint16).T
    targets = [np.zeros(source.shape, np.uint16) for _ in range(workers)]
    begin = time.perf_counter()
    for _ in in_order(lambda i: move(source, targets[i % workers]), range(workers * ROUNDS), workers=workers):
        pass
    rate = workers * ROUNDS * source.nbytes / (time.perf_counter() - begin) / HASHING
    return (
        f"  time      about {duration(max(plan.nbytes / rate, 1))} with {workers} workers ({rate / 1e6:,.0f} MB/s, "
        f"measured on a sample), plus as much to verify; longer when the disk is slower"
    )
