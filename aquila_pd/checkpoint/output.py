"""The place a conversion writes to: checked first, filled under another name, and there at once or not at all.

The other name is OUTPUT.partial, beside the output. It is locked while a run writes to it, and stays when a run stops
after its first finished shard, for the next run to go on from (journal.py).
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import (
    CheckpointError,
    ConfigError,
    InstallationError,
    OutputError,
    TokenizerError,
    VerificationError,
    report,
)
from ..shards import INDEX, SHARD_NAME, SHARDS, SINGLE, read_layout
from ..weight_map import BASE_MODEL_PREFIX
from .bundle import bundled_modules, flat_name
from .ids import GENERATION_CONFIG
from .journal import JOURNAL, LOCK
from .layout import CONFIG
from .manifest import MANIFEST

SPARE = 64 * 10**6  # bytes beside the weights: tokenizer, code, headers
MODELING = f"{flat_name('modeling')}.py"  # every conversion writes it and no Hugging Face folder has it
CODE = re.compile(r"\w+_aquila_pd\.py")  # of any version of the package
CACHE = "__pycache__"  # appears when the code in the folder is used
PARTIAL = ".partial"
OF_THE_RUN = (JOURNAL, LOCK)  # in the staging folder; no part of the model
LAST = (INDEX, CONFIG)  # whoever finds these finds a complete folder


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
    place = output if _is_empty_folder(output) else nearest_parent(output)
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
    """Where a conversion into `output` writes until it is complete: beside it, or in it when it is an empty folder."""
    output = output.resolve()
    return (output if _is_empty_folder(output) else output.parent) / f"{output.name}{PARTIAL}"


def _already_written(output: Path) -> int:
    """Bytes of shards that an earlier run may have finished."""
    return sum(path.stat().st_size for path in staging_folder(output).glob(SHARDS))


def nearest_parent(path: Path) -> Path:
    """The lowest path above a path that exists."""
    return next(parent for parent in path.parents if parent.exists())


def _is_empty_folder(output: Path) -> bool:
    return output.is_dir() and not _names(output)


def _names(output: Path) -> list[str]:
    """What a folder holds, without the staging folder of a conversion into it."""
    return sorted(path.name for path in output.iterdir() if path.name != f"{output.name}{PARTIAL}")


def _check_existing(output: Path, overwrite: bool) -> None:
    if not output.is_dir():
        raise OutputError(f"The output {output} is a file. Give the name of a folder.")
    names = _names(output)
    if not names:
        return
    if not overwrite:
        count = "1 file" if len(names) == 1 else f"{len(names)} files"
        raise OutputError(f"The output {output} exists and holds {count}. Remove it or pass --overwrite.")
    # --overwrite deletes a whole folder; a mistyped path must cost nobody an original or a home directory
    findings = _not_of_a_conversion(output, names)
    if os.path.ismount(output):
        findings.append("it is a mount point, which cannot be replaced; give a folder inside it")
    if findings:
        headline = f"{output} is not replaced, although --overwrite says so:"
        raise OutputError(report(headline, findings, "Remove it yourself if you mean it, or choose another output."))


def _not_of_a_conversion(output: Path, names: list[str]) -> list[str]:
    """Why a folder is not, or not only, what a conversion wrote; nothing when it is."""
    findings = []
    if MODELING not in names or CONFIG not in names:
        findings.append(f"it holds no converted model ({CONFIG} and {MODELING} together)")
    else:
        try:
            held = read_layout(output)
        except CheckpointError as error:
            findings.append(f"its weights cannot be read as a converted model's: {error}")
        else:
            if not any(name.startswith(f"{BASE_MODEL_PREFIX}.") for name in held):
                findings.append(f"none of its tensors has a Paddle name, which begins with {BASE_MODEL_PREFIX}.")
    known = _files_written()
    for name in names:
        if (output / name).is_dir():
            findings += [] if name == CACHE else [f"it holds the folder {name}, which no conversion writes"]
        elif not (name in known or SHARD_NAME.fullmatch(name) or CODE.fullmatch(name)):
            findings.append(f"it holds {name}, which no conversion writes")
    return findings


def _files_written() -> set[str]:
    """Names of files a conversion may write, apart from numbered shards."""
    from .. import tokenizer_files as names  # imports the tokenizers library

    tokenizer = {names.TOKENIZER_JSON, names.VOCAB_JSON, names.MERGES_TXT, names.CONFIG_JSON}
    tokenizer |= {names.SPECIAL_MAP_JSON, names.ADDED_TOKENS_JSON, names.SENTENCEPIECE}
    code = {f"{flat_name(module)}.py" for module in bundled_modules()}
    # the last two are there when a run was killed between its rename and its very end
    return {SINGLE, INDEX, CONFIG, GENERATION_CONFIG, *tokenizer, *code, MANIFEST, JOURNAL, LOCK}


# ------------------------------------------------------------------------------------------------ killed runs


def restore_replaced(output: Path) -> list[str]:
    """Deal with an earlier output that a killed --overwrite left as <output>.replaced-PID; say what was done.

    It goes back to its place when nothing is there (the run died between two renames), and is removed otherwise.
    """
    output = output.resolve()
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


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    """Make the folder and hold its lock, which the system lets go of however this process ends.

    Raises OutputError when another run holds it, or nothing can be made there.
    """
    try:
        descriptor = _open_lock(folder)
    except BlockingIOError:
        raise OutputError(
            f"Another conversion is writing {output} ({_holder(folder)}). Wait for it, or choose another output."
        ) from None
    except OSError as error:
        raise OutputError(f"{output} cannot be made: {error.strerror}. Choose a place you may write to.") from error
    try:
        yield
    finally:
        os.close(descriptor)


def _open_lock(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # another run may have finished between the two lines above, and taken the file away with its folder
            if _same_file(descriptor, folder / LOCK):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()}".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


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


# ------------------------------------------------------------------------------------------------ staging

FINAL = (CheckpointError, ConfigError, TokenizerError, VerificationError, InstallationError)  # no use to try again


@dataclass
class Stage:
    """A staging folder while it is filled. finished: how many shards a later run could use, and of how many."""

    folder: Path
    finished: tuple[int, int] = (0, 0)


@contextmanager
def staging(output: Path, *, overwrite: bool = False, say: Callable[[str], None] = print) -> Iterator[Stage]:
    """A locked folder, which takes the output's place when the block ends without an error.

    It lies beside the output; in it when the output is an empty folder, which then stays the same folder (it may be
    a mount point). What was at `output` is as before after any error. The folder stays for a later run when shards are
    finished and another try can help (a full disk, Ctrl-C); otherwise it is removed. Which, is a note on the error.
    An earlier output is removed last, when the new one is complete: what cannot be removed is said, and no error.
    """
    output = output.resolve()
    into = _is_empty_folder(output)
    stage = Stage(staging_folder(output))
    made = [parent for parent in output.parents if not parent.exists()]
    with _locked(stage.folder, output):
        try:
            yield stage
            aside = _appear(stage.folder, output, into=into, overwrite=overwrite)
        except BaseException as error:
            done, count = stage.finished
            if done and not isinstance(error, FINAL):
                error.add_note(
                    f"{done} of {count} shards are finished and kept in {stage.folder}: the same command goes on after "
                    "them. Remove that folder to start afresh."
                )
            else:
                shutil.rmtree(stage.folder, ignore_errors=True)
                _remove_empty(made)
                error.add_note(f"Nothing was left behind; {output} is as it was before.")
            raise
        for name in OF_THE_RUN:
            (output / name).unlink(missing_ok=True)
    if aside is not None:
        _remove_replaced(aside, output, say)


def _remove_empty(folders: list[Path]) -> None:
    """Lowest first; those that hold anything stay."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _appear(partial: Path, output: Path, *, into: bool, overwrite: bool) -> Path | None:
    """Put partial at output; return where an earlier output stepped aside to."""
    if output.exists():  # checked again: another run may have been faster
        try:
            _check_existing(output, overwrite)
        except OutputError as error:
            raise OutputError(f"While this run was writing, {output} changed.\n{error}") from error
    if into:
        _move_files(partial, output)
        return None
    if not (output.is_dir() and _names(output)):
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
    names = sorted(path.name for path in partial.iterdir())
    ordered = [name for name in names if name not in LAST] + [name for name in LAST if name in names]
    try:
        for name in ordered:
            (partial / name).rename(output / name)
        partial.rmdir()
    except BaseException:
        partial.mkdir(exist_ok=True)
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
