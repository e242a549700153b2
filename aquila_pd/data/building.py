"""A folder built under a temporary name and committed by an atomic rename, by one process at a time.

It is filled as FOLDER.partial, under a lock that the system lets go of however the run ends, and renamed at the end.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..utils.errors import OutputError
from ..utils.files import sync

LOCK = ".lock"
PARTIAL = ".partial"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of some network file systems


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the name `folder` when the block ends without an error.

    What a killed run has left is removed first. After an error nothing stays; the error says so in a note.
    Raises OutputError when another run is at it, when `folder` is there already, or nothing can be made there; also
    when what is in the way was not left by a run.
    """
    folder = folder.resolve()
    partial = folder.with_name(f"{folder.name}{PARTIAL}")
    if partial.is_symlink() or (partial.is_dir() and any(partial.iterdir()) and not (partial / LOCK).is_file()):
        raise OutputError(
            f"{folder} would be written as {partial} first, and that is there and was made by no run of this program. "
            "Remove it yourself if you mean it, or choose another folder."
        )
    with _locked(partial, folder):
        try:
            if folder.exists():  # another run may have finished just now
                raise OutputError(f"{folder} is there already. Use it, or choose another folder.")
            _empty(partial)
            yield partial
            for path in [*sorted(partial.rglob("*")), partial]:
                sync(path)
            _rename(partial, folder)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            error.add_note(f"Nothing was left behind at {folder}.")
            raise
        (folder / LOCK).unlink()
        sync(folder.parent)


@contextmanager
def _locked(partial: Path, folder: Path) -> Iterator[None]:
    try:
        descriptor = _open_lock(partial)
    except BlockingIOError:
        raise OutputError(f"Another run is making {folder}. Wait for it, or choose another folder.") from None
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}. Choose a place you may write to.") from error
    try:
        yield
    finally:
        os.close(descriptor)


def _open_lock(partial: Path) -> int:
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor)
            with suppress(FileNotFoundError):  # it went away with a run that ended between these lines
                if os.path.samestat(os.fstat(descriptor), (partial / LOCK).stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:  # without locks somebody else has to see that one run is at it
            raise


def _empty(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _rename(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise OutputError(
            f"While this run was writing, {folder} appeared. Use it, or choose another folder."
        ) from error
