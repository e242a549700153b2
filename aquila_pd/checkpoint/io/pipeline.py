"""Ordered thread pipeline with bounded read-ahead, and the buffer pool it fills."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import numpy as np

from ...utils import cores
from ...utils.errors import ConfigError

Task, Result = TypeVar("Task"), TypeVar("Result")

MEMORY = 96 * 2**20  # bytes of all buffers together, whatever the number of workers
LARGEST = 24 * 2**20  # bytes of one buffer; larger ones gain nothing
AHEAD = 2  # buffers beyond one per worker: one being written, one waiting
MOST_WORKERS = 8  # one thread hashes and writes, so that more have nothing to do


def count_workers(asked: int | None) -> int:
    """Worker threads: as requested, by default the usable cores, at most 8. Raises ConfigError."""
    if asked is not None and asked < 1:
        raise ConfigError(f"The number of workers is {asked}; it must be at least 1.")
    if asked is None:
        asked = cores.count()
    return min(asked, MOST_WORKERS)


def buffer_size(workers: int) -> int:
    """Bytes of each buffer."""
    return min(LARGEST, MEMORY // (workers + AHEAD))


class Buffers:
    """Pool of reusable buffers: page faults of fresh memory cost as much as filling it."""

    def __init__(self, workers: int):
        self.nbytes = buffer_size(workers)
        self._free: SimpleQueue[np.ndarray] = SimpleQueue()
        for _ in range(workers + AHEAD):
            self._free.put(np.empty(self.nbytes, np.uint8))

    def take(self, nbytes: int) -> np.ndarray:
        """A free buffer, blocking; a new one when a single row of a tensor exceeds the buffer size."""
        return self._free.get() if nbytes <= self.nbytes else np.empty(nbytes, np.uint8)

    def give_back(self, buffer: np.ndarray) -> None:
        if buffer.nbytes == self.nbytes:
            self._free.put(buffer)


def in_order(work: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int) -> Iterator[Result]:
    """Ordered parallel map: results of work(task) in task order, `workers` at once.

    At most workers + AHEAD results exist at a time. A task's error is raised in its place; later tasks that have begun
    are waited for, the others cancelled.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="aquila_pd")
    waiting: deque = deque()
    try:
        for task in tasks:
            if len(waiting) == workers + AHEAD:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work, task))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
