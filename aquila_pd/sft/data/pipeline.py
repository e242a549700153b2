"""From a DataSpec to conversations: files in order, rows read, normalized, filtered, without duplicates.

    files of `evaluate`, then of `train` (globs sorted) -> rows -> format -> source -> normalize -> language
        -> exact duplicates -> contamination -> near-duplicates -> held out or not

The same spec over the same files gives the same conversations in the same order, on every machine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .counters import Counters
from .settings import DataSpec


class DataFile(NamedTuple):
    """One file of a spec. part: "train" or "evaluate"."""

    path: Path
    format: str
    weight: float
    part: str


class Conversation(NamedTuple):
    """One row that is left.

    messages: [{"role": "system" | "user" | "assistant", "content": text}, ...], normalized. id: the row's own, "" where
    it has none. file: number in `data_files(spec)`; number: line (JSONL) or row of it, from 1. source: the row's
    `source`, "" where it has none. weight: of its Source. held_out: for evaluation, not for training.
    """

    messages: list[dict]
    id: str
    file: int
    number: int
    source: str
    weight: float
    held_out: bool


@dataclass
class Findings:
    """What was found in rows beside counts, bounded in size; filled while conversations are read."""

    bad_lines: list[str] = field(default_factory=list)  # the last few, each with file, line and reason
    duplicates: dict = field(default_factory=dict)  # {"exact": {...}, "near": {...}}: groups, rows, examples
    contamination: list[dict] = field(default_factory=list)  # benchmark item, row, overlapping text

    def to_json(self) -> dict:
        return {"bad_lines": self.bad_lines, "duplicates": self.duplicates, "contamination": self.contamination}


def data_files(spec: DataSpec) -> list[DataFile]:
    """The files of a spec in the order they are read in: those of `evaluate`, then those of `train`.

    Raises DataError naming every file that is not there, glob that finds nothing, and file given twice.
    """
    raise NotImplementedError


def conversations(
    spec: DataSpec,
    seed: int,
    *,
    counters: Counters,
    knows_system: bool = True,
    findings: Findings | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Iterator[Conversation]:
    """The conversations of a spec, one after the other; bounded memory beside what finding duplicates says.

    counters: rows per rule, filled on the way. knows_system: the template can write system messages; without, their
    text goes in front of the first user turn. findings: filled on the way. note: told of each bad line.
    Raises DataError for files that cannot be read, more bad lines than allowed, and when nothing is left.
    """
    raise NotImplementedError
