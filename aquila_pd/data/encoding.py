"""Tokenization of conversations in batches, in order, in a process pool or in this process."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from multiprocessing import get_context, parent_process
from signal import SIG_IGN, SIGINT, signal
from threading import Thread
from typing import NamedTuple

from ..text.prompts import ChatPrompts
from ..utils.errors import DataError
from .pipeline import Conversation
from .truncation import Fitted, fit

BATCH = 64  # conversations handed to a process at once
ALONE = 32  # batches that this process does before it asks others for help: few rows are done by then
AHEAD = 2  # batches that wait for each process


class Encoder(NamedTuple):
    """Makes samples of conversations. length, overlong: see fitting.fit."""

    prompts: ChatPrompts
    length: int | None
    overlong: str

    def encode(self, batch: Sequence[Conversation]) -> list[Fitted]:
        return [fit(self.prompts, row.messages, length=self.length, overlong=self.overlong) for row in batch]


def encode_all(
    encoder: Encoder, conversations: Iterable[Conversation], *, workers: int
) -> Iterator[list[tuple[Conversation, Fitted]]]:
    """Batches of conversations with what became of them, in order, the same for any number of workers.

    workers: processes that encode; 1: this one. Raises DataError when a process was killed.
    """
    rows = iter(conversations)
    batches = iter(lambda: list(islice(rows, BATCH)), [])
    for batch in batches if workers <= 1 else islice(batches, ALONE):
        yield list(zip(batch, encoder.encode(batch), strict=True))
    yield from _encode_with(encoder, batches, workers)


def _encode_with(
    encoder: Encoder, batches: Iterator[list[Conversation]], workers: int
) -> Iterator[list[tuple[Conversation, Fitted]]]:
    first = next(batches, None)
    if first is None:
        return
    # spawn: a copy of a process that has run Paddle's threads may hang
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(encoder,))
    waiting: deque[tuple[list[Conversation], Future]] = deque()
    try:
        waiting.append((first, pool.submit(_encode, first)))
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch)))
            if len(waiting) > AHEAD * workers:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    except BrokenProcessPool as error:
        raise DataError(
            "A process that encodes rows was killed, perhaps because memory ran out. Try again with fewer workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _result(batch: list[Conversation], future: Future) -> list[tuple[Conversation, Fitted]]:
    return list(zip(batch, future.result(), strict=True))


_encoder: Encoder | None = None  # of this process, when it is one of several


def _begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    Thread(target=_end_with_parent, daemon=True).start()
    with suppress(ValueError):
        signal(SIGINT, SIG_IGN)  # Ctrl-C ends the process that asked, which then ends these


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for rows for ever."""
    parent_process().join()
    os._exit(1)


def _encode(batch: list[Conversation]) -> list[Fitted]:
    return _encoder.encode(batch)
