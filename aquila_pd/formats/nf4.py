"""NF4 codec in numpy, with double quantization: encode, decode. Knows neither files nor frameworks.

The weight in torch's order [out, in] is laid out flat and cut into blocks of 64. A block keeps its largest magnitude;
each value becomes the nearest of sixteen levels times that, two codes to a byte, the first in the high half. The
magnitudes, less their mean, are packed the same way: blocks of 256, and 256 levels that are dense around zero.

    bytes per value: 1/2 of codes + 1/64 of magnitudes + 4/16384 of theirs = 0.516

Codes, magnitudes and values are those of bitsandbytes 0.50 on a CPU, bit for bit. One number is not: the mean is
rounded from double precision here, where torch's depends on the processor, and may differ in its last two bits.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

BLOCK = 64  # values that share a magnitude
NESTED_BLOCK = 256  # magnitudes that share one of theirs
CODES = 16
ENCODED = 1024  # blocks at once; their floats fit a processor's second cache
DECODED = 2**17  # values at once; their bytes, indices and floats fit that cache
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

Read = Callable[[slice], np.ndarray]  # a slice of what is stored


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


# ------------------------------------------------------------------------------------------------ encoding


def encode(shape: tuple[int, int], strips: Iterable[np.ndarray]) -> NF4:
    """Pack a matrix [out, in] of finite values, given as strips float32 [strip_height(in, ...), in]; the last may have
    fewer rows."""
    blocks = -(-shape[0] * shape[1] // BLOCK)
    codes, absmax = np.empty(-(-shape[0] * shape[1] // 2), np.uint8), np.empty(blocks, np.float32)
    first = 0  # block of the strip
    for strip in strips:
        _pack(strip.reshape(-1), codes[first * BLOCK // 2 :], absmax[first:])
        first += strip.size // BLOCK
    packed, nested, offset = quantize_magnitudes(absmax)
    return NF4(shape, codes, packed, nested, offset)


def strip_height(in_: int, values: int) -> int:
    """Rows of about so many values, of which every multiple ends with a whole block, and a whole byte."""
    whole = BLOCK // int(np.gcd(in_, BLOCK))
    return max(1, values // (in_ * whole)) * whole


def _pack(values: np.ndarray, codes: np.ndarray, absmax: np.ndarray) -> None:
    """Pack values [n] that begin with a block into the beginnings of codes and absmax."""
    blocks, rest = divmod(len(values), BLOCK)
    for begin in range(0, blocks, ENCODED):
        end = min(begin + ENCODED, blocks)
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


# ------------------------------------------------------------------------------------------------ decoding


@dataclass(frozen=True)
class Nested:
    """Magnitudes as codes: table[code] * scale of its block + offset, all float32."""

    table: np.ndarray  # [256]
    scales: np.ndarray  # [blocks of blocks]
    blocksize: int
    offset: np.float32

    def unpack(self, codes: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Magnitudes of codes whose places among all codes are `index`, of the same shape."""
        return self.table[codes] * self.scales[index // self.blocksize] + self.offset


@dataclass(frozen=True)
class Decoder:
    """Any part of a packed matrix. shape: (out, in); table: the sixteen values, float32 [16]; nested: None where the
    magnitudes are stored as float32.

    codes, absmax: functions that return a slice of the stored bytes [ceil(out * in / 2)] and magnitudes [blocks].
    """

    shape: tuple[int, int]
    table: np.ndarray
    blocksize: int
    nested: Nested | None = None

    def decode(self, codes: Read, absmax: Read, rows: slice, columns: slice) -> np.ndarray:
        """[rows, columns] float32: the products that bitsandbytes computes, before they are rounded to a smaller
        dtype."""
        out, in_ = self.shape
        outs, ins = range(out)[rows], range(in_)[columns]
        part = np.empty((len(outs), len(ins)), np.float32)
        if part.size:
            fill = self._fill_blocks if in_ % self.blocksize == 0 else self._fill_flat
            fill(part, partial(self._packed, codes, absmax), outs, ins)
        return part

    def _fill_blocks(self, part: np.ndarray, packed: Callable, rows: range, columns: range) -> None:
        """Where every row is whole blocks: only the blocks that the columns touch are unpacked."""
        size, in_ = self.blocksize, self.shape[1]
        per_row = in_ // size
        blocks = slice(columns.start // size, -(-columns.stop // size))
        inside = slice(columns.start - blocks.start * size, columns.stop - blocks.start * size)
        codes, absmax = packed(slice(rows.start * per_row, rows.stop * per_row))
        codes = codes.reshape(len(part), per_row, -1)[:, blocks]
        absmax = absmax.reshape(len(part), per_row)[:, blocks]
        height = max(1, DECODED // (codes.shape[1] * size))
        for begin in range(0, len(part), height):
            some = slice(begin, begin + height)
            row = np.arange(len(part))[some, None] + rows.start
            values = self._unpack(codes[some], absmax[some], row * per_row + np.arange(blocks.start, blocks.stop))
            part[some] = values.reshape(len(row), -1)[:, inside]

    def _fill_flat(self, part: np.ndarray, packed: Callable, rows: range, columns: range) -> None:
        """Where blocks run over the ends of rows: strips of whole rows are unpacked, and cut."""
        size, in_ = self.blocksize, self.shape[1]
        height = max(1, DECODED // in_)
        for begin in range(rows.start, rows.stop, height):
            end = min(begin + height, rows.stop)
            blocks = slice(begin * in_ // size, -(-end * in_ // size))
            codes, absmax = packed(blocks)
            values = self._unpack(codes, absmax, np.arange(blocks.start, blocks.stop)).reshape(-1)
            strip = values[begin * in_ - blocks.start * size :][: (end - begin) * in_].reshape(-1, in_)
            part[begin - rows.start : end - rows.start] = strip[:, columns.start : columns.stop]

    def _packed(self, codes: Read, absmax: Read, blocks: slice) -> tuple[np.ndarray, np.ndarray]:
        """Bytes [blocks, blocksize / 2] and their magnitudes [blocks] as stored; a last short block is filled up."""
        half = self.blocksize // 2
        found = codes(slice(blocks.start * half, blocks.stop * half)).reshape(-1)
        lacking = (blocks.stop - blocks.start) * half - len(found)
        if lacking:
            found = np.pad(found, (0, lacking))
        return found.reshape(-1, half), absmax(blocks)

    def _unpack(self, codes: np.ndarray, absmax: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Bytes [..., blocksize / 2], magnitudes [...] and their places [...] -> values [..., blocksize]."""
        pairs = np.stack([np.repeat(self.table, CODES), np.tile(self.table, CODES)], axis=1)  # [256, 2], by byte
        values = np.empty((*codes.shape, 2), np.float32)
        # moved as items of eight bytes; a byte is always within the table, so nothing is clipped
        np.take(pairs.view(np.complex64)[:, 0], codes, out=values.view(np.complex64)[..., 0], mode="clip")
        values = values.reshape(*codes.shape[:-1], self.blocksize)
        values *= (self.nested.unpack(absmax, index) if self.nested else absmax)[..., None]
        return values


def dequantize(packed: NF4, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
    """Part of a packed matrix [out, in], float32."""
    nested = Nested(nested_levels(), packed.nested, NESTED_BLOCK, packed.offset)
    decoder = Decoder(packed.shape, LEVELS, BLOCK, nested)
    return decoder.decode(packed.codes.__getitem__, packed.absmax.__getitem__, rows, columns)
