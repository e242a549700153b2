"""The staging folder of a conversion: one writer, committed by a rename, kept for the next run where that can resume.

It is called OUTPUT.partial and lies beside the output; in it when the output is an empty folder, which then stays the
same folder (it may be a mount point). Its lock is released by the system however a run ends.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ...formats.safetensors import INDEX
from ...utils.atomic import locked, rename, rename_new, sync, sync_tree
from ...utils.errors import (
    CheckpointError,
    ConfigError,
    InstallationError,
    OutputError,
    TokenizerError,
    VerificationError,
)
from ..layout import CONFIG
from .journal import LOCK, OF_THE_RUN, remove_files_of_the_run
from .output import check_existing, names_in, staging_folder

LAST = (INDEX, CONFIG)  # a folder that has these is complete
FINAL = (CheckpointError, ConfigError, TokenizerError, VerificationError, InstallationError)  # no use to try again


@dataclass
class Stage:
    """An open staging folder. finished: shards a later run could use; count: of how many."""

    folder: Path
    finished: Callable[[], int] = lambda: 0
    count: int = 0


@contextmanager
def staging(
    output: Path, *, overwrite: bool = False, fsync: bool = False, say: Callable[[str], None] = print
) -> Iterator[Stage]:
    """Lock the staging folder, and commit it to `output` when the block ends without an error.

    Raises OutputError when another run holds the lock. What was at `output` is as before after any error. The folder
    stays for a later run when shards are finished and another try can help (a full disk, Ctrl-C); otherwise it is
    removed. Which, is a note on the error. An earlier output is removed last, when the new one is complete: a failure
    to remove it is a warning.
    fsync: the names of all files are on the disk before the output appears, and it itself when the block has ended.
    """
    output = output.resolve()
    stage = Stage(staging_folder(output))
    place = stage.folder.parent
    into = place == output
    made = [parent for parent in output.parents if not parent.exists()]
    lock = locked(
        stage.folder / LOCK,
        busy=lambda by: f"Another conversion is writing {output} ({by}). Wait for it, or choose another output.",
        failed=lambda reason: f"{output} cannot be made: {reason}. Choose a place you may write to.",
    )
    with lock as (_, works):
        if not works:
            say(f"  warning   the file system of {place} has no locks: see that no other run writes there")
        for folder in [place, *(parent.parent for parent in made)] if fsync else []:
            sync(folder)
        try:
            yield stage
            if fsync:
                sync(stage.folder)
            aside = _commit(stage.folder, output, into=into, overwrite=overwrite)
        except BaseException as error:
            error.add_note(_after_error(stage, output, error, made))
            raise
        with completed(output):
            try:
                # the earlier output is on the disk; what replaces it has to be there too before it goes
                if fsync or aside:
                    sync_tree(output)
                    sync(output.parent)
            finally:
                remove_files_of_the_run(stage.folder if into else output)
                if into:
                    stage.folder.rmdir()
    if aside is not None:
        _remove_replaced(aside, output, say)


@contextmanager
def completed(output: Path) -> Iterator[None]:
    """After the commit: an interruption no longer undoes the output, and its error carries a note about that."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        error.add_note(f"The model in {output} is complete.")
        raise


def _after_error(stage: Stage, output: Path, error: BaseException, made: list[Path]) -> str:
    """Keep or remove the folder after an error; what is left, in a sentence."""
    if not stage.folder.exists():  # the rename was done when the interruption came
        remove_files_of_the_run(output)
        return f"The model in {output} is complete."
    done = stage.finished()
    if done and not isinstance(error, FINAL):
        return (
            f"{done} of {stage.count} shards are finished and kept in {stage.folder}: the same command goes on after "
            "them. Remove that folder to start afresh."
        )
    shutil.rmtree(stage.folder, ignore_errors=True)
    _remove_empty(made)
    return f"Nothing was left behind; {output} is as it was before."


def _remove_empty(folders: list[Path]) -> None:
    """Lowest first; those that hold anything stay."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _commit(partial: Path, output: Path, *, into: bool, overwrite: bool) -> Path | None:
    """Put partial at output; return where an earlier output stepped aside to."""
    if output.exists():  # checked again: another run may have been faster
        try:
            check_existing(output, overwrite)
        except OutputError as error:
            raise OutputError(f"While this run was writing, {output} changed.\n{error}") from error
    if into:
        _move_files(partial, output)
        return None
    if not (output.is_dir() and names_in(output)):
        _rename(partial, output)
        return None
    aside = output.with_name(f"{output.name}.replaced-{os.getpid()}")
    rename(output, aside)
    try:
        rename(partial, output)
    except BaseException:
        if partial.exists():  # else the rename was done when the interruption came
            rename(aside, output)
        raise
    return aside


def _rename(partial: Path, output: Path) -> None:
    """Rename to a path where nothing or an empty folder is; the operating system refuses any other."""
    try:
        rename_new(partial, output)
    except FileExistsError as error:
        raise OutputError(
            f"While this run was writing, {output} appeared. Remove it or choose another output."
        ) from error


def _move_files(partial: Path, output: Path) -> None:
    """Move the files of one folder into another on the same disk, those of LAST at the end; all or none."""
    names = sorted(path.name for path in partial.iterdir() if path.name not in OF_THE_RUN)
    ordered = [name for name in names if name not in LAST] + [name for name in LAST if name in names]
    try:
        for name in ordered:
            rename(partial / name, output / name)
    except BaseException:
        for name in reversed(ordered):
            if not (partial / name).exists():
                with suppress(OSError):
                    rename(output / name, partial / name)
        raise


def _remove_replaced(aside: Path, output: Path, say: Callable[[str], None]) -> None:
    try:
        shutil.rmtree(aside)
    except BaseException as error:
        remains = f"The model in {output} is complete; of the one it replaced, {aside} remains. Remove that yourself."
        if isinstance(error, OSError):
            return say(f"  warning   {remains} ({error})")
        error.add_note(remains)
        raise
    return None
