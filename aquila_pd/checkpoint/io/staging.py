"""The folder a conversion fills before its output appears: one run at a time, kept for the next when it is stopped.

It is called OUTPUT.partial and lies beside the output; in it when the output is an empty folder, which then stays the
same folder (it may be a mount point). Its lock is let go of by the system however a run ends.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ...formats.safetensors import INDEX
from ...utils.errors import (
    CheckpointError,
    ConfigError,
    InstallationError,
    OutputError,
    TokenizerError,
    VerificationError,
)
from ...utils.files import sync, sync_tree
from ..layout import CONFIG
from .journal import JOURNAL, LOCK, read_fingerprint
from .manifest import MANIFEST, read_manifest
from .output import OF_THE_RUN, PARTIAL, check_existing, is_empty_folder, names_in, staging_folder

LAST = (INDEX, CONFIG)  # whoever finds these finds a complete folder
FINAL = (CheckpointError, ConfigError, TokenizerError, VerificationError, InstallationError)  # no use to try again


# ------------------------------------------------------------------------------------------------ killed runs


def undo_killed(output: Path, fingerprint: dict) -> list[str]:
    """Put things back where a run that was killed while its output appeared can be done again; say what was done."""
    output = output.resolve()
    said = _undo_moves(output) or _undo_rename(output, fingerprint)
    return said + _restore_replaced(output)


def _undo_rename(output: Path, fingerprint: dict) -> list[str]:
    """Killed after the rename, before its journal was removed: the folder is complete, and its run ends again."""
    if not (output / JOURNAL).is_file() or _is_held(output):
        return []
    partial = output.with_name(f"{output.name}{PARTIAL}")
    if partial.exists() or read_fingerprint(output) != fingerprint:  # of another conversion, and complete
        _remove_files_of_the_run(output)
        return []
    output.rename(partial)
    return [f"  resumes   {output}, which an earlier run had not quite ended"]


def _undo_moves(output: Path) -> list[str]:
    """Killed while files moved into a folder that was empty: they move back to the others."""
    partial = output / f"{output.name}{PARTIAL}"
    if not (partial / JOURNAL).is_file() or is_empty_folder(output) or _is_held(partial):
        return []
    manifest = next((folder for folder in (partial, output) if (folder / MANIFEST).is_file()), None)
    written = {*(PurePosixPath(file).parts[0] for file in read_manifest(manifest)), MANIFEST} if manifest else set()
    moved = [name for name in names_in(output) if name in written]
    for name in moved:
        (output / name).rename(partial / name)
    return [f"  resumes   {output}, which an earlier run had not quite filled"] if moved else []


def _restore_replaced(output: Path) -> list[str]:
    """An earlier output that a killed --overwrite left as <output>.replaced-PID.

    It goes back to its place when nothing is there (the run died between two renames), and is removed otherwise.
    """
    said = []
    for path in sorted(output.parent.iterdir()) if output.parent.is_dir() else []:
        match = re.fullmatch(re.escape(output.name) + r"\.replaced-(\d+)", path.name)
        if not match or not path.is_dir() or path.is_symlink() or _runs(int(match[1])):
            continue
        if not output.exists():
            path.rename(output)
            said.append(f"  restored  {output}, set aside as {path.name} by a run that was killed")
        else:
            shutil.rmtree(path)
            said.append(f"  removed   {path}, left by a run that was killed")
    return said


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# ------------------------------------------------------------------------------------------------ one at a time


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of some network file systems


@contextmanager
def _locked(folder: Path, output: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Make the folder and hold its lock, which the system lets go of however this process ends.

    Raises OutputError when another run holds it, or nothing can be made there. Where the file system has no locks, the
    run goes on without, and says so.
    """
    try:
        descriptor = _open_lock(folder, say)
    except BlockingIOError:
        raise OutputError(
            f"Another conversion is writing {output} ({_holder(folder)}). Wait for it, or choose another output."
        ) from None
    except OSError as error:
        raise OutputError(f"{output} cannot be made: {error.strerror}. Choose a place you may write to.") from error
    except BaseException:
        with suppress(OSError):  # it holds something, or never came to be
            folder.rmdir()
        raise
    try:
        yield
    finally:
        os.close(descriptor)


def _open_lock(folder: Path, say: Callable[[str], None]) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, folder, say)
            # another run may have finished between the two lines above, and taken the file away with its folder
            if _same_file(descriptor, folder / LOCK):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, say: Callable[[str], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        say(f"  warning   the file system of {folder.parent} has no locks: see that no other run writes there")


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(folder: Path) -> str:
    try:
        return (folder / LOCK).read_text("utf-8") or "it has only begun"
    except OSError:
        return "it has just ended"


def _is_held(folder: Path) -> bool:
    """Whether a run that still goes on holds the lock in a folder."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_LOCKS
    finally:
        os.close(descriptor)
    return False


# ------------------------------------------------------------------------------------------------ staging


@dataclass
class Stage:
    """A staging folder while it is filled. finished: shards a later run could use; count: of how many."""

    folder: Path
    finished: Callable[[], int] = lambda: 0
    count: int = 0


@contextmanager
def staging(
    output: Path, *, overwrite: bool = False, fsync: bool = False, say: Callable[[str], None] = print
) -> Iterator[Stage]:
    """A locked folder, which takes the output's place when the block ends without an error.

    What was at `output` is as before after any error. The folder stays for a later run when shards are finished and
    another try can help (a full disk, Ctrl-C); otherwise it is removed. Which, is a note on the error. An earlier
    output is removed last, when the new one is complete: what cannot be removed is said, and no error.
    fsync: the names of all files are on the disk before the output appears, and it itself when the block has ended.
    """
    output = output.resolve()
    stage = Stage(staging_folder(output))
    into = stage.folder.parent == output
    made = [parent for parent in output.parents if not parent.exists()]
    with _locked(stage.folder, output, say):
        for folder in [stage.folder.parent, *(parent.parent for parent in made)] if fsync else []:
            sync(folder)
        try:
            yield stage
            if fsync:
                sync(stage.folder)
            aside = _appear(stage.folder, output, into=into, overwrite=overwrite)
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
                _remove_files_of_the_run(stage.folder if into else output)
                if into:
                    stage.folder.rmdir()
    if aside is not None:
        _remove_replaced(aside, output, say)


@contextmanager
def completed(output: Path) -> Iterator[None]:
    """What stops a run now no longer undoes it, and carries a note that says so."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        error.add_note(f"The model in {output} is complete.")
        raise


def _after_error(stage: Stage, output: Path, error: BaseException, made: list[Path]) -> str:
    """Keep or remove the folder after an error; what is left, in a sentence."""
    if not stage.folder.exists():  # the rename was done when the interruption came
        _remove_files_of_the_run(output)
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


def _remove_files_of_the_run(folder: Path) -> None:
    try:
        for name in OF_THE_RUN:
            (folder / name).unlink(missing_ok=True)
    except KeyboardInterrupt:  # the folder is complete: it is not left with one of them
        _remove_files_of_the_run(folder)
        raise


def _remove_empty(folders: list[Path]) -> None:
    """Lowest first; those that hold anything stay."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _appear(partial: Path, output: Path, *, into: bool, overwrite: bool) -> Path | None:
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
    output.rename(aside)
    try:
        partial.rename(output)
    except BaseException:
        if partial.exists():  # else the rename was done when the interruption came
            aside.rename(output)
        raise
    return aside


def _rename(partial: Path, output: Path) -> None:
    """Rename to a path where nothing or an empty folder is; the operating system refuses any other."""
    try:
        partial.rename(output)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise OutputError(
            f"While this run was writing, {output} appeared. Remove it or choose another output."
        ) from error


def _move_files(partial: Path, output: Path) -> None:
    """Move the files of one folder into another on the same disk, those of LAST at the end; all or none."""
    names = sorted(path.name for path in partial.iterdir() if path.name not in OF_THE_RUN)
    ordered = [name for name in names if name not in LAST] + [name for name in LAST if name in names]
    try:
        for name in ordered:
            (partial / name).rename(output / name)
    except BaseException:
        for name in reversed(ordered):
            if not (partial / name).exists():
                with suppress(OSError):
                    (output / name).rename(partial / name)
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
