"""Training checkpoints: atomic, hashed, sharded over ranks; a damaged one falls back to the one before.

    checkpoints/step-00000120/
      weights-00001.safetensors            what is trained: all weights, or the adapter; by rank 0
      optimizer-00001-of-00002.safetensors moments (and float32 master weights) of the parameters this rank updates
      part-00001-of-00002.json             size and hash of what this rank wrote
      trainer_state.json                   PaddleNLP's own: its Trainer reads the step from it
      checkpoint.json                      step, best evaluation so far, all files with size and hash; written last

A folder is written under the name `.step-...partial` and renamed. Tensors are named by parameter and not by Paddle's
counters, so a run of another process, or of another number of ranks, finds its own.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np

from ...formats.dtypes import DTYPES
from ...formats.safetensors import Entry, Shard, TensorInfo, bits, plan_shards, read_header, view, write_shard
from ...utils.atomic import partial_of, remove_folder, rename, sync
from ...utils.errors import CheckpointError, TrainingError, report
from ...utils.files import hash_file, read_object, write_json

log = logging.getLogger("aquila_pd")

VERSION = 1
MANIFEST = "checkpoint.json"
STEP = "step-{:08d}"
LARGEST_FILE = 5 * 10**9
NOTHING: Mapping = MappingProxyType({})


class Tensor(Protocol):
    """What a framework's tensor must offer to be written."""

    shape: Sequence[int]
    dtype: object

    def numpy(self) -> np.ndarray: ...


Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Ranks:
    """This process among those that write one checkpoint; wait: until all are here."""

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def label(self) -> str:
        return f"{self.rank + 1:05d}-of-{self.count:05d}"


@dataclass(frozen=True)
class Checkpoint:
    """One that was found whole. facts: what its maker wanted to know later."""

    folder: Path
    step: int
    facts: Mapping

    def weights(self) -> dict[str, TensorInfo]:
        """The trained tensors by name."""
        return self._tensors("weights-*.safetensors")

    def optimizer(self) -> dict[str, TensorInfo]:
        """The optimizer's tensors by name, whichever rank wrote them."""
        return self._tensors("optimizer-*.safetensors")

    def _tensors(self, pattern: str) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for file in sorted(self.folder.glob(pattern)):
            infos, wrong = read_header(file)
            if wrong:
                raise CheckpointError(report(f"{self.folder} is damaged:", wrong, "Resume from the one before."))
            found |= {info.name: info for info in infos}
        return found


class Checkpoints:
    """The checkpoints of one stage. keep: so many of the newest stay; the best one stays besides."""

    def __init__(self, folder: Path, *, keep: int):
        self.folder, self.keep = folder, keep

    def save(
        self,
        step: int,
        *,
        weights: Tensors,
        optimizer: Tensors,
        ranks: Ranks,
        facts: Mapping = NOTHING,
        write_more: Callable[[Path], None] = lambda folder: None,
        best: int | None = None,
    ) -> Path:
        """Write the checkpoint of a step; every rank calls this. Older ones go when it is there.

        weights: asked of rank 0 alone; optimizer: this rank's. facts: JSON. write_more: rank 0 adds files of others'
        formats. best: the step whose checkpoint is not to go. Raises OSError when there is no room, and then leaves
        what was there before.
        """
        final = self.folder / STEP.format(step)
        partial = partial_of(final)
        if ranks.first:
            self._clean()
            partial.mkdir(parents=True)
        ranks.wait()
        try:
            self._write_part(partial, weights if ranks.first else NOTHING, optimizer, ranks)
            ranks.wait()
            if ranks.first:
                write_more(partial)
                manifest = {"version": VERSION, "step": step, "best": best, "facts": dict(facts)}
                self._finish(partial, final, ranks, manifest)
                self._remove_old()
        except BaseException:
            if ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        ranks.wait()
        return final

    def _clean(self) -> None:
        """Remove what runs left that were killed while they wrote or removed a checkpoint."""
        for left in self.folder.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)

    def _write_part(self, partial: Path, weights: Tensors, optimizer: Tensors, ranks: Ranks) -> None:
        files = _write_tensors(partial, "weights-{:05d}", weights)
        files |= _write_tensors(partial, f"optimizer-{ranks.label}" + "-{:05d}", optimizer)
        write_json(partial / f"part-{ranks.label}.json", files, fsync=True)

    def _finish(self, partial: Path, final: Path, ranks: Ranks, manifest: dict) -> None:
        files: dict = {}
        for rank in range(ranks.count):  # by name: a network's file system may list a file late
            files |= read_object(partial / f"part-{replace(ranks, rank=rank).label}.json", CheckpointError)
        for path in sorted(partial.iterdir()):
            if path.name not in files:  # parts, and what write_more left there
                sync(path)
                files[path.name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        write_json(partial / MANIFEST, manifest | {"files": files}, fsync=True)
        sync(partial)
        if final.exists():  # of a run that was resumed from an earlier one
            remove_folder(final)
        rename(partial, final, fsync=True)

    def _remove_old(self) -> None:
        """Remove all but the newest, and the best that each of these knows: a run may go on from any of them."""
        steps = self.steps()
        manifests = (self.folder / STEP.format(step) / MANIFEST for step in steps[-self.keep :])
        best = {read_object(path, CheckpointError).get("best") for path in manifests if path.is_file()}
        for step in steps[: -self.keep]:
            if step not in best:
                remove_folder(self.folder / STEP.format(step))

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        found = (path.name.removeprefix("step-") for path in self.folder.glob("step-*"))
        return sorted(int(number) for number in found if number.isdigit())

    def with_weights(self, step: int) -> Checkpoint:
        """The checkpoint of this step, looked at as far as its weights go.

        Raises CheckpointError, with all findings, when they are damaged or not there.
        """
        folder = self.folder / STEP.format(step)
        wrong = damage(folder, only="weights-")
        if wrong:
            raise CheckpointError(report(f"The checkpoint {folder} cannot be used:", wrong, "Put it back from a copy."))
        return _opened(folder, step)

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest intact checkpoint; damaged newer ones are reported and renamed.

        Raises TrainingError when there are checkpoints and none of them is whole, and leaves them where they are:
        starting anew would be a silent loss, now or when it is tried once more.
        """
        self._clean()
        damaged: dict[Path, list[str]] = {}
        for step in reversed(self.steps()):
            folder = self.folder / STEP.format(step)
            wrong = damage(folder)
            if not wrong:
                for other, findings in damaged.items():
                    say(_put_aside(other, findings))
                return _opened(folder, step)
            damaged[folder] = wrong
        if damaged:
            findings = [f"{folder.name}: {line}" for folder, wrong in damaged.items() for line in wrong]
            advice = "Put one back from a copy, or remove them to start the stage anew."
            raise TrainingError(report(f"All checkpoints in {self.folder} are damaged:", findings, advice))
        return None


def _put_aside(folder: Path, wrong: list[str]) -> str:
    """Give a damaged checkpoint another name; what happened, in words."""
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    rename(folder, aside)
    return report(
        f"The checkpoint of step {int(folder.name.removeprefix('step-'))} is damaged:",
        wrong,
        f"It is now {aside}; the one before is next.",
    )


def _opened(folder: Path, step: int) -> Checkpoint:
    """A checkpoint that was found whole."""
    return Checkpoint(folder, step, read_object(folder / MANIFEST, CheckpointError)["facts"])


def damage(folder: Path, only: str = "") -> list[str]:
    """Damage of a checkpoint, by the size and the hash of every file whose name begins with `only`."""
    if not (folder / MANIFEST).is_file():
        return [f"{MANIFEST} is not there: it was never finished"]
    try:
        manifest = read_object(folder / MANIFEST, CheckpointError)
        version, files, facts = (manifest[key] for key in ("version", "files", "facts"))
        if version != VERSION or not isinstance(facts, dict):
            return [f"it has the format {version!r}, here {VERSION}"]
        looked_at = {name: fact for name, fact in files.items() if name.startswith(only)}
        return [line for name, fact in looked_at.items() for line in _wrong_file(folder / name, fact)]
    except CheckpointError as error:
        return [str(error)]
    except (KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} does not say what it should ({type(error).__name__}: {error})"]


def _wrong_file(file: Path, fact: Mapping) -> list[str]:
    if not file.is_file():
        return [f"{file.name} is not there"]
    if file.stat().st_size != fact["bytes"]:
        return [f"{file.name} has {file.stat().st_size:,} bytes of {fact['bytes']:,}"]
    return [] if hash_file(file) == fact["sha256"] else [f"{file.name} has other bytes than were written"]


def _write_tensors(folder: Path, pattern: str, tensors: Tensors) -> dict:
    """Write tensors into files named by the pattern, one at a time in memory; {file: {bytes, sha256}}."""
    entries = [Entry(name, _tag(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()]
    files = {}
    for number, planned in enumerate(plan_shards(entries, LARGEST_FILE) if entries else (), 1):
        shard = Shard(pattern.format(number) + ".safetensors", planned.entries)
        path = folder / shard.file
        arrays = (bits(tensors[entry.name].numpy()) for entry in shard.entries)
        digest = write_shard(path, shard, arrays)
        sync(path)
        files[shard.file] = {"bytes": path.stat().st_size, "sha256": digest}
    return files


def _tag(tensor: Tensor) -> str:
    """The safetensors tag of a tensor whose dtype prints as numpy's or as paddle.float32."""
    name = str(tensor.dtype).rpartition(".")[2]
    return next(tag for tag, dtype in DTYPES.items() if dtype.name == name)


def array_of(info: TensorInfo) -> np.ndarray:
    """A stored tensor as numpy for Paddle: bfloat16 as uint16."""
    array = view(info)
    return np.ascontiguousarray(array.view(np.uint16) if info.dtype == "BF16" else array)
