"""Deduplication in one pass, first row kept: exact by content hash, near by MinHash signatures and LSH bands.

Exact: the same messages. Near: the MinHash signatures of two rows (128 numbers of the row's runs of three words) agree
in a share of at least the threshold, which estimates the share of runs that both have of those that either has. A row
is compared with kept rows only, so each row that goes is like a row that stays. Candidates are found by bands: rows
that agree in all numbers of one band meet in its table. Rows of fewer than LEAST words are compared exactly only: as
words, "2 + 2" and "2 * 2" are the same.

Memory, for each row that is kept:

    exact   16 bytes, times 1.4 to 2.9 for free places; half as much again while the table grows
    near    8 bytes, and 5 for each band (18 at threshold 0.8), these times 1.7 to 3.4 for free places, so 160 to 310;
            and 512 bytes on disk, in a file without a name that goes with the process

An exact digest has 64 bits: among ten million rows, the chance that any two that differ are taken for one is three in
a million.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from .counters import Rule
from .ngrams import hashes, runs, words

SAME_ROW = Rule("duplicate_exact", "the same messages as an earlier row", "dropped")
LIKE_ROW = Rule("duplicate_near", "nearly the same words as an earlier row", "dropped")
EXAMPLES = 20  # groups that a report shows
MEMBERS = 5  # rows of each

NUMBERS = 128  # of a signature; the share of equal ones is the likeness with a standard error of 0.035 at 0.8
SHINGLE = 3  # words
LEAST = 10  # words of a row that is looked at for likeness
BATCH = 4096  # shingles hashed at once: 2 MB
CERTAIN = 0.95  # chance that two rows just as like as the threshold meet in a band
PROBES = 32  # places of a table looked at: rows that share a band and are unlike would make longer searches
CHUNK = 1 << 14  # signatures mapped at once: 8 MB

Place = tuple[int, int]  # of a row: file, number


def digest(messages: Sequence[dict]) -> bytes:
    """Content hash of roles and words, 16 bytes."""
    found = blake2b(digest_size=16)
    for message in messages:
        content = message["content"].encode("utf-8", "surrogatepass")
        found.update(f"{message['role']} {len(content)} ".encode())
        found.update(content)
    return found.digest()


# ------------------------------------------------------------------------------------------------------------ exact


class ExactIndex:
    """Digests of the rows so far, in a table of open addressing, each with the place of the row that had it first.

    groups: rows that others are the same as.
    """

    def __init__(self) -> None:
        self._count = self.groups = 0
        self._make(1 << 10)

    def _make(self, size: int) -> None:
        self._keys = np.zeros(size, dtype=np.uint64)  # 0: free
        self._places = np.zeros(size, dtype=np.uint64)

    def __len__(self) -> int:
        return self._count

    def find(self, key: bytes) -> Place | None:
        """Where a row of this digest was first; None when it was not."""
        slot = self._slot(_key(key))
        if not self._keys[slot]:
            return None
        self.groups += _mark(self._places, slot)
        return _unpacked(self._places[slot])

    def first(self, key: bytes, place: Place) -> Place | None:
        """The same, and a row that was not there is remembered at `place`."""
        found = self.find(key)
        if found is None:
            slot = self._slot(_key(key))
            self._keys[slot], self._places[slot] = _key(key), _packed(place)
            self._count += 1
            if self._count * 10 > len(self._keys) * 7:
                self._grow()
        return found

    def _slot(self, number: int) -> int:
        """Where a digest stands, or would."""
        mask = len(self._keys) - 1
        slot = number & mask
        while (found := self._keys[slot]) and found != number:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        keys, places = self._keys, self._places
        self._make(2 * len(keys))
        for old in np.flatnonzero(keys):
            slot = self._slot(int(keys[old]))
            self._keys[slot], self._places[slot] = keys[old], places[old]


def _key(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little") or 1  # 0 is a free place


# A place is 64 bits: is it the first of a group (1), the file (23), the row in it (40).
_GROUP = 1 << 63


def _packed(place: Place) -> int:
    return place[0] << 40 | place[1]


def _unpacked(number: np.uint64) -> Place:
    plain = int(number) & _GROUP - 1
    return plain >> 40, plain & (1 << 40) - 1


def _mark(places: np.ndarray, slot: int) -> bool:
    """Say of a place that it has a group; whether that is new."""
    is_new = not int(places[slot]) & _GROUP
    places[slot] |= np.uint64(_GROUP)
    return is_new


# ------------------------------------------------------------------------------------------------------------- near


class Signer:
    """Makes signatures. The same text has the same one on every machine."""

    def __init__(self) -> None:
        from datasketch import MinHash

        same = {"seed": 1, "scheme": "affine32"}
        drawn = MinHash(NUMBERS, **same).permutations  # once: drawing them takes longer than a row
        self._make = lambda: MinHash(NUMBERS, hashfunc=int, permutations=drawn, **same)

    def sign(self, messages: Iterable[dict]) -> np.ndarray | None:
        """uint32 [NUMBERS]; None for a row of fewer than LEAST words."""
        numbers = shingles(messages)
        if numbers is None:
            return None
        found = self._make()
        for start in range(0, len(numbers), BATCH):
            found.update_batch(numbers[start : start + BATCH].tolist())
        return found.hashvalues


def shingles(messages: Iterable[dict]) -> np.ndarray | None:
    """uint32, without repeats: a number for each run of SHINGLE words of a conversation, where the role is a word.

    None for fewer than LEAST words.
    """
    turns = [(f"<{message['role']}>", words(message["content"])) for message in messages]
    if sum(len(spoken) for _, spoken in turns) < LEAST:
        return None
    said = [word for role, spoken in turns for word in (role, *spoken)]
    return np.unique(runs(hashes(said), SHINGLE) >> np.uint64(32)).astype(np.uint32)


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, numbers in each): the widest bands in which rows as like as the threshold still meet, nearly always."""
    for width in range(NUMBERS, 1, -1):
        bands = NUMBERS // width
        if 1 - (1 - threshold**width) ** bands >= CERTAIN:
            return bands, width
    return NUMBERS, 1


class NearIndex:
    """Signatures of the rows kept so far. threshold: likeness from which a row is taken for one of them.

    folder: where the file of signatures goes; None: the system's folder for temporary files. groups: rows that others
    are like.
    """

    def __init__(self, threshold: float, *, folder: Path | None = None):
        self._least = threshold * NUMBERS - 1e-9  # equal numbers
        self._bands, self._width = bands_for(threshold)
        self._signatures = _Signatures(folder)
        self._places: list[np.ndarray] = []
        self.groups = 0
        self._make(1 << 12)

    def _make(self, size: int) -> None:
        self._rows = np.zeros(size, dtype=np.uint32)  # number of a kept row, from 1; 0: free
        self._tags = np.zeros(size, dtype=np.uint8)  # a part of the band's hash, so that few signatures are fetched

    def __len__(self) -> int:
        return len(self._signatures)

    def first(self, signature: np.ndarray, place: Place) -> Place | None:
        """Where the kept row is that this one is most like; None when it is like none, and is kept."""
        starts, tags = (found[0] for found in self._bands_of(signature[None]))
        number = self._likest(signature, starts, tags)
        if number is not None:
            chunk, offset = divmod(number, CHUNK)
            self.groups += _mark(self._places[chunk], offset)
            return _unpacked(self._places[chunk][offset])
        self._keep(signature, place)
        if len(self) * self._bands * 10 > len(self._rows) * 6:
            self._grow()
        else:
            self._enter(len(self), starts.tolist(), tags)
        return None

    def _bands_of(self, signatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64, uint8 [rows, bands]: where in the table the search for each band begins, and its tag."""
        used = signatures[:, : self._bands * self._width].astype(np.uint64)
        grouped = used.reshape(len(used), self._bands, self._width)
        found = np.tile(np.arange(1, self._bands + 1, dtype=np.uint64), (len(used), 1))
        for place in range(self._width):
            found = (found ^ grouped[:, :, place]) * np.uint64(0xD6E8FEB86659FD93)
            found ^= found >> np.uint64(32)
        return (found & np.uint64(len(self._rows) - 1)).astype(np.int64), (found >> np.uint64(56)).astype(np.uint8)

    def _likest(self, signature: np.ndarray, starts: np.ndarray, tags: np.ndarray) -> int | None:
        """The number, from 0, of the kept row that is most like this one; of equals the first."""
        met: set[int] = set()
        for step in range(PROBES):
            slots = starts + step & len(self._rows) - 1
            rows = self._rows[slots]
            met.update(rows[(rows > 0) & (self._tags[slots] == tags)].tolist())
            if not rows.all():  # a free place ends the search of its band
                starts, tags = starts[rows > 0], tags[rows > 0]
                if not len(starts):
                    break
        best, most = None, self._least
        for number in sorted(met):
            same = int(np.count_nonzero(self._signatures[number - 1] == signature))
            if same >= self._least and (best is None or same > most):
                best, most = number - 1, same
        return best

    def _enter(self, number: int, starts: list[int], tags: np.ndarray) -> None:
        """Write a row, counted from 1, into the first free place of each band; into none where PROBES are taken."""
        mask = len(self._rows) - 1
        for start, tag in zip(starts, tags, strict=True):
            for step in range(PROBES):
                slot = start + step & mask
                if not self._rows[slot]:
                    self._rows[slot], self._tags[slot] = number, tag
                    break

    def _grow(self) -> None:
        """A table twice as large, filled again from the signatures: the old one is gone before."""
        size = 2 * len(self._rows)
        del self._rows, self._tags
        self._make(size)
        for begin, signatures in self._signatures.pieces():
            starts, tags = self._bands_of(signatures)
            for offset in range(len(signatures)):
                self._enter(begin + offset + 1, starts[offset].tolist(), tags[offset])

    def _keep(self, signature: np.ndarray, place: Place) -> None:
        if len(self) % CHUNK == 0:
            self._places.append(np.zeros(CHUNK, dtype=np.uint64))
        self._places[-1][len(self) % CHUNK] = _packed(place)
        self._signatures.append(signature)


class _Signatures:
    """uint32 [rows, NUMBERS] in a temporary file, mapped in chunks."""

    def __init__(self, folder: Path | None):
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it stays open as long as this is there
        self._chunks: list[np.ndarray] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> np.ndarray:
        return self._chunks[number // CHUNK][number % CHUNK]

    def append(self, signature: np.ndarray) -> None:
        if self._count % CHUNK == 0:
            nbytes = CHUNK * NUMBERS * 4
            self._file.truncate((len(self._chunks) + 1) * nbytes)
            place = len(self._chunks) * nbytes
            self._chunks.append(np.memmap(self._file, np.uint32, "r+", place, (CHUNK, NUMBERS)))
        self._chunks[-1][self._count % CHUNK] = signature
        self._count += 1

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number of its first row, the signatures) of all, 1,024 at once."""
        for number in range(0, self._count, 1024):
            begin = number % CHUNK
            yield number, self._chunks[number // CHUNK][begin : min(begin + 1024, begin + self._count - number)]


# ----------------------------------------------------------------------------------------------------------- report


class Examples:
    """Rows that went because of kept ones: how many, and the first few groups.

    groups: {place of the kept row: places of dropped ones}.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.groups: dict[Place, list[Place]] = {}

    def add(self, kept: Place, dropped: Place) -> None:
        self.rows += 1
        if kept in self.groups or len(self.groups) < EXAMPLES:
            members = self.groups.setdefault(kept, [])
            if len(members) < MEMBERS:
                members.append(dropped)
