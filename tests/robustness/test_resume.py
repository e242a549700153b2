"""A conversion that is stopped: killed, interrupted, out of room, without its source, twice at once.

Whatever happens, the same command finishes the same bytes, says what it took over, and leaves nothing beside them.
The moments are found from outside: Python reports every file that is opened, renamed or removed (sys.addaudithook),
and a run is stopped at one of these events. Nothing here knows in which order the converter does its work. Of moments
of one kind a few are tried, all with AQUILA_PD_TEST_THOROUGH=1.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import checkpoint_factory as factory
import pytest
from effort import THOROUGH
from fork_server import ForkServer
from paths import ROOT, SUPPORT

from aquila_pd.utils.files import files_under
from convert.torch2paddle import main

JOURNAL, LOCK, MANIFEST = "conversion-journal.json", "conversion.lock", "conversion-manifest.json"
SIZE = ("--max-shard-size", "25KB")
SHARDS = 5  # of the factory's default model, at this size
SECOND = ".model-00002-of"  # in the temporary name of the second shard

JOURNAL_GONE = "a resumed run removes the journal before it has checked the shards the journal names"

DIE = "os.kill(os.getpid(), signal.SIGKILL)"
INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"
TERMINATE = "os.kill(os.getpid(), signal.SIGTERM)"
SMALL_FILES = "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))"
FILL = """
with suppress(OSError), open({filler!r}, "wb", buffering=0) as file:
    while True:
        file.write(bytes(1 << 16))
"""

# One run, in a fork of a process that has converted before. It does `act` at the `number`-th event whose kind and path
# contain `kind` and `path`, of events about paths below `about`, and writes them all down: an open that only reads and
# a folder that is there already change nothing on the disk.
RUN = """
import itertools, json, os, resource, signal, sys
from contextlib import suppress
from aquila_pd.checkpoint.command import main

KINDS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")

def changes(event, arguments):
    if event == "open":
        return bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
    return event != "os.mkdir" or not os.path.isdir(arguments[0])

def watch(events, about, kind, path, number, act):
    matching = itertools.count(1)
    def hook(event, arguments):
        if event not in KINDS:
            return
        paths = [os.fspath(one) for one in arguments if isinstance(one, (str, os.PathLike))]
        if not any(one.startswith(about) for one in paths):
            return
        events.append([event, paths[0], changes(event, arguments)])
        if kind in event and any(path in one for one in paths) and next(matching) == number:
            exec(act)
    sys.addaudithook(hook)

request, events = json.loads(sys.argv[1]), []
watch(events, *request["watch"])
status = main(request["argv"], framework=request["framework"])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
came_through = json.dumps(events)
with open(request["events"], "w") as file:
    file.write(came_through)
sys.exit(status)
"""


@dataclass
class Ended:
    """How a run ended: exit status (-9 when killed), what it printed, and the events it came through."""

    status: int
    out: str
    err: str
    events: list[tuple[str, str, bool]]  # kind, path, whether it changes anything

    @property
    def resumed(self) -> int:
        """How many shards of an earlier run it says it took over."""
        lines = [line.split() for line in self.out.splitlines() if line.startswith("  resumed ")]
        return int(lines[0][1]) if lines else 0


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    """A copy of the package: every output carries code, so an edit during these tests would be seen as a difference."""
    folder = tmp_path_factory.mktemp("code")
    for package in ("aquila_pd", "convert"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def laboratory(code) -> Iterator[ForkServer]:
    made = ForkServer(["aquila_pd.checkpoint.sources.packed", "converted_once"], path=[str(code), str(SUPPORT)])
    yield made
    made.close()


@dataclass
class Place:
    """A folder with a source, into which the same command is run again and again."""

    laboratory: ForkServer
    folder: Path
    logs: Path
    framework: str = "paddle"

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def partial(self) -> Path:
        return self.folder / "out.partial"

    def run(
        self,
        *options: str,
        act: str = "pass",
        kind: str = "",
        path: str = "",
        number: int = 1,
        output: Path | None = None,
    ) -> Ended:
        """Convert in a process of its own; do `act` in it at the number-th event of this kind at this path."""
        argv = ["--input", str(self.source), "--output", str(output or self.output), *SIZE, *options]
        events = self.logs / "events"
        events.write_text("[]")
        watch = [str(self.folder.parent), kind, path, number, act]
        request = {"argv": argv, "framework": self.framework, "watch": watch, "events": str(events)}
        done = self.laboratory.run(["-c", RUN, json.dumps(request)])
        came_through = [tuple(event) for event in json.loads(events.read_text())]
        return Ended(done.returncode, done.stdout, done.stderr, came_through)

    def reference(self, *options: str) -> dict[str, str]:
        """What an uninterrupted run writes: file name -> hash."""
        output = self.logs / "reference"
        ended = self.run(*options, output=output)
        assert ended.status == 0, ended.err
        found = factory.digests(output)
        shutil.rmtree(output)
        return found

    def journaled(self) -> list[str]:
        """The shards a journal calls finished, read without the product: in the staging folder, wherever it is now."""
        inside = self.output / self.partial.name  # where the output was an empty folder
        places = [folder / JOURNAL for folder in (self.partial, inside, self.output)]
        path = next((path for path in places if path.is_file()), None)
        return sorted(json.loads(path.read_text())["finished"]) if path else []

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def clear(self) -> None:
        """Only the source stays."""
        for path in self.folder.iterdir():
            if path != self.source:
                shutil.rmtree(path)


@pytest.fixture
def place(tmp_path, laboratory) -> Place:
    made = Place(laboratory, tmp_path / "work", tmp_path / "logs")
    made.logs.mkdir()
    factory.write_safetensors(made.source, factory.config(), factory.weights(factory.config()), shards=3)
    factory.write_byte_tokenizer(made.source, bos="[CLS]", eos="</s>", pad="<|endoftext|>")
    return made


def kind_of(event: str, path: str, changes: bool) -> tuple:
    """What makes two moments alike: the same is done to a file of the same sort. Shards are of one sort, and so are
    copied files of code."""
    path = re.sub(r"(aquila_pd_code|replaced-\w+)/.*", r"\1/", path)
    return event, re.sub(r"\d+", "#", path), changes


def moments(run: Ended, each: int, *, reads: bool = False) -> list[int]:
    """Numbers of the events of a whole run at which to stop another: up to `each` of every kind, the first and the last
    among them. All of them in a thorough run.

    Events that only read leave out what matters to SIGKILL: until the next change, the disk is as it was.
    """
    assert run.status == 0, run.err
    kinds: dict[tuple, list[int]] = {}
    for number, event in enumerate(run.events, 1):
        if reads or event[2] or number == len(run.events):
            kinds.setdefault(kind_of(*event), []).append(number)
    if THOROUGH:
        return list(range(1, len(run.events) + 1))
    return sorted(number for numbers in kinds.values() for number in spread(numbers, each))


def number_of(run: Ended, path: str) -> int:
    """Of the first event about a path in which that is."""
    return next(number for number, event in enumerate(run.events, 1) if path in event[1])


def spread(numbers: list[int], count: int) -> set[int]:
    """Up to `count` of the numbers, evenly, the first always and the last if there may be two."""
    steps = min(count, len(numbers))
    return {numbers[round(i * (len(numbers) - 1) / max(steps - 1, 1))] for i in range(steps)}


def sweep(moments: list[int], check: Callable[[int], None]) -> None:
    """Run a check at every moment; all failures are told together."""
    failed = []
    for moment in moments:
        try:
            check(moment)
        except AssertionError as error:
            failed.append(f"event {moment}: " + " ".join(str(error).split())[:400])
    assert not failed, f"{len(failed)} moments failed:\n" + "\n".join(failed[:4])


def differing(folder: Path, wanted: dict[str, str]) -> list[str]:
    """Files of a folder that are not as in an uninterrupted run, missing and additional ones too."""
    found = factory.digests(folder)
    return sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))


def workers(number: int) -> tuple[str, str]:
    return ("--workers", str(number))


def kill_in_second_shard(place: Place, *options: str) -> None:
    """Leave one finished shard and half of another."""
    assert place.run(*options, act=DIE, kind="rename", path=SECOND).status == -signal.SIGKILL
    assert place.journaled() == ["model-00001-of-00005.safetensors"]


# ------------------------------------------------------------------------------------------------ SIGKILL


def assert_same_command_finishes(place: Place, wanted: dict[str, str], *options: str) -> None:
    """The same command again: 0, says what it took over, the bytes of an uninterrupted run, nothing beside them."""
    finished = len(place.journaled())
    again = place.run(*options)
    assert (again.status, again.resumed) == (0, finished), again.err or again.out
    assert differing(place.output, wanted) == []
    assert place.names() == ["out", "source"]


# What SIGKILL leaves is what lies on the disk, so every change is tried with one worker, all five shards. More workers
# leave other mixtures of finished and half written shards; when the last shard is there, they make no difference.
@pytest.mark.parametrize(("first", "second"), [(1, 1), (2, 5), (5, 1)])
def test_killed_at_any_moment_the_same_command_finishes_the_same_bytes(place, first, second):
    wanted, taken = place.reference(), set()

    def check(moment: int) -> None:
        place.clear()
        assert place.run(*workers(first), act=DIE, number=moment).status == -signal.SIGKILL
        taken.add(len(place.journaled()))
        if place.output.exists():  # renamed already: another test's subject
            assert wanted.items() <= factory.digests(place.output).items()
        else:
            assert_same_command_finishes(place, wanted, *workers(second))

    whole = place.run(*workers(first))
    upto = len(whole.events) if first == 1 else number_of(whole, "out.partial/.model.safetensors.index")
    sweep([number for number in moments(whole, SHARDS if first == 1 else 3) if number <= upto], check)
    assert {0, SHARDS} <= taken and len(taken) > 2, "the moments reach from before the first shard to after the last"


def test_the_run_that_goes_on_may_be_killed_at_any_moment_too(place):
    """From its second shard on it does what any run does: one moment of each kind, and the first with a reading one."""
    wanted = place.reference()
    kill_in_second_shard(place)
    shutil.copytree(place.partial, place.logs / "killed")
    whole = place.run()
    after = number_of(whole, SECOND)

    def check(moment: int) -> None:
        place.clear()
        shutil.copytree(place.logs / "killed", place.partial)
        assert place.run(*workers(2), act=DIE, number=moment).status == -signal.SIGKILL
        if place.partial.exists():
            assert place.journaled(), "the first run's shard is lost"
            assert_same_command_finishes(place, wanted, *workers(1))

    before = [number for number in moments(whole, 1, reads=True) if number < after]
    sweep(sorted({*before, *moments(whole, 1)}), check)


def test_killed_while_finished_shards_are_hashed_they_are_still_finished(place):
    kill_in_second_shard(place)
    hashing = place.run(act=DIE, kind="open", path="out.partial/model-00001-of-00005.safetensors")
    assert hashing.status == -signal.SIGKILL
    assert place.journaled() == ["model-00001-of-00005.safetensors"]
    assert_same_command_finishes(place, place.reference())


@pytest.fixture
def back(place) -> Place:
    """A place whose source is a converted folder, which goes back to torch."""
    assert place.run().status == 0
    shutil.rmtree(place.source)
    place.output.rename(place.source)
    return Place(place.laboratory, place.folder, place.logs, framework="torch")


def test_the_way_back_goes_on_too(back):
    wanted = back.reference()

    def check(moment: int) -> None:
        back.clear()
        assert back.run(act=DIE, number=moment).status == -signal.SIGKILL
        if not back.output.exists():
            assert_same_command_finishes(back, wanted)

    sweep(moments(back.run(), 1), check)


@pytest.mark.parametrize("name", [JOURNAL, LOCK])
def test_killed_right_after_the_last_rename_the_same_command_ends_well(place, name):
    wanted = place.reference()
    assert place.run(act=DIE, kind="remove", path=f"out/{name}").status == -signal.SIGKILL
    assert wanted.items() <= factory.digests(place.output).items()
    again = place.run()
    assert again.status == 0, again.err
    assert differing(place.output, wanted) == []
    assert place.names() == ["out", "source"]


def test_killed_at_any_moment_of_filling_an_empty_folder_the_same_command_finishes(place):
    wanted = place.reference()
    place.output.mkdir()

    def check(moment: int) -> None:
        place.clear()
        place.output.mkdir()
        assert place.run(act=DIE, number=moment).status == -signal.SIGKILL
        if differing(place.output, wanted) == []:
            return  # at the very last moments all is done, and nothing says any more that a run was there
        again = place.run()
        assert again.status == 0, again.err
        assert differing(place.output, wanted) == []
        assert place.names() == ["out", "source"]

    sweep(moments(place.run(), 2), check)


# ------------------------------------------------------------------------------------------------ power failures


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [zeros, truncated, one_bit, longer, empty])
def test_damaged_shard_is_written_again_and_said(place, damage):
    wanted = place.reference()
    assert place.run(act=DIE, kind="open", path="out.partial/.config.json").status == -signal.SIGKILL
    damage(place.partial / "model-00003-of-00005.safetensors")
    again = place.run(*workers(2))
    assert (again.status, again.resumed) == (0, SHARDS - 1)
    assert "  damaged   model-00003-of-00005.safetensors, finished by an earlier run" in again.out
    assert again.out.count("  damaged   ") == 1
    assert differing(place.output, wanted) == []


def test_lost_shard_is_written_again(place):
    wanted = place.reference()
    assert place.run(act=DIE, kind="open", path="out.partial/.config.json").status == -signal.SIGKILL
    (place.partial / "model-00003-of-00005.safetensors").unlink()
    again = place.run()
    assert (again.status, again.resumed) == (0, SHARDS - 1)
    assert differing(place.output, wanted) == []


ODD_JOURNALS = [b"", bytes(300), b"{", b"[]", b"3", b'"for"', b"\xff\xfe", b"{}", b'{"for": {}, "finished": []}']
UNREAD_JOURNALS = [b'{"for": [], "finished": {}}', b'{"for": null, "finished": {}}', b"[" * 100_000]


@pytest.mark.parametrize(
    "content",
    [*ODD_JOURNALS, *UNREAD_JOURNALS],
    ids=lambda content: repr(content[:30]),
)
def test_damaged_journal_means_beginning_again_and_that_is_said(place, content):
    wanted = place.reference()
    kill_in_second_shard(place)
    (place.partial / JOURNAL).write_bytes(content)
    again = place.run()
    assert (again.status, again.resumed) == (0, 0), again.err
    assert "  restarted an earlier run was not finished, but " in again.out
    assert differing(place.output, wanted) == []


def test_truncated_journal_means_beginning_again(place):
    wanted = place.reference()
    kill_in_second_shard(place)
    truncated(place.partial / JOURNAL)
    again = place.run()
    assert (again.status, again.resumed) == (0, 0)
    assert "but its journal is damaged: it is done again from the beginning" in again.out
    assert differing(place.output, wanted) == []


def test_damage_before_the_last_rename_is_found_by_the_verification(place):
    """Control of the hash check: a shard that is damaged after it was written does not pass for whole."""
    act = f"open({str(place.partial / 'model-00002-of-00005.safetensors')!r}, 'r+b').truncate(9000)"
    ended = place.run(act=act, kind="rename", path=f".{MANIFEST}")
    assert ended.status == 1
    assert "model-00002-of-00005.safetensors is cut off" in ended.err
    assert place.names() == ["source"]


# ------------------------------------------------------------------------------------------------ changes


def touch(place: Place) -> None:
    path = place.source / "model-00002-of-00003.safetensors"
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def other_weights(place: Place) -> None:
    tensors = factory.weights(factory.config(), seed=1)
    factory.write_safetensors(place.source, factory.config(), tensors, shards=3)


def other_files(place: Place) -> None:
    for path in place.source.glob("model*"):
        path.unlink()
    factory.write_safetensors(place.source, factory.config(), factory.weights(factory.config()), shards=2)


def other_config(place: Place) -> None:
    factory.write_config(place.source, factory.config(rope_theta=5e5))


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (touch, (), "the source is not the same now"),
        (other_weights, (), "the source is not the same now"),
        (other_files, (), "the source is not the same now"),
        (other_config, (), "the plan is not the same now"),
        (None, ("--dtype", "float16"), "the plan is not the same now"),
        (None, ("--max-shard-size", "50KB"), "the plan is not the same now"),
        (None, ("--architecture", "llama"), "the plan is not the same now"),
    ],
)
def test_finished_shards_of_another_conversion_are_never_thrown_away(place, change, options, reason):
    kill_in_second_shard(place)
    before = factory.digests(place.partial)
    if change:
        change(place)
    again = place.run(*options)
    assert again.status == 1
    assert f"holds finished shards of an earlier run, but {reason}. Nothing was changed." in again.err
    assert {name: digest for name, digest in factory.digests(place.partial).items() if "lock" not in name} == {
        name: digest for name, digest in before.items() if "lock" not in name
    }
    shutil.rmtree(place.partial)  # as the message says
    assert place.run(*options).status == 0
    assert differing(place.output, place.reference(*options)) == []
    assert place.names() == ["out", "source"]


def test_other_workers_fsync_and_verification_are_no_change(place):
    wanted = place.reference()
    kill_in_second_shard(place, *workers(1))
    again = place.run(*workers(3), "--fsync", "--verify", "none")
    assert (again.status, again.resumed) == (0, 1)
    assert differing(place.output, wanted) == []


def test_a_moved_source_is_no_change(place):
    wanted = place.reference()
    kill_in_second_shard(place)
    moved = place.folder / "moved"
    place.source.rename(moved)
    again = place.run("--input", str(moved))
    assert (again.status, again.resumed) == (0, 1)
    assert differing(place.output, wanted) == []


def test_another_tokenizer_or_generation_config_reaches_the_output_of_a_resumed_run(place):
    kill_in_second_shard(place)
    (place.source / "generation_config.json").write_text('{"max_new_tokens": 7}')
    factory.write_byte_tokenizer(place.source, bos="<s>", eos="<end>", pad="<pad>")
    again = place.run()
    assert again.status == 0, again.err
    assert differing(place.output, place.reference()) == []
    assert json.loads((place.output / "generation_config.json").read_text())["max_new_tokens"] == 7


def test_other_weights_under_the_same_size_and_time_do_not_pass(place):
    """The journal cannot see such a change; the comparison of all values does, and the next run begins again."""
    kill_in_second_shard(place)
    stats = {path: path.stat() for path in place.source.glob("*.safetensors")}
    other_weights(place)
    for path, stat in stats.items():
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = place.run()
    assert (again.status, again.resumed) == (1, 1)
    assert "does not hold what" in again.err
    assert place.names() == ["source"]
    assert place.run().status == 0
    assert differing(place.output, place.reference()) == []


# ------------------------------------------------------------------------------------------------ room, sources


def test_full_disk_in_the_middle_keeps_what_is_finished(place):
    wanted = place.reference()
    full = place.run(act=SMALL_FILES, path=SECOND)
    assert full.status == 1
    assert full.err.startswith(f"error: Writing {place.output} failed: File too large.\nMake room")
    assert f"1 of {SHARDS} shards are finished and kept in {place.partial}: the same command goes on" in full.err
    assert place.names() == ["out.partial", "source"]
    assert_same_command_finishes(place, wanted)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 96 MB, since the converter wants 64 MB to spare before it begins."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "none", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here ({done.stderr.strip()}): this test did not run")
    yield place
    subprocess.run(["umount", place], check=True)


def test_really_full_disk_keeps_what_is_finished_and_goes_on_with_room(place, small_disk):
    wanted, filler = place.reference(), small_disk / "filler"
    full = place.run(act=FILL.format(filler=str(filler)), path=SECOND, output=small_disk / "out")
    assert full.status == 1
    assert "failed: No space left on device.\nMake room" in full.err
    assert f"1 of {SHARDS} shards are finished and kept in {small_disk / 'out.partial'}" in full.err
    still = place.run(output=small_disk / "out")
    assert still.status == 1
    assert "needs" in still.err
    assert (small_disk / "out.partial" / "model-00001-of-00005.safetensors").is_file()
    filler.unlink()
    again = place.run(output=small_disk / "out")
    assert (again.status, again.resumed) == (0, 1)
    assert differing(small_disk / "out", wanted) == []
    assert [path.name for path in small_disk.iterdir()] == ["out"]


@pytest.mark.parametrize("way", ["removed", "truncated"])
def test_source_lost_in_the_middle_goes_on_when_it_is_back(place, way):
    wanted = place.reference()
    lost, aside = place.source / "model-00003-of-00003.safetensors", place.logs / "aside"
    copied = f"shutil.copy2({str(lost)!r}, {str(aside)!r}); "
    act = {"removed": f"os.unlink({str(lost)!r})", "truncated": f"os.truncate({str(lost)!r}, 4096)"}[way]
    ended = place.run(*workers(1), act=f"import shutil; {copied}{act}", path=SECOND)
    assert ended.status not in (0, 70)
    assert "Traceback" not in ended.err
    assert lost.name in ended.err
    assert place.names() == ["out.partial", "source"]
    assert not (place.partial / "config.json").exists()
    shutil.copy2(aside, lost)
    assert_same_command_finishes(place, wanted)


# ------------------------------------------------------------------------------------------------ Ctrl-C


def assert_last_words_are_true(place: Place, message: str, wanted: dict[str, str]) -> str:
    """What the message says is left behind is what lies there, and nothing else; returns "complete", "kept" or
    "nothing"."""
    assert message.count("\n") == 1, message
    if "is complete" in message:
        assert place.names() == ["out", "source"], message
        assert differing(place.output, wanted) == [], message
        return "complete"
    if "shards are finished and kept" in message:
        assert place.names() == ["out.partial", "source"], message
        assert f"{len(place.journaled())} of {SHARDS} shards are finished and kept in {place.partial}:" in message
        assert place.journaled(), message
        return "kept"
    assert message.endswith(f"Nothing was left behind; {place.output} is as it was before.\n"), message
    assert place.names() == ["source"], message
    return "nothing"


# What an interrupted run still does and says depends on what it was doing, reading too: one moment of each kind.
# SIGTERM takes the same way to another exit status: changes alone.
@pytest.mark.parametrize(("act", "status"), [(INTERRUPT, 130), (TERMINATE, 143)], ids=["SIGINT", "SIGTERM"])
def test_stopped_at_any_moment_the_last_words_are_true(place, act, status):
    wanted, left = place.reference(), set()

    def check(moment: int) -> None:
        place.clear()
        ended = place.run(*workers(1), act=act, number=moment)
        assert ended.status == status, ended.err
        left.add(assert_last_words_are_true(place, ended.err, wanted))
        if not place.output.exists():
            assert_same_command_finishes(place, wanted)

    sweep(moments(place.run(*workers(1)), 1, reads=act == INTERRUPT), check)
    assert left == {"nothing", "kept", "complete"}, "the moments reach from before the first shard to the end"


def test_ctrl_c_right_after_the_last_rename_is_told_as_it_is(place):
    wanted = place.reference()
    ended = place.run(act=INTERRUPT, kind="remove", path=f"out/{JOURNAL}")
    assert ended.status == 130
    assert_last_words_are_true(place, ended.err, wanted)


def test_ctrl_c_before_the_lock_is_taken_leaves_nothing(place):
    ended = place.run(act=INTERRUPT, kind="open", path=f"out.partial/{LOCK}")
    assert ended.status == 130
    assert_last_words_are_true(place, ended.err, {})


def test_ctrl_c_before_the_first_shard_removes_the_folders_it_made(place):
    ended = place.run(act=INTERRUPT, path=".model-00001", output=place.folder / "new" / "deep" / "out")
    assert ended.status == 130
    assert "Nothing was left behind" in ended.err
    assert place.names() == ["source"]


def test_ctrl_c_while_finished_shards_are_hashed_keeps_them(place):
    kill_in_second_shard(place)
    ended = place.run(act=INTERRUPT, kind="open", path="out.partial/model-00001-of-00005.safetensors")
    assert ended.status == 130
    assert place.journaled() == ["model-00001-of-00005.safetensors"], ended.err
    assert f"kept in {place.partial}" in ended.err
    assert_same_command_finishes(place, place.reference())


# ------------------------------------------------------------------------------------------------ two at once

PAUSED = """
import sys, time
from pathlib import Path
import aquila_pd.checkpoint.io.shard_writer as writing
move = writing.move
def waiting(*args, **kwargs):
    while not Path({go!r}).exists():
        time.sleep(0.01)
    return move(*args, **kwargs)
writing.move = waiting
from convert.torch2paddle import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def other(place, code) -> Iterator[Callable[..., subprocess.Popen]]:
    """other() is a conversion of the same source to the same output, which waits for the file logs/go to appear."""
    started = []

    def start(*options: str) -> subprocess.Popen:
        argv = ["--input", str(place.source), "--output", str(place.output), *SIZE, *options]
        paused = PAUSED.format(go=str(place.logs / "go"))
        environment = {**os.environ, "PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-P", "-c", paused, *argv], env=environment, **pipes))
        deadline = time.monotonic() + 60
        while not list(place.partial.glob(".model-*")) and time.monotonic() < deadline:
            assert started[-1].poll() is None, started[-1].communicate()
            time.sleep(0.01)
        return started[-1]

    yield start
    for running in started:
        running.kill()
        running.communicate()


def test_second_converter_is_refused_and_does_not_disturb_the_first(place, other):
    wanted, first = place.reference(), other()
    for options in ((), ("--overwrite",), ("--dtype", "float16")):
        second = place.run(*options)
        assert second.status == 1
        assert f"Another conversion is writing {place.output} (process {first.pid})." in second.err
    (place.logs / "go").touch()
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 0, stderr
    assert differing(place.output, wanted) == []
    assert place.names() == ["out", "source"]


def test_after_the_first_was_killed_the_second_runs(place, other):
    wanted, first = place.reference(), other()
    assert place.run().status == 1
    first.kill()
    first.wait()
    assert_same_command_finishes(place, wanted)


@pytest.mark.parametrize("text", ["", "process 1", "process 999999999"])
def test_a_lock_file_alone_is_no_obstacle(place, text):
    place.partial.mkdir()
    (place.partial / LOCK).write_text(text)
    assert_same_command_finishes(place, place.reference())


# ------------------------------------------------------------------------------------------------ --fsync


@pytest.fixture
def steps(place, monkeypatch) -> list[tuple[str, Path]]:
    """("sync", path) and ("move", new path) in the order in which a conversion in this process does them."""
    found, fsync, rename, replace = [], os.fsync, os.rename, os.replace

    def recorded(move: Callable) -> Callable:
        def recorder(old, new, **options) -> None:
            move(old, new, **options)
            found.append(("move", Path(new)))

        return recorder

    def syncing(descriptor: int) -> None:
        fsync(descriptor)
        found.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", recorded(rename))
    monkeypatch.setattr(os, "replace", recorded(replace))
    return found


def convert_here(place: Place, *options: str) -> None:
    assert main(["--input", str(place.source), "--output", str(place.output), *SIZE, *options]) == 0


def test_without_fsync_nothing_waits_for_the_disk(place, steps):
    convert_here(place)
    assert {kind for kind, _ in steps} == {"move"}


@pytest.mark.parametrize("number", [1, 3])
def test_fsync_puts_each_shard_on_the_disk_before_the_journal_names_it(place, steps, number):
    convert_here(place, "--fsync", *workers(number))
    folder = place.partial
    journaled = [("sync", folder / f".{JOURNAL}.partial"), ("move", folder / JOURNAL), ("sync", folder)]
    for i in range(1, SHARDS + 1):
        file = f"model-{i:05d}-of-{SHARDS:05d}.safetensors"
        at = steps.index(("sync", folder / f".{file}.partial"))
        assert steps[at : at + 6] == [steps[at], ("move", folder / file), ("sync", folder), *journaled]


def test_fsync_puts_every_file_and_its_name_on_the_disk_before_the_folder_appears(place, steps):
    convert_here(place, "--fsync")
    folder, appeared = place.partial, steps.index(("move", place.output))
    last = {path: i for i, (kind, path) in enumerate(steps[:appeared]) if kind == "sync"}
    for name in files_under(place.output):
        assert folder / name in last, f"{name} was not on the disk"
    last_move = max(i for i, (kind, _) in enumerate(steps[:appeared]) if kind == "move")
    assert last[folder] > last_move, "the names of the last files were not on the disk"
    assert ("sync", place.folder) in steps[appeared:]


def test_fsync_of_an_empty_folder_that_is_filled_reaches_that_folder(place, steps):
    place.output.mkdir()
    convert_here(place, "--fsync")
    last_move = max(i for i, (kind, path) in enumerate(steps) if kind == "move" and path.parent == place.output)
    assert ("sync", place.output) in steps[last_move:]


# ------------------------------------------------------------------------------------------------ the manifest


def test_the_manifest_has_every_file_and_its_hash(place):
    assert place.run().status == 0
    manifest = json.loads((place.output / MANIFEST).read_text())
    contents = {name: (place.output / name).read_bytes() for name in files_under(place.output) if name != MANIFEST}
    assert manifest["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(contents.items())
    }
    assert {JOURNAL, LOCK}.isdisjoint(contents)


def test_time_path_and_workers_leave_no_trace(place, tmp_path):
    first = place.reference(*workers(1))
    assert place.run(*workers(5)).status == 0
    content = (place.output / MANIFEST).read_text()
    assert str(tmp_path) not in content
    assert set(json.loads(content)) == {"written_by", "target", "tensors", "files"}
    elsewhere = Place(place.laboratory, tmp_path / "elsewhere", place.logs)
    shutil.copytree(place.source, elsewhere.source, copy_function=shutil.copyfile)  # other times, too
    assert elsewhere.run(*workers(2)).status == 0
    assert factory.digests(place.output) == factory.digests(elsewhere.output) == first


# ------------------------------------------------------------------------------------------------ --overwrite


def test_killed_overwrite_never_costs_the_earlier_output(place):
    new, options = place.reference("--dtype", "float16"), ("--overwrite", "--dtype", "float16")
    assert place.run().status == 0
    old = factory.digests(place.output)
    shutil.copytree(place.output, place.logs / "old")

    def check(moment: int) -> None:
        place.clear()
        shutil.copytree(place.logs / "old", place.output)
        assert place.run(*options, act=DIE, number=moment).status == -signal.SIGKILL
        aside = [path for path in place.folder.glob("out.replaced-*") if factory.digests(path) == old]
        found = factory.digests(place.output) if place.output.exists() else {}
        assert found == old or aside or new.items() <= found.items(), "both outputs are lost"
        assert_same_command_finishes(place, new, *options)

    sweep(moments(place.run(*options), 2), check)


def test_interrupted_overwrite_keeps_the_earlier_output_until_the_new_one_is_complete(place):
    assert place.run().status == 0
    old, options = factory.snapshot(place.output), ("--overwrite", "--dtype", "float16")
    ended = place.run(*options, act=INTERRUPT, kind="rename", path=SECOND)
    assert ended.status == 130
    assert "1 of 2 shards are finished and kept" in ended.err
    assert factory.snapshot(place.output) == old
    without = place.run("--dtype", "float16")
    assert without.status == 1
    assert "pass --overwrite" in without.err
    again = place.run(*options)
    assert (again.status, again.resumed) == (0, 1)
    assert differing(place.output, place.reference("--dtype", "float16")) == []
    assert place.names() == ["out", "source"]


def test_overwrite_replaces_an_earlier_output_of_the_way_back(back):
    assert back.run().status == 0
    again = back.run("--overwrite", "--dtype", "float16")
    assert again.status == 0, again.err
    assert differing(back.output, back.reference("--dtype", "float16")) == []


def test_overwrite_replaces_an_earlier_output_for_paddlenlps_llama(place):
    options = ("--architecture", "llama")
    assert place.run(*options).status == 0
    again = place.run(*options, "--overwrite", "--dtype", "float16")
    assert again.status == 0, again.err
    assert differing(place.output, place.reference(*options, "--dtype", "float16")) == []
