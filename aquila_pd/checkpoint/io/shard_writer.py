"""Shard writer: parts of tensors made by worker threads, hashed and written in order, journaled shard by shard.

The workers slice, cast and transpose; one thread hashes and writes, so that a file is written sequentially and its
bytes do not depend on the number of workers.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from ...formats.dtypes import DTYPES, FLOATS
from ...formats.safetensors import Entry, Shard, write_shard
from ...utils.atomic import replacing
from ...utils.errors import CheckpointError, report
from ...utils.progress import Progress
from ...utils.units import counted
from ..plan import Plan
from ..sources import Source
from .journal import Finished, Journal
from .pipeline import Buffers, in_order
from .stream_copy import Counts, move, parts

UNPACKED = 4  # bytes of a value while it is unpacked; rows of such a part are unpacked at once


@dataclass(frozen=True)
class Part:
    """Unit of work: rows of an output tensor. last: the last part of its tensor."""

    entry: Entry
    rows: slice
    last: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows.stop - self.rows.start, *self.entry.shape[1:])


@dataclass
class Made:
    """A finished part: its bytes in a pooled buffer, and the counts of its values."""

    part: Part
    buffer: np.ndarray
    nbytes: int
    counts: Counts


def write_weights(source: Source, plan: Plan, journal: Journal, *, workers: int, fsync: bool) -> list[str]:
    """Write the shards not yet in the journal; returns a finding for each tensor with NaN or infinite values.

    Raises CheckpointError naming every tensor with finite values that its dtype cannot hold.
    """
    waiting = [shard for shard in plan.shards if shard.file not in journal.finished]
    buffers = Buffers(workers)
    tasks = (part for shard in waiting for part in _parts(source, plan, shard, buffers.nbytes))
    tensors = sum(len(shard.entries) for shard in waiting)
    total = sum(shard.nbytes for shard in waiting)
    with (
        Progress("write", total=total, tensors=tensors) as progress,
        closing(in_order(lambda part: _make(source, plan, part, buffers), tasks, workers=workers)) as made,
    ):
        for shard in waiting:
            _write(shard, plan, made, buffers, progress, journal, fsync=fsync)
    return _findings(plan, journal)


def _parts(source: Source, plan: Plan, shard: Shard, most: int) -> Iterator[Part]:
    for entry in shard.entries:
        weight, itemsize = plan.moves[entry.name], DTYPES[entry.dtype].itemsize
        if source.tensors[weight.hf].packed and not plan.target.transposes(weight):
            itemsize = max(itemsize, UNPACKED)
        cut = list(parts(entry.shape, itemsize, most))
        yield from (Part(entry, rows, rows is cut[-1]) for rows in cut)


def _make(source: Source, plan: Plan, part: Part, buffers: Buffers) -> Made:
    weight, dtype = plan.moves[part.entry.name], DTYPES[part.entry.dtype]
    nbytes = int(np.prod(part.shape)) * dtype.itemsize
    buffer = buffers.take(nbytes)
    region = buffer[:nbytes].view(dtype).reshape(part.shape)
    if not plan.target.transposes(weight):
        return Made(part, buffer, nbytes, move(source.read(weight.hf, part.rows), region))
    counts = Counts()
    for some in source.tiles(weight.hf):
        counts.add(move(source.read(weight.hf, some, part.rows).T, region[:, some]))
    return Made(part, buffer, nbytes, counts)


def _write(
    shard: Shard,
    plan: Plan,
    made: Iterator[Made],
    buffers: Buffers,
    progress: Progress,
    journal: Journal,
    *,
    fsync: bool,
) -> None:
    """One shard under a temporary name, then under its own and in the journal."""
    found: dict[str, Counts] = {}

    def pieces() -> Iterator[np.ndarray]:
        left = shard.nbytes
        while left:
            one = next(made)
            yield one.buffer[: one.nbytes]
            buffers.give_back(one.buffer)
            left -= one.nbytes
            found.setdefault(plan.moves[one.part.entry.name].hf, Counts()).add(one.counts)
            progress.advance(one.nbytes, int(one.part.last))

    with replacing(journal.folder / shard.file, fsync=fsync) as partial:
        digest = write_shard(partial, shard, pieces(), framework=plan.target.tag)
    nonfinite = {name: counts.nonfinite for name, counts in found.items() if counts.nonfinite}
    overflowed = {name: counts.overflowed for name, counts in found.items() if counts.overflowed}
    if overflowed:  # not after the last shard, which may be hours away
        raise CheckpointError(_overflow_report(plan, overflowed))
    journal.record(shard.file, Finished(digest, nonfinite), fsync=fsync)


def _findings(plan: Plan, journal: Journal) -> list[str]:
    finished = [journal.finished[shard.file] for shard in plan.shards]
    return [
        f"{name} holds {n} NaN or infinite values; they were kept"
        for done in finished
        for name, n in done.nonfinite.items()
    ]


def _overflow_report(plan: Plan, overflows: dict[str, int]) -> str:
    tags = {plan.moves[entry.name].hf: entry.dtype for shard in plan.shards for entry in shard.entries}
    lines = [
        f"overflow    {name}: {counted(n, 'value')} too large for {FLOATS[tags[name]]}" for name, n in overflows.items()
    ]
    advice = {
        "F16": "Use --dtype bfloat16, which has the range of float32.",
        "BF16": "Use --dtype float32.",
    }.get(tags[next(iter(overflows))], "No dtype of a Paddle model can hold them; look at the source.")
    headline = f"{plan.source} holds values that would become infinite:"
    return report(headline, lines, f"Later shards were not looked at. {advice}")
