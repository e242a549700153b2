"""Row pipeline from a DataSpec to conversations: read, normalize, filter, deduplicate, split off evaluation rows.

    files of `evaluate`, then of `train`, globs sorted
      -> rows -> format -> source -> normalize -> language          data/row_stage.py, in several processes if asked
      -> exact duplicates -> contamination -> near-duplicates       here, in the order of the rows
      -> for training or held out

The same spec over the same files gives the same conversations in the same order, on every machine, with any number of
processes. Nothing is shuffled here (data/epoch_order.py does that) and nothing is encoded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..utils.errors import DataError, report
from . import contamination, duplicates, filters, normalize
from .counters import Counters, Rule
from .duplicates import ExactIndex, Examples, NearIndex, Place
from .formats import KEYS
from .row_stage import EVALUATE, TRAIN, Chunk, DataFile, Examined, Examiner, Unreadable, examine_rows
from .settings import DataSpec, Source
from .sources import BadRows, Row, find_files, read_rows

ROWS = Rule("rows", "rows found in the files", "counted")
BAD_ROW = Rule("bad_row", "the row cannot be read as a conversation of texts", "dropped")
IN_EVALUATION = Rule("in_evaluation", "the row, or one nearly like it, is in the files of evaluate", "dropped")
HELD_OUT = Rule("held_out", "left, for evaluation", "counted")
KEPT = Rule("kept", "left, for training", "counted")
RULES = (
    ROWS,
    BAD_ROW,
    *filters.RULES[:2],
    *normalize.RULES,
    *filters.RULES[2:],
    IN_EVALUATION,
    duplicates.SAME_ROW,
    contamination.CONTAMINATED,
    contamination.CONTAMINATED_KEPT,
    duplicates.LIKE_ROW,
    HELD_OUT,
    KEPT,
)


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
    """What was found in rows beside counts, bounded in size; complete when the conversations have ended.

    bad_rows: the last few, each with file, row and reason. duplicates: {"exact": ..., "near": ...}, each {"rows" that
    went, "groups" they are of, "examples": [{"kept", "dropped"}]}. contamination: see contamination.Report. notes:
    sentences.
    """

    bad_rows: list[str] = field(default_factory=list)
    duplicates: dict = field(default_factory=dict)
    contamination: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict:
        return asdict(self)


def data_files(spec: DataSpec) -> list[DataFile]:
    """The files of a spec in the order they are read in: those of `evaluate`, then those of `train`.

    Raises DataError naming every file that is not there, glob that finds nothing, and file that is found twice.
    """
    parts: list[tuple[str, Source]] = [(EVALUATE, source) for source in spec.evaluate]
    parts += [(TRAIN, source) for source in spec.train]
    patterns = [(pattern, source, part) for part, source in parts for pattern in source.files]
    found = find_files([pattern for pattern, _, _ in patterns])
    return [
        DataFile(path, source.format, source.weight, part)
        for (_, source, part), files in zip(patterns, found, strict=True)
        for path in files
    ]


class _Enough(Exception):
    """More rows cannot be read than may be."""


class _Reading:
    """Rows on their way in: counts them, and watches over those that cannot be read."""

    def __init__(self, files: Sequence[DataFile], spec: DataSpec, counters: Counters, note: Callable[[str], None]):
        self._paths = [file.path for file in files]
        self._limit, self._counters = spec.max_bad_lines, counters
        self.bad = BadRows(self._paths, spec.max_bad_lines, note)
        self._good, self._wrong = [0] * len(files), [0] * len(files)
        self._checked = 0  # files whose rows are all known

    def rows(self) -> Iterator[Row | Unreadable]:
        """All rows, each that cannot be read in its place: so nothing depends on how many processes there are."""
        waiting: list[Unreadable] = []

        def wait(file: int, number: int, reason: str) -> None:
            waiting.append(Unreadable(file, number, reason))
            if len(waiting) > self._limit:
                raise _Enough

        try:
            for row in read_rows(self._paths, on_bad=wait, columns=KEYS):
                yield from waiting
                waiting.clear()
                yield row
        except _Enough:
            pass
        yield from waiting

    def take(self, chunk: Chunk) -> None:
        """Count a chunk's rows. Raises DataError for too many bad ones, and for a file that has no others."""
        for file, rows in chunk.read.items():
            self._good[file] += rows
            self._counters.count(ROWS, rows)
        for rule, rows in chunk.counters:
            self._counters.count(rule, rows)
        for row in chunk.rows:
            if isinstance(row, Unreadable):
                self._counters.count(ROWS)
                self._counters.count(BAD_ROW)
                self._wrong[row.file] += 1
                self.bad(*row)
        self._check(max([*chunk.read, *(row.file for row in chunk.rows)]))

    def finish(self) -> list[str]:
        """What to say of the files when all is read. Raises like `take`."""
        self._check(len(self._paths))
        known = zip(self._paths, self._good, self._wrong, strict=True)
        return [f"{path} holds no rows." for path, good, wrong in known if not good + wrong]

    def _check(self, files: int) -> None:
        """files: so many have been read to their end."""
        for file in range(self._checked, files):
            if self._wrong[file] and not self._good[file]:
                headline = (
                    f"{self._paths[file]}: not one of its {self._wrong[file]:,} rows can be read. The last of all:"
                )
                advice = "Is it of another kind, or is `format` wrong? Leave the file out, or mend it."
                raise DataError(report(headline, list(self.bad.last), advice))
        self._checked = max(self._checked, files)


class _Judge:
    """Which examined rows are left, by those that came before: they have to come in order."""

    def __init__(
        self, spec: DataSpec, files: Sequence[DataFile], examiner: Examiner, counters: Counters, folder: Path | None
    ):
        self._spec, self._files, self._counters = spec, files, counters
        self._exact = ExactIndex()
        self._near = NearIndex(spec.near_threshold, folder=folder) if spec.deduplicate == "near" else None
        self._examples = {"exact": Examples(), "near": Examples()}
        self._overlaps = contamination.Report(examiner.benchmarks) if examiner.benchmarks else None

    def judged(self, row: Examined) -> Iterator[Conversation]:
        """The conversation of a row that is left; nothing for one that is not, which is counted."""
        file = self._files[row.file]
        dropped = self._same(row) or self._contaminated(row) or self._like(row)
        if dropped:
            self._counters.count(dropped)
            return
        held_out = file.part == EVALUATE or row.fate < self._spec.held_out
        self._counters.count(HELD_OUT if held_out else KEPT)
        yield Conversation(row.messages, row.id, row.file, row.number, row.source, file.weight, held_out)

    def _same(self, row: Examined) -> Rule | None:
        place = (row.file, row.number)
        if self._spec.deduplicate != "none":
            return self._because_of(self._exact.first(row.digest, place), row, "exact")
        if self._files[row.file].part == EVALUATE:  # remembered all the same: it is not to be trained on
            self._exact.first(row.digest, place)
            return None
        return self._because_of(self._exact.find(row.digest), row, "exact")

    def _like(self, row: Examined) -> Rule | None:
        if self._near is None or row.signature is None:
            return None
        return self._because_of(self._near.first(row.signature, (row.file, row.number)), row, "near")

    def _because_of(self, kept: Place | None, row: Examined, how: str) -> Rule | None:
        """The rule that drops a row for which another one was kept; None without one."""
        if kept is None:
            return None
        self._examples[how].add(kept, (row.file, row.number))
        if self._files[kept[0]].part != self._files[row.file].part:
            return IN_EVALUATION
        return duplicates.SAME_ROW if how == "exact" else duplicates.LIKE_ROW

    def _contaminated(self, row: Examined) -> Rule | None:
        if not row.overlaps:
            return None
        self._overlaps.add(row.overlaps, file=str(self._files[row.file].path), number=row.number)
        if self._spec.drop_contaminated:
            return contamination.CONTAMINATED
        self._counters.count(contamination.CONTAMINATED_KEPT)
        return None

    def fill(self, findings: Findings) -> None:
        """Write down what was found so far."""
        findings.duplicates["exact"] = self._groups("exact", self._exact.groups)
        if self._near is not None:
            findings.duplicates["near"] = self._groups("near", self._near.groups)
        if self._overlaps is not None:
            findings.contamination.update(self._overlaps.to_json())

    def _groups(self, how: str, groups: int) -> dict:
        found = self._examples[how]
        examples = [
            {"kept": self._name(kept), "dropped": [self._name(place) for place in dropped]}
            for kept, dropped in found.groups.items()
        ]
        return {"rows": found.rows, "groups": groups, "examples": examples}

    def _name(self, place: Place) -> dict:
        return {"file": str(self._files[place[0]].path), "row": place[1]}


def conversations(
    spec: DataSpec,
    seed: int,
    *,
    counters: Counters,
    knows_system: bool = True,
    findings: Findings | None = None,
    note: Callable[[str], None] = lambda line: None,
    workers: int = 1,
    folder: Path | None = None,
) -> Iterator[Conversation]:
    """The conversations of a spec, one after the other; bounded memory beside what duplicates.py and contamination.py
    say.

    counters: rows per rule, filled on the way. knows_system: the template can write system messages; without, their
    text goes in front of the first user turn. findings: filled on the way. note: told of each row that cannot be read,
    and of what else a person should know. workers: processes that examine rows. folder: for a temporary file of
    signatures, where near-duplicates are looked for; None: the system's folder for such files.
    Raises DataError for files that cannot be read, more bad rows than allowed, and when nothing is left to train on.
    """
    files = data_files(spec)
    counters.name(RULES)
    findings = Findings() if findings is None else findings
    examiner = Examiner(spec, files, seed, knows_system=knows_system)
    reading = _Reading(files, spec, counters, note)
    judge = _Judge(spec, files, examiner, counters, folder)
    before = counters[KEPT]  # the counters may have counted other stages
    unmet = {*spec.sources, *spec.exclude_sources}
    arguments = (spec, files, seed, knows_system)
    try:
        with closing(examine_rows(examiner, reading.rows(), workers=workers, arguments=arguments)) as chunks:
            for chunk in chunks:
                reading.take(chunk)
                unmet &= set(chunk.unmet)
                for row in chunk.rows:
                    if isinstance(row, Examined):
                        yield from judge.judged(row)
        findings.notes += reading.finish()
    finally:
        findings.bad_rows[:] = reading.bad.last
        judge.fill(findings)
    if counters[KEPT] == before:
        names = ", ".join(sorted({file.path.name for file in files if file.part == TRAIN}))
        headline = f"No row is left to train on, out of {names}:"
        raise DataError(report(headline, counters.lines(), "Look at what became of them."))
    if unmet:
        findings.notes.append(f"No row has a source that fits {', '.join(sorted(unmet))}.")
    if spec.held_out and not counters[HELD_OUT]:
        findings.notes.append(f"No row is held out: {spec.held_out:g} of {counters[KEPT]:,} rows came to none.")
    for line in findings.notes:
        note(line)
