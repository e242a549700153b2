"""Atomic writes (partial name, fsync, rename) and the lock that admits one writer: the only module that does either.

A file or folder is written under a partial name beside its place and renamed when it is complete. The rename is atomic,
so a reader finds all of it or nothing. With fsync the content is on the disk before the rename, the name after it.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError

PARTIAL = ".partial"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of some network file systems
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # what rename(2) says of a place that is not free


# ------------------------------------------------------------------------------------------------ fsync, rename


def sync(path: Path) -> None:
    """fsync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync every file and every folder under this one, and itself."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def rename(old: Path, new: Path, *, fsync: bool = False) -> None:
    """Atomic rename on one file system, over a file or an empty folder. fsync: the new name is on the disk."""
    os.replace(old, new)
    if fsync:
        sync(new.parent)


def rename_new(old: Path, new: Path) -> None:
    """Rename a folder to where nothing or an empty folder is. Raises FileExistsError for any other place."""
    try:
        rename(old, new)
    except OSError as error:
        if error.errno not in OCCUPIED:
            raise
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new)) from error


def remove_folder(folder: Path) -> None:
    """Remove a folder under another name, so that what an interruption leaves of it cannot pass for whole."""
    going = folder.with_name(f".{folder.name}.going")
    shutil.rmtree(going, ignore_errors=True)
    rename(folder, going)
    shutil.rmtree(going, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ files, folders


def partial_of(path: Path) -> Path:
    """The hidden partial name of a file or folder with one writer."""
    return path.with_name(f".{path.name}{PARTIAL}")


@contextmanager
def replacing(path: Path, *, fsync: bool = False) -> Iterator[Path]:
    """A partial file to write, renamed to `path` when the block ends and removed after an error."""
    with replacing_all([path], fsync=fsync) as (partial,):
        yield partial


@contextmanager
def replacing_all(paths: Sequence[Path], *, fsync: bool = False) -> Iterator[list[Path]]:
    """Partial files to write, renamed one after the other when all are complete and removed after an error."""
    partials = [partial_of(path) for path in paths]
    try:
        yield partials
        for partial in partials if fsync else ():
            sync(partial)
        for partial, path in zip(partials, paths, strict=True):
            rename(partial, path, fsync=fsync)
    except BaseException:
        for partial in partials:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty partial folder to fill: fsynced and renamed when the block ends, removed after an error.

    For one writer; what an earlier one left of it when it was killed is removed first.
    """
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)
        rename(partial, folder, fsync=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def shared_folder(folder: Path) -> Iterator[Path]:
    """new_folder() for several processes that make the same content at once: each its own, the first rename wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=PARTIAL, dir=folder.parent))
    try:
        yield partial
        sync_tree(partial)
        partial.chmod(0o755)  # mkdtemp's mode admits its owner only
        try:
            rename_new(partial, folder)
        except FileExistsError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ locks


@contextmanager
def locked(
    path: Path, *, busy: Callable[[str], str], failed: Callable[[str], str], text: str = ""
) -> Iterator[tuple[int, bool]]:
    """open_lock() for a block. Raises OutputError: busy(what the file says of its holder), failed(the system's reason).

    A folder that was made for the lock is removed when an interruption comes first.
    """
    try:
        descriptor, works = open_lock(path, text)
    except BlockingIOError:
        raise OutputError(busy(_read(path))) from None
    except OSError as error:
        raise OutputError(failed(error.strerror or str(error))) from error
    except BaseException:
        with suppress(OSError):  # it holds something, or never came to be
            path.parent.rmdir()
        raise
    try:
        yield descriptor, works
    finally:
        os.close(descriptor)


def open_lock(path: Path, text: str = "") -> tuple[int, bool]:
    """Lock a file, made with its folder if need be, until the descriptor is closed or the process ends however it ends.

    text: what the file says of its holder, by default "process PID". Returns the descriptor, and False where the file
    system has no locks. Raises BlockingIOError when another process holds it, OSError when the file cannot be made.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            works = _flock(descriptor)
            # the last holder may have finished between the two lines above, and removed the file with its folder
            if _is_file(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, (text or f"process {os.getpid()}").encode())
                return descriptor, works
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process that still runs holds the lock of a file."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        _flock(descriptor)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _flock(descriptor: int) -> bool:
    """Take the lock without waiting; False where the file system has none."""
    import fcntl  # of POSIX only, and this module is part of every converted folder

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip() or "it has only begun"
    except OSError:
        return "it has just ended"


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
