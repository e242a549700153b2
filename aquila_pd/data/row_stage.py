"""Stateless per-row stage in a process pool: parse, filter, hash, MinHash, benchmark overlaps.

It needs no earlier row, so the outcome is the same for any number of processes.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from hashlib import blake2b
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..utils.errors import DataError
from .contamination import Benchmarks, Overlap
from .counters import Counters
from .duplicates import Signer, digest
from .filters import LanguageFilter, SourceFilter
from .formats import BadRow, Talk, read_talk
from .normalize import BLANK_LINE, normalize
from .settings import DataSpec
from .sources import Row

TRAIN, EVALUATE = "train", "evaluate"
CHUNK = 128  # rows handed to a process at once
AHEAD = 2  # chunks that wait for each process


class DataFile(NamedTuple):
    """One file of a spec. format, weight: of its Source; part: TRAIN or EVALUATE."""

    path: Path
    format: str
    weight: float
    part: str


class Examined(NamedTuple):
    """A row with messages. fate: a number from 0 to below 1, by seed and content. signature, overlaps: if asked for."""

    file: int
    number: int
    messages: list[dict]
    id: str
    source: str
    digest: bytes
    fate: float
    signature: np.ndarray | None
    overlaps: list[Overlap]


class Unreadable(NamedTuple):
    """A row that is no conversation."""

    file: int
    number: int
    reason: str


class Chunk(NamedTuple):
    """What came of some rows.

    rows: those that are left, and those that cannot be read, in order. counters: of rules that know one row. read: rows
    of each file that could be read, the dropped ones too. unmet: names of sources that have fitted none so far.
    """

    rows: list[Examined | Unreadable]
    counters: Counters
    read: dict[int, int]
    unmet: list[str]


class Examiner:
    """Examines rows as a spec wants it. files: `data_files(spec)`.

    Raises DataError for unknown languages, and for benchmark files that cannot be read.
    """

    def __init__(self, spec: DataSpec, files: Sequence[DataFile], seed: int, *, knows_system: bool):
        self._files, self._seed, self._knows_system = files, str(seed).encode(), knows_system
        self._sources = SourceFilter(spec.sources, spec.exclude_sources)
        self._languages = LanguageFilter(spec.languages) if spec.languages else None
        self.benchmarks = Benchmarks(spec.contamination) if spec.contamination else None
        self._signer = Signer() if spec.deduplicate == "near" else None

    def examine(self, rows: Iterable[Row | Unreadable]) -> Chunk:
        counters, found, read = Counters(), [], {}
        for row in rows:
            if isinstance(row, Unreadable):
                found.append(row)
                continue
            try:
                talk = read_talk(row.value, self._files[row.file].format)
            except BadRow as reason:
                found.append(Unreadable(row.file, row.number, str(reason)))
                continue
            read[row.file] = read.get(row.file, 0) + 1
            messages = self._messages(row, talk, counters)
            if messages is not None:
                found.append(self._examined(row, messages, talk))
        return Chunk(found, counters, read, self._sources.unmet)

    def _messages(self, row: Row, talk: Talk, counters: Counters) -> list[dict] | None:
        """None for a row that is dropped, and counted. Evaluation files are not filtered: they were chosen."""
        is_filtered = self._files[row.file].part == TRAIN
        rule = self._sources.why_not(talk.source) if is_filtered else None
        if rule:
            counters.count(rule)
            return None
        messages = normalize(talk.turns, knows_system=self._knows_system, counters=counters)
        if messages is None or self._languages is None or not is_filtered:
            return messages
        rule = self._languages.judge(messages)
        if rule:
            counters.count(rule)
        return None if rule and rule.effect == "dropped" else messages

    def _examined(self, row: Row, messages: list[dict], talk: Talk) -> Examined:
        is_checked = self.benchmarks is not None and self._files[row.file].part == TRAIN
        return Examined(
            file=row.file,
            number=row.number,
            messages=messages,
            id=talk.id,
            source=talk.source,
            digest=digest(messages),
            fate=self._fate(messages),
            signature=self._signer.sign(messages) if self._signer else None,
            overlaps=self.benchmarks.overlaps(messages) if is_checked else [],
        )

    def _fate(self, messages: list[dict]) -> float:
        # The texts joined as normalize.py joins them: whether a template knows system messages changes nothing.
        text = BLANK_LINE.join(message["content"] for message in messages)
        found = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=blake2b(self._seed).digest())
        return (int.from_bytes(found.digest(), "little") >> 11) / 2**53


# ------------------------------------------------------------------------------------------------ several processes


def examine_rows(
    examiner: Examiner, rows: Iterator[Row | Unreadable], *, workers: int, arguments: tuple
) -> Iterator[Chunk]:
    """Chunks in the order of the rows.

    workers: processes; 1: this one. arguments: (spec, files, seed, knows_system) that the examiner was made of, from
    which other processes make their own. Raises DataError when one of them ends before its time.
    """
    chunks = iter(lambda: list(islice(rows, CHUNK)), [])
    if workers <= 1:
        yield from map(examiner.examine, chunks)
        return
    # spawn: a copy of a process that has run Paddle's threads may hang
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=arguments)
    try:
        waiting = deque(pool.submit(_examine, chunk) for chunk in islice(chunks, AHEAD * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_examine, chunk) for chunk in islice(chunks, 1))
    except BrokenProcessPool as error:
        raise DataError(
            "A process that examines rows has ended before its time, perhaps because memory ran out.\n"
            "Ask for fewer processes; one needs none beside this one."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_examiner: Examiner | None = None  # of this process, when it is one of several


def _begin(spec: DataSpec, files: Sequence[DataFile], seed: int, knows_system: bool) -> None:
    global _examiner
    _examiner = Examiner(spec, files, seed, knows_system=knows_system)


def _examine(rows: list[Row]) -> Chunk:
    return _examiner.examine(rows)
