"""Global batches of packs, sharded over data-parallel ranks and micro-batches.

The packs of all epochs stand in one row; step s takes `global_batch` of them from s * global_batch on, the last step
what is left. So a step is the same on any number of ranks: with 8 packs a step, 2 ranks and 2 packs at a time

    step s        pack 0  1 | 2  3 | 4  5 | 6  7
    rank             0      |  1   |  0   |  1
    micro-batch      0      |  0   |  1   |  1

Every micro-batch knows how many labels its whole step has: losses are summed and divided by that, which makes the mean
over all of them, however they are cut, and needs no talk among ranks.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ...architecture.labels import IGNORE_INDEX
from ...data.packing import Plan, pack_arrays
from ...data.samples import Samples
from ...utils.errors import DataError

FIELDS = ("input_ids", "labels", "position_ids", "segment_ids")


class DataParallelShard(NamedTuple):
    """This rank of `world_size` data-parallel ones, `micro_batch` packs at a time."""

    rank: int
    world_size: int
    micro_batch: int


class StepCounts(NamedTuple):
    """What one step trains on over all ranks: labels, tokens, and places with the padding among them."""

    labels: int
    tokens: int
    places: int


class Packs:
    """The packs of several epochs in one row. epochs may be a fraction: of the last one the first packs are taken.

    plan_of: epoch -> Plan. pad_id: what stands where nothing does. most: packs that are needed at most; epochs behind
    them are not planned.
    """

    def __init__(
        self,
        samples: Samples,
        plan_of: Callable[[int], Plan],
        *,
        epochs: float,
        length: int,
        pad_id: int,
        most: int | None = None,
    ):
        self.samples, self.length, self.pad_id = samples, length, pad_id
        self._plan_of = lru_cache(maxsize=2)(plan_of)
        sizes: list[int] = []
        while len(sizes) < math.ceil(epochs) and (most is None or sum(sizes) < most):
            size, part = len(self._plan_of(len(sizes))), epochs - len(sizes)
            sizes.append(size if part >= 1 else max(1, round(size * part)))
        self.ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _place(self, number: int) -> tuple[Plan, int]:
        epoch = int(np.searchsorted(self.ends, number, side="right"))
        return self._plan_of(epoch), number - (int(self.ends[epoch - 1]) if epoch else 0)

    def epoch(self, number: int) -> float:
        """How many epochs are behind when `number` packs are."""
        epoch = min(int(np.searchsorted(self.ends, number, side="right")), len(self.ends) - 1)
        begin = int(self.ends[epoch - 1]) if epoch else 0
        return epoch + (number - begin) / len(self._plan_of(epoch))

    def arrays(self, number: int) -> dict[str, np.ndarray]:
        """A pack's arrays, int64 [length]."""
        plan, place = self._place(number)
        return pack_arrays(self.samples, plan.members(place), self.length, pad_id=self.pad_id)

    def counts(self, number: int) -> tuple[int, int]:
        """(labels, tokens) of a pack."""
        plan, place = self._place(number)
        return int(plan.target_counts[place]), int(plan.token_counts[place])

    def rows(self, number: int) -> list[str]:
        """The rows in a pack, as file:number."""
        plan, place = self._place(number)
        origins = [self.samples.origin(int(member)) for member in plan.members(place)]
        return list(dict.fromkeys(f"{origin.file}:{origin.row}" for origin in origins))

    def empty(self) -> dict[str, np.ndarray]:
        """A pack of padding alone: what a rank computes in a last step that has not enough packs for all."""
        arrays = {name: np.zeros(self.length, np.int64) for name in FIELDS}
        arrays["input_ids"][:] = self.pad_id
        arrays["labels"][:] = IGNORE_INDEX
        return arrays


class Steps:
    """The steps of a stage: `steps` of them, `global_batch` packs each, the last perhaps fewer.

    max_steps: an end before the packs are used up. Raises DataError when a step has no label, which plans of real
    packs do not make.
    """

    def __init__(self, packs: Packs, *, global_batch: int, max_steps: int | None = None):
        self.packs, self.global_batch = packs, global_batch
        whole = -(-len(packs) // global_batch)
        self.steps = whole if max_steps is None else min(whole, max_steps)

    def numbers(self, step: int) -> range:
        """The packs of a step."""
        return range(step * self.global_batch, min((step + 1) * self.global_batch, len(self.packs)))

    def counts(self, step: int) -> StepCounts:
        found = [self.packs.counts(number) for number in self.numbers(step)]
        labels, tokens = (sum(column) for column in zip(*found, strict=True))
        if not labels:
            raise DataError(f"Step {step} has nothing to learn: the packs {list(self.numbers(step))} hold no label.")
        return StepCounts(labels, tokens, self.global_batch * self.packs.length)

    def micro_batches(self, shard: DataParallelShard, first: int = 0) -> Iterator[dict]:
        """This rank's micro-batches from step `first` on: FIELDS int64 [micro_batch, length], and

        step, micro: where it stands; numbers: of its packs; labels_in_step: labels of the whole step over all ranks.
        """
        per_micro = shard.world_size * shard.micro_batch
        for step in range(first, self.steps):
            numbers, labels = self.numbers(step), self.counts(step).labels
            for micro in range(self.global_batch // per_micro):
                begin = micro * per_micro + shard.rank * shard.micro_batch
                mine = numbers[begin : begin + shard.micro_batch]
                arrays = [self.packs.arrays(number) for number in mine]
                arrays += [self.packs.empty() for _ in range(shard.micro_batch - len(arrays))]
                batch = {name: np.stack([pack[name] for pack in arrays]) for name in FIELDS}
                yield batch | {"step": step, "micro": micro, "numbers": mine, "labels_in_step": labels}
