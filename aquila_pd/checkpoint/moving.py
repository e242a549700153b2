"""One tensor from its source to its place in a mapped file: cast, transposed, counted. Nothing is held whole."""

from dataclasses import dataclass

import numpy as np

ROWS = 256  # of the source at a time; the cast copy of a strip stays in the cache
COLUMNS = 512
PIECE = 16  # bytes moved as one item; numpy has a fast copy for complex128
BLOCK = 128  # for shapes that do not divide into pieces

# Bit patterns from which on a 16-bit float is infinite or NaN: of positive numbers, and of negative ones.
SPECIAL = {"bfloat16": (0x7F80, 0xFF80), "float16": (0x7C00, 0xFC00)}


@dataclass
class Counts:
    """Values of one tensor worth telling about: nonfinite in the source, overflowed when cast."""

    nonfinite: int = 0
    overflowed: int = 0


def move(source: np.ndarray, target: np.ndarray, *, transpose: bool) -> Counts:
    """Write source [R, C] into target, [C, R] when transposed, else of the source's shape, in target's dtype.

    Casting rounds to nearest even; what overflows becomes infinite and is counted.
    """
    counts = Counts()
    if source.ndim != 2:
        source, target = source.reshape(1, -1), target.reshape(1, -1)
    for begin in range(0, len(source), ROWS):
        some = slice(begin, begin + ROWS)
        strip = _cast(source[some], target.dtype, counts)
        if transpose:
            _transpose(strip, target[:, some])
        else:
            target[some] = strip
    return counts


def _cast(strip: np.ndarray, dtype: np.dtype, counts: Counts) -> np.ndarray:
    clean = all_finite(strip)
    if not clean:
        counts.nonfinite += int(strip.size - np.count_nonzero(np.isfinite(strip)))
    if strip.dtype == dtype:
        return strip
    with np.errstate(over="ignore", invalid="ignore"):
        cast = strip.astype(dtype)
    if not all_finite(cast):
        counts.overflowed += int(np.count_nonzero(np.isinf(cast) & np.isfinite(strip)))
    return cast


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite. Two maxima over the bits of a 16-bit float, which numpy does quickly."""
    if values.dtype.name not in SPECIAL or not values.size or not values.flags.c_contiguous:
        return bool(np.isfinite(values).all())
    positive, negative = SPECIAL[values.dtype.name]
    bits = values.view(np.int16)
    return int(bits.max()) < positive and int(bits.view(np.uint16).max()) < negative


def _transpose(strip: np.ndarray, target: np.ndarray) -> None:
    """target [C, R] = strip [R, C] turned.

    Copying single 16-bit items with a stride is slow (0.2 GB/s). Here `group` rows are first laid side by side, so
    that each column of the group is one 16-byte item, and those items are moved: about ten times as fast.
    """
    rows, columns = strip.shape
    group = PIECE // strip.itemsize
    if rows % group or target.strides[0] % PIECE or not _aligned(target):
        return _transpose_plainly(strip, target)
    strip = strip.view(f"u{strip.itemsize}")  # numpy copies its own types twice as fast as bfloat16
    pieces = target.view(np.complex128)  # [C, R / group], 16 bytes each; only ever copied, so no value can change
    for begin in range(0, columns, COLUMNS):
        some = slice(begin, begin + COLUMNS)
        grouped = strip[:, some].reshape(rows // group, group, -1)
        beside = np.empty((rows // group, grouped.shape[2], group), strip.dtype)
        for row in range(group):
            beside[:, :, row] = grouped[:, row]
        pieces[some] = beside.view(np.complex128)[:, :, 0].T
    return None


def _aligned(array: np.ndarray) -> bool:
    return array.ctypes.data % PIECE == 0


def _transpose_plainly(strip: np.ndarray, target: np.ndarray) -> None:
    for begin in range(0, strip.shape[1], BLOCK):
        some = slice(begin, begin + BLOCK)
        target[some] = strip[:, some].T
