"""The small files of a checkpoint: JSON and text read with named errors, and written whole or not at all."""

import json
import os
from contextlib import suppress
from pathlib import Path

from .errors import AquilaError

LFS_BEGINNING = b"version https://git-lfs"
# what json.loads raises for text that is not JSON, not UTF-8, or nested deeper than Python's stack
JSON_ERRORS = (ValueError, RecursionError)


def lfs_pointer(path: Path) -> str | None:
    """What is wrong with a file that a clone without Git LFS left in place of the real one; None for any other."""
    with path.open("rb") as file:
        if file.read(len(LFS_BEGINNING)) != LFS_BEGINNING:
            return None
    return f"{path.name} is a Git LFS pointer, not the file itself; run `git lfs pull` in the source"


def refuse_lfs_pointer(path: Path, error: type[AquilaError]) -> None:
    """Raise `error` when the file is a Git LFS pointer."""
    found = lfs_pointer(path)
    if found:
        raise error(f"{path.parent}: {found}.")


def read_text(path: Path, error: type[AquilaError]) -> str:
    """UTF-8 text, without the byte order mark some editors put in front. Raises `error` naming the file."""
    try:
        refuse_lfs_pointer(path, error)
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise error(f"{path} does not exist. Fetch it from where the weights came from.") from None
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}. See to it, or fetch it again.") from reason
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not UTF-8 text ({reason}). Fetch it again.") from reason


def read_object(path: Path, error: type[AquilaError]) -> dict:
    """The object in a JSON file. Raises `error` naming the file when it is absent, damaged or of another kind."""
    text = read_text(path, error)
    try:
        found = json.loads(text)
    except JSON_ERRORS as reason:
        raise error(f"{path} is not JSON ({reason}). Fetch it again.") from reason
    if not isinstance(found, dict):
        raise error(f"{path} holds a {type(found).__name__}, not a JSON object. Fetch it again.")
    return found


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and not only in the system's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, fsync: bool = False) -> None:
    """Write UTF-8 under a temporary name, then rename: a reader never sees half a file. No platform newlines.

    fsync: the file survives a power failure once this returns.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(text.encode("utf-8"))
        if fsync:
            sync(partial)
        os.replace(partial, path)
        if fsync:
            sync(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict, *, fsync: bool = False) -> None:
    """A JSON file for people to read, whole or not there."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", fsync=fsync)
