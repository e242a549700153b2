"""The small files of a checkpoint: JSON and text read with named errors, and written whole or not at all.

Files come from anywhere, so nothing is believed of them: what is no ordinary file is not opened (a named pipe would
wait for ever), nothing is read without a limit, and what a message repeats of them cannot steer a terminal.
"""

import json
import math
import os
import stat
from collections.abc import Iterator
from hashlib import file_digest
from pathlib import Path

from .atomic import replacing
from .errors import AquilaError, shown, shown_value

LFS_BEGINNING = b"version https://git-lfs"
# what parse_json raises for text that is not JSON, not UTF-8, or nested deeper than Python's stack
JSON_ERRORS = (ValueError, RecursionError)

MAX_TEXT = 20_000_000  # bytes; a vocabulary of half a million tokens has less
MAX_DEPTH = 64  # of brackets in brackets; far from the end of Python's stack, where comparing and printing fail too
# Of these bytes of JSON no more than one may be a bracket: Python needs seventy bytes for "[]", and a hundred megabytes
# of nothing else would fill the memory. The densest honest text, a safetensors header, has seventeen.
BYTES_PER_BRACKET = 8
FEW = 1_000_000  # brackets that are no matter


def is_whole(value: object) -> bool:
    """Whether a value out of JSON is a whole number; true and false, which Python counts among them, are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return is_whole(value) or isinstance(value, float)


def refuse_larger(path: Path, limit: int, error: type[AquilaError]) -> None:
    """Raise `error` for a file of more bytes than one of its kind has."""
    size = path.stat().st_size
    if size > limit:
        raise error(f"{path} has {size:,} bytes; more than {limit:,} are taken for damage. Fetch it again.")


def why_not_a_file(path: Path) -> str | None:
    """What is wrong with a path that should be a file one can read and be done with; None for such a file."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: the name cannot be one, it holds a NUL
        return "is a link that leads nowhere" if os.path.islink(path) else "does not exist"
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "named pipe", stat.S_ISSOCK: "socket"}
    kind = next((name for is_kind, name in kinds.items() if is_kind(mode)), "device")
    return f"is a {kind}, not a file"


def lfs_pointer(path: Path) -> str | None:
    """What is wrong with a file that a clone without Git LFS left in place of the real one; None for any other."""
    with path.open("rb") as file:
        if file.read(len(LFS_BEGINNING)) != LFS_BEGINNING:
            return None
    return f"{path.name} is a Git LFS pointer, not the file itself; run `git lfs pull` in the source"


def refuse_lfs_pointer(path: Path, error: type[AquilaError]) -> None:
    """Raise `error` when the file is a Git LFS pointer, or no file at all."""
    found = why_not_a_file(path)
    if found:
        raise error(f"{path} {found}. Fetch it from where the weights came from.")
    found = lfs_pointer(path)
    if found:
        raise error(f"{path.parent}: {found}.")


def read_text(path: Path, error: type[AquilaError]) -> str:
    """UTF-8 text, without the byte order mark some editors put in front. Raises `error` naming the file."""
    try:
        refuse_lfs_pointer(path, error)
        size = path.stat().st_size
        if size > MAX_TEXT:
            raise error(f"{path} has {size:,} bytes; more than {MAX_TEXT:,} are taken for damage. Fetch it again.")
        return path.read_text(encoding="utf-8-sig")
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}. See to it, or fetch it again.") from reason
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not UTF-8 text ({reason}). Fetch it again.") from reason


def read_object(path: Path, error: type[AquilaError]) -> dict:
    """The object in a JSON file. Raises `error` naming the file when it is absent, damaged or of another kind."""
    text = read_text(path, error)
    try:
        found = parse_json(text)
        _check_values(found)
    except JSON_ERRORS as reason:
        raise error(f"{path} is not JSON ({reason}). Fetch it again.") from reason
    if not isinstance(found, dict):
        raise error(f"{path} holds a {type(found).__name__}, not a JSON object. Fetch it again.")
    return found


def parse_json(text: str) -> object:
    """JSON as Python has it. Raises one of JSON_ERRORS, also where a key is there twice (which of the two was meant?)
    and where there are more brackets than any file has reason for."""
    brackets = text.count("[") + text.count("{")
    if brackets > FEW and brackets * BYTES_PER_BRACKET > len(text):
        raise ValueError(f"{brackets:,} brackets in {len(text):,} characters")
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{shown(twice)} is there twice")
    return found


def _check_values(found: object) -> None:
    """Raise ValueError for what Python reads, and cannot be written again or gone through."""
    for value, depth in _walk(found):
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is no number")
        if isinstance(value, str) and not _is_text(value):
            raise ValueError(f"half of a surrogate pair in {shown_value(value)}")


def _walk(found: object) -> Iterator[tuple[object, int]]:
    """Every value and key, with its depth; without recursion, which has an end."""
    waiting = [(found, 0)]
    while waiting:
        value, depth = waiting.pop()
        yield value, depth
        if isinstance(value, dict):
            waiting += [(inner, depth + 1) for pair in value.items() for inner in pair]
        elif isinstance(value, list):
            waiting += [(inner, depth + 1) for inner in value]


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def hash_file(path: Path) -> str:
    """The sha256 of a file in hex digits, read in pieces."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def files_under(folder: Path, *, without: str = "__pycache__") -> list[str]:
    """The files in a folder and in its subfolders, as paths relative to it with "/" between; sorted.

    without: the name of subfolders that are left out; Python's caches appear when code in the folder is used.
    """
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != without)
        found += [(Path(place) / name).relative_to(folder).as_posix() for name in names]
    return sorted(found)


def write_text(path: Path, text: str, *, fsync: bool = False) -> None:
    """Write UTF-8 atomically, its folder too if need be; no platform newlines.

    fsync: the file survives a power failure once this returns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, fsync=fsync) as partial:
        partial.write_bytes(text.encode("utf-8"))


def write_json(path: Path, content: dict, *, fsync: bool = False) -> None:
    """A JSON file for people to read, whole or not there."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", fsync=fsync)
