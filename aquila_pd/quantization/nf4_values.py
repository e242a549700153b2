"""NF4 with double quantization in numpy: weights to codes, and back. The layer that computes with them is in nf4.py.

The weight in torch's order [out, in] is laid out flat and cut into blocks of 64. A block keeps its largest magnitude;
each value becomes the nearest of sixteen levels times that, two codes to a byte, the first in the high half. The
magnitudes, less their mean, are packed the same way: blocks of 256, and 256 levels that are dense around zero.

    bytes per value: 1/2 of codes + 1/64 of magnitudes + 4/16384 of theirs = 0.516

Codes, magnitudes and values are those of bitsandbytes 0.50 on a CPU, bit for bit. One number is not: the mean is
rounded from double precision here, where torch's depends on the processor, and may differ in its last two bits.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..checkpoint.io.stream_copy import Counts, move
from ..checkpoint.sources.packed.nf4 import Nested, NF4Matrix
from ..checkpoint.sources.reader import ALL, Stored
from ..utils.errors import CheckpointError

BLOCK = 64  # values that share a magnitude
NESTED_BLOCK = 256  # magnitudes that share one of theirs
STRIP = 2**22  # values of a matrix that are turned and cast at once
AT_ONCE = 1024  # blocks; their floats fit a processor's second cache
TINY = np.float32(1e-38)  # a block of zeros is divided by this

# The levels of the 4-bit "normal float": quantiles of the normal distribution, made symmetric and with an exact zero,
# as published with QLoRA.
LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
BORDERS = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)  # a value on a border takes the lower level
GRID = 65535  # steps from -1 to 1 to which bitsandbytes rounds a magnitude before it looks for its level


@dataclass
class NF4:
    """A packed matrix. shape: (out, in); codes: uint8 [ceil(out * in / 2)]; absmax: uint8 [blocks], each a number of a
    level; nested: float32 [blocks of blocks], what a level is multiplied with; offset: float32, then added."""

    shape: tuple[int, int]
    codes: np.ndarray
    absmax: np.ndarray
    nested: np.ndarray
    offset: np.float32

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes + self.nested.nbytes + 4


# ------------------------------------------------------------------------------------------------ packing


def quantize(weight: np.ndarray, name: str = "a weight") -> NF4:
    """Pack a matrix [out, in] of any float dtype and any strides; a transposed view costs no copy of it.

    Beside the result there are no more than a few strips of 16 MB. Raises CheckpointError, with the name, for NaN or
    infinite values: a single one would spoil its block, and NaN the whole matrix.
    """
    out, in_ = weight.shape
    blocks = -(-weight.size // BLOCK)
    codes, absmax = np.empty(-(-weight.size // 2), np.uint8), np.empty(blocks, np.float32)
    height = strip_height(in_, STRIP)
    for begin in range(0, out, height):
        some = weight[begin : begin + height]
        strip = np.empty(some.shape, np.float32)
        counts: Counts = move(some, strip)
        if counts.nonfinite:
            raise CheckpointError(f"{name} holds NaN or infinite values, which NF4 cannot keep. Look at its source.")
        first = begin * in_ // BLOCK
        _pack(strip.reshape(-1), codes[first * BLOCK // 2 :], absmax[first:])
    packed, nested, offset = quantize_magnitudes(absmax)
    return NF4((out, in_), codes, packed, nested, offset)


def strip_height(in_: int, values: int) -> int:
    """Rows of about so many values, of which every multiple ends with a whole block, and a whole byte."""
    whole = BLOCK // int(np.gcd(in_, BLOCK))
    return max(1, values // (in_ * whole)) * whole


def _pack(values: np.ndarray, codes: np.ndarray, absmax: np.ndarray) -> None:
    """Pack values [n] that begin with a block into the beginnings of codes and absmax."""
    blocks, rest = divmod(len(values), BLOCK)
    for begin in range(0, blocks, AT_ONCE):
        end = min(begin + AT_ONCE, blocks)
        some = values[begin * BLOCK : end * BLOCK].reshape(-1, BLOCK)
        absmax[begin:end] = np.abs(some).max(axis=1)
        scaled = some * (np.float32(1) / np.maximum(absmax[begin:end], TINY))[:, None]
        codes[begin * BLOCK // 2 : end * BLOCK // 2] = _bytes(scaled.reshape(-1))
    if rest:  # bitsandbytes divides here, and multiplies above
        some = values[blocks * BLOCK :]
        absmax[blocks] = np.maximum(np.abs(some).max(), TINY)
        codes[blocks * BLOCK // 2 : -(-len(values) // 2)] = _bytes(np.pad(some / absmax[blocks], (0, rest % 2)))


def _bytes(scaled: np.ndarray) -> np.ndarray:
    """Values [2n] from -1 to 1 as bytes [n] of two codes."""
    found = np.zeros(scaled.shape, np.uint8)
    for border in BORDERS:  # fifteen comparisons run faster than any search
        found += scaled > border
    return found[::2] << 4 | found[1::2]


def quantize_magnitudes(absmax: np.ndarray, offset: np.float32 | None = None) -> tuple:
    """Magnitudes float32 [blocks] as (levels uint8 [blocks], their factors float32 [blocks of blocks], offset).

    offset: what is taken away first; by default the mean.
    """
    if offset is None:
        offset = np.float32(absmax.mean(dtype=np.float64))
    blocks = -(-len(absmax) // NESTED_BLOCK)
    rest = np.pad(absmax - offset, (0, blocks * NESTED_BLOCK - len(absmax))).reshape(blocks, NESTED_BLOCK)
    nested = np.abs(rest).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(nested[:, None] > 0, rest * (np.float32(1) / nested[:, None]), np.float32(-1))
    step = np.floor((scaled + np.float32(1)) * np.float32(GRID / 2) + np.float32(0.5))
    levels = _level_of_step()[np.clip(step, 0, GRID).astype(np.int64)]
    return levels.reshape(-1)[: len(absmax)].copy(), nested, offset


@cache
def nested_levels() -> np.ndarray:
    """The 256 levels of magnitudes, float32, sorted: 0, 1, and for seven powers of ten the middles of 2**i equal parts
    of 0.1 to 1, with both signs. Small numbers have few digits and a wide range, large ones the reverse."""
    found = [0.0, 1.0]
    for i in range(7):
        parts = 2**i
        step, places = np.float64(np.float32(0.9) / np.float32(parts)), np.arange(parts + 1)
        from_below, from_above = np.float64(np.float32(0.1)) + step * places, 1 - step * (parts - places)
        # torch counts from both ends, each with one rounding
        borders = np.where(places < (parts + 1) // 2, from_below, from_above).astype(np.float32)
        middles = (borders[:-1] + borders[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        found += [*middles, *-middles]
    return np.sort(np.array(found, np.float32))


@cache
def _level_of_step() -> np.ndarray:
    """The nearest level of each step of the grid, uint8 [GRID + 1]."""
    levels = nested_levels().astype(np.float64)
    steps = np.arange(GRID + 1) / (GRID / 2) - 1
    return np.searchsorted((levels[:-1] + levels[1:]) / 2, steps).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ unpacking


def dequantize(packed: NF4, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
    """Part of the matrix, float32, through the converter's own reader of such files."""
    nested = Nested(nested_levels(), packed.nested, NESTED_BLOCK, packed.offset)
    matrix = NF4Matrix(Stored("F32", packed.shape, ""), "codes", "absmax", LEVELS, BLOCK, nested)
    return matrix.read(_InMemory(packed), rows, columns)


class _InMemory:
    """What NF4Matrix reads from, of arrays."""

    def __init__(self, packed: NF4):
        self.packed = packed

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        return getattr(self.packed, name)[rows]
