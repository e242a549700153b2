"""Journal of finished shards, from which the same command resumes after a kill or a power failure.

It lies in the staging folder and names each finished shard with its sha256. A resuming run trusts neither the journal
nor the files: it hashes every finished shard again and keeps those that match, if the fingerprint of source, options
and version is the same.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

from ...runtime.versions import VERSION
from ...utils.errors import OutputError
from ...utils.files import JSON_ERRORS, hash_file, write_json
from ...utils.progress import Progress
from ...utils.units import counted
from ..plan import Plan
from ..sources import Source
from .pipeline import in_order

JOURNAL = "conversion-journal.json"
LOCK = "conversion.lock"  # held by the run that writes here
# In the staging folder, no part of the model; removed in this order, so that a journal without lock tells of a run
# that was killed at its very end.
OF_THE_RUN = (LOCK, JOURNAL)


@dataclass(frozen=True)
class Finished:
    """A written shard: its sha256; nonfinite: source tensor -> count of NaN or infinite values."""

    sha256: str
    nonfinite: dict[str, int] = field(default_factory=dict)


class Journal:
    """Finished shards of one staging folder by file name. made_for: the fingerprint of the conversion."""

    def __init__(self, folder: Path, made_for: dict):
        self.folder, self.made_for = folder, made_for
        self.finished: dict[str, Finished] = {}
        self.other = ""  # in which parts the fingerprint of shards in this folder differs
        self._claimed, self._why_not = self._read()  # of an earlier run; not verified yet

    @property
    def worth_keeping(self) -> int:
        """Count of shards a later run may reuse, as read from the disk: a run may stop anywhere."""
        claimed, _ = self._read()
        return len(claimed) or int(bool(self.other))

    def record(self, file: str, finished: Finished, *, fsync: bool = False) -> None:
        """Record a shard that was renamed to its final name."""
        self._write({**self.finished, file: finished}, fsync=fsync)
        self.finished[file] = finished

    def resume(self, *, workers: int, say: Callable[[str], None]) -> None:
        """Reuse the verified shards of an earlier run, remove its other files, report both.

        Raises OutputError when finished shards of another conversion lie there: they may be the work of a night.
        """
        if self.other:
            raise OutputError(
                f"{self.folder} holds finished shards of an earlier run, but {self.other} "
                f"{'are' if ' and ' in self.other else 'is'} not the same now. Nothing was changed.\n"
                f"Give the command of that run again to go on after them, or remove {self.folder} to start afresh."
            )
        rest = [path for path in self.folder.iterdir() if path.name not in {LOCK, JOURNAL, *self._claimed}]
        if self._why_not and (rest or (self.folder / JOURNAL).exists()):
            say(
                f"  restarted an earlier run was not finished, but {self._why_not}: it is done again from the beginning"
            )
        for path in rest:
            _remove(path)
        if self._claimed:
            self._check(workers=workers, say=say)
        self._write(self.finished)

    def _read(self) -> tuple[dict[str, Finished], str]:
        """The shards an earlier journal calls finished, and why it is of no use."""
        try:
            found = json.loads((self.folder / JOURNAL).read_text("utf-8"))
            theirs = dict(found["for"])
            claimed = {str(file): Finished(**finished) for file, finished in found["finished"].items()}
        except FileNotFoundError:
            return {}, "left no journal"
        except (OSError, *JSON_ERRORS, KeyError, TypeError, AttributeError):
            return {}, "its journal is damaged"
        claimed = {f: done for f, done in claimed.items() if Path(f).name == f and (self.folder / f).is_file()}
        differing = [key for key, value in self.made_for.items() if theirs.get(key) != value]
        self.other = " and ".join(differing) if claimed else ""
        return (claimed, "") if not differing else ({}, "another conversion began it")

    def _check(self, *, workers: int, say: Callable[[str], None]) -> None:
        """Keep the claimed shards whose sha256 matches."""
        sizes = {file: (self.folder / file).stat().st_size for file in self._claimed}
        hashes = in_order(lambda file: (file, hash_file(self.folder / file)), sorted(sizes), workers=workers)
        with Progress("check", total=sum(sizes.values()), tensors=len(sizes), what="shard") as progress:
            for file, digest in hashes:
                progress.advance(sizes[file])
                if digest == self._claimed[file].sha256:
                    self.finished[file] = self._claimed[file]
                else:
                    say(f"  damaged   {file}, finished by an earlier run, has another hash now: it is written again")
                    del self._claimed[file]
                    _remove(self.folder / file)
        if self.finished:
            say(f"  resumed   {counted(len(self.finished), 'shard')} finished by an earlier run, hashes checked")

    def _write(self, finished: dict[str, Finished], *, fsync: bool = False) -> None:
        lines = {file: asdict(finished[file]) for file in sorted(finished)}
        write_json(self.folder / JOURNAL, {"for": self.made_for, "finished": lines}, fsync=fsync)


def fingerprint(source: Source, plan: Plan) -> dict:
    """Fingerprint of what a shard depends on: version, source files, plan; not paths, not the worker count."""
    stats = [(path.name, path.stat()) for path in source.files]
    options = {
        "kind": plan.kind,
        "family": plan.family,
        "target": [plan.target.framework, plan.target.architecture],
        "shards": [[s.file, [[e.name, e.dtype, list(e.shape)] for e in s.entries]] for s in plan.shards],
        "config": source.config,
    }
    return {
        "the version of aquila_pd": VERSION,
        "the source": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "the plan": sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest(),
    }


def read_fingerprint(folder: Path) -> object:
    """The fingerprint in the journal of a folder; None when it cannot be read."""
    try:
        return json.loads((folder / JOURNAL).read_text("utf-8"))["for"]
    except (OSError, *JSON_ERRORS, KeyError, TypeError):
        return None


def remove_files_of_the_run(folder: Path) -> None:
    """Remove lock and journal from a folder that is complete."""
    try:
        for name in OF_THE_RUN:
            (folder / name).unlink(missing_ok=True)
    except KeyboardInterrupt:  # the folder is complete: it is not left with one of them
        remove_files_of_the_run(folder)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
