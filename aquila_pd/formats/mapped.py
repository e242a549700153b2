"""Stored tensors as writable arrays: a private (copy-on-write) memory map, or a converting read.

Knows no model and no Paddle. `shards.view` is the other way to look at a tensor: read-only, for reading it once.
"""

import errno
import mmap
from pathlib import Path

import numpy as np

from .dtypes import DTYPES
from .safetensors import ALIGNMENT, TensorInfo

BLOCK = 1 << 20  # bytes read at a time into a buffer that stays in the processor's cache
PAGE = mmap.PAGESIZE


class Maps:
    """Private memory maps of tensors, one map per file.

    The maps are private: writing into an array copies the page written to and never reaches the file. A file that is
    replaced by renaming another one over it, or removed, lives on in its map. One that is rewritten in place or cut
    off changes the arrays, or ends the process when they are read next.
    """

    def __init__(self):
        self._files: dict[Path, np.ndarray] = {}

    @staticmethod
    def fits(info: TensorInfo, dtype: np.dtype) -> bool:
        """Whether the stored bytes can serve as the array: same dtype, and aligned."""
        # Windows does not let a mapped file be replaced, so a model could not be saved where it came from.
        possible = hasattr(mmap, "MAP_PRIVATE") and info.nbytes > 0
        return possible and DTYPES[info.dtype] == dtype and info.offset % ALIGNMENT == 0

    def array(self, info: TensorInfo) -> np.ndarray:
        """The tensor, writable. Nothing is read yet: see `touch`. Raises OSError when its file is shorter than it
        was."""
        if info.file not in self._files:
            self._files[info.file] = np.memmap(info.file, np.uint8, "c").view(np.ndarray)
        whole = self._files[info.file][info.offset : info.offset + info.nbytes]
        if whole.nbytes < info.nbytes:
            raise _cut_off(info)
        return whole.view(DTYPES[info.dtype]).reshape(info.shape)


def touch(array: np.ndarray) -> None:
    """Prefault a mapped array: read its pages now, in order, instead of at first use."""
    array.reshape(-1).view(np.uint8)[::PAGE].max()


def read_into(info: TensorInfo, out: np.ndarray) -> None:
    """Converting read: a tensor into an array of its shape, block by block, cast to the array's dtype.

    out may be part of a larger array, such as some columns of a matrix. Values beyond a smaller dtype become infinite.
    Raises OSError when the file is shorter than it was.
    """
    if not info.nbytes:
        return
    row = info.nbytes // info.shape[0]
    count = max(1, BLOCK // row)  # of rows in a block
    buffer = np.empty(min(count * row, info.nbytes), np.uint8)
    with info.file.open("rb", buffering=0) as file, np.errstate(over="ignore", invalid="ignore"):
        file.seek(info.offset)
        for first in range(0, info.shape[0], count):
            some = out[first : first + count]
            block = buffer[: len(some) * row]
            done = 0
            while done < len(block):
                got = file.readinto(block[done:])
                if not got:
                    raise _cut_off(info)
                done += got
            np.copyto(some, block.view(DTYPES[info.dtype]).reshape(some.shape), casting="unsafe")


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Page-aligned memory for weights.

    In pages of the size the system chooses. numpy's own large arrays ask for huge ones, and in a virtual machine that
    gives free memory back to its host these took two to five times as long to come by as small ones.
    """
    nbytes = int(np.prod(shape)) * dtype.itemsize
    if not nbytes or not hasattr(mmap, "MAP_PRIVATE"):
        return np.empty(shape, dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype).reshape(shape)


def _cut_off(info: TensorInfo) -> OSError:
    return OSError(errno.EIO, f"It was cut off while {info.name} was read", str(info.file))
