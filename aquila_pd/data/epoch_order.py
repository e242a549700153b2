"""Epoch shuffling: a seeded permutation in constant memory, and fractional repetition of weighted rows.

Everything is computed in whole numbers, so that it is the same on every machine.
"""

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

ROUNDS = 8
LEAST_BITS = 8  # of a permutation's domain: with fewer, keys would reach only some of a few things' orders
UNIT = 1 << 20  # a weight of 1
CHUNK = 1 << 16  # places looked at together

# splitmix64, the finalizer: every bit of the input moves every bit of the output
MULTIPLY_1, MULTIPLY_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
SHIFT_1, SHIFT_2, SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


def derive_key(*parts: object) -> int:
    """64 bits out of a seed and whatever else tells one use of it from another; parts are compared by their repr."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def mix(values: np.ndarray) -> np.ndarray:
    """uint64 [n] scrambled, uint64 [n]; the same input gives the same output everywhere."""
    values = (values ^ (values >> SHIFT_1)) * MULTIPLY_1
    values = (values ^ (values >> SHIFT_2)) * MULTIPLY_2
    return values ^ (values >> SHIFT_3)


class Permutation:
    """The numbers 0..count-1 in an order that a key decides; any stretch of it costs what the stretch costs.

    A Feistel network over the next even number of bits; a number that lands beyond `count` goes through it again.
    """

    def __init__(self, count: int, key: int):
        self.count = count
        bits = max((max(count, 1) - 1).bit_length(), LEAST_BITS)
        self._half = np.uint64((bits + 1) // 2)
        self._low = np.uint64((1 << int(self._half)) - 1)
        self._keys = [np.uint64(derive_key(key, number)) for number in range(ROUNDS)]

    def __len__(self) -> int:
        return self.count

    def at(self, begin: int, end: int) -> np.ndarray:
        """The numbers at the places begin..end-1 of the order, int64 [end - begin]."""
        assert 0 <= begin <= end <= self.count
        found = self._scramble(np.arange(begin, end, dtype=np.uint64))
        beyond = np.flatnonzero(found >= self.count)
        while beyond.size:
            found[beyond] = self._scramble(found[beyond])
            beyond = beyond[found[beyond] >= self.count]
        return found.astype(np.int64)

    def _scramble(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._low
        for key in self._keys:
            left, right = right, left ^ (mix(right ^ key) & self._low)
        return (left << self._half) | right


def times_seen(weights: np.ndarray, phases: np.ndarray, epoch: int) -> np.ndarray:
    """How often samples come in an epoch (0, 1, ...), int64 [n].

    weights: float64 [n], taken to the nearest 1/UNIT; phases: int64 [n], fixed numbers in [0, UNIT). A weight of 2.5 is
    twice in one epoch and three times in the next; after E epochs the sum is weight * E, rounded once for all of them.
    """
    units = in_units(weights)
    return (units * (epoch + 1) + phases) // UNIT - (units * epoch + phases) // UNIT


def in_units(weights: np.ndarray) -> np.ndarray:
    return np.rint(weights * UNIT).astype(np.int64)


def phases_of(files: np.ndarray, rows: np.ndarray, key: int) -> np.ndarray:
    """A fixed number in [0, UNIT) for each row, int64 [n]: the parts of a split row have the same."""
    scrambled = mix(mix(files.astype(np.uint64) ^ np.uint64(key)) ^ rows.astype(np.uint64))
    return (scrambled % np.uint64(UNIT)).astype(np.int64)


def draw(records: np.ndarray, *, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """The samples of an epoch in its order, as int64 arrays of any length: sample numbers, weighted ones repeated.

    records: with the fields weight, file, row (see samples.py); memory-mapped ones stay on disk.
    """
    most = most_often(records["weight"])
    copies = Permutation(len(records) * most, derive_key("order", seed, epoch))
    plain = most == 1 and bool((records["weight"] == 1).all())
    phase_key = derive_key("phase", seed)
    for begin in range(0, len(copies), CHUNK):
        copy, numbers = np.divmod(copies.at(begin, min(begin + CHUNK, len(copies))), len(records))
        if not plain:
            chosen = records[numbers]
            phases = phases_of(chosen["file"], chosen["row"], phase_key)
            numbers = numbers[copy < times_seen(chosen["weight"], phases, epoch)]
        yield numbers


def most_often(weights: np.ndarray) -> int:
    """The most that any sample may come in one epoch."""
    return -(-int(in_units(weights.max())) // UNIT) if len(weights) else 0
