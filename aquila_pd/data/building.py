"""A folder built under a temporary name and committed by an atomic rename, by one process at a time.

It is filled as FOLDER.partial, under a lock that the system lets go of however the run ends, and renamed at the end.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..utils.atomic import PARTIAL, locked, rename_new, sync, sync_tree
from ..utils.errors import OutputError

LOCK = ".lock"


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
    lock = locked(
        partial / LOCK,
        busy=lambda holder: f"Another run is making {folder}. Wait for it, or choose another folder.",
        failed=lambda reason: f"{folder} cannot be made: {reason}. Choose a place you may write to.",
    )
    with lock:
        try:
            if folder.exists():  # another run may have finished just now
                raise OutputError(f"{folder} is there already. Use it, or choose another folder.")
            _empty(partial)
            yield partial
            sync_tree(partial)
            _commit(partial, folder)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            error.add_note(f"Nothing was left behind at {folder}.")
            raise
        (folder / LOCK).unlink()
        sync(folder.parent)


def _empty(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _commit(partial: Path, folder: Path) -> None:
    try:
        rename_new(partial, folder)
    except FileExistsError as error:
        raise OutputError(
            f"While this run was writing, {folder} appeared. Use it, or choose another folder."
        ) from error
