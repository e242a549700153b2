"""One output folder as a transaction: plan, stage, journal, write, verify, commit (atomic rename).

What is planned comes in: an open source, a plan for it, and the tokenizer's files in a folder of their own. The output
appears when every file is written and verified; a run that is stopped before leaves its finished shards and a journal,
from which the same transaction resumes. Conversion and the merge of an adapter both write through this.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..formats.safetensors import INDEX, index_of, write_json
from ..utils.atomic import sync_tree
from ..utils.errors import CheckpointError, OutputError
from .bundle import write_bundle
from .ids import GENERATION_CONFIG
from .io.journal import Journal, fingerprint
from .io.manifest import write_manifest
from .io.output import check_output
from .io.recovery import undo_killed
from .io.shard_writer import write_weights
from .io.staging import staging
from .layout import CONFIG
from .plan import Plan
from .sources import Source

ADVICE = "\nMake room, or choose another disk."  # what helps when the disk fails


@dataclass(frozen=True)
class Written:
    """A complete staging folder. findings: a line for each tensor with NaN or infinite values; resumed: shards that an
    earlier run had finished; seconds: of writing."""

    folder: Path
    findings: list[str]
    resumed: int
    seconds: float


@dataclass
class Transaction:
    """A plan on its way into `output`.

    tokenizer: a folder whose files are copied. protected: paths of originals, which the output must not touch.
    changed: the error for a source that changes while it is read; advice: what helps when the disk fails. fsync: each
    shard is on the disk before the journal names it, and the output before the run ends.
    """

    source: Source
    plan: Plan
    output: Path
    tokenizer: Path
    protected: Sequence[Path]
    changed: str
    workers: int
    advice: str = ADVICE
    overwrite: bool = False
    fsync: bool = False
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self._made_for = fingerprint(self.source, self.plan)  # before anything is written, to see changes by

    def recover(self) -> None:
        """Put back what a run left that was killed during its commit, and say so."""
        for line in undo_killed(self.output, self._made_for):
            self.say(line)

    def check_output(self) -> None:
        """Raise OutputError unless the output can be made there without harm. Writes nothing."""
        for original in self.protected:
            check_output(self.output, original, overwrite=self.overwrite, nbytes=self.plan.nbytes)

    def run(self, verify: Callable[[Written], None] = lambda written: None) -> Written:
        """Stage, write, verify, commit. Raises an AquilaError; its notes say what is left on the disk.

        verify: raises for a folder that must not become the output.
        """
        with staging(self.output, overwrite=self.overwrite, fsync=self.fsync, say=self.say) as stage:
            self.check_output()  # again, now that no other run can be writing it
            journal = Journal(stage.folder, self._made_for)
            stage.finished, stage.count = lambda: journal.worth_keeping, len(self.plan.shards)
            with disk_failures(self.output, reading=[self.source.path, *self.source.files], advice=self.advice):
                written = self._write(journal)
            verify(written)
        return written

    def _write(self, journal: Journal) -> Written:
        """Shards that are not finished, then what makes them a model, then the manifest."""
        begin = time.monotonic()
        journal.resume(workers=self.workers, say=self.say)
        resumed = len(journal.finished)
        findings = write_weights(self.source, self.plan, journal, workers=self.workers, fsync=self.fsync)
        self._write_companions(journal.folder)
        hashes = {file: finished.sha256 for file, finished in journal.finished.items()}
        write_manifest(journal.folder, self.plan, hashes)
        if fingerprint(self.source, self.plan) != self._made_for:
            raise CheckpointError(self.changed)
        if self.fsync:
            sync_tree(journal.folder)
        return Written(journal.folder, findings, resumed, time.monotonic() - begin)

    def _write_companions(self, folder: Path) -> None:
        """Index, configuration, tokenizer, code."""
        plan = self.plan
        if len(plan.shards) > 1:
            write_json(folder / INDEX, index_of(plan.shards))
        write_json(folder / CONFIG, plan.config)
        write_json(folder / GENERATION_CONFIG, plan.generation)
        for path in sorted(self.tokenizer.iterdir()):  # one by one: copytree would copy the temporary folder's mode too
            shutil.copyfile(path, folder / path.name)
        if plan.target.bundle:
            write_bundle(folder)


@contextmanager
def disk_failures(output: Path, *, reading: Sequence[Path], advice: str = ADVICE) -> Iterator[None]:
    """An error of the system becomes an OutputError, unless it is about what is read: these paths, and all below."""
    try:
        yield
    except BrokenPipeError:  # of the progress lines, whose reader is gone; no disk is at fault
        raise
    except OSError as error:
        if error.filename and {Path(error.filename), *Path(error.filename).parents} & set(reading):
            raise  # the output is not to blame
        raise OutputError(f"Writing {output} failed: {error.strerror or error}.{advice}") from error
