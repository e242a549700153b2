"""Preparation flow: files of conversations to a folder of tokenized samples, ready to be packed.

FOLDER/
  train/         samples to train on (samples.py)
  held_out/      samples to evaluate on, where any are asked for and found
  dataset.json   what all was made of, and what became of the rows; written last
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..runtime.versions import VERSION as PACKAGE_VERSION
from ..text.prompts import ChatPrompts
from ..utils import cores
from ..utils.errors import ConfigError, DataError, OutputError, report
from ..utils.files import read_object, write_json
from .building import building
from .counters import Counters
from .encoding import Encoder, encode_all
from .inputs import check_unchanged, describe_inputs, differences, digest_of
from .pipeline import Conversation, Findings, conversations
from .samples import Samples, SamplesWriter
from .settings import DataSpec
from .targets import knows_system
from .truncation import RULES, Fitted

MANIFEST = "dataset.json"
TRAIN, HELD_OUT = "train", "held_out"
MOST_WORKERS = 8  # reading the rows is one process's work, which more than these would wait for
EXAMPLES = 10  # rows that cannot be written, named in the manifest


class Progress(NamedTuple):
    """How far it has come. rows: those left after all rules; file: the number of the one that is read, from 1."""

    rows: int
    samples: int
    tokens: int
    file: int
    files: int


@dataclass(frozen=True)
class PreparedSummary:
    """A prepared folder. manifest: its dataset.json; is_reused: it was there already, of the same inputs."""

    folder: Path
    manifest: dict
    is_reused: bool

    @property
    def train(self) -> dict:
        """rows, samples, tokens, targets, longest, digest."""
        return self.manifest[TRAIN]

    @property
    def held_out(self) -> dict | None:
        """The same of the samples to evaluate on, where there are any."""
        return self.manifest[HELD_OUT]

    @property
    def counters(self) -> Counters:
        return Counters.from_json(self.manifest["counters"])


def prepare(
    spec: DataSpec,
    prompts: ChatPrompts,
    *,
    length: int,
    seed: int,
    folder: Path,
    workers: int | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda line: None,
) -> PreparedSummary:
    """Make the samples of a spec in a folder, or find there what an earlier run has made of the same.

    length: tokens that a sample may have at most. seed: decides which rows are held out. workers: processes; None: one
    for each core, and for few rows none beside this one. progress: told of every batch; note: of each row that cannot
    be read, and what else a person should know. Memory is bounded, whatever the number of rows, but for what finding
    duplicates says of itself. The same inputs give the same samples, whatever the number of workers.

    Raises DataError for rows, for nothing to train on, and for a folder that was made of something else; OutputError
    for the place; ConfigError, ChatError and TokenizerError for what cannot be written at all.
    """
    folder = Path(folder)
    if length < 2:
        raise ConfigError(f"Samples of {length} tokens hold nothing to learn. Give a length of at least 2.")
    known = read_manifest(folder) if folder.exists() else None
    inputs = describe_inputs(spec, prompts, length=length, seed=seed, known=known and known["inputs"])
    if known is not None:
        return _reused(folder, known, inputs)
    try:
        with building(folder) as partial:
            made = _Preparing(spec, prompts, inputs, partial)
            manifest = made.run(workers_for(workers), progress, note)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OutputError(
            f"The disk of {folder} is full. Nothing was left behind.\nMake room, or choose another disk; a token takes "
            "five bytes."
        ) from error
    return PreparedSummary(folder, manifest, is_reused=False)


def workers_for(asked: int | None) -> int:
    """So many processes, by default one for each core. Raises ConfigError for a number that has no meaning."""
    if asked is not None and asked < 1:
        raise ConfigError(f"The number of workers is {asked}; it must be at least 1.")
    return asked or min(cores.count(), MOST_WORKERS)


def readers_for(spec: DataSpec, workers: int | None) -> int:
    """So many processes that read rows: one is enough where nothing is looked for in them."""
    is_costly = spec.deduplicate == "near" or spec.contamination or spec.languages
    return workers_for(workers) if is_costly else 1


def read_manifest(folder: Path) -> dict:
    """The dataset.json of a prepared folder. Raises DataError for a folder that is none."""
    if not folder.is_dir() or not (folder / MANIFEST).is_file():
        what = f"holds no {MANIFEST}" if folder.is_dir() else "is no folder"
        raise DataError(
            f"{folder} {what}: no prepared data. Choose another folder, or remove it and prepare the data again."
        )
    manifest = read_object(folder / MANIFEST, DataError)
    if not {"inputs", "inputs_digest", "counters", TRAIN, HELD_OUT} <= set(manifest):
        raise DataError(f"{folder / MANIFEST} does not say what was prepared. Remove the folder and prepare again.")
    return manifest


def _reused(folder: Path, known: dict, inputs: dict) -> PreparedSummary:
    """The folder as it is. Raises DataError when it was made of something else, or is damaged."""
    if known["inputs_digest"] != digest_of(inputs):
        findings = list(differences(known["inputs"], inputs))
        advice = "Choose another folder, or remove that one and prepare the data again."
        raise DataError(report(f"The data in {folder} was prepared of something else:", findings, advice))
    for part in (TRAIN, HELD_OUT):
        if known[part] is not None and Samples.open(folder / part).digest != known[part]["digest"]:
            raise DataError(f"{folder / part} is not what {MANIFEST} says. Remove the folder and prepare again.")
    return PreparedSummary(folder, known, is_reused=True)


class _Preparing:
    """One run, which fills a folder."""

    def __init__(self, spec: DataSpec, prompts: ChatPrompts, inputs: dict, folder: Path):
        self._spec, self._prompts, self._inputs, self._folder = spec, prompts, inputs, folder
        self._names = [entry["path"] for entry in inputs["files"]]
        self._counters, self._findings = Counters(), Findings()
        self._unwritable: list[str] = []
        self._rows = {TRAIN: 0, HELD_OUT: 0}  # that gave samples
        self._writers: dict[str, SamplesWriter] = {}

    def run(self, workers: int, progress: Callable[[Progress], None], note: Callable[[str], None]) -> dict:
        """Write everything; returns the manifest."""
        with ExitStack() as stack:
            self._writers = {part: stack.enter_context(self._writer(part)) for part in self._rows}
            rows = stack.enter_context(closing(self._conversations(workers, note)))
            for batch in stack.enter_context(closing(encode_all(self._encoder(), rows, workers=workers))):
                for conversation, fitted in batch:
                    self._take(conversation, fitted)
                progress(self._progress(batch[-1][0].file))
            self._counters.name(RULES)
            check_unchanged(self._inputs)
            self._check(note)
            manifest = self._finish()
        write_json(self._folder / MANIFEST, manifest, fsync=True)
        return manifest

    def _writer(self, part: str) -> SamplesWriter:
        (self._folder / part).mkdir()
        return SamplesWriter(self._folder / part)

    def _encoder(self) -> Encoder:
        return Encoder(self._prompts, self._inputs["length"], self._spec.overlong)

    def _conversations(self, workers: int, note: Callable[[str], None]) -> Iterator[Conversation]:
        return conversations(
            self._spec,
            self._inputs["seed"],
            counters=self._counters,
            knows_system=knows_system(self._prompts),
            findings=self._findings,
            note=note,
            workers=readers_for(self._spec, workers),
            folder=self._folder,
        )

    def _take(self, conversation: Conversation, fitted: Fitted) -> None:
        for rule in fitted.rules:
            self._counters.count(rule)
        if fitted.reason and len(self._unwritable) < EXAMPLES:
            name = self._names[conversation.file]
            self._unwritable.append(f"{name}:{conversation.number}: {fitted.reason}")
        part = HELD_OUT if conversation.held_out else TRAIN
        self._rows[part] += bool(fitted.parts)
        for number, (_, sample) in enumerate(fitted.parts):
            self._writers[part].add(
                sample.ids,
                sample.is_target,
                file=conversation.file,
                row=conversation.number,
                part=number,
                weight=1.0 if conversation.held_out else conversation.weight,
            )

    def _progress(self, file: int) -> Progress:
        samples = sum(writer.count for writer in self._writers.values())
        tokens = sum(writer.tokens for writer in self._writers.values())
        return Progress(sum(self._rows.values()), samples, tokens, file + 1, len(self._names))

    def _check(self, note: Callable[[str], None]) -> None:
        """Raise DataError when there is nothing to train on, or nothing in files that were given for evaluation."""
        if self._unwritable:
            note(f"Rows that cannot be written, such as {self._unwritable[0]}")
        wanted = [TRAIN, HELD_OUT] if self._spec.evaluate else [TRAIN]
        for part in wanted:
            if not self._writers[part].count:
                headline = f"No sample is left to {'train' if part == TRAIN else 'evaluate'} on:"
                lines = [*self._counters.lines(), *self._unwritable[:1]]
                advice = "Look at what dropped them; a greater length keeps longer turns."
                raise DataError(report(headline, lines, advice))

    def _finish(self) -> dict:
        manifest = {
            "made_by": f"aquila_pd {PACKAGE_VERSION}",
            "inputs_digest": digest_of(self._inputs),
            "inputs": self._inputs,
            "counters": self._counters.to_json(),
            "findings": self._findings.to_json(),
            "unwritable": self._unwritable,
        }
        return manifest | {part: self._finish_part(part) for part in self._rows}

    def _finish_part(self, part: str) -> dict | None:
        writer = self._writers[part]
        written = writer.finish(self._names)
        if not writer.count:
            for path in [*writer.folder.iterdir(), writer.folder]:
                path.rmdir() if path.is_dir() else path.unlink()
            return None
        facts = {key: written[key] for key in ("samples", "tokens", "targets", "longest", "largest_id")}
        return {"rows": self._rows[part], **facts, "digest": Samples.open(writer.folder).digest}
