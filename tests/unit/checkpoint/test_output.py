"""Where a conversion writes and how it ends: replaced folders, reports, permissions, signals, pipes, full disks."""

import errno
import fcntl
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import checkpoint_factory as factory
import pytest
from paths import ROOT

from aquila_pd.checkpoint import report as reporting
from aquila_pd.checkpoint import transaction
from aquila_pd.checkpoint.io import output, staging
from aquila_pd.utils import command
from aquila_pd.utils.errors import OutputError
from aquila_pd.utils.files import files_under
from aquila_pd.utils.units import counted
from convert.torch2paddle import main

SCRIPT = ROOT / "convert" / "torch2paddle.py"
SLOWLY = """
import sys, time, aquila_pd.checkpoint.io.shard_writer as writing
move = writing.move
def slowly(*args, **kwargs):
    time.sleep(0.3)
    return move(*args, **kwargs)
writing.move = slowly
from convert.torch2paddle import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def source(tmp_path) -> Path:
    return factory.write_safetensors(tmp_path / "source", factory.config(), factory.weights(factory.config()))


@pytest.fixture
def run(source, tmp_path):
    """run(*options) converts <tmp_path>/source to <tmp_path>/out, or to `place`, and returns the exit status."""

    def run(*options: str, place: Path | None = None) -> int:
        return main(["--input", str(source), "--output", str(place or tmp_path / "out"), *options])

    return run


def process(*argv: str, code: str = "", **options) -> subprocess.Popen:
    begin = [sys.executable, "-c", code] if code else [sys.executable, str(SCRIPT)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([*begin, *argv], env=environment, **options)


def dead_pid() -> int:
    """The id of a process that has just ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def strays(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if ".partial" in path.name or ".replaced" in path.name]


# ------------------------------------------------------------------------------------------------ --overwrite


def test_overwrite_never_replaces_a_hugging_face_folder(source, tmp_path, run, capsys):
    original = factory.write_safetensors(tmp_path / "original", factory.config(), factory.weights(factory.config()))
    before = factory.snapshot(tmp_path)
    assert run("--overwrite", place=original) == 1
    assert "it holds no conversion-manifest.json, which every conversion writes" in capsys.readouterr().err
    (original / "modeling_aquila_pd.py").write_text("")  # not even with our code beside its weights
    assert run("--overwrite", place=original) == 1
    assert "it holds no conversion-manifest.json" in capsys.readouterr().err
    (original / "modeling_aquila_pd.py").unlink()
    assert factory.snapshot(tmp_path) == before


def test_overwrite_replaces_what_this_command_made_unless_it_was_changed(source, tmp_path, run, capsys):
    for options in ((), ("--architecture", "llama")):
        assert run(*options, place=tmp_path / "mine") == 0
        assert run(*options, "--overwrite", place=tmp_path / "mine") == 0
        shutil.rmtree(tmp_path / "mine")
    assert run() == 0
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace("1e-05", "1e-06"))  # as a fine-tuned model saved over it may
    before = factory.snapshot(tmp_path)
    assert run("--overwrite") == 1
    assert "it holds config.json, which was changed since the conversion" in capsys.readouterr().err
    assert factory.snapshot(tmp_path) == before


@pytest.mark.parametrize("staged", ["out.partial", "out.partial/deep"])
def test_a_source_in_the_staging_folder_is_never_touched(tmp_path, capsys, staged):
    source = factory.write_safetensors(tmp_path / staged, factory.config(), factory.weights(factory.config()))
    before = factory.snapshot(tmp_path)
    assert main(["--input", str(source), "--output", str(tmp_path / "out")]) == 1
    assert "belongs to the source, which is never written to" in capsys.readouterr().err
    assert factory.snapshot(tmp_path) == before


def test_somebody_elses_folder_of_the_staging_folders_name_is_kept(tmp_path, run, capsys):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    before = factory.snapshot(tmp_path)
    assert run() == 1
    assert "holds 1 files that no conversion wrote, thesis.txt first" in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "other.partial").symlink_to(tmp_path / "elsewhere")
    assert run(place=tmp_path / "other") == 1
    assert "is no folder" in capsys.readouterr().err
    assert factory.snapshot(tmp_path) == before


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(tmp_path, run, capsys, monkeypatch, number):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert run() == 0
    assert f"the file system of {tmp_path} has no locks" in capsys.readouterr().out


def test_a_new_disk_counts_as_empty(tmp_path, run):
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    assert run() == 0
    assert (tmp_path / "out" / "config.json").is_file()
    assert not strays(tmp_path)


def test_a_source_that_changes_while_it_is_read_is_no_model(source, tmp_path, run, capsys, monkeypatch):
    write = transaction.write_weights

    def meanwhile(*args, **kwargs):
        found = write(*args, **kwargs)
        factory.write_safetensors(source, factory.config(), factory.weights(factory.config(), seed=1))
        return found

    monkeypatch.setattr(transaction, "write_weights", meanwhile)
    assert run("--verify", "none") == 1
    assert "changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not strays(tmp_path)


def test_overwrite_lists_the_files_it_did_not_write(tmp_path, run, capsys):
    assert run() == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "model-best.safetensors").write_text("mine")
    (tmp_path / "out" / "__pycache__").mkdir()  # made by using the folder's code
    before = factory.snapshot(tmp_path)
    assert run("--overwrite") == 1
    message = capsys.readouterr().err
    assert "it holds notes.txt, which the conversion did not write" in message
    assert "it holds model-best.safetensors, which the conversion did not write" in message
    assert "__pycache__" not in message
    assert factory.snapshot(tmp_path) == before
    for name in ("notes.txt", "model-best.safetensors"):
        (tmp_path / "out" / name).unlink()
    assert run("--overwrite") == 0


def test_mount_point_that_holds_an_earlier_output_is_not_replaced(tmp_path, run, capsys, monkeypatch):
    assert run() == 0
    monkeypatch.setattr(output.os.path, "ismount", lambda path: path == tmp_path / "out")
    assert run("--overwrite") == 1
    assert "it is a mount point, which cannot be replaced" in capsys.readouterr().err


def test_replaced_folder_that_cannot_be_removed_is_no_failed_conversion(tmp_path, run, capsys, monkeypatch):
    assert run() == 0
    remove = shutil.rmtree

    def stuck(path, *args, **kwargs):
        if ".replaced-" in Path(path).name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        remove(path, *args, **kwargs)

    monkeypatch.setattr(staging.shutil, "rmtree", stuck)
    assert run("--overwrite", "--dtype", "float16") == 0
    text = capsys.readouterr().out
    assert f"The model in {tmp_path / 'out'} is complete; of the one it replaced, {tmp_path / 'out.replaced-'}" in text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


def test_ctrl_c_while_the_replaced_folder_is_removed_tells_the_truth(tmp_path, run, capsys, monkeypatch):
    assert run() == 0
    remove = shutil.rmtree

    def interrupted(path, *args, **kwargs):
        if ".replaced-" in Path(path).name:
            raise KeyboardInterrupt
        remove(path, *args, **kwargs)

    monkeypatch.setattr(staging.shutil, "rmtree", interrupted)
    assert run("--overwrite", "--dtype", "float16") == 130
    message = capsys.readouterr().err
    assert message.startswith(f"Interrupted. The model in {tmp_path / 'out'} is complete; of the one it replaced, ")
    assert "Nothing was left" not in message
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"


# ------------------------------------------------------------------------------------------------ the folder


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_modes_follow_the_umask(tmp_path, source, run, mask):
    factory.write_byte_tokenizer(source, bos="[CLS]", eos="</s>", pad="<|endoftext|>")
    before = os.umask(mask)
    try:
        assert run() == 0
    finally:
        os.umask(before)
    out = tmp_path / "out"
    assert out.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {(out / name).stat().st_mode & 0o777 for name in files_under(out)} == {0o666 & ~mask}


def test_empty_folder_stays_the_same_folder(tmp_path, run, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    before = out.stat().st_ino
    monkeypatch.chdir(out)
    assert run(place=Path(".")) == 0
    assert out.stat().st_ino == before
    assert (out / "config.json").is_file()
    assert not strays(tmp_path)


def test_files_move_into_an_empty_folder_with_config_and_index_last_and_all_or_none(tmp_path, run, monkeypatch):
    (tmp_path / "out").mkdir()
    moved = []
    rename = os.replace

    def until_config(old, new):
        if Path(new).parent == tmp_path / "out":
            moved.append(Path(new).name)
            if Path(old).name == "config.json":
                raise OSError(errno.EIO, "Input/output error")
        return rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until_config)
        assert run("--max-shard-size", "30KB") == 1
    assert moved[-2:] == ["model.safetensors.index.json", "config.json"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["out.partial"]  # its shards are finished
    assert run("--max-shard-size", "30KB") == 0
    assert not strays(tmp_path)


def test_output_that_appears_meanwhile_is_kept(tmp_path, run, capsys, monkeypatch):
    write = transaction.write_weights

    def meanwhile(*args, **kwargs):
        found = write(*args, **kwargs)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("of another run")
        return found

    monkeypatch.setattr(transaction, "write_weights", meanwhile)
    assert run() == 1
    assert "While this run was writing" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert strays(tmp_path) == ["out.partial"]


def test_rename_itself_refuses_a_folder_that_holds_something(tmp_path):
    for name in ("partial", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OutputError, match="appeared"):
        staging._rename(tmp_path / "partial", tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "out"


def test_output_inside_a_file_is_said(tmp_path, run, capsys):
    (tmp_path / "file").write_text("mine")
    assert run(place=tmp_path / "file" / "out") == 1
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert run("--report", str(tmp_path / "file" / "report.json")) == 1
    assert "is a file" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the report


def test_report_never_replaces_a_file_that_is_no_report(tmp_path, run, capsys):
    path = factory.write_gguf(tmp_path / "tiny.gguf", factory.config(), factory.weights(factory.config()))
    (tmp_path / "thesis.json").write_text('{"tensors": 3}')
    (tmp_path / "folder").mkdir()
    before = factory.snapshot(tmp_path)
    argv = ["--input", str(path), "--output", str(tmp_path / "out"), "--report"]
    for report, words in {
        path: "is the source itself",
        tmp_path / "thesis.json": "would replace a file that is no earlier report",
        tmp_path / "folder": "would replace a folder",
        tmp_path / "out" / "report.json": "lies in the output",
    }.items():
        assert main([*argv, str(report)]) == 1
        assert words in capsys.readouterr().err
    assert factory.snapshot(tmp_path) == before


def test_earlier_report_is_replaced(tmp_path, run):
    report = str(tmp_path / "report.json")
    assert run("--report", report) == 0
    assert run("--report", report, "--overwrite", "--dtype", "float16") == 0
    assert json.loads(Path(report).read_text())["config"]["dtype"] == "float16"


def test_report_into_a_read_only_folder_is_noticed_before_starting(tmp_path, run, capsys, monkeypatch):
    (tmp_path / "closed").mkdir()
    real = os.access
    monkeypatch.setattr(reporting.os, "access", lambda p, mode: p != tmp_path / "closed" and real(p, mode))
    assert run("--report", str(tmp_path / "closed" / "report.json")) == 1
    assert "is read-only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_failing_report_beside_a_complete_output_says_so(tmp_path, run, capsys, monkeypatch):
    write = reporting.write_json

    def full(path, content):
        if path.name == "report.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(reporting, "write_json", full)
    assert run("--report", str(tmp_path / "report.json")) == 1
    message = capsys.readouterr().err
    assert f"The model in {tmp_path / 'out'} is complete; only the report" in message
    assert "Nothing" not in message
    assert (tmp_path / "out" / "config.json").is_file()


def test_dry_run_writes_no_report_and_says_so(tmp_path, run, capsys):
    assert run("--dry-run", "--report", str(tmp_path / "report.json")) == 0
    assert "Dry run: nothing was written, the report neither." in capsys.readouterr().out
    assert not (tmp_path / "report.json").exists()


# ------------------------------------------------------------------------------------------------ stopped, killed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopping_a_process_of_its_own_leaves_nothing(source, tmp_path, number):
    before = factory.snapshot(source)
    (tmp_path / "temporary").mkdir()
    argv = ["--input", str(source), "--output", str(tmp_path / "out")]
    running = process(*argv, code=SLOWLY, env={"TMPDIR": str(tmp_path / "temporary")})
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial/.model*.partial")) and time.monotonic() < deadline:
        assert running.poll() is None, running.communicate()
        time.sleep(0.02)
    assert list((tmp_path / "temporary").iterdir())
    running.send_signal(number)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 128 + number
    assert stderr.startswith("Interrupted." if number == signal.SIGINT else f"Stopped by {number.name}.")
    assert stderr.rstrip().endswith(f"Nothing was left behind; {tmp_path / 'out'} is as it was before.")
    assert factory.snapshot(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "temporary"]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_signals_that_are_ignored_or_handled_stay_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with command.stoppable():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_that_a_killed_run_set_aside_comes_back(tmp_path, run, capsys):
    assert run() == 0
    before = factory.digests(tmp_path / "out")
    aside = tmp_path / f"out.replaced-{dead_pid()}"
    (tmp_path / "out").rename(aside)
    assert run() == 1
    streams = capsys.readouterr()
    assert f"restored  {tmp_path / 'out'}" in streams.out
    assert "pass --overwrite" in streams.err
    assert factory.digests(tmp_path / "out") == before
    assert not aside.exists()


# ------------------------------------------------------------------------------------------------ pipes, terminals


def test_closed_pipe_is_no_disk_error(source, tmp_path):
    running = process("--input", str(source), "--output", str(tmp_path / "out"), code=SLOWLY)
    running.stdout.close()
    stderr = running.stderr.read()
    assert running.wait(60) == 141
    assert stderr.startswith("Nobody reads the output any more. Nothing was left behind;")
    assert stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_terminal_gets_a_bar_and_a_pipe_plain_lines(source, tmp_path):
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    code, terminal = SLOWLY.replace("0.3", "0.05"), {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    argv = ["--input", str(source), "--output", str(tmp_path / "a")]
    running = process(*argv, code=code, stderr=follower, env=terminal)
    os.close(follower)
    seen = b""
    while True:
        try:
            some = os.read(leader, 4096)
        except OSError:  # how Linux tells the end of a terminal
            break
        if not some:
            break
        seen += some
    os.close(leader)
    stdout, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    assert "  write " in seen.decode() and "━" in seen.decode() and "/21 tensors" in seen.decode()
    assert "21/21 tensors" not in stdout
    stdout, stderr = process("--input", str(source), "--output", str(tmp_path / "b")).communicate(timeout=60)
    assert "write     21/21 tensors, 0.1 MB," in stdout
    assert stderr == ""


def test_closed_stderr_and_a_terminal_without_unicode_stop_nothing(source, tmp_path):
    source.rename(tmp_path / "模型")
    argv = ["--input", str(tmp_path / "模型"), "--output", str(tmp_path / "out")]
    closing = f"import os, sys; os.close(2); sys.stderr = None\n{SLOWLY.replace('0.3', '0')}"
    running = process(*argv, code=closing, env={"PYTHONIOENCODING": "ascii"})
    stdout, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    assert "\\u6a21\\u578b" in stdout


def test_one_tensor_is_not_one_tensors():
    assert [counted(number, "tensor") for number in (0, 1, 1234)] == ["0 tensors", "1 tensor", "1,234 tensors"]


# ------------------------------------------------------------------------------------------------ limits


def test_a_write_that_really_fails(source, tmp_path):
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    before = factory.snapshot(tmp_path)
    argv = ["--input", str(source), "--output", str(tmp_path / "out")]
    running = process(*argv, preexec_fn=small_files, env={"PYTHONDONTWRITEBYTECODE": "1"})
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 1
    assert stderr.startswith(f"error: Writing {tmp_path / 'out'} failed: File too large.\n")
    assert "Nothing was left behind" in stderr
    assert factory.snapshot(tmp_path) == before
