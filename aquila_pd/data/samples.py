"""Tokenized samples on disk: written as a stream, read through a memory map.

A folder of samples:
  tokens.bin     int32, the ids of all samples, one behind the other
  targets.bin    uint8, 1 where the token is one that the model learns to write
  samples.bin    one RECORD for each sample
  samples.json   sizes and hashes of these files, names of the row files, counts; written last
All numbers are little-endian. A folder without samples.json is unfinished.
"""

from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np

from ..utils.atomic import sync
from ..utils.errors import DataError, report
from ..utils.files import hash_file, read_object, write_json

VERSION = 1
MANIFEST = "samples.json"
TOKENS, TARGETS, RECORDS = "tokens.bin", "targets.bin", "samples.bin"
RECORD = np.dtype(
    [
        ("offset", "<i8"),  # of the first token
        ("length", "<i8"),  # in tokens
        ("targets", "<i8"),  # tokens that give a label: targets, but never the first token, which nothing stands before
        ("row", "<i8"),  # in the file, from 1
        ("weight", "<f8"),  # how often it is seen in an epoch
        ("file", "<i4"),  # number of the row file
        ("part", "<i4"),  # of the row, from 0; other than 0 only where a row was split
    ]
)
PENDING = 4096  # records held before they are written


class Origin(NamedTuple):
    """Where a sample comes from: the row file's name, the row in it from 1, the part of that row from 0."""

    file: str
    row: int
    part: int


def label_count(is_target: np.ndarray) -> int:
    """How many labels a sample gives: bool [n] -> the targets that have a token in front."""
    return int(np.count_nonzero(is_target[1:]))


class _Stream:
    """A file written from begin to end, hashed on the way."""

    def __init__(self, path: Path):
        self.path, self.bytes, self._hash = path, 0, sha256()
        self._file: BinaryIO = path.open("wb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def close(self) -> None:
        self._file.close()

    def facts(self) -> dict:
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}


class SamplesWriter:
    """Writes a folder of samples in constant memory; the folder must exist and is finished by `finish` alone.

    As a context manager it closes its files when something fails, and leaves what is unfinished without a manifest.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = self.tokens = self.targets = self.longest = 0
        self.largest_id = -1
        self._streams = {name: _Stream(folder / name) for name in (TOKENS, TARGETS, RECORDS)}
        self._pending: list[tuple] = []

    def __enter__(self) -> "SamplesWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for stream in self._streams.values():
            stream.close()

    def add(
        self, ids: np.ndarray, is_target: np.ndarray, *, file: int, row: int, part: int = 0, weight: float = 1.0
    ) -> None:
        """Append a sample: ids int [n], is_target bool [n]; where it comes from, and how often it is seen."""
        assert len(ids) == len(is_target) > 0 and weight > 0
        targets = label_count(is_target)
        self._pending.append((self.tokens, len(ids), targets, row, weight, file, part))
        self._streams[TOKENS].write(np.asarray(ids, dtype="<i4").tobytes())
        self._streams[TARGETS].write(np.asarray(is_target, dtype=np.uint8).tobytes())
        self.count += 1
        self.tokens += len(ids)
        self.targets += targets
        self.longest = max(self.longest, len(ids))
        self.largest_id = max(self.largest_id, int(np.max(ids)))
        if len(self._pending) >= PENDING:
            self._write_pending()

    def finish(self, files: Sequence[str], **facts: object) -> dict:
        """Write what is left and the manifest, with more facts in it; returns the manifest. files: the row files."""
        self._write_pending()
        for stream in self._streams.values():
            stream.close()
            sync(stream.path)
        manifest = {
            "version": VERSION,
            "samples": self.count,
            "tokens": self.tokens,
            "targets": self.targets,
            "longest": self.longest,
            "largest_id": self.largest_id,
            "row_files": list(files),
            "files": {name: stream.facts() for name, stream in self._streams.items()},
            **facts,
        }
        write_json(self.folder / MANIFEST, manifest, fsync=True)
        return manifest

    def _write_pending(self) -> None:
        self._streams[RECORDS].write(np.array(self._pending, dtype=RECORD).tobytes())
        self._pending.clear()


class Samples:
    """A finished folder of samples, read-only; nothing of it is in memory but what is looked at.

    manifest: what samples.json says. digest: names the content; equal digests, equal samples in equal order.
    """

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest = folder, manifest
        self._tokens = _mapped(folder / TOKENS, np.dtype("<i4"))
        self._targets = _mapped(folder / TARGETS, np.dtype(np.bool_))
        self.records = _mapped(folder / RECORDS, RECORD)

    @classmethod
    def open(cls, folder: Path | str, *, verify: bool = False) -> "Samples":
        """The samples of a folder. verify: every byte is hashed, not only every size compared.

        Raises DataError for what is unfinished, damaged or of another version.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            what = (
                f"holds no {MANIFEST}: it is unfinished, or no folder of samples" if folder.is_dir() else "is not there"
            )
            raise DataError(f"{folder} {what}. Prepare the data again (`aquila-pd data prepare`).")
        manifest = read_object(folder / MANIFEST, DataError)
        if manifest.get("version") != VERSION:
            raise DataError(
                f"{folder} was prepared by another version of this program (format {manifest.get('version')!r}, here "
                f"{VERSION}). Prepare the data again, into another folder."
            )
        findings = _damage(folder, manifest, verify=verify)
        if findings:
            advice = "Remove the folder and prepare the data again; nothing else is lost."
            raise DataError(report(f"The prepared samples in {folder} are damaged:", findings, advice))
        return cls(folder, manifest)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 [samples]."""
        return self.records["length"]

    @property
    def target_counts(self) -> np.ndarray:
        """Labels that each sample gives, int64 [samples]."""
        return self.records["targets"]

    @cached_property
    def digest(self) -> str:
        hashes = [self.manifest["files"][name]["sha256"] for name in (TOKENS, TARGETS, RECORDS)]
        return sha256("".join(hashes).encode()).hexdigest()

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n], is_target bool [n]), views into the files."""
        record = self.records[number]
        place = slice(int(record["offset"]), int(record["offset"] + record["length"]))
        return self._tokens[place], self._targets[place]

    def origin(self, number: int) -> Origin:
        """The row that a sample was made of."""
        record = self.records[number]
        return Origin(self.manifest["row_files"][record["file"]], int(record["row"]), int(record["part"]))


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _damage(folder: Path, manifest: dict, *, verify: bool) -> list[str]:
    """What is wrong with the files, by size, or by content too."""
    try:
        written = {name: manifest["files"][name] for name in (TOKENS, TARGETS, RECORDS)}
        tokens, count = int(manifest["tokens"]), int(manifest["samples"])
        said = {TOKENS: 4 * tokens, TARGETS: tokens, RECORDS: RECORD.itemsize * count}
        findings = [f"{MANIFEST} contradicts itself about {n}" for n in said if written[n]["bytes"] != said[n]]
        hashes = {name: str(facts["sha256"]) for name, facts in written.items()}
    except (KeyError, TypeError, ValueError):
        return [f"{MANIFEST} does not say what the files hold"]
    for name, size in said.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            findings.append(f"{name} is missing")
        elif found != size:
            findings.append(f"{name} has {found:,} bytes, not {size:,}")
        elif verify and hash_file(path) != hashes[name]:
            findings.append(f"{name} has other bytes than were written")
    return findings
