"""Safetensors folders, read and written without holding them in memory.

Knows files, headers and bytes. Which tensors a model consists of is not its business.
"""

import json
import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import ml_dtypes
import numpy as np

from .errors import CheckpointError, ConfigError, report
from .files import JSON_ERRORS, lfs_pointer, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
SHARDS = "model-*-of-*.safetensors"
DEFAULT_SHARD_SIZE = "5GB"
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
# Paddle has no numpy bfloat16: it keeps the bits in uint16 and tags files U16, the published release too. No weight
# is ever a real uint16, so both ways U16 means BF16. This line pair is the only place that knows.
READ_AS = {"U16": "BF16"}
TAGS[np.dtype(np.uint16)] = "BF16"

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
ALIGNMENT = 64  # bytes; data begins on a cache line, so 16-byte copies in a mapped file stay aligned


@dataclass(frozen=True)
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
    """File names of a checkpoint: in one piece, its index, and a pattern of its pieces."""

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
        infos, wrong = read_header(folder / file) if (folder / file).is_file() else ([], [f"{file} does not exist"])
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
    if (folder / naming.index).is_file():
        return _read_index(folder, naming)
    strays = sorted(path.name for path in folder.glob(naming.pattern))
    if strays:
        return {}, [f"{naming.index} does not exist, but there are {len(strays)} shards, {strays[0]} first"]
    if not (folder / naming.single).is_file():
        return {}, [f"it holds neither {naming.single} nor {naming.index}"]
    return {naming.single: None}, []


def _read_index(folder: Path, naming: Naming) -> tuple[dict[str, set[str] | None], list[str]]:
    pointer = lfs_pointer(folder / naming.index)
    if pointer:
        return {}, [pointer]
    try:
        pairs = json.loads((folder / naming.index).read_text("utf-8-sig"), object_pairs_hook=list)
        rows = [(str(name), str(file)) for name, file in dict(pairs)["weight_map"]]
    except (*JSON_ERRORS, KeyError, TypeError) as error:
        return {}, [f"{naming.index} is not an index with a weight_map ({type(error).__name__}: {error})"]
    placed: dict[str, set[str] | None] = {}
    for name, file in rows:
        placed.setdefault(file, set()).add(name)
    findings = [f"{name} is listed twice in {naming.index}" for name in _repeated([name for name, _ in rows])]
    outside = sorted(file for file in placed if Path(file).name != file)
    findings += [f"{naming.index} names {file!r}, which is not a file of this folder" for file in outside]
    strays = {path.name for path in folder.glob(naming.pattern)} - set(placed)
    findings += [f"{file} is there, but {naming.index} does not name it" for file in sorted(strays)]
    if (folder / naming.single).is_file() and naming.single not in placed:
        findings.append(f"both {naming.single} and {naming.index} are there, and the index does not name the file")
    return {file: names for file, names in placed.items() if file not in outside}, findings


def compare_with_index(file: str, held: set[str], named: set[str] | None, naming: Naming) -> list[str]:
    """What a file holds and its index says, where they differ."""
    if named is None:
        return []
    missing = [f"{name} is not in {file}, where {naming.index} says it is" for name in sorted(named - held)]
    return missing + [f"{name} is in {file}, but {naming.index} does not say so" for name in sorted(held - named)]


def read_header(path: Path) -> tuple[list[TensorInfo], list[str]]:
    """The tensors of one safetensors file in data order, and what is wrong with it (then there are no tensors)."""
    size = path.stat().st_size
    if size == 0:
        return [], [f"{path.name} has zero bytes"]
    pointer = lfs_pointer(path)
    if pointer:
        return [], [pointer]
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= MAX_HEADER:
            return [], [f"{path.name} does not begin with a safetensors header"]
        if size < 8 + length:
            return [], [f"{path.name} is cut off: its header alone needs {8 + length:,} bytes, the file has {size:,}"]
        text = file.read(length)
    try:
        pairs = json.loads(text, object_pairs_hook=list)
        rows = [(name, dict(body)) for name, body in pairs if name != "__metadata__"]
        infos = [_tensor_info(name, body, path, 8 + length) for name, body in rows]
    except (*JSON_ERRORS, KeyError, TypeError) as error:
        return [], [f"{path.name} has a damaged header ({type(error).__name__}: {error})"]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    findings = _check_header(infos, path.name, 8 + length, size)
    return ([], findings) if findings else (infos, [])


def _tensor_info(name: str, body: dict, path: Path, base: int) -> TensorInfo:
    begin, end = (_whole(n) for n in body["data_offsets"])
    tag = READ_AS.get(body["dtype"], body["dtype"])
    return TensorInfo(name, tag, tuple(_whole(n) for n in body["shape"]), path, base + begin, end - begin)


def _whole(number: object) -> int:
    """JSON has 32.7, "32", true and Infinity too, all of which int() would take or choke on."""
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is not a whole number")
    return number


def _check_header(infos: list[TensorInfo], file: str, base: int, size: int) -> list[str]:
    findings = [f"{name} is twice in {file}" for name in _repeated([info.name for info in infos])]
    place = base
    for info in infos:
        if info.dtype not in DTYPES:
            findings.append(f"{info.name} in {file} has the dtype {info.dtype}; known are {', '.join(DTYPES)}")
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


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def view(info: TensorInfo) -> np.ndarray:
    """The tensor as a read-only array mapped from its file (bfloat16 as ml_dtypes.bfloat16); nothing is read yet."""
    dtype = DTYPES[info.dtype]
    if not info.nbytes:
        return np.empty(info.shape, dtype)  # an empty map is an error of the operating system
    return np.memmap(info.file, np.uint8, "r", info.offset, (info.nbytes,)).view(dtype).reshape(info.shape)


def release(array: np.ndarray) -> None:
    """Give back the memory of a mapped array; what is looked at again is read again. Others are left alone."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
        base.madvise(mmap.MADV_DONTNEED)


# ---------------------------------------------------------------------------------------------------- writing


def parse_size(text: str | int) -> int:
    """Bytes of "5GB" (decimal, as Hugging Face counts), "500MB", "2GiB" or a plain number. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMGT]?i?B)?)\s*", str(text), re.IGNORECASE)
    unit = (match[2].upper() or "B") if match else ""
    if unit not in UNITS or float(match[1]) * UNITS[unit] < 1:
        raise ConfigError(f"The size {text!r} cannot be read. Write a number and a unit, such as 5GB, 500MB or 2GiB.")
    return int(float(match[1]) * UNITS[unit])


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
    temporary: dict[Path, Path] = {}
    try:
        for shard in shards:
            partial = folder / f".{shard.file}.partial"
            temporary[partial] = folder / shard.file
            write_shard(partial, shard, (bits(read(entry)) for entry in shard.entries))
        # without its index an interrupted replacement cannot pass for either save
        (folder / INDEX).unlink(missing_ok=True)
        for partial, final in temporary.items():
            os.replace(partial, final)
        if len(shards) > 1:
            write_json(folder / INDEX, index_of(shards))
    except BaseException:
        for partial in temporary:
            partial.unlink(missing_ok=True)
        raise
    _remove_stale(folder, {shard.file for shard in shards})


def write_shard(
    path: Path, shard: Shard, pieces: Iterable[np.ndarray], *, framework: str = "np", fsync: bool = False
) -> str:
    """Write one file from the bytes of its tensors, in order; return the file's sha256 in hex digits.

    A piece may be changed again as soon as the next one is asked for. fsync: the file is on the disk, not only in the
    system's memory, when this returns.
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
        if fsync:
            file.flush()
            os.fsync(file.fileno())
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
