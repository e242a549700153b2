"""GGUF header parser, shared by the readers of weights, configuration and tokenizer.

The header is read here and nothing in it is believed: what is refused would have filled the memory, taken for ever, or
been read as something else. The gguf package, which knows the quantizations, makes objects of a kilobyte for each value
of the vocabulary, 250 MB in all; here a value takes its own bytes.
"""

import math
import mmap
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from ..utils.errors import CheckpointError, InstallationError, report
from ..utils.files import refuse_lfs_pointer, shown

PRE_TOKENIZER = "tokenizer.ggml.pre"
UNNAMED = (None, "default")  # a converter that did not recognise the splitting pattern writes one of these

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4  # of ggml
MAX_TEXT = 2**24  # bytes; a chat template, the longest, has some thousands
MAX_NAME = 255  # bytes of a key or of a tensor's name; ggml has 64 for the second
MOST_VALUES = 1_000_000  # in all lists together; a vocabulary of 150,000 has 600,000 with its types and merges
ALIGNMENT = "general.alignment"

STRING, ARRAY, UINT32 = 8, 9, 4
# kind of metadata -> what a value is to numpy
_SPELLED = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
SCALARS = {kind: np.dtype(spelled) for kind, spelled in _SPELLED.items()}
WHOLE = {0, 1, 2, 3, UINT32, 5, 10, 11}
TEXT, TEXTS, NUMBER, NUMBERS = "a text", "a list of texts", "a whole number", "a list of whole numbers"
# What the readers of this package rely on. The sizes, llama.*, are checked by the family like those of a config.json.
EXPECTED = {
    "general.architecture": TEXT,
    "split.count": NUMBER,
    "tokenizer.ggml.model": TEXT,
    PRE_TOKENIZER: TEXT,
    "tokenizer.ggml.tokens": TEXTS,
    "tokenizer.ggml.merges": TEXTS,
    "tokenizer.ggml.token_type": NUMBERS,
    "tokenizer.ggml.bos_token_id": NUMBER,
    "tokenizer.ggml.eos_token_id": NUMBER,
    "tokenizer.ggml.unknown_token_id": NUMBER,
    "tokenizer.ggml.padding_token_id": NUMBER,
    "tokenizer.chat_template": TEXT,
    "llama.context_length": NUMBER,
}

# Parsed once, also for the tokenizer. Weak: the vocabulary goes when its last reader lets go.
_open: WeakValueDictionary = WeakValueDictionary()


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: its kind is a gguf.GGMLQuantizationType; shape as the file has it, the innermost dimension first;
    data_offset: of its first byte in the file."""

    name: str
    tensor_type: object
    shape: tuple[int, ...]
    path: Path
    data_offset: int
    n_bytes: int

    @property
    def data(self) -> np.ndarray:
        """Its bytes, mapped: [..., rows, bytes of a row]."""
        mapped = np.memmap(self.path, np.uint8, "r", self.data_offset, (self.n_bytes,))
        return mapped.reshape(*reversed(self.shape[1:]), -1)


@dataclass
class GGUFFile:
    """A parsed header. fields: key of the metadata -> value; texts stay bytes until read_value decodes them."""

    fields: dict[str, object] = field(default_factory=dict)
    tensors: list[GGUFTensor] = field(default_factory=list)


class _Header:
    """Sequential reader of a GGUF header; ValueError for anything that the format does not allow."""

    def __init__(self, data: mmap.mmap):
        self.data, self.place = data, 0
        self._values_left = MOST_VALUES

    def skip(self, count: int) -> int:
        """Advance by `count` bytes; return where they begin."""
        begin = self.place
        if count > len(self.data) - begin:
            raise ValueError(f"{count:,} bytes are due at byte {begin:,}, the file has {len(self.data):,}")
        self.place += count
        return begin

    def number(self, nbytes: int) -> int:
        begin = self.skip(nbytes)
        return int.from_bytes(self.data[begin : self.place], "little")

    def name(self) -> str:
        length = self.number(8)
        if length > MAX_NAME:
            raise ValueError(f"a name of {length:,} bytes at byte {self.place:,}")
        begin = self.skip(length)
        name = self.data[begin : self.place].decode("utf-8")
        if not (name and name.isprintable()):
            raise ValueError(f"'{shown(name)}' is no name")
        return name

    def text(self) -> bytes:
        length = self.number(8)
        if length > MAX_TEXT:
            raise ValueError(f"a text of {length:,} bytes at byte {self.place:,}")
        begin = self.skip(length)
        return self.data[begin : self.place]

    def value(self) -> tuple[str | None, object]:
        """The next value, and which of the expected it is. Texts come as bytes, lists of numbers as arrays."""
        kind = self.number(4)
        if kind == STRING:
            return TEXT, self.text()
        if kind == ARRAY:
            return self._array()
        return (NUMBER if kind in WHOLE else None), self._numbers(kind, 1)[0].item()

    def _array(self) -> tuple[str | None, object]:
        kind, count = self.number(4), self.number(8)
        self._values_left -= count
        if self._values_left < 0:
            raise ValueError(f"a list of {count:,} values; all together may have {MOST_VALUES:,}")
        if kind == STRING:
            return TEXTS, [self.text() for _ in range(count)]
        return (NUMBERS if kind in WHOLE else None), self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in SCALARS:  # lists in lists are among them: no reader has a use for those
            raise ValueError(f"metadata of the unknown kind {kind} before byte {self.place:,}")
        begin = self.skip(count * SCALARS[kind].itemsize)
        return np.frombuffer(self.data[begin : self.place], SCALARS[kind])


def _parse(path: Path, gguf) -> GGUFFile:
    """Parse a header and check that tensors do not overlap and lie in the file. Raises CheckpointError."""
    try:
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Header(data)
            tensors, keys = _read_counts(header)
            file = GGUFFile()
            findings, alignment = _read_metadata(header, keys, file)
            findings += _read_tensors(header, tensors, file, path=path, alignment=alignment, gguf=gguf)
    except ValueError as error:  # a name that is not UTF-8 is one too, and an empty file
        raise _damaged(path, error) from error
    if findings:
        raise CheckpointError(report(f"{path} is damaged or cut off:", findings, "Fetch the file again."))
    return file


def _read_counts(header: _Header) -> tuple[int, int]:
    """The numbers of tensors and of metadata."""
    header.skip(len(MAGIC))
    if header.data[: len(MAGIC)] != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = header.number(4)
    if version and not version % 2**16:
        raise ValueError("the numbers in it are big-endian, which only machines of another kind can use")
    if version not in VERSIONS:
        raise ValueError(f"its version is {version}; known are {', '.join(map(str, VERSIONS))}")
    return header.number(8), header.number(8)


def _read_metadata(header: _Header, count: int, file: GGUFFile) -> tuple[list[str], int]:
    """Fill in the metadata; what is wrong with it, and the alignment of tensors that it says."""
    findings = []
    for _ in range(count):
        key, begin = header.name(), header.place
        found, file.fields[key] = header.value()
        if found != EXPECTED.get(key, found):
            findings.append(f"its metadata {key} is not {EXPECTED[key]}")
        if key == ALIGNMENT and header.data[begin : begin + 4] != UINT32.to_bytes(4, "little"):
            raise ValueError(f"{ALIGNMENT} is not of its kind")
    alignment = file.fields.get(ALIGNMENT, 32)
    if not alignment or alignment & (alignment - 1):
        raise ValueError(f"{ALIGNMENT} is not a power of two")
    return findings, alignment


def _read_tensors(header: _Header, count: int, file: GGUFFile, *, path: Path, alignment: int, gguf) -> list[str]:
    """Fill in the tensors; what is wrong: each begins at a multiple of the alignment, behind the one before it."""
    findings, found = [], []
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    for _ in range(count):
        name, dimensions = header.name(), header.number(4)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions:,} dimensions")
        shape = tuple(header.number(8) for _ in range(dimensions))
        kind, offset = header.number(4), header.number(8)
        values, nbytes = sizes.get(kind, (0, 0))
        if not values:
            findings.append(f"{name} is of the unknown kind {kind}")
        elif shape[0] % values or offset % alignment:
            findings.append(f"{name} is no whole number of blocks of {values}, or not at a multiple of {alignment}")
        else:
            found.append((offset, math.prod(shape) // values * nbytes, name, kind, shape))
    begin = -(-header.place // alignment) * alignment  # of what is behind the header
    file.tensors = [
        GGUFTensor(name, gguf.GGMLQuantizationType(kind), shape, path, begin + offset, nbytes)
        for offset, nbytes, name, kind, shape in found
    ]
    twice = len({tensor.name for tensor in file.tensors}) < len(found)
    findings += ["it holds tensors of one name twice"] if twice else []
    return findings + _misplaced([place[:3] for place in found], len(header.data) - begin)


def _misplaced(places: list[tuple[int, int, str]], size: int) -> list[str]:
    """A finding for each tensor that reaches into the next or out of the file. size: of what is behind the header."""
    findings = []
    end = 0
    for offset, nbytes, name in sorted(places):
        if offset < end:
            findings.append(f"{name} begins at byte {offset:,} of the data, where another tensor lies")
        if offset + nbytes > size:
            findings.append(f"the file is cut off: {name} ends at byte {offset + nbytes:,} of {size:,}")
        end = max(end, offset + nbytes)
    return findings


def open_gguf(path: Path) -> GGUFFile:
    """The parsed header of a file, cached while it is referenced and the file is unchanged.

    Raises InstallationError without the gguf package, CheckpointError for a damaged file.
    """
    gguf = import_gguf(path)
    refuse_lfs_pointer(path, CheckpointError)
    status = path.stat()
    key = (path.resolve(), status.st_mtime_ns, status.st_size)
    file = _open.get(key)
    if file is None:
        file = _open[key] = _parse(path, gguf)
    return file


def read_value(file: GGUFFile, key: str, path: Path) -> object:
    """The metadata under a key as a Python value, None if absent. Raises CheckpointError for undecodable text."""
    found = file.fields.get(key)
    try:
        if isinstance(found, bytes):
            return found.decode("utf-8")
        if isinstance(found, list):
            return [text.decode("utf-8") for text in found]
    except UnicodeDecodeError as error:
        raise _damaged(path, error, place=f"its metadata {key} ") from error
    return found.tolist() if isinstance(found, np.ndarray) else found


def pre_tokenizer_note(pre: object) -> str | None:
    """A note for the user on a file whose tokenizer.ggml.pre is `pre`."""
    if pre not in UNNAMED:
        return None
    return f"the file does not name its pre-tokenizer ({PRE_TOKENIZER} is {pre!r}): text is split as gpt-2 does"


def import_gguf(path: Path):
    """The gguf package. Raises InstallationError."""
    try:
        import gguf
    except ImportError as error:
        raise InstallationError(
            f"{path} can only be read with the package gguf, which is not installed.\nInstall it with "
            f'pip install "aquila_pd[gguf]".'
        ) from error
    return gguf


def _damaged(path: Path, error: Exception, *, place: str = "") -> CheckpointError:
    found = f"{place}is damaged or cut off ({type(error).__name__}: {error})"
    return CheckpointError(f"{path}{': ' if place else ' '}{found}. Fetch the file again.")
