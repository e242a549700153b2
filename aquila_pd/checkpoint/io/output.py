"""Preflight of the output path: not the source, free or replaceable, writable, enough disk space."""

import os
import shutil
from pathlib import Path, PurePosixPath

from ...formats.safetensors import SHARDS
from ...utils.atomic import PARTIAL
from ...utils.errors import CheckpointError, OutputError, report
from ...utils.files import files_under, hash_file
from .journal import JOURNAL, OF_THE_RUN
from .manifest import MANIFEST, read_manifest

SPARE = 64 * 10**6  # bytes beside the weights: tokenizer, code, headers
SMALL = 16 * 10**6  # bytes of a file that is hashed to detect a change
CACHE = "__pycache__"  # appears when the code in the folder is used
OF_THE_DISK = "lost+found"  # what a new ext4 disk holds


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
    _check_staging_folder(output, source)
    if output.exists():
        check_existing(output, overwrite)
    place = output if is_empty_folder(output) else nearest_parent(output)
    if not place.is_dir():
        raise OutputError(f"{place} is a file, so {output} cannot be made in it. Choose another output.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{place} is read-only, so {output} cannot be made. Choose a place you may write to.")
    free, needed = shutil.disk_usage(place).free, nbytes + SPARE - _already_written(output)
    if free < needed:
        raise OutputError(
            f"{output} needs {needed / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free. Nothing was written.\n"
            f"Make room, choose another disk, or a smaller --dtype."
        )


def staging_folder(output: Path) -> Path:
    """Path of the staging folder: beside `output`, or inside when `output` is an empty folder."""
    output = output.resolve()
    beside = output.with_name(f"{output.name}{PARTIAL}")
    # an earlier run may have begun beside it, before the empty folder was made
    return output / beside.name if is_empty_folder(output) and not (beside / JOURNAL).is_file() else beside


def _check_staging_folder(output: Path, source: Path) -> None:
    """Raise OutputError unless the staging folder is new, empty, or of an earlier run: what else it holds is lost."""
    staged = staging_folder(output)
    wanted = f"The conversion would be written to {staged} first, and that"
    if staged == source or staged in source.parents or source in staged.parents:
        raise OutputError(f"{wanted} belongs to the source, which is never written to. Choose another output.")
    if staged.is_symlink() or (staged.exists() and not staged.is_dir()):
        raise OutputError(f"{wanted} is no folder. Remove it, or choose another output.")
    names = {path.name for path in staged.iterdir()} if staged.is_dir() else set()
    if names and not names & set(OF_THE_RUN):
        raise OutputError(
            f"{wanted} holds {len(names)} files that no conversion wrote, {sorted(names)[0]} first. Remove it yourself "
            "if you mean it, or choose another output."
        )


def _already_written(output: Path) -> int:
    """Bytes of shards that an earlier run may have finished."""
    return sum(path.stat().st_size for path in staging_folder(output).glob(SHARDS))


def nearest_parent(path: Path) -> Path:
    """The deepest existing parent of a path."""
    return next(parent for parent in path.parents if parent.exists())


def is_empty_folder(output: Path) -> bool:
    return output.is_dir() and not names_in(output)


def names_in(output: Path) -> list[str]:
    """Names in a folder, without the staging folder of a conversion into it."""
    others = {f"{output.name}{PARTIAL}", OF_THE_DISK}
    return sorted(path.name for path in output.iterdir() if path.name not in others)


def check_existing(output: Path, overwrite: bool) -> None:
    if not output.is_dir():
        raise OutputError(f"The output {output} is a file. Give the name of a folder.")
    names = names_in(output)
    if not names:
        return
    if not overwrite:
        count = "1 file" if len(names) == 1 else f"{len(names)} files"
        raise OutputError(f"The output {output} exists and holds {count}. Remove it or pass --overwrite.")
    # --overwrite deletes a whole folder; a mistyped path must not cost an original or a home directory
    findings = _not_of_a_conversion(output, names)
    if os.path.ismount(output):
        findings.append("it is a mount point, which cannot be replaced; give a folder inside it")
    if findings:
        headline = f"{output} is not replaced, although --overwrite says so:"
        raise OutputError(report(headline, findings, "Remove it yourself if you mean it, or choose another output."))


def _not_of_a_conversion(output: Path, names: list[str]) -> list[str]:
    """Why a folder is not, or not only, what a conversion wrote; nothing when it is. Its manifest is the witness."""
    if MANIFEST not in names:
        return [f"it holds no {MANIFEST}, which every conversion writes"]
    try:
        written = read_manifest(output)
    except CheckpointError as error:
        return [str(error)]
    findings = []
    for name in names:
        within = [file for file in written if PurePosixPath(file).parts[0] == name]
        if within:
            findings += _changed_within(output, name, {file: written[file] for file in within})
        elif name not in (MANIFEST, *OF_THE_RUN) and not (name == CACHE and (output / name).is_dir()):
            findings.append(f"it holds {name}, which the conversion did not write")
    return findings


def _changed_within(output: Path, name: str, written: dict) -> list[str]:
    """Findings for a file, or the files of a folder, that are others than were written."""
    there = {f"{name}/{file}" for file in files_under(output / name)} if (output / name).is_dir() else set()
    others = [f"it holds {file}, which the conversion did not write" for file in sorted(there - set(written))]
    return [finding for file, about in written.items() for finding in _changed(output / file, file, about)] + others


def _changed(path: Path, name: str, written: dict) -> list[str]:
    """A finding for a file that is another than was written; of large ones only the size is looked at."""
    if not path.is_file():
        return [f"{name} is no file any more"]
    size = path.stat().st_size
    same = size == written["bytes"] and (size > SMALL or hash_file(path) == written["sha256"])
    return [] if same else [f"it holds {name}, which was changed since the conversion"]
