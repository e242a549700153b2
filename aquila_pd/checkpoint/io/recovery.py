"""Recovery of an output whose run was killed during its commit: rolled back to the staging folder.

A commit is one rename, or the moves of files into an empty folder, or with --overwrite two renames. Which of these was
under way shows in where the journal and the lock lie. A run that still holds its lock is left alone.
"""

import os
import re
import shutil
from pathlib import Path, PurePosixPath

from ...utils.atomic import PARTIAL, is_locked, rename
from .journal import JOURNAL, LOCK, read_fingerprint, remove_files_of_the_run
from .manifest import MANIFEST, read_manifest
from .output import is_empty_folder, names_in


def undo_killed(output: Path, fingerprint: dict) -> list[str]:
    """Roll back a commit that was killed, so that its run can be resumed; returns a line for each action."""
    output = output.resolve()
    said = _undo_moves(output) or _undo_rename(output, fingerprint)
    return said + _restore_replaced(output)


def _undo_rename(output: Path, fingerprint: dict) -> list[str]:
    """Killed after the rename, before its journal was removed: the folder is complete, and its run ends again."""
    if not (output / JOURNAL).is_file() or is_locked(output / LOCK):
        return []
    partial = output.with_name(f"{output.name}{PARTIAL}")
    if partial.exists() or read_fingerprint(output) != fingerprint:  # of another conversion, and complete
        remove_files_of_the_run(output)
        return []
    rename(output, partial)
    return [f"  resumes   {output}, which an earlier run had not quite ended"]


def _undo_moves(output: Path) -> list[str]:
    """Killed while files moved into a folder that was empty: they move back to the others."""
    partial = output / f"{output.name}{PARTIAL}"
    if not (partial / JOURNAL).is_file() or is_empty_folder(output) or is_locked(partial / LOCK):
        return []
    manifest = next((folder for folder in (partial, output) if (folder / MANIFEST).is_file()), None)
    written = {*(PurePosixPath(file).parts[0] for file in read_manifest(manifest)), MANIFEST} if manifest else set()
    moved = [name for name in names_in(output) if name in written]
    for name in moved:
        rename(output / name, partial / name)
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
            rename(path, output)
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
