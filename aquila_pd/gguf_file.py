"""GGUF files, parsed once for all who read from them: weights, configuration and tokenizer."""

from pathlib import Path
from weakref import WeakValueDictionary

from .errors import CheckpointError, InstallationError
from .files import refuse_lfs_pointer

PRE_TOKENIZER = "tokenizer.ggml.pre"
UNNAMED = (None, "default")  # a converter that did not recognise the splitting pattern writes one of these

# Parsing takes seconds, most of them for the vocabulary. Weak: the file is unmapped when its last reader lets go.
_open: WeakValueDictionary = WeakValueDictionary()


def open_gguf(path: Path):
    """The gguf.GGUFReader of a file, the same one for everybody as long as somebody holds it and the file is the same.

    Raises InstallationError without the gguf package, CheckpointError for a damaged file.
    """
    gguf = import_gguf(path)
    refuse_lfs_pointer(path, CheckpointError)
    status = path.stat()
    key = (path.resolve(), status.st_mtime_ns, status.st_size)
    file = _open.get(key)
    if file is None:
        try:
            file = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise _damaged(path, error) from error
        _open[key] = file
    return file


def read_value(file, key: str, path: Path) -> object:
    """The metadata under a key, None when it is not there. Raises CheckpointError for one that cannot be decoded."""
    if key not in file.fields:
        return None
    try:
        return file.fields[key].contents()
    except (ValueError, IndexError, TypeError) as error:  # a string that is not UTF-8 is a ValueError
        raise _damaged(path, error, place=f"its metadata {key} ") from error


def pre_tokenizer_note(pre: object) -> str | None:
    """What the user should know of a file whose tokenizer.ggml.pre is `pre`."""
    if pre not in UNNAMED:
        return None
    return f"the file does not name its pre-tokenizer ({PRE_TOKENIZER} is {pre!r}): text is split as gpt-2 does"


def import_gguf(path: Path):
    """The gguf package. Raises InstallationError."""
    try:
        import gguf
    except ImportError as error:
        raise InstallationError(
            f"{path} can only be read with the package gguf, which is not installed.\nInstall it with "
            f'pip install "aquila_pd[gguf]".'
        ) from error
    return gguf


def _damaged(path: Path, error: Exception, *, place: str = "") -> CheckpointError:
    found = f"{place}is damaged or cut off ({type(error).__name__}: {error})"
    return CheckpointError(f"{path}{': ' if place else ' '}{found}. Fetch the file again.")
