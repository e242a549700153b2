"""Preflight: validate, lock the run folder, open or resume its manifest, prepare rows."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...data.pipeline import data_files
from ...text.loading import check_folder
from ...utils.atomic import locked
from ...utils.errors import TrainingError
from ..recipe.load import Recipe, Stage
from .folder import RunFolder
from .manifest import FILE as MANIFEST
from .manifest import Manifest, describe_model, environment
from .resuming import WAITING

LOCK = "run.lock"


def check(recipe: Recipe, run: RunFolder, *, devices: int) -> None:
    """Raise what stands in the way and shows without reading a row, before the run folder is there."""
    from .stages import computes_in_half

    check_folder(Path(recipe.model))
    for stage in recipe.stages:
        stage.accumulation(devices)
        computes_in_half(stage)
        if not run.result(stage.name).is_dir():
            data_files(stage.data)


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Hold the run folder's lock, which is on this descriptor.

    Raises OutputError when another process does, or the folder cannot be made.
    """
    lock = locked(
        folder / LOCK,
        text=str(os.getpid()),
        busy=lambda pid: (
            f"Process {pid if pid.isdigit() else '?'} is training in {folder}. Wait for it, or choose another output."
        ),
        failed=lambda reason: f"The run folder {folder} cannot be written: {reason}.",
    )
    with lock as (descriptor, works):
        if not works:
            print(f"  warning   the file system of {folder} has no locks: see that no other run trains there")
        yield descriptor


def open_manifest(recipe: Recipe, run: RunFolder, *, devices: int) -> Manifest:
    """The run's manifest: of a new run, or of one that goes on, whose differences are printed.

    Raises RecipeError when it would be another run.
    """
    known = _known(run)
    model, facts = _facts(recipe, known, devices)
    if known is None:
        return Manifest.start(run.root, recipe, model=model, environment=facts)
    is_done = all(run.result(stage.name).is_dir() for stage in recipe.stages)
    for line in known.resume(recipe, model=model, environment=facts, record=not is_done):
        print(f"  changed   {line}")
    return known


def compare_with_run(recipe: Recipe, run: RunFolder, *, devices: int) -> list[str]:
    """What is different from the run that the folder holds, if it holds one; nothing is written. Raises RecipeError."""
    known = _known(run)
    if known is None:
        return []
    model, facts = _facts(recipe, known, devices)
    return known.resume(recipe, model=model, environment=facts, record=False)


def _known(run: RunFolder) -> Manifest | None:
    """The manifest of a run that has prepared or learned anything.

    A stage that failed before it had learned anything has not begun: its recipe may still be mended.
    """
    if not (run.root / MANIFEST).is_file():
        return None
    manifest = Manifest.open(run.root)
    is_begun = False
    for name, facts in manifest.content["stages"].items():
        if not has_begun(run, name):
            facts["state"] = WAITING
            if not run.data(name).is_dir():  # removed, to be prepared otherwise
                facts.pop("data", None)
        is_begun |= has_begun(run, name) or "data" in facts
    return manifest if is_begun else None


def has_begun(run: RunFolder, stage: str) -> bool:
    """Whether something was learned in a stage."""
    return run.checkpoints(stage).is_dir() or run.result(stage).is_dir()


def _facts(recipe: Recipe, known: Manifest | None, devices: int) -> tuple[dict, dict]:
    from ..estimate.stage import Machine

    model = describe_model(Path(recipe.model), known.content["model"] if known else None)
    return model, environment(devices=devices, device=Machine.here(devices).name)


def prepare_all(recipe: Recipe, run: RunFolder, manifest: Manifest, *, workers: int | None) -> None:
    """Prepare the rows of every stage that is not done, so that what is wrong with them shows before the first.

    Raises TrainingError where a stage has begun with other rows.
    """
    from .preparing import prepare_stage

    for stage in recipe.stages:
        if run.result(stage.name).is_dir():
            continue
        before = manifest.stage(stage.name).get("data")
        facts = prepare_stage(recipe, stage, run, workers=workers)
        if before and has_begun(run, stage.name) and facts["train"]["digest"] != before["train"]["digest"]:
            raise _other_rows(stage, run)
        manifest.update(stage.name, data=facts)


def _other_rows(stage: Stage, run: RunFolder) -> TrainingError:
    files = ", ".join(Path(file).name for source in stage.data.train for file in source.files)
    return TrainingError(
        f"Stage {stage.name} has begun with other rows than {files} gives now: half a stage on these is no stage.\n"
        f"Put the files back as they were and remove {run.data(stage.name)}, or start in another output folder."
    )
