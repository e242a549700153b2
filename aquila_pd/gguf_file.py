"""GGUF files, parsed once for all who read from them: weights, configuration and tokenizer.

The gguf package parses; it believes every length and count a file says. So the header is gone through here first, with
nothing believed: what it refuses would have filled the memory, taken for ever, or been read as something else.
"""

import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from weakref import WeakValueDictionary

from .errors import CheckpointError, InstallationError, report
from .files import refuse_lfs_pointer, shown

PRE_TOKENIZER = "tokenizer.ggml.pre"
UNNAMED = (None, "default")  # a converter that did not recognise the splitting pattern writes one of these

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4  # of ggml
MAX_NAME = 255  # bytes of a key or of a tensor's name; ggml has 64 for the second
# Values in all lists together; a vocabulary of 150,000 has 600,000 with its types and merges. The gguf package makes an
# object or two of each, about a kilobyte, so that a list of bytes would become a thousand times as large.
MOST_VALUES = 1_000_000
ALIGNMENT = "general.alignment"

STRING, ARRAY, UINT32 = 8, 9, 4
# kind of metadata -> bytes of a value
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, UINT32: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
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

# Parsing takes seconds, most of them for the vocabulary. Weak: the file is unmapped when its last reader lets go.
_open: WeakValueDictionary = WeakValueDictionary()


class _Header:
    """Goes through a GGUF file from its beginning; a ValueError where it is not what the format allows."""

    def __init__(self, data: mmap.mmap):
        self.data, self.place = data, 0
        self._values_left = MOST_VALUES

    def skip(self, count: int) -> int:
        """Go on by so many bytes; return where they begin."""
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

    def value(self) -> str | None:
        """Go past a value and its kind; return which of the expected it is."""
        kind = self.number(4)
        if kind == STRING:
            self.skip(self.number(8))
            return TEXT
        if kind == ARRAY:
            return self._array()
        self.skip(self._size(kind))
        return NUMBER if kind in WHOLE else None

    def _array(self) -> str | None:
        kind, count = self.number(4), self.number(8)
        self._values_left -= count
        if self._values_left < 0:
            raise ValueError(f"a list of {count:,} values; all together may have {MOST_VALUES:,}")
        if kind != STRING:
            self.skip(count * self._size(kind))
            return NUMBERS if kind in WHOLE else None
        for _ in range(count):
            self.skip(self.number(8))
        return TEXTS

    def _size(self, kind: int) -> int:
        if kind not in SCALARS:  # lists in lists are among them: no reader has a use for those
            raise ValueError(f"metadata of the unknown kind {kind} before byte {self.place:,}")
        return SCALARS[kind]


def check_header(path: Path, sizes: Mapping[int, tuple[int, int]]) -> None:
    """Raise CheckpointError unless the header is one and every tensor has a place in the file for itself.

    sizes: kind of tensor -> (values in a block, bytes of a block).
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Header(data)
            tensors, keys = _read_counts(header)
            findings, alignment = _read_metadata(header, keys)
            findings += _read_tensors(header, tensors, alignment=alignment, sizes=sizes)
    except ValueError as error:  # a name that is not UTF-8 is one too, and an empty file
        raise _damaged(path, error) from error
    if findings:
        raise CheckpointError(report(f"{path} is damaged or cut off:", findings, "Fetch the file again."))


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


def _read_metadata(header: _Header, count: int) -> tuple[list[str], int]:
    """What is wrong with the metadata, and the alignment of tensors that it says."""
    findings, alignment = [], 32
    for _ in range(count):
        key, begin = header.name(), header.place
        found = header.value()
        if found != EXPECTED.get(key, found):
            findings.append(f"its metadata {key} is not {EXPECTED[key]}")
        if key == ALIGNMENT:
            kind, alignment = (int.from_bytes(header.data[at : at + 4], "little") for at in (begin, begin + 4))
            if kind != UINT32 or not alignment or alignment & (alignment - 1):
                raise ValueError(f"{ALIGNMENT} is not a power of two")
    return findings, alignment


def _read_tensors(header: _Header, count: int, *, alignment: int, sizes: Mapping[int, tuple[int, int]]) -> list[str]:
    """What is wrong with the tensors: each begins at a multiple of the alignment, behind the one before it."""
    findings, places = [], []
    for _ in range(count):
        name, dimensions = header.name(), header.number(4)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions:,} dimensions")
        shape = [header.number(8) for _ in range(dimensions)]
        kind, offset = header.number(4), header.number(8)
        values, nbytes = sizes.get(kind, (0, 0))
        if not values:
            findings.append(f"{name} is of the unknown kind {kind}")
        elif shape[0] % values or offset % alignment:
            findings.append(f"{name} is no whole number of blocks of {values}, or not at a multiple of {alignment}")
        else:
            places.append((offset, math.prod(shape) // values * nbytes, name))
    return findings + _misplaced(places, len(header.data) + -header.place // alignment * alignment)


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


def open_gguf(path: Path):
    """The gguf.GGUFReader of a file, the same one for everybody as long as somebody holds it and the file is the same.

    Raises InstallationError without the gguf package, CheckpointError for a damaged file.
    """
    gguf = import_gguf(path)
    refuse_lfs_pointer(path, CheckpointError)
    status = path.stat()
    key = (path.resolve(), status.st_mtime_ns, status.st_size)
    file = _open.get(key)
    if file is None:
        check_header(path, {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()})
        try:
            file = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise _damaged(path, error) from error
        _open[key] = file
    return file


def read_value(file, key: str, path: Path) -> object:
    """The metadata under a key, None when it is not there. Raises CheckpointError for one that cannot be decoded."""
    if key not in file.fields:
        return None
    try:
        return file.fields[key].contents()
    except (ValueError, IndexError, TypeError) as error:  # a string that is not UTF-8 is a ValueError
        raise _damaged(path, error, place=f"its metadata {key} ") from error


def pre_tokenizer_note(pre: object) -> str | None:
    """What the user should know of a file whose tokenizer.ggml.pre is `pre`."""
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
