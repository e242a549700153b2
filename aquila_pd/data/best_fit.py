"""Best-fit packing: an exact subset-sum over sample lengths, longest first, as a bit set.

A pack begins with the longest sample that is left, and of all choices among the others it takes the one that leaves the
least room. Which sums can be made of some lengths is kept as the bits of one number: bit n is set when n places can be
filled, and a length more is a shift. The longest lengths come first, and mostly few are looked at until a pack is full
to its last place.

What follows: nothing in a later pack fits into the room of an earlier one. So room is left only where no sample has
that length any more, which is at the end, or where there are no short samples at all.
"""

import numpy as np


def best_fit(lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(order int64 [n], ends int64 [packs]): pack p holds the samples order[ends[p - 1] : ends[p]].

    lengths: tokens of each sample, int64 [n], each from 1 to `length`. Each sample is in exactly one pack.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    by_size = np.argsort(sizes, kind="stable")
    counts = np.bincount(sizes, minlength=length + 1)
    assert len(counts) == length + 1 and not counts[0]
    first = (np.cumsum(counts) - counts).tolist()  # of each size, in by_size
    left = counts.tolist()  # samples of each size
    present = sum(1 << int(size) for size in np.flatnonzero(counts))  # bit n: there are samples of n tokens
    order, ends = [], []
    while present:
        for size, count in _fill(present, left, length):
            left[size] -= count
            order += range(first[size] + left[size], first[size] + left[size] + count)
            if not left[size]:
                present ^= 1 << size
        ends.append(len(order))
    return by_size[np.array(order, dtype=np.int64)], np.array(ends, dtype=np.int64)


def _fill(present: int, left: list[int], length: int) -> list[tuple[int, int]]:
    """[(size, how many of it)] of one pack, the longest size that is left among them."""
    longest = present.bit_length() - 1
    room = length - longest
    fitting = (1 << (room + 1)) - 1  # the sums that can be used
    sums, steps = 1, []
    waiting = present & fitting
    while waiting and not sums >> room:
        size = waiting.bit_length() - 1
        waiting ^= 1 << size
        steps.append((size, sums))
        sums = _with_size(sums, size, min(left[size] - (size == longest), room // size), fitting)
    chosen, filled = {longest: 1}, sums.bit_length() - 1
    for size, before in reversed(steps):
        while not before >> filled & 1:
            filled -= size
            chosen[size] = chosen.get(size, 0) + 1
    return list(chosen.items())


def _with_size(sums: int, size: int, count: int, fitting: int) -> int:
    """The sums that can be made with up to `count` more of a size: 1, 2, 4 ... of it at once reach every number."""
    step = 1
    while count > 0:
        taken = min(step, count)
        sums |= (sums << (size * taken)) & fitting
        count -= taken
        step *= 2
    return sums
