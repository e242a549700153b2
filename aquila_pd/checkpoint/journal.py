"""What a conversion has finished, so that the same command goes on after it was killed.

The journal lies in the staging folder and names each finished shard with its hash. A later run believes neither it nor
the files: it reads every finished shard again and keeps those whose hash is right, if source, options and version are
the same. So it does not matter what a power failure left behind.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path

from ..files import write_json
from ..versions import VERSION
from .pipeline import in_order
from .plan import Plan
from .progress import Progress, counted
from .sources import Source

JOURNAL = "conversion-journal.json"
LOCK = "conversion.lock"  # held by the run that writes here


@dataclass(frozen=True)
class Finished:
    """A shard that is written: its hash; names of source tensors -> how many NaN or infinite values they hold, and how
    many values the new dtype cannot hold."""

    sha256: str
    nonfinite: dict[str, int] = field(default_factory=dict)
    overflowed: dict[str, int] = field(default_factory=dict)


class Journal:
    """Finished shards of one staging folder, by file name."""

    def __init__(self, folder: Path, fingerprint: dict):
        self.folder, self._fingerprint = folder, fingerprint
        self.finished: dict[str, Finished] = {}

    def record(self, file: str, finished: Finished, *, fsync: bool = False) -> None:
        """Note a shard that lies in the folder under its own name."""
        self.finished[file] = finished
        self._write(fsync=fsync)

    def resume(self, *, workers: int, say: Callable[[str], None]) -> None:
        """Take over what an earlier run finished, remove the rest of what it left, and say which."""
        claimed, why_not = self._claimed()
        if why_not and self._left_over():
            say(f"  restarted an earlier run was not finished, but {why_not}: it is done again from the beginning")
        for path in self._left_over():
            if path.name not in claimed:
                _remove(path)
        if claimed:
            self._check(claimed, workers=workers, say=say)
        self._write()

    def _claimed(self) -> tuple[dict[str, Finished], str]:
        """The shards an earlier journal calls finished, or why it is of no use."""
        try:
            found = json.loads((self.folder / JOURNAL).read_text("utf-8"))
            theirs = found["for"]
            claimed = {str(file): Finished(**finished) for file, finished in found["finished"].items()}
        except FileNotFoundError:
            return {}, "left no journal"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}, "its journal is damaged"
        differing = [key for key, value in self._fingerprint.items() if theirs.get(key) != value]
        if differing:
            return {}, f"{' and '.join(differing)} {'have' if len(differing) > 1 else 'has'} changed since"
        return {f: done for f, done in claimed.items() if Path(f).name == f and (self.folder / f).is_file()}, ""

    def _left_over(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.name != LOCK]

    def _check(self, claimed: dict[str, Finished], *, workers: int, say: Callable[[str], None]) -> None:
        sizes = {file: (self.folder / file).stat().st_size for file in claimed}
        progress = Progress("check", total=sum(sizes.values()), tensors=len(claimed), what="shard")
        hashes = in_order(lambda file: (file, hash_file(self.folder / file)), sorted(claimed), workers=workers)
        for file, digest in hashes:
            progress.advance(sizes[file])
            if digest == claimed[file].sha256:
                self.finished[file] = claimed[file]
            else:
                say(f"  damaged   {file}, finished by an earlier run, has another hash now: it is written again")
                _remove(self.folder / file)
        progress.close()
        if self.finished:
            say(f"  resumed   {counted(len(self.finished), 'shard')} finished by an earlier run, hashes checked")

    def _write(self, *, fsync: bool = False) -> None:
        finished = {file: asdict(self.finished[file]) for file in sorted(self.finished)}
        write_json(self.folder / JOURNAL, {"for": self._fingerprint, "finished": finished}, fsync=fsync)


def fingerprint(source: Source, plan: Plan) -> dict:
    """What a finished shard depends on. Another path to the same files, or another number of workers, is no change."""
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


def hash_file(path: Path) -> str:
    """The sha256 of a file in hex digits, read in pieces."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
