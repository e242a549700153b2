"""Atomic writes and locks: whole or not there after any error, on the disk in the right order, one writer at a time."""

import ast
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

from aquila_pd.utils import atomic
from aquila_pd.utils.errors import OutputError

HOLD = """
import sys
from pathlib import Path
from aquila_pd.utils.atomic import open_lock
open_lock(Path(sys.argv[1]), "me")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def steps(monkeypatch) -> list[tuple[str, str]]:
    """("sync", name) and ("rename", new name), in order."""
    found, fsync, replace = [], os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        found.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def renaming(old, new) -> None:
        found.append(("rename", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", renaming)
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ------------------------------------------------------------------------------------------------ files


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    (tmp_path / "a").write_text("old")
    with atomic.replacing(tmp_path / "a") as partial:
        partial.write_text("new")
        assert (tmp_path / "a").read_text() == "old" and partial.parent == tmp_path
    assert (tmp_path / "a").read_text() == "new" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_after_an_error_the_earlier_file_is_there_and_nothing_else(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(error), atomic.replacing(tmp_path / "a") as partial:
        partial.write_text("half")
        raise error
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_several_files_are_replaced_when_the_last_is_complete(tmp_path):
    places = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(OSError), atomic.replacing_all(places) as partials:
        partials[0].write_text("whole")
        raise OSError
    assert names(tmp_path) == []
    with atomic.replacing_all(places) as partials:
        for partial in partials:
            partial.write_text("whole")
    assert names(tmp_path) == ["a", "b"]


def test_fsync_puts_the_content_on_the_disk_before_the_name(tmp_path, steps):
    with atomic.replacing(tmp_path / "a", fsync=True) as partial:
        partial.write_text("x")
    assert steps == [("sync", ".a.partial"), ("rename", "a"), ("sync", tmp_path.name)]


def test_without_fsync_nothing_waits_for_the_disk(tmp_path, steps):
    with atomic.replacing(tmp_path / "a") as partial:
        partial.write_text("x")
    assert steps == [("rename", "a")]


# ------------------------------------------------------------------------------------------------ folders


def test_a_folder_is_on_the_disk_with_all_it_holds_before_it_gets_its_name(tmp_path, steps):
    with atomic.new_folder(tmp_path / "new") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("x")
    assert steps[-2:] == [("rename", "new"), ("sync", tmp_path.name)]
    assert {name for _, name in steps[:-2]} == {"file", "deep", ".new.partial"}
    assert names(tmp_path) == ["new", "new/deep", "new/deep/file"]


def test_what_a_killed_writer_left_is_no_part_of_the_folder(tmp_path):
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "half").write_text("x")
    with atomic.new_folder(tmp_path / "new") as partial:
        assert not list(partial.iterdir())
    assert names(tmp_path) == ["new"]


@pytest.mark.parametrize("make", [atomic.new_folder, atomic.shared_folder])
def test_after_an_error_no_folder_is_there(tmp_path, make):
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "new") as partial:
        (partial / "half").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_of_two_writers_of_a_shared_folder_the_first_wins(tmp_path):
    with atomic.shared_folder(tmp_path / "new") as late:
        (late / "late").write_text("x")
        with atomic.shared_folder(tmp_path / "new") as early:
            (early / "early").write_text("x")
    assert names(tmp_path) == ["new", "new/early"]
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o755


def test_a_shared_folder_is_no_success_where_a_file_is_in_the_way(tmp_path):
    (tmp_path / "new").write_text("mine")
    with pytest.raises(FileExistsError), atomic.shared_folder(tmp_path / "new"):
        pass
    assert (tmp_path / "new").read_text() == "mine" and names(tmp_path) == ["new"]


@pytest.mark.parametrize("in_the_way", ["file", "full folder"])
def test_rename_new_never_replaces(tmp_path, in_the_way):
    (tmp_path / "old").mkdir()
    if in_the_way == "file":
        (tmp_path / "new").write_text("x")
    else:
        (tmp_path / "new" / "deep").mkdir(parents=True)
    before = names(tmp_path)
    with pytest.raises(FileExistsError):
        atomic.rename_new(tmp_path / "old", tmp_path / "new")
    assert names(tmp_path) == before


def test_rename_new_takes_an_empty_folder_and_passes_other_errors_on(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    atomic.rename_new(tmp_path / "old", tmp_path / "new")
    assert names(tmp_path) == ["new"]
    with pytest.raises(FileNotFoundError):
        atomic.rename_new(tmp_path / "old", tmp_path / "new")


def test_a_folder_is_removed_under_another_name(tmp_path, steps):
    (tmp_path / "old" / "deep").mkdir(parents=True)
    (tmp_path / ".old.going").mkdir()  # of a removal that was killed
    atomic.remove_folder(tmp_path / "old")
    assert steps == [("rename", ".old.going")] and names(tmp_path) == []


# ------------------------------------------------------------------------------------------------ locks


@pytest.fixture
def holder(tmp_path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock of tmp_path/made/lock until it is killed."""
    argv = [sys.executable, "-c", HOLD, str(tmp_path / "made" / "lock")]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "held\n"
        yield running
        running.kill()


def test_one_process_holds_a_lock_and_a_killed_one_does_not(tmp_path, holder):
    lock = tmp_path / "made" / "lock"
    assert atomic.is_locked(lock) and lock.read_text() == "me"
    with pytest.raises(BlockingIOError):
        atomic.open_lock(lock)
    assert lock.read_text() == "me", "who was refused has written into it"
    holder.kill()
    holder.wait()
    assert not atomic.is_locked(lock)
    descriptor, works = atomic.open_lock(lock)
    assert works and lock.read_text() == f"process {os.getpid()}"
    os.close(descriptor)
    assert not atomic.is_locked(lock) and not atomic.is_locked(tmp_path / "none")


def test_who_holds_a_lock_and_what_the_system_refused_are_in_the_error(tmp_path, holder):
    words = {"busy": lambda by: f"busy: {by}", "failed": lambda reason: f"failed: {reason}"}
    with pytest.raises(OutputError, match="busy: me"), atomic.locked(tmp_path / "made" / "lock", **words):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="failed: File exists"), atomic.locked(tmp_path / "file" / "lock", **words):
        pass
    with pytest.raises(OSError, match="of the block"), atomic.locked(tmp_path / "lock", **words):
        assert atomic.is_locked(tmp_path / "lock")
        raise OSError("of the block")
    assert not atomic.is_locked(tmp_path / "lock")


def test_an_interrupted_lock_leaves_no_empty_folder(tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic.locked(tmp_path / "new" / "lock", busy=str, failed=str):
        pass
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", atomic.NO_LOCKS)
def test_a_file_system_without_locks_is_told_from_a_held_lock(tmp_path, monkeypatch, number):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    descriptor, works = atomic.open_lock(tmp_path / "lock")
    os.close(descriptor)
    assert not works and not atomic.is_locked(tmp_path / "lock")
    number = errno.EIO  # the control: any other refusal is an error
    with pytest.raises(OSError):
        atomic.open_lock(tmp_path / "lock")


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    import fcntl

    flock, removed = fcntl.flock, []

    def meanwhile(descriptor, operation):
        flock(descriptor, operation)
        if not removed:
            (tmp_path / "lock").unlink()
            removed.append(descriptor)

    monkeypatch.setattr(fcntl, "flock", meanwhile)
    descriptor, _ = atomic.open_lock(tmp_path / "lock")
    assert removed and os.path.samestat(os.fstat(descriptor), (tmp_path / "lock").stat())
    os.close(descriptor)


# ------------------------------------------------------------------------------------------------ written once


def mechanisms(code: str) -> list[str]:
    """What of locks, fsync and renames a module does by itself."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import) and any(alias.name == "fcntl" for alias in node.names):
            found.append("import fcntl")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            found += [f"os.{node.attr}"] * (node.attr in ("fsync", "rename", "replace", "renames"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "rename":
            found += [".rename()"] * (ast.unparse(node.func.value) != "os")
    return found


def test_no_other_module_locks_fsyncs_or_renames():
    found = {path: mechanisms(path.read_text("utf-8")) for path in (ROOT / "aquila_pd").rglob("*.py")}
    assert {path.name for path, uses in found.items() if uses} == {"atomic.py"}


@pytest.mark.parametrize(
    "code", ["import fcntl", "os.fsync(1)", "os.replace(a, b)", "Path(a).rename(b)", "a.b.rename(c)"]
)
def test_control_each_mechanism_is_noticed(code):
    assert mechanisms(code)
    assert not mechanisms("rename(a, b); text.replace(a, b); os.remove(a)")
