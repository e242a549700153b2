"""Benchmark contamination: n-gram overlap of training rows with the items of evaluation sets.

A benchmark is a file of items (JSON lines, a JSON array, parquet, CSV); every text in an item is looked at, whatever
its key. A row is contaminated when a run of 13 words of one of its messages (21 characters where the item is Chinese or
Japanese: as long, when spoken) is a run of an item's words. Case, punctuation and white space do not matter.

    benchmark   ... She sells the remainder at the farmers' market daily for $2 per fresh duck egg. ...
    row         Solve step by step:  she sells the remainder at the farmers market daily for 2 per fresh duck egg
                                     [---------------- 16 words in a row: reported, whole -----------------]

What many items begin with ("Please choose the correct answer to the question") is how a benchmark asks, not what: a run
that has fewer than OWN words beside such text does not count. Of an item that is shorter than a run, the longest text
is looked for as a whole; one of fewer than 8 words (13 characters) is not looked for, and the report says how many.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..utils.errors import DataError
from .counters import Rule
from .ngrams import hashes, is_ideograph, joined, runs, words
from .sources import find_files, read_rows

CONTAMINATED = Rule("contaminated", "a run of words of a benchmark is in the row", "dropped")
CONTAMINATED_KEPT = Rule("contaminated_kept", "a run of words of a benchmark is in the row; it stays", "counted")
ITEMS = 5  # items that are named for one row
SHOWN = 60  # words of an overlap that a report shows
MANY = 5  # items that share a text: with more it is how the benchmark asks
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # GSM8K's calculations, which copies of it leave out
CSV = ".csv"


@dataclass(frozen=True)
class Measure:
    """How long runs are. run: words of one; whole: of the shortest text looked for as a whole; asking: of the runs that
    tell how a benchmark asks; own: words that a run needs beside such text."""

    run: int
    whole: int
    asking: int
    own: int


SPACED, UNSPACED = Measure(13, 8, 8, 5), Measure(21, 13, 13, 8)


@dataclass(frozen=True)
class Overlap:
    """What a row shares with an item. benchmark: its file; item: its row in it, from 1; words: how many in a run;
    share: of the words of the item's text; text: what is shared, as words."""

    benchmark: str
    item: int
    words: int
    share: float
    text: str

    def to_json(self) -> dict:
        return {
            "benchmark": self.benchmark,
            "item": self.item,
            "words": self.words,
            "share": round(self.share, 3),
            "text": self.text,
        }


@dataclass(frozen=True)
class _Text:
    """One text of an item, as numbers of its words."""

    file: int
    item: int
    numbers: np.ndarray
    measure: Measure


class Benchmarks:
    """The runs of all items of some files, ready to be found in rows.

    Memory: 16 bytes a run and 8 a word (GSM8K's test set: 2 MB). Raises DataError for a file that cannot be read whole,
    and for one without a text that can be looked for.
    """

    def __init__(self, patterns: Sequence[str]):
        self.files = [file for found in find_files(patterns, also=(CSV,)) for file in found]
        self.items = [0] * len(self.files)
        self.too_short = [0] * len(self.files)  # items that are not looked for
        self._texts: list[_Text] = []
        for file, path in enumerate(self.files):
            self._add(file, path)
        self._tables = dict(self._tabulated())

    def _add(self, file: int, path: Path) -> None:
        before = len(self._texts)
        for number, value in enumerate(_items_of(path), 1):
            self.items[file] = number
            found = list(_texts_of(value, file, number))
            self.too_short[file] += not found
            self._texts += found
        if len(self._texts) == before:
            raise DataError(
                f"{path} holds no text of at least {SPACED.whole} words that rows could be compared with.\n"
                "Give a benchmark's file, with one item a line or row."
            )

    def _tabulated(self) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        """For each length of runs: their numbers, sorted, and of each the text and the place in it."""
        asking = {measure: _shared(self._texts, measure) for measure in (SPACED, UNSPACED)}
        of_length: dict[int, list[tuple[np.ndarray, int, np.ndarray]]] = {}
        for number, text in enumerate(self._texts):
            length = min(text.measure.run, len(text.numbers))
            found = runs(text.numbers, length)
            places = _own_places(text, length, asking[text.measure])
            if len(places):
                of_length.setdefault(length, []).append((found[places], number, places))
        for length, parts in of_length.items():
            keys = np.concatenate([found for found, _, _ in parts])
            texts = np.concatenate([np.full(len(found), number, np.uint32) for found, number, _ in parts])
            places = np.concatenate([places.astype(np.uint32) for _, _, places in parts])
            order = np.argsort(keys, kind="stable")
            yield length, (keys[order], texts[order], places[order])

    def overlaps(self, messages: Iterable[dict]) -> list[Overlap]:
        """What a row shares with items, the longest of each item, longest first; [] for a clean row."""
        best: dict[tuple[int, int], Overlap] = {}
        for message in messages:
            spoken = _words(message["content"])
            numbers = hashes(spoken)
            for overlap, text in self._found(spoken, numbers):
                key = (text.file, text.item)
                if key not in best or overlap.words > best[key].words:
                    best[key] = overlap
        ranked = sorted(best.items(), key=lambda entry: (-entry[1].words, entry[0]))
        return [overlap for _, overlap in ranked[:ITEMS]]

    def _found(self, spoken: list[str], numbers: np.ndarray) -> Iterator[tuple[Overlap, _Text]]:
        for length, (keys, texts, places) in self._tables.items():
            here = runs(numbers, length)
            first = np.searchsorted(keys, here)
            hits = np.flatnonzero(keys[np.minimum(first, len(keys) - 1)] == here)
            ends: dict[int, int] = {}  # of the last overlap with a text: its other runs are part of it
            for hit in hits.tolist():
                for entry in range(first[hit], min(first[hit] + 2 * MANY, len(keys))):
                    if keys[entry] != here[hit]:
                        break
                    number = int(texts[entry])
                    if ends.get(number, 0) > hit:
                        continue
                    text = self._texts[number]
                    start, end = _extended(numbers, hit, text.numbers, int(places[entry]), length)
                    if end > start:
                        ends[number] = end
                        yield self._overlap(spoken[start:end], text), text

    def _overlap(self, shared: list[str], text: _Text) -> Overlap:
        more = "" if len(shared) <= SHOWN else " ..."
        name, share = str(self.files[text.file]), len(shared) / len(text.numbers)
        return Overlap(name, text.item, len(shared), share, joined(shared[:SHOWN]) + more)


def _extended(row: np.ndarray, at: int, text: np.ndarray, place: int, length: int) -> tuple[int, int]:
    """[start, end) in the row of the longest shared run around a hit; empty where only the run's number is the same."""
    if not np.array_equal(row[at : at + length], text[place : place + length]):
        return at, at
    end = length
    while at + end < len(row) and place + end < len(text) and row[at + end] == text[place + end]:
        end += 1
    back = 0
    while back < min(at, place) and row[at - back - 1] == text[place - back - 1]:
        back += 1
    return at - back, at + end


# ---------------------------------------------------------------------------------------------------- texts of items


def _items_of(path: Path) -> Iterator[object]:
    if path.suffix.lower() == CSV:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from csv.reader(file, strict=True)
        except (csv.Error, UnicodeDecodeError, OSError) as error:
            raise DataError(f"{path} cannot be read as CSV: {error}.\nFetch it again.") from error
        return

    def refuse(file: int, number: int, reason: str) -> None:
        raise DataError(f"{path}, row {number:,}: {reason}.\nA benchmark has to be whole; fetch the file again.")

    yield from (row.value for row in read_rows([path], on_bad=refuse))


def _words(text: str) -> list[str]:
    return words(_ANNOTATION.sub(" ", text) if "<<" in text else text)


def _texts_of(value: object, file: int, item: int) -> Iterator[_Text]:
    """The texts of an item as long as a run; without any, its longest one, if it is not too short."""
    found = []
    for text in _leaves(value):
        spoken = _words(text)
        eastern = sum(map(is_ideograph, spoken)) * 2 > len(spoken)
        found.append(_Text(file, item, hashes(spoken), UNSPACED if eastern else SPACED))
    long = [text for text in found if len(text.numbers) >= text.measure.run]
    if long:
        yield from long
    elif found:
        longest = max(found, key=lambda text: len(text.numbers))
        if len(longest.numbers) >= longest.measure.whole:
            yield longest


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _leaves(inner)


def _shared(texts: list[_Text], measure: Measure) -> np.ndarray:
    """Numbers, sorted, of the short runs that more than MANY items have."""
    of_item: dict[tuple[int, int], list[np.ndarray]] = {}
    for text in texts:
        if text.measure == measure:
            of_item.setdefault((text.file, text.item), []).append(runs(text.numbers, measure.asking))
    if not of_item:
        return np.empty(0, dtype=np.uint64)
    keys, items = np.unique(
        np.concatenate([np.unique(np.concatenate(r)) for r in of_item.values()]), return_counts=True
    )
    return keys[items > MANY]


def _own_places(text: _Text, length: int, asking: np.ndarray) -> np.ndarray:
    """Where runs begin that have enough words of the item's own."""
    measure = text.measure
    is_asking = np.zeros(len(text.numbers), dtype=bool)
    for place in np.flatnonzero(np.isin(runs(text.numbers, measure.asking), asking)):
        is_asking[place : place + measure.asking] = True
    own = np.concatenate([[0], np.cumsum(~is_asking)])
    return np.flatnonzero(own[length:] - own[:-length] >= measure.own)


class Report:
    """What was found, by benchmark: items met, rows, and the first `limit` pairs of item and row."""

    def __init__(self, benchmarks: Benchmarks, limit: int = 10_000):
        self._benchmarks, self._limit = benchmarks, limit
        self.rows = 0
        self.pairs: list[dict] = []
        self._met: dict[str, set[int]] = {str(file): set() for file in benchmarks.files}

    def add(self, overlaps: list[Overlap], *, file: str, number: int) -> None:
        """A contaminated row."""
        self.rows += 1
        for overlap in overlaps:
            self._met[overlap.benchmark].add(overlap.item)
            if len(self.pairs) < self._limit:
                self.pairs.append({**overlap.to_json(), "file": file, "row": number})

    def to_json(self) -> dict:
        known = zip(self._benchmarks.files, self._benchmarks.items, self._benchmarks.too_short, strict=True)
        return {
            "rows": self.rows,
            "benchmarks": [
                {"file": str(file), "items": items, "too_short": short, "met": len(self._met[str(file)])}
                for file, items, short in known
            ],
            "overlaps": self.pairs,
        }
