"""torch.save's zip container: validated entries, and dtype, strides and file offset of each tensor.

NAME/data.pkl describes the tensors, NAME/data/KEY holds the numbers of one storage, NAME/byteorder says how. Nothing is
compressed, so that every tensor can be mapped. What data.pkl says is read in formats/torch_pickle.py.

A tensor has at most as many elements as its storage has bytes for. A view that repeats elements (a stride of zero) is
read like any other as long as this holds; one that is larger than what it repeats can be of any size in a file of a
kilobyte, and is no weight.
"""

import io
import math
import re
import struct
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np

from ..utils.errors import CheckpointError, shown
from . import safetensors
from .dtypes import DTYPES, TORCH
from .torch_pickle import LARGEST, MAX_BYTES, Tensor

ZIPPED = b"PK\x03\x04"
UNKNOWN_DTYPE = f"has the dtype {{}}; known are {', '.join(TORCH.values())}"
REPEATED = "has {:,} elements, more than its storage of {:,} bytes holds"
LOCAL_HEADER = struct.Struct("<4s4xH16xHH")  # mark, compression, lengths of name and extra field; then the entry itself
ENCRYPTED = 1  # a flag


@dataclass(frozen=True)
class Place:
    """Where a tensor lies. dtype: a safetensors tag; strides: in bytes; offset: of its first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def view(self) -> np.ndarray:
        """The tensor as a read-only array mapped from its file; every one has a map of its own, to be let go of."""
        dtype = DTYPES[self.dtype]
        if not math.prod(self.shape):
            return np.empty(self.shape, dtype)  # an empty map is an error of the operating system
        reach = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        whole = safetensors.map_bytes(self.file, self.offset, reach + dtype.itemsize)
        return np.ndarray(self.shape, dtype, whole, strides=self.strides)


class _Sparing(io.FileIO):
    """File with a limit on one read: zipfile reads the central directory whole, however long."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_BYTES:
            raise BadZipFile(f"one of its lists takes {size:,} bytes, more than {MAX_BYTES:,}")
        return super().read(size)


class Archive:
    """An open zip, used as a context manager. Raises CheckpointError for one that torch does not write."""

    def __init__(self, path: Path):
        self.path = path
        self._file = _Sparing(path)
        try:
            self._entries = _entries(self._file, path.name)
            self._top = _top_folder(self._entries, path.name)
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> bytes | None:
        """The content of a small entry; None where there is none."""
        found = self.find(name)
        if found is None:
            return None
        offset, size = found
        self._file.seek(offset)
        content, expected = self._file.read(size), self._entries[f"{self._top}/{name}"].CRC
        if expected and zlib.crc32(content) != expected:  # torch can be told to leave it out, and writes 0 then
            raise BadZipFile(f"'{shown(name)}' has another checksum than the list of entries says")
        return content

    def find(self, name: str) -> tuple[int, int] | None:
        """Offset of the first byte of an entry in the file, and its size; None where there is no such entry."""
        entry = self._entries.get(f"{self._top}/{name}")
        if entry is None:
            return None
        self._file.seek(entry.header_offset)
        mark, compression, *lengths = LOCAL_HEADER.unpack(self._file.read(LOCAL_HEADER.size))
        offset = entry.header_offset + LOCAL_HEADER.size + sum(lengths)
        if mark != ZIPPED or compression != ZIP_STORED:
            raise BadZipFile(f"no entry begins at byte {entry.header_offset:,}, where '{shown(name)}' should")
        if offset + entry.file_size > self.path.stat().st_size:
            raise BadZipFile(f"'{shown(name)}' reaches beyond the end of the file")
        return offset, entry.file_size

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _entries(file: io.FileIO, called: str) -> dict[str, ZipInfo]:
    with ZipFile(file) as archive:
        entries = archive.infolist()
    twice = [name for name, count in Counter(entry.orig_filename for entry in entries).items() if count > 1]
    if twice:
        raise CheckpointError(f"{called} holds the entry '{shown(twice[0])}' twice. Fetch it again")
    for entry in entries:
        if entry.compress_type != ZIP_STORED or entry.flag_bits & ENCRYPTED or entry.compress_size != entry.file_size:
            raise CheckpointError(
                f"{called} holds the compressed or encrypted entry '{shown(entry.orig_filename)}', and torch writes "
                f"neither. Fetch it again"
            )
        if ".." in re.split(r"[/\\]", entry.orig_filename):
            raise CheckpointError(
                f"{called} holds an entry that leads out of it, '{shown(entry.orig_filename)}'. Do not use this file"
            )
    return {entry.orig_filename: entry for entry in entries}


def _top_folder(entries: dict[str, ZipInfo], called: str) -> str:
    tops = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(tops) != 1:
        raise CheckpointError(f"{called} is a zip, but not one of torch: it holds {len(tops) or 'no'} data.pkl")
    if f"{tops[0]}/constants.pkl" in entries:
        raise CheckpointError(f"{called} is a TorchScript program, not tensors by name")
    return tops[0]


def place(tensor: Tensor, archive: Archive) -> Place | str:
    """Where a tensor lies, or what keeps it from being read."""
    if tensor.trouble:
        return tensor.trouble
    tag = TORCH.get(tensor.dtype)
    if tag is None:
        return UNKNOWN_DTYPE.format(tensor.dtype)
    found = archive.find(f"data/{tensor.storage.key}")
    if found is None:
        return f"lies in the storage '{shown(tensor.storage.key)}', which is not there"
    (offset, size), storage, itemsize = found, tensor.storage, DTYPES[tag].itemsize
    if size // DTYPES[TORCH[storage.dtype]].itemsize != storage.count:
        return f"lies in a storage of {storage.count:,} {storage.dtype}, which takes {size:,} bytes"
    most = LARGEST // itemsize
    if len(tensor.shape) > safetensors.MAX_DIMENSIONS or math.prod(max(n, 1) for n in tensor.shape) > most:
        return f"has {len(tensor.shape)} dimensions and more elements than any array can have"
    strides = [stride if n > 1 else 0 for n, stride in zip(tensor.shape, tensor.strides, strict=True)]
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
    if 0 not in tensor.shape and (last + 1) * itemsize > size:
        return f"reaches to byte {(last + 1) * itemsize:,} of a storage of {size:,}"
    if math.prod(tensor.shape) * itemsize > size:
        return REPEATED.format(math.prod(tensor.shape), size)
    begin = offset + tensor.offset * itemsize
    return Place(archive.path, tag, tensor.shape, tuple(stride * itemsize for stride in strides), begin)
