"""Weights of pytorch_model.bin files, single or sharded, read without torch and without running code from them.

Such a file is an uncompressed zip: a pickle that describes the tensors, and their numbers in one entry per storage.
What the pickle says is read in pickles.py. Only files in the format before torch 1.6 need torch.
"""

import io
import math
import re
import struct
import threading
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np

from ... import shards
from ...errors import CheckpointError, InstallationError, report
from ...families.dialect import Dialect
from ...files import lfs_pointer
from ..layout import BIN, BIN_INDEX, BIN_SHARDS, read_config
from .pickles import LARGEST, MAX_BYTES, META, NOT_DENSE, UNFINISHED, Table, Tensor, WouldRunCode, kind_of, read_pickle
from .reader import ALL, Stored

ZIPPED = b"PK\x03\x04"  # torch's format since 1.6
PICKLED = b"\x80\x02"  # the format before
NAMING = shards.Naming(single=BIN, index=BIN_INDEX, pattern=BIN_SHARDS)
WRAPPER = "module"  # FlagAI saves {"module": state_dict}
TAGS = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float64": "F64",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
UNKNOWN_DTYPE = f"has the dtype {{}}; known are {', '.join(TAGS.values())}"
LOCAL_HEADER = struct.Struct("<4s4xH16xHH")  # mark, compression, lengths of name and extra field; then the entry itself
ENCRYPTED = 1  # a flag
MAX_DIMENSIONS = 32  # numpy's own limit
ADVICE_OF_TORCH = re.compile(r"weights[_ ]only", re.IGNORECASE)
WOULD_RUN = re.compile(r"unsupported global|trying to (call|instantiate|load)", re.IGNORECASE)
SHOWN = 10  # values that are no tensors, of perhaps thousands


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
        dtype = shards.DTYPES[self.dtype]
        if not math.prod(self.shape):
            return np.empty(self.shape, dtype)  # an empty map is an error of the operating system
        reach = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        whole = shards.map_bytes(self.file, self.offset, reach + dtype.itemsize)
        return np.ndarray(self.shape, dtype, whole, strides=self.strides)


# ------------------------------------------------------------------------------------------ what both formats share


def _by_name(content: object, tensor_type: type, called: str) -> dict:
    """The tensors of a file by name, out of FlagAI's wrapper if they are in one."""
    for name, value in _pairs(content):
        if isinstance(name, str) and name == WRAPPER and isinstance(value, Table | dict):
            content = value
    others = [complaint for name, value in _pairs(content) if (complaint := _complaint(name, value, tensor_type))]
    if not isinstance(content, Table | dict):
        others = [f"it is a {kind_of(content)}"]
    if others:
        more = [f"{len(others) - SHOWN:,} more"] if len(others) > SHOWN else []
        raise CheckpointError(f"{called} does not hold tensors by name: {', '.join(others[:SHOWN] + more)}")
    return dict(_pairs(content))


def _complaint(name: object, value: object, tensor_type: type) -> str:
    if not isinstance(name, str):
        return f"a {kind_of(value)} goes by a {kind_of(name)}"
    if not isinstance(value, tensor_type):
        return f"{_shown(name)} is a {kind_of(value)}"
    return "" if name.isprintable() else f"{_shown(name)} is no name that can be printed"


def _pairs(content: object) -> list[tuple[object, object]]:
    if isinstance(content, Table):
        return content.pairs
    return list(content.items()) if isinstance(content, dict) else []


def _shown(text: str) -> str:
    """Text from a file, fit for a message."""
    return repr(text if len(text) < 200 else text[:200] + "...")


def _why(error: Exception) -> str:
    """An error of loading in one line; torch's own text proposes to load the file unsafely, which we never do."""
    lines = str(error).split("WeightsUnpickler error:")[-1].splitlines()
    found = next((line.strip() for line in lines if line.strip() and not ADVICE_OF_TORCH.search(line)), "")
    if isinstance(error, WouldRunCode) or WOULD_RUN.search(found):
        wanted = found.split(". Please")[0].split(" was not an allowed")[0]
        return f"would run code when loaded ({wanted}); it is refused. Ask its author for safetensors files"
    return f"is damaged or cut off ({type(error).__name__}: {found})"


# ------------------------------------------------------------------------------------------------- torch's zip files


class _Sparing(io.FileIO):
    """Refuses to read more at once than honest lists take: zipfile reads the list of entries whole, however long."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_BYTES:
            raise BadZipFile(f"one of its lists takes {size:,} bytes, more than {MAX_BYTES:,}")
        return super().read(size)


class _Archive:
    """A torch zip: NAME/data.pkl, NAME/data/KEY for each storage, NAME/byteorder. Used as a context manager."""

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
            raise BadZipFile(f"{_shown(name)} has another checksum than the list of entries says")
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
            raise BadZipFile(f"no entry begins at byte {entry.header_offset:,}, where {_shown(name)} should")
        if offset + entry.file_size > self.path.stat().st_size:
            raise BadZipFile(f"{_shown(name)} reaches beyond the end of the file")
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
        raise CheckpointError(f"{called} holds the entry {_shown(twice[0])} twice. Fetch it again")
    for entry in entries:
        if entry.compress_type != ZIP_STORED or entry.flag_bits & ENCRYPTED or entry.compress_size != entry.file_size:
            raise CheckpointError(
                f"{called} holds the compressed or encrypted entry {_shown(entry.orig_filename)}, and torch writes "
                f"neither. Fetch it again"
            )
        if ".." in re.split(r"[/\\]", entry.orig_filename):
            raise CheckpointError(
                f"{called} holds an entry that leads out of it, {_shown(entry.orig_filename)}. Do not use this file"
            )
    return {entry.orig_filename: entry for entry in entries}


def _top_folder(entries: dict[str, ZipInfo], called: str) -> str:
    tops = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(tops) != 1:
        raise CheckpointError(f"{called} is a zip, but not one of torch: it holds {len(tops) or 'no'} data.pkl")
    if f"{tops[0]}/constants.pkl" in entries:
        raise CheckpointError(f"{called} is a TorchScript program, not tensors by name")
    return tops[0]


def _tensors(archive: _Archive) -> dict[str, Tensor]:
    order = archive.read("byteorder")
    if order not in (None, b"little"):
        advice = "Save it again on a machine with the byte order little"
        raise CheckpointError(f"{archive.path.name} has the byte order {order[:8]!r}, which is not read. {advice}")
    return _by_name(read_pickle(archive.read("data.pkl")), Tensor, archive.path.name)


def _place(tensor: Tensor, archive: _Archive) -> Place | str:
    """Where a tensor lies, or what keeps it from being read."""
    if tensor.trouble:
        return tensor.trouble
    tag = TAGS.get(tensor.dtype)
    if tag is None:
        return UNKNOWN_DTYPE.format(tensor.dtype)
    found = archive.find(f"data/{tensor.storage.key}")
    if found is None:
        return f"lies in the storage {_shown(tensor.storage.key)}, which is not there"
    (offset, size), storage, itemsize = found, tensor.storage, shards.DTYPES[tag].itemsize
    if size // shards.DTYPES[TAGS[storage.dtype]].itemsize != storage.count:
        return f"lies in a storage of {storage.count:,} {storage.dtype}, which takes {size:,} bytes"
    if len(tensor.shape) > MAX_DIMENSIONS or math.prod(max(n, 1) for n in tensor.shape) > LARGEST // itemsize:
        return f"has {len(tensor.shape)} dimensions and more elements than any array can have"
    strides = [stride if n > 1 else 0 for n, stride in zip(tensor.shape, tensor.strides, strict=True)]
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True))
    if 0 not in tensor.shape and (last + 1) * itemsize > size:
        return f"reaches to byte {(last + 1) * itemsize:,} of a storage of {size:,}"
    begin = offset + tensor.offset * itemsize
    return Place(archive.path, tag, tensor.shape, tuple(stride * itemsize for stride in strides), begin)


# ------------------------------------------------------------------------------------------------- the format before


class _WholeFiles:
    """Files in the format before torch 1.6, which only torch reads: one at a time in memory, for any thread."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._lock = threading.Lock()
        self._held: tuple[str, dict] = ("", {})

    def tensors(self, file: str) -> dict:
        with self._lock:
            if self._held[0] != file:
                self._held = ("", {})  # before the next one comes
                self._held = (file, _load_whole(self._folder / file))
            return self._held[1]

    def read(self, file: str, name: str) -> np.ndarray:
        tensor = self.tensors(file)[name].detach()  # a parameter counts as one that wants a gradient
        if str(tensor.dtype) == "torch.bfloat16":  # numpy knows it only through its bits
            import torch

            return tensor.view(torch.int16).numpy().view(shards.DTYPES["BF16"])
        return tensor.numpy()

    def close(self) -> None:
        with self._lock:
            self._held = ("", {})


def _load_whole(path: Path) -> dict:
    try:
        import torch
    except ImportError as error:
        raise InstallationError(
            f"{path} is in torch's format from before 1.6, which only torch can read, and torch is not installed.\n"
            f'Install it with pip install "aquila_pd[verify]", or convert the folder to safetensors elsewhere.'
        ) from error
    try:
        # weights_only refuses every pickle that would call anything but tensor building
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its own kinds for each sort of damage
        raise CheckpointError(f"{path.name} {_why(error)}") from error
    return _by_name(content, torch.Tensor, path.name)


def _trouble(tensor) -> str:
    """What keeps a torch tensor from being read, if anything does."""
    if str(tensor.dtype) not in TAGS:
        return UNKNOWN_DTYPE.format(tensor.dtype)
    if tensor.is_meta:
        return META
    if str(tensor.layout) != "torch.strided":
        return NOT_DENSE.format(tensor.layout)
    return UNFINISHED if tensor.is_neg() or tensor.is_conj() else ""


# -------------------------------------------------------------------------------------------------------- the reader


class TorchBinReader:
    """Maps each tensor from its file when asked for it; those of old files are in memory."""

    dialect: Dialect | None = None  # the family's

    def __init__(self, folder: Path):
        self.config = read_config(folder)
        self.notes: list[str] = []
        self._folder = folder
        self._places: dict[str, Place] = {}  # of the tensors that can be mapped
        self._whole_files = _WholeFiles(folder)
        self.stored = self._survey()

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        place = self._places.get(name)
        tensor = place.view() if place else self._whole_files.read(self.stored[name].file, name)
        return tensor[(*(rows, columns)[: tensor.ndim], ...)]  # with the dots a scalar stays an array

    def close(self) -> None:
        self._whole_files.close()  # every map closes with its array

    def _survey(self) -> dict[str, Stored]:
        """Name, dtype and shape of every tensor. Raises CheckpointError with all findings."""
        placed, findings = shards.read_placement(self._folder, NAMING)
        stored: dict[str, Stored] = {}
        for file in sorted(placed):
            try:
                held, troubles = self._look_into(self._folder / file)
            except CheckpointError as error:
                findings.append(str(error))
                continue
            findings += [f"{name} is in both {stored[name].file} and {file}" for name in held if name in stored]
            findings += shards.compare_with_index(file, set(held), placed[file], NAMING)
            findings += [f"{name} in {file} {trouble}" for name, trouble in troubles.items()]
            stored.update(held)
        if findings:
            advice = "Fetch the named files again, or compare the folder with its original."
            raise CheckpointError(report(f"{self._folder} is not a usable .bin checkpoint:", findings, advice))
        return stored

    def _look_into(self, path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
        """What a file holds, and by name what keeps a tensor from being read."""
        if not path.is_file():
            raise CheckpointError(f"{path.name} does not exist")
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path.name} has zero bytes")
        pointer = lfs_pointer(path)
        if pointer:
            raise CheckpointError(pointer)
        with path.open("rb") as file:
            beginning = file.read(16)
        if beginning.startswith(ZIPPED):
            return self._look_into_zip(path)
        if beginning.startswith(PICKLED):
            return self._look_into_whole(path)
        raise CheckpointError(f"{path.name} is not a torch file: it begins with {beginning!r}. Fetch it again")

    def _look_into_zip(self, path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
        try:
            with _Archive(path) as archive:
                tensors = _tensors(archive)
                found = {name: _place(tensor, archive) for name, tensor in tensors.items()}
        except CheckpointError:
            raise
        except Exception as error:  # zipfile too has many kinds of errors for damage
            raise CheckpointError(f"{path.name} {_why(error)}") from error
        troubles = {name: place for name, place in found.items() if isinstance(place, str)}
        self._places.update((name, place) for name, place in found.items() if name not in troubles)
        held = {name: Stored(TAGS.get(t.dtype, ""), t.shape, path.name) for name, t in tensors.items()}
        return held, troubles

    def _look_into_whole(self, path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
        tensors = self._whole_files.tensors(path.name)
        troubles = {name: trouble for name, tensor in tensors.items() if (trouble := _trouble(tensor))}
        held = {n: Stored(TAGS.get(str(t.dtype), ""), tuple(t.shape), path.name) for n, t in tensors.items()}
        self.notes.append(
            f"{path.name} is in torch's format from before 1.6, which cannot be mapped: it is read into memory whole"
        )
        return held, troubles
