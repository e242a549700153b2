"""Streaming copy: slice, cast, transpose; counts non-finite and overflowed values. No tensor is in memory whole."""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...formats import safetensors

ROWS = 256  # of the source at a time; the cast copy of a block stays in the cache
COLUMNS = 1024
PIECE = 16  # bytes moved as one item; numpy has a fast copy for complex128
BLOCK = 128  # for shapes that do not divide into pieces
WHOLE_BLOCKS = 256  # a part of a matrix begins at a multiple of this where it can: quantized values come in such blocks

# Bit patterns from which on a 16-bit float is infinite or NaN: of positive numbers, and of negative ones.
SPECIAL = {"bfloat16": (0x7F80, 0xFF80), "float16": (0x7C00, 0xFC00)}


def parts(shape: tuple[int, ...], itemsize: int, most: int) -> Iterator[slice]:
    """Slices along the first axis of about `most` bytes each; none for an empty tensor."""
    row = math.prod(shape[1:]) * itemsize
    if not row or not shape[0]:
        return
    rows = max(1, most // row)
    if rows > WHOLE_BLOCKS:
        rows -= rows % WHOLE_BLOCKS
    for begin in range(0, shape[0], rows):
        yield slice(begin, min(begin + rows, shape[0]))


@dataclass
class Counts:
    """Counts of values: nonfinite in the source, overflowed by the cast."""

    nonfinite: int = 0
    overflowed: int = 0

    def add(self, other: "Counts") -> None:
        self.nonfinite += other.nonfinite
        self.overflowed += other.overflowed


def move(source: np.ndarray, target: np.ndarray) -> Counts:
    """Copy source into target, same shape [R, C] or [C] with contiguous rows, cast to target's dtype.

    A source that is a transposed view is transposed block by block. Casting rounds to nearest even (float64 to
    bfloat16 by way of float32); what overflows becomes infinite and is counted. Pages of a mapped source are let go at
    the end.
    """
    counts = Counts()
    if source.ndim != 2:
        source, target = source.reshape(1, -1), target.reshape(1, -1)
    transposed = source.strides[0] < source.strides[1] and source.shape[0] > 1
    along = source.T if transposed else source  # rows of `along` are contiguous
    for begin in range(0, len(along), ROWS):
        some = slice(begin, begin + ROWS)
        block = _cast(along[some], target.dtype, counts)
        if transposed:
            _transpose(block, target[:, some])
        else:
            target[some] = block
    safetensors.release(source)
    return counts


def _cast(block: np.ndarray, dtype: np.dtype, counts: Counts) -> np.ndarray:
    clean = all_finite(block)
    if not clean:
        with np.errstate(invalid="ignore"):  # a signalling NaN is a value like any other here
            counts.nonfinite += int(block.size - np.count_nonzero(np.isfinite(block)))
    if block.dtype == dtype:
        return block
    with np.errstate(over="ignore", invalid="ignore"):
        cast = block.astype(dtype)
    if not all_finite(cast):
        counts.overflowed += int(np.count_nonzero(np.isinf(cast) & np.isfinite(block)))
    return cast


def all_finite(values: np.ndarray) -> bool:
    """No NaN or infinity: two maxima over the bit patterns for 16-bit floats, where isfinite is slow."""
    if values.dtype.name not in SPECIAL or not values.size or values.strides[-1] != values.itemsize:
        with np.errstate(invalid="ignore"):
            return bool(np.isfinite(values).all())
    positive, negative = SPECIAL[values.dtype.name]
    bits = values.view(np.int16)
    return int(bits.max()) < positive and int(bits.view(np.uint16).max()) < negative


def _transpose(block: np.ndarray, target: np.ndarray) -> None:
    """target [C, R] = block [R, C] transposed.

    Copying single 16-bit items with a stride is slow (0.2 GB/s). Here `group` rows are first laid side by side, so
    that each column of the group is one 16-byte item, and those items are moved: about ten times as fast.
    """
    rows, columns = block.shape
    group = PIECE // block.itemsize
    if rows % group or target.strides[0] % PIECE or not _aligned(target):
        return _transpose_plainly(block, target)
    block = block.view(f"u{block.itemsize}")  # numpy copies its own types twice as fast as bfloat16
    pieces = target.view(np.complex128)  # [C, R / group], 16 bytes each; only ever copied, so no value can change
    for begin in range(0, columns, COLUMNS):
        some = slice(begin, begin + COLUMNS)
        grouped = block[:, some].reshape(rows // group, group, -1)
        beside = _scratch(block.size // columns * grouped.shape[2] * block.itemsize).view(block.dtype)
        beside = beside.reshape(rows // group, grouped.shape[2], group)
        for row in range(group):
            beside[:, :, row] = grouped[:, row]
        pieces[some] = beside.view(np.complex128)[:, :, 0].T
    return None


_threads = threading.local()


def _scratch(nbytes: int) -> np.ndarray:
    """Memory of this thread that is used again each time: fresh pages cost half as much as the work on them."""
    if getattr(_threads, "scratch", None) is None or _threads.scratch.nbytes < nbytes:
        _threads.scratch = np.empty(nbytes, np.uint8)
    return _threads.scratch[:nbytes]


def _aligned(array: np.ndarray) -> bool:
    return array.ctypes.data % PIECE == 0


def _transpose_plainly(block: np.ndarray, target: np.ndarray) -> None:
    for begin in range(0, block.shape[1], BLOCK):
        some = slice(begin, begin + BLOCK)
        target[some] = block[:, some].T
