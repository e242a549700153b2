"""The place a conversion writes to: checked first, filled under another name, and there at once or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError
from ..shards import INDEX, SHARD_NAME, SINGLE

SPARE = 64 * 10**6  # bytes beside the weights: tokenizer, code, headers


def check_output(output: Path, source: Path, *, overwrite: bool, nbytes: int) -> None:
    """Raise OutputError unless a folder of nbytes can appear at `output` without harm. Writes nothing."""
    output, source = output.resolve(), source.resolve()
    folder = source if source.is_dir() else source.parent
    if output == source or (source.is_dir() and folder in output.parents):
        raise OutputError(
            f"The output {output} lies in the source {folder}, which is never written to. Choose another."
        )
    if output in [folder, *folder.parents]:
        raise OutputError(f"The output {output} holds the source. Choose a folder outside of it.")
    if output.exists():
        _check_existing(output, overwrite)
    parent = nearest_parent(output)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} is read-only, so {output} cannot be made. Choose a place you may write to.")
    free = shutil.disk_usage(parent).free
    if free < nbytes + SPARE:
        raise OutputError(
            f"{output} needs {(nbytes + SPARE) / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free. Nothing was "
            f"written.\nMake room, choose another disk, or a smaller --dtype."
        )


def nearest_parent(path: Path) -> Path:
    """The lowest folder above a path that exists."""
    return next(parent for parent in path.parents if parent.exists())


def _check_existing(output: Path, overwrite: bool) -> None:
    if not output.is_dir():
        raise OutputError(f"The output {output} is a file. Give the name of a folder.")
    names = sorted(path.name for path in output.iterdir())
    if not names:
        return
    if not overwrite:
        raise OutputError(f"The output {output} exists and holds {len(names)} files. Remove it or pass --overwrite.")
    # --overwrite deletes a whole folder; a mistyped path must not cost anybody a home directory
    weights = [name for name in names if name in (SINGLE, INDEX) or SHARD_NAME.fullmatch(name)]
    folders = [path.name for path in output.iterdir() if path.is_dir() and path.name != "__pycache__"]
    if folders or not weights or "config.json" not in names:
        why = f"it holds the folder {folders[0]}" if folders else "it holds no converted model"
        raise OutputError(
            f"{output} is not replaced, although --overwrite says so: {why}. Remove it yourself if you mean it."
        )


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A new folder beside the output, which takes the output's place when the block ends without an error.

    After an error or Ctrl-C it is removed and what was at `output` is as before.
    """
    output = output.resolve()
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{output} cannot be made: {error.strerror}. Choose a place you may write to.") from error
        yield partial
        replace_folder(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:  # lowest first; those that hold anything stay
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def replace_folder(partial: Path, output: Path) -> None:
    """Rename partial to output; what was there steps aside first and is removed last."""
    if not output.exists():
        partial.rename(output)
        return
    aside = output.with_name(f"{output.name}.replaced-{os.getpid()}")
    output.rename(aside)
    try:
        partial.rename(output)
    except BaseException:
        aside.rename(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)
