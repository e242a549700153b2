"""What rows a run is made of and what is done with them: DataSpec, which a recipe and a command line both fill in.

No file is opened here; what can be judged from the values alone is, all findings at once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..utils.errors import DataError, report, shown_value

FORMATS = ("auto", "infinity", "openai", "alpaca", "paddlenlp")
OVERLONG = ("split", "truncate", "drop")
DEDUPLICATE = ("exact", "near", "none")
SHARPEST, LOOSEST = 0.99, 0.5  # thresholds of near-duplicates that signatures of 128 numbers can tell apart
HEAVIEST = 1000.0  # weight: a row seen more often in one epoch is a mistake in a file, not a wish


@dataclass(frozen=True)
class Source:
    """Files that belong together.

    files: paths and globs; format: one of FORMATS; weight: how often each row is seen in an epoch, 2.5 being twice, and
    half of the rows once more.
    """

    files: tuple[str, ...]
    format: str = "auto"
    weight: float = 1.0


@dataclass(frozen=True)
class DataSpec:
    """The rows of one stage. Raises DataError that names every value that cannot be.

    train: what is trained on. held_out: the share of its rows kept for evaluation, by a hash of seed and content: equal
    rows are on one side, rows that are nearly equal only where `near` leaves one of them.
    evaluate: files of their own for evaluation; a row of them that is in `train` too is not trained on.
    overlong: what becomes of a sample longer than a pack (split: cut at turn borders, every part trained on).
    max_bad_lines: lines that cannot be read before the run stops.
    deduplicate: exact (the same messages), near (also rows of which near_threshold of the shingles are the same), none.
    languages: codes such as "zh", "en"; sources, exclude_sources: names or globs for a row's `source`. Empty: all.
    contamination: benchmark files; drop_contaminated: rows that hold a piece of one are dropped, not only reported.
    """

    train: tuple[Source, ...]
    held_out: float = 0.0
    evaluate: tuple[Source, ...] = ()
    overlong: str = "split"
    max_bad_lines: int = 100
    deduplicate: str = "exact"
    near_threshold: float = 0.8
    languages: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    exclude_sources: tuple[str, ...] = ()
    contamination: tuple[str, ...] = ()
    drop_contaminated: bool = True

    def __post_init__(self) -> None:
        findings = [*_wrong_with_sources(self), *_wrong_with_values(self)]
        if findings:
            raise DataError(report("These settings of the data cannot be:", findings, "Nothing was read."))


def _wrong_with_sources(spec: DataSpec) -> Iterator[str]:
    if not spec.train:
        yield "train: no files are given"
    for name in ("train", "evaluate"):
        for number, source in enumerate(getattr(spec, name)):
            where = f"{name}.{number}"
            if not source.files:
                yield f"{where}.files: none are given"
            yield from _wrong_with_texts(f"{where}.files", source.files)
            yield from _wrong_choice(f"{where}.format", source.format, FORMATS)
            if not _is_number(source.weight) or not 0 < source.weight <= HEAVIEST:
                yield f"{where}.weight: {shown_value(source.weight)} is no number above 0 and up to {HEAVIEST:,.0f}"
            elif name == "evaluate" and source.weight != 1:
                yield f"{where}.weight: rows for evaluation are seen once; leave the weight out"


def _wrong_with_values(spec: DataSpec) -> Iterator[str]:
    if not _is_number(spec.held_out) or not 0 <= spec.held_out < 1:
        yield f"held_out: {shown_value(spec.held_out)} is no share from 0 to below 1"
    if not _is_number(spec.near_threshold) or not LOOSEST <= spec.near_threshold <= SHARPEST:
        yield f"near_threshold: {shown_value(spec.near_threshold)} is no number from {LOOSEST} to {SHARPEST}"
    if type(spec.max_bad_lines) is not int or spec.max_bad_lines < 0:
        yield f"max_bad_lines: {shown_value(spec.max_bad_lines)} is no number of lines"
    if type(spec.drop_contaminated) is not bool:
        yield f"drop_contaminated: {shown_value(spec.drop_contaminated)} is neither true nor false"
    yield from _wrong_choice("overlong", spec.overlong, OVERLONG)
    yield from _wrong_choice("deduplicate", spec.deduplicate, DEDUPLICATE)
    for name in ("languages", "sources", "exclude_sources", "contamination"):
        yield from _wrong_with_texts(name, getattr(spec, name))
    if spec.held_out and spec.evaluate:
        yield "held_out and evaluate: rows for evaluation come from one of them; leave out the other"


def _wrong_choice(name: str, value: object, choices: tuple[str, ...]) -> Iterator[str]:
    if value not in choices:
        yield f"{name}: {shown_value(value)} is none of {', '.join(choices)}"


def _wrong_with_texts(name: str, values: object) -> Iterator[str]:
    if not isinstance(values, tuple):  # a text alone would be taken for a list of letters
        yield f"{name}: {shown_value(values)} is no tuple of texts"
        return
    yield from (
        f"{name}: {shown_value(value)} is no text" for value in values if not isinstance(value, str) or not value
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
