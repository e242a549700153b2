"""Safetensors reader and writer for sharded folders: headers checked, tensors mapped, shards streamed.

Knows files, headers and bytes. Which tensors a model consists of is not its business.
"""

import errno
import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from ..utils.atomic import replacing_all
from ..utils.errors import CheckpointError, report
from ..utils.files import JSON_ERRORS, lfs_pointer, parse_json, shown, shown_value, why_not_a_file, write_json
from ..utils.units import parse_size
from .dtypes import DTYPES, READ_AS, TAGS

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
SHARDS = "model-*-of-*.safetensors"
DEFAULT_SHARD_SIZE = "5GB"

MAX_HEADER = 100_000_000  # bytes, of an index too; the limit of the safetensors library
MAX_TENSORS = 100_000  # in a file; no model known here has a hundredth
MAX_NUMBER = 2**59  # bytes of a file, or values of a tensor: what still can be counted in bytes in 64 bits
MAX_DIMENSIONS = 32  # numpy's limit
MAX_NAME = 255  # bytes of a file's name on the usual disks; no tensor's name is as long
ALIGNMENT = 64  # bytes; data begins on a cache line, so 16-byte copies in a mapped file stay aligned


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. dtype: a safetensors tag such as "BF16"; offset: of its first byte in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Entry:
    """A tensor to be written. dtype: a safetensors tag."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """A file to be written: its name and its tensors in order."""

    file: str
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class Naming:
    """File names of a checkpoint: single file, index, pattern of shards."""

    single: str
    index: str
    pattern: str


SAFETENSORS = Naming(SINGLE, INDEX, SHARDS)

# ---------------------------------------------------------------------------------------------------- reading


def read_layout(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a folder with model.safetensors, or with shards and an index. Reads headers only.

    Raises CheckpointError with everything that is wrong with the files.
    """
    folder = Path(folder)
    placed, findings = read_placement(folder, SAFETENSORS)
    found: dict[str, TensorInfo] = {}
    for file in sorted(placed):
        infos, wrong = read_header(folder / file)
        findings += wrong
        findings += [f"{i.name} is in both {found[i.name].file.name} and {file}" for i in infos if i.name in found]
        found.update((info.name, info) for info in infos)
        if not wrong:  # a file that cannot be read is one finding, not one for each tensor it should hold
            findings += compare_with_index(file, {info.name for info in infos}, placed[file], SAFETENSORS)
    if findings:
        advice = "Fetch the named files again, or compare the folder with its original."
        raise CheckpointError(report(f"{folder} is not a complete safetensors checkpoint:", findings, advice))
    return found


def read_placement(folder: Path, naming: Naming) -> tuple[dict[str, set[str] | None], list[str]]:
    """File name -> the tensors its index expects in it (None without an index), and what is wrong so far."""
    if os.path.lexists(folder / naming.index):
        return _read_index(folder, naming)
    strays = sorted(path.name for path in folder.glob(naming.pattern))
    if strays:
        return {}, [f"{naming.index} does not exist, but there are {len(strays)} shards, {shown(strays[0])} first"]
    if not os.path.lexists(folder / naming.single):
        return {}, [f"it holds neither {naming.single} nor {naming.index}"]
    return {naming.single: None}, []


def _read_index(folder: Path, naming: Naming) -> tuple[dict[str, set[str] | None], list[str]]:
    path = folder / naming.index
    wrong = why_not_a_file(path)
    if wrong:
        return {}, [f"{naming.index} {wrong}"]
    pointer = lfs_pointer(path)
    if pointer:
        return {}, [pointer]
    try:
        rows = _weight_map(path)
    except (*JSON_ERRORS, KeyError, TypeError) as error:
        return {}, [f"{naming.index} is not an index with a weight_map ({type(error).__name__}: {error})"]
    placed: dict[str, set[str] | None] = {}
    for name, file in rows.items():
        placed.setdefault(file, set()).add(name)
    outside = {file for file in placed if not _is_file_name(file)}
    findings = [f"{naming.index} names '{shown(file)}', which is not a file of this folder" for file in sorted(outside)]
    strays = {path.name for path in folder.glob(naming.pattern)} - set(placed)
    findings += [f"{shown(file)} is there, but {naming.index} does not name it" for file in sorted(strays)]
    if os.path.lexists(folder / naming.single) and naming.single not in placed:
        findings.append(f"both {naming.single} and {naming.index} are there, and the index does not name the file")
    return {file: names for file, names in placed.items() if file not in outside}, findings


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name. Raises JSON_ERRORS, KeyError or TypeError for anything else."""
    size = path.stat().st_size
    if size > MAX_HEADER:
        raise ValueError(f"it has {size:,} bytes")
    found = parse_json(path.read_text("utf-8-sig"))["weight_map"]
    if not isinstance(found, dict) or len(found) > MAX_TENSORS:
        raise TypeError(f"the weight_map is {shown_value(found)}")
    for name, file in found.items():
        _check_name(name)
        if not isinstance(file, str):
            raise TypeError(f"the file of {name} is {shown_value(file)}")
    return found


def _is_file_name(text: str) -> bool:
    """Whether a text names a file in a folder, and nothing beside or above it on any system."""
    return (
        text not in ("", ".", "..")
        and text.isprintable()
        and not set(text) & set("/\\")
        and len(text.encode("utf-8")) <= MAX_NAME  # a lone surrogate is not printable
    )


def _check_name(name: str) -> None:
    """Raise ValueError for the name of a tensor that could not be printed: one that fools a terminal, or never ends."""
    if not (name and name.isprintable() and len(name) <= MAX_NAME):
        raise ValueError(f"'{shown(name)}' is no name of a tensor")


def compare_with_index(file: str, held: set[str], named: set[str] | None, naming: Naming) -> list[str]:
    """What a file holds and its index says, where they differ."""
    if named is None:
        return []
    missing = [f"{name} is not in {file}, where {naming.index} says it is" for name in sorted(named - held)]
    return missing + [f"{name} is in {file}, but {naming.index} does not say so" for name in sorted(held - named)]


def read_header(path: Path) -> tuple[list[TensorInfo], list[str]]:
    """The tensors of one safetensors file in data order, and what is wrong with it (then there are no tensors)."""
    wrong = _why_no_safetensors(path)
    if wrong:
        return [], [wrong]
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= MAX_HEADER:
            return [], [f"{path.name} does not begin with a safetensors header"]
        if size < 8 + length:
            return [], [f"{path.name} is cut off: its header alone needs {8 + length:,} bytes, the file has {size:,}"]
        header = file.read(length)
    try:
        infos = _tensor_infos(header, path)
    except (*JSON_ERRORS, KeyError, TypeError) as error:
        return [], [f"{path.name} has a damaged header ({type(error).__name__}: {error})"]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    findings = _check_header(infos, path.name, 8 + length, size)
    return ([], findings) if findings else (infos, [])


def _why_no_safetensors(path: Path) -> str | None:
    wrong = why_not_a_file(path)
    if wrong:
        return f"{path.name} {wrong}"
    return f"{path.name} has zero bytes" if path.stat().st_size == 0 else lfs_pointer(path)


def _tensor_infos(header: bytes, path: Path) -> list[TensorInfo]:
    """The tensors a header lists. Raises JSON_ERRORS, KeyError or TypeError for a header that is none."""
    listed = header.count(b'"data_offsets"')  # before they fill the memory
    if listed > MAX_TENSORS:
        raise ValueError(f"it lists {listed:,} tensors")
    found = parse_json(header.decode("utf-8"))
    if not isinstance(found, dict):
        raise TypeError(f"it is {shown_value(found)}")
    about = found.pop("__metadata__", None) or {}
    if not (isinstance(about, dict) and all(isinstance(said, str) for said in about.values())):
        raise TypeError(f"its __metadata__ is {shown_value(about)}")
    return [_tensor_info(name, body, path, 8 + len(header)) for name, body in found.items()]


def _tensor_info(name: str, body: dict, path: Path, base: int) -> TensorInfo:
    _check_name(name)
    if not (isinstance(body, dict) and isinstance(body["shape"], list) and isinstance(body["data_offsets"], list)):
        raise TypeError(f"{name} is {shown_value(body)}")
    shape = tuple(_whole(n) for n in body["shape"])
    # numpy counts without the zeros
    if len(shape) > MAX_DIMENSIONS or math.prod(n or 1 for n in shape) > MAX_NUMBER:
        raise ValueError(f"{name} has the shape {shown_value(list(shape))}, beyond any memory")
    begin, end = (_whole(n) for n in body["data_offsets"])
    tag = body["dtype"] if isinstance(body["dtype"], str) else shown_value(body["dtype"])
    tag = READ_AS.get(tag, tag)
    return TensorInfo(name, tag, shape, path, base + begin, end - begin)


def _whole(number: object) -> int:
    """JSON has 32.7, "32", true and Infinity too, all of which int() would take or choke on."""
    if type(number) is not int or not 0 <= number <= MAX_NUMBER:
        raise ValueError(f"{shown_value(number)} is not a whole number")
    return number


def _check_header(infos: list[TensorInfo], file: str, base: int, size: int) -> list[str]:
    findings = []
    place = base
    for info in infos:
        if info.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            findings.append(f"{info.name} in {file} has the dtype {shown(info.dtype)}; known are {known}")
        elif math.prod(info.shape) * DTYPES[info.dtype].itemsize != info.nbytes:
            findings.append(
                f"{info.name} in {file} takes {info.nbytes:,} bytes, not those of {list(info.shape)} {info.dtype}"
            )
        if info.offset != place:
            findings.append(f"{info.name} in {file} begins at byte {info.offset:,} where {place:,} was due")
        place = info.offset + info.nbytes
    if place > size:
        findings.append(f"{file} is cut off: its header says {place:,} bytes, the file has {size:,}")
    if place < size:
        findings.append(f"{file} is too long: its header says {place:,} bytes, the file has {size:,}")
    return findings


def view(info: TensorInfo) -> np.ndarray:
    """The tensor as a read-only array mapped from its file (bfloat16 as ml_dtypes.bfloat16); nothing is read yet."""
    dtype = DTYPES[info.dtype]
    if not info.nbytes:
        return np.empty(info.shape, dtype)  # an empty map is an error of the operating system
    return map_bytes(info.file, info.offset, info.nbytes).view(dtype).reshape(info.shape)


def map_bytes(file: Path, offset: int, nbytes: int) -> np.ndarray:
    """Bytes [n] of a file as a separate read-only map. Raises OSError when the file became shorter."""
    try:
        return np.memmap(file, np.uint8, "r", offset, (nbytes,))
    except ValueError as error:
        raise OSError(errno.EIO, f"It was cut off while it was read ({error})", str(file)) from error


def release(array: np.ndarray) -> None:
    """Drop the resident pages of a mapped array (MADV_DONTNEED); no effect on other arrays."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
        base.madvise(mmap.MADV_DONTNEED)


# ---------------------------------------------------------------------------------------------------- writing


def plan_shards(entries: Iterable[Entry], max_shard_size: int) -> list[Shard]:
    """Entries packed greedily in order into files of at most max_shard_size bytes of data.

    A tensor larger than that gets a file of its own. One file is called model.safetensors, as readers expect.
    """
    groups: list[list[Entry]] = [[]]
    room = max_shard_size
    for entry in entries:
        if groups[-1] and entry.nbytes > room:
            groups.append([])
            room = max_shard_size
        groups[-1].append(entry)
        room -= entry.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]))]
    count = len(groups)
    return [Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)]


def write_shards(folder: Path, shards: Sequence[Shard], read: Callable[[Entry], np.ndarray]) -> None:
    """Write planned shards and their index into folder; `read` gives each tensor's array when its turn comes.

    Files appear under temporary names and are renamed when all are complete, the index last. Shards of an earlier
    save are removed after that. Should anything fail, the temporary files are removed and the error goes on.
    """
    with replacing_all([folder / shard.file for shard in shards]) as partials:
        for shard, partial in zip(shards, partials, strict=True):
            write_shard(partial, shard, (bits(read(entry)) for entry in shard.entries))
        # without its index an interrupted replacement cannot pass for either save
        (folder / INDEX).unlink(missing_ok=True)
    if len(shards) > 1:
        write_json(folder / INDEX, index_of(shards))
    _remove_stale(folder, {shard.file for shard in shards})


def write_shard(path: Path, shard: Shard, pieces: Iterable[np.ndarray], *, framework: str = "np") -> str:
    """Write one file from the bytes of its tensors, in order; return the file's sha256 in hex digits.

    A piece may be changed again as soon as the next one is asked for.
    """
    header = header_bytes(shard.entries, framework=framework)
    digest, left = sha256(), shard.nbytes
    with path.open("wb") as file, ThreadPoolExecutor(1) as hashing:  # both let go of Python's lock: they overlap
        digest.update(header)
        file.write(header)
        for piece in pieces:
            hashed = hashing.submit(digest.update, piece)
            file.write(piece)
            hashed.result()
            left -= piece.nbytes
    assert not left, f"{shard.file}: {left} bytes are missing"
    return digest.hexdigest()


def bits(array: np.ndarray) -> np.ndarray:
    """The bytes of an array [n], so that NaNs keep their payload; a copy only when it is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # reshape first, since a scalar has no other view


def save_tensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, max_shard_size: str | int = DEFAULT_SHARD_SIZE
) -> list[str]:
    """Write named arrays as a safetensors checkpoint and return the names of its files.

    uint16 arrays are Paddle's bfloat16 and become BF16. The arrays are held until the end; write_shards streams.
    """
    arrays = dict(tensors)
    entries = [Entry(name, tag_of(array), array.shape) for name, array in arrays.items()]
    shards = plan_shards(entries, parse_size(max_shard_size))
    write_shards(Path(folder), shards, lambda entry: arrays[entry.name])
    return [shard.file for shard in shards] + ([INDEX] if len(shards) > 1 else [])


def tag_of(array: np.ndarray) -> str:
    """The safetensors tag of an array's dtype. Raises CheckpointError for one that has none."""
    if array.dtype not in TAGS:
        raise CheckpointError(
            f"A tensor of dtype {array.dtype} cannot be saved. Cast it to one of {', '.join(DTYPES)}."
        )
    return TAGS[array.dtype]


def header_bytes(entries: Sequence[Entry], *, framework: str = "np") -> bytes:
    """The length prefix and header of a safetensors file that holds these tensors in this order.

    framework: for whom the file is. PaddleNLP refuses "pt" and "pd", transformers everything but "pt".
    """
    rows: dict[str, object] = {"__metadata__": {"format": framework}}
    place = 0
    for entry in entries:
        rows[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [place, place + entry.nbytes],
        }
        place += entry.nbytes
    text = json.dumps(rows, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def index_of(shards: Sequence[Shard]) -> dict:
    """The content of model.safetensors.index.json."""
    placed = {entry.name: shard.file for shard in shards for entry in shard.entries}
    return {"metadata": {"total_size": sum(shard.nbytes for shard in shards)}, "weight_map": placed}


def _remove_stale(folder: Path, fresh: set[str]) -> None:
    for path in folder.glob("model*.safetensors"):
        if (path.name == SINGLE or SHARD_NAME.fullmatch(path.name)) and path.name not in fresh:
            path.unlink()
