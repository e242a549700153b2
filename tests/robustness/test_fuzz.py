"""Damaged checkpoints by the thousand: each is converted rightly or refused by name, and leaves nothing behind.

Hypothesis damages sound files in a fixed order of tries (no clock, no stored examples), many more of them with
AQUILA_PD_TEST_THOROUGH=1. What still converts is compared with what the libraries that own the format read from the
same damaged file.
"""

import copy
import io
import json
import os
import pickle
import resource
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import checkpoint_factory as factory
import pytest
from effort import tries
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from aquila_pd.checkpoint.convert import convert
from aquila_pd.checkpoint.plan import make_plan
from aquila_pd.checkpoint.sources import open_source
from aquila_pd.checkpoint.targets import find_target
from aquila_pd.formats import safetensors
from aquila_pd.utils import files
from aquila_pd.utils.errors import AquilaError

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "aquila_pd-hypothesis")  # not the folder the tests run in
FIXED = settings(max_examples=tries(100, 2000), report_multiple_bugs=False, suppress_health_check=list(HealthCheck))
SECONDS = 60  # for one folder, on a busy machine; a sound one takes a twentieth of one second
MEMORY = 500 * 2**20  # bytes that one of these tests may add; its files have a tenth of a megabyte
SINGLE, INDEX, CONFIG, BIN = "model.safetensors", "model.safetensors.index.json", "config.json", "pytorch_model.bin"

# ------------------------------------------------------------------------------------------- what is watched

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# event -> which of its arguments is the changed path, and which the open folder it is relative to
CHANGING = {
    "os.mkdir": (0, 2),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.rename": (1, 3),
    "os.link": (1, 3),
    "os.symlink": (1, 2),
    "os.chmod": (0, 2),
    "os.truncate": (0, None),
}
RUNNING = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pty.spawn")


class Watch:
    """Notes every attempt of Python code to run something, or to write outside of one folder."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []

    def __call__(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        if event in RUNNING:
            self.seen.append(f"{event} {args}")
        elif (path := written(event, args)) and not path.startswith(self.folder):
            self.seen.append(f"{event} {path}")


def written(event: str, args: tuple) -> str | None:
    """The path that an event of Python is about to change."""
    if event == "open":
        return os.path.abspath(args[0]) if isinstance(args[0], str) and (args[2] or 0) & WRITING else None
    if event not in CHANGING:
        return None
    path, folder = CHANGING[event]
    if isinstance(args[path], int):
        return None  # a file that is open; opening it was noted
    above = os.readlink(f"/proc/self/fd/{args[folder]}") if folder and args[folder] > 0 else os.getcwd()
    return os.path.join(above, os.fspath(args[path]))


WATCH = Watch()


@pytest.fixture(scope="module", autouse=True)
def _watching() -> None:
    sys.addaudithook(WATCH)  # for good: Python knows no way to remove one


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fail when something is run, or written outside of the folder, in the block."""
    WATCH.seen, WATCH.folder = [], str(folder)
    try:
        yield
    finally:
        WATCH.folder = None
    assert not WATCH.seen


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where everything happens: temporary files of the product too."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


# ------------------------------------------------------------------------------------------- the property


def names_below(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def survives(source: Path, place: Path) -> Path | None:
    """The output when the source converts, None when it is refused; every other outcome fails."""
    output, before, begin = place / "out", names_below(source), time.monotonic()
    shutil.rmtree(output, ignore_errors=True)
    with watched(place):
        try:
            with open_source(source) as opened:
                make_plan(opened, find_target("paddle"), dtype=None, max_shard_size="5GB")
            convert(source, output, workers=1, max_shard_size="40KB", say=lambda line: None)
        except AquilaError as error:
            message = str(error)
            assert all(line.isprintable() for line in message.splitlines()), ascii(message)
            assert not output.exists()
    assert time.monotonic() - begin < SECONDS
    assert names_below(source) == before
    assert {path.name for path in place.iterdir()} <= {"source", "tiny.gguf", "temporary", "out"}
    assert not list((place / "temporary").iterdir())
    return output if output.exists() else None


def as_bytes(tensors: dict) -> dict:
    return {name: (str(value.dtype), value.shape, value.tobytes()) for name, value in tensors.items()}


def check_folder(source: Path, place: Path) -> None:
    """The property for safetensors: what we convert, their library reads too, and to the same bits."""
    output = survives(source, place)
    if output:
        wanted = factory.expected(factory.load_folder(source))
        assert as_bytes(factory.load_folder(output)) == as_bytes(wanted)
        theirs, ours = (json.loads((folder / CONFIG).read_text("utf-8-sig")) for folder in (source, output))
        assert ours["hidden_size"] == theirs["hidden_size"]


# ------------------------------------------------------------------------------------------- ways to damage


@st.composite
def damaged(draw: Callable, content: bytes, upto: int | None = None) -> bytes:
    """The bytes with a few places changed, taken out, put in or cut off; `upto`: where damage is of interest."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(min(upto or len(found), len(found)) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "flip", "set", "number", "cut out", "put in", "twice", "end"]))
        if kind == "flip" and found:
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and found:
            found[at] = draw(st.sampled_from(b'\0\xff\x80 0"{}[],:'))
        elif kind == "number":
            found[at : at + 8] = draw(st.sampled_from(NUMBERS)).to_bytes(8, "little")
        elif kind == "cut out":
            del found[at : at + draw(st.integers(1, 40))]
        elif kind == "put in":
            found[at:at] = draw(st.binary(min_size=1, max_size=20))
        elif kind == "twice":
            found[at:at] = found[at : at + draw(st.integers(1, 40))]
        elif kind == "end":
            del found[at:]
    return bytes(found)


NUMBERS = (0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
NASTY = (
    *(None, True, False, -1, 0, 1, 2, 31, 32, 33, 64, 79, 80, 2**31, 2**40, 2**63, 10**400, 0.5, 32.0, -0.0, 1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        "a",
        "32",
        "F32",
        "F16",
        "BF16",
        "U8",
        "linear",
        "float16",
        "../../etc/passwd",
        "\0",
    ),
    *("\x1b[2J", "\ud800", "\u202e", "x" * 5000, [], {}, [[]], [0, 0], [32], [32, 32], [0, 128], {"a": {"b": []}}),
    *({"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": "2"}, {"rope_type": "default"}),
)
TWICE = "\u0001twice\u0001"


def places_in(value: object, way: tuple = ()) -> Iterator[tuple]:
    """The way to every value in JSON, by keys and numbers."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in children:
        yield (*way, key)
        yield from places_in(inner, (*way, key))


@st.composite
def changed(draw: Callable, content: dict) -> str:
    """JSON text with a few values replaced, left out, moved to another key, or said twice."""
    found = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        ways = list(places_in(found))
        if not ways:
            break
        *above, key = draw(st.sampled_from(ways))
        inner = found
        for step in above:
            inner = inner[step]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "leave out", "rename", "twice"]))
        if kind == "replace":
            inner[key] = copy.deepcopy(draw(st.sampled_from(NASTY)))
        elif kind == "leave out" or isinstance(inner, list):
            del inner[key]
        else:
            name = draw(st.sampled_from(["", "x", "\x1b", "dtype", "model.norm.weight", "rope_parameters", "head_dim"]))
            inner[name if kind == "rename" else key + TWICE] = inner[key] if kind == "twice" else inner.pop(key)
    return json.dumps(found).replace(json.dumps(TWICE)[1:-1], "")


def header_of(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(file: Path, text: str, data: bytes) -> None:
    header = text.encode("utf-8")
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


# ------------------------------------------------------------------------------------------- safetensors


@pytest.fixture
def source(place) -> Path:
    config = factory.config(num_hidden_layers=1)
    folder = factory.write_safetensors(place / "source", config, factory.weights(config), shards=2)
    check_folder(folder, place)  # a sound one survives; and what is imported on the way is there now
    assert (place / "out").exists()
    return folder


FIRST = "model-00001-of-00002.safetensors"


def fuzz_header_values(folder: Path, place: Path, profile: settings = FIXED) -> None:
    header, data = header_of(folder / FIRST)

    @profile
    @given(changed(header))
    def run(text: str) -> None:
        write_header(folder / FIRST, text, data)
        check_folder(folder, place)

    run()


def test_header_with_changed_values(source, place):
    fuzz_header_values(source, place)


def test_header_with_damaged_bytes(source, place):
    content = (source / FIRST).read_bytes()

    @FIXED
    @given(damaged(content, 600))
    def run(found: bytes) -> None:
        (source / FIRST).write_bytes(found)
        check_folder(source, place)

    run()


@pytest.mark.parametrize("name", [INDEX, CONFIG])
def test_index_and_config_with_changed_values(source, place, name):
    content = json.loads((source / name).read_text())

    @FIXED
    @given(changed(content))
    def run(text: str) -> None:
        (source / name).write_text(text)
        check_folder(source, place)

    run()


@pytest.mark.parametrize("name", [INDEX, CONFIG])
def test_index_and_config_with_damaged_bytes(source, place, name):
    content = (source / name).read_bytes()

    @FIXED
    @given(damaged(content))
    def run(found: bytes) -> None:
        (source / name).write_bytes(found)
        check_folder(source, place)

    run()


# ------------------------------------------------------------------------------------------- GGUF


def test_gguf_with_damaged_bytes(place):
    pytest.importorskip("gguf")
    config = factory.config(num_hidden_layers=1)
    path = factory.write_gguf(place / "tiny.gguf", config, factory.weights(config), kind="Q8_0")
    assert survives(path, place)
    content = path.read_bytes()

    @FIXED
    @given(damaged(content, 4000))  # the header, and a little of the data
    def run(found: bytes) -> None:
        path.write_bytes(found)
        survives(path, place)

    run()


# ------------------------------------------------------------------------------------------- pickles


@pytest.fixture
def bin_folder(place) -> Path:
    pytest.importorskip("torch")
    config = factory.config(num_hidden_layers=1)
    folder = factory.write_bin(place / "source", config, factory.weights(config))
    assert survives(folder, place)
    return folder


def with_pickle(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A torch file with another pickle in its zip."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            found = old.read(entry)
            new.writestr(entry.filename, change(found) if entry.filename.endswith("data.pkl") else found)
    return made.getvalue()


def test_bin_with_a_damaged_pickle(bin_folder, place):
    content = (bin_folder / BIN).read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        inner = archive.read(name)

    @FIXED
    @given(damaged(inner))
    def run(found: bytes) -> None:
        (bin_folder / BIN).write_bytes(with_pickle(content, lambda old: found))
        survives(bin_folder, place)

    run()


def test_bin_with_damaged_bytes(bin_folder, place):
    content = (bin_folder / BIN).read_bytes()

    @FIXED
    @given(st.one_of(damaged(content, 3000), damaged(content[-3000:]).map(lambda end: content[:-3000] + end)))
    def run(found: bytes) -> None:
        (bin_folder / BIN).write_bytes(found)
        survives(bin_folder, place)

    run()


# ------------------------------------------------------------------------------------------- controls

QUICK = settings(FIXED, max_examples=5000, phases=[Phase.generate])  # until the first; it need not be made small


@pytest.mark.parametrize(
    "where, check, instead",
    [
        (safetensors, "_check_header", lambda *anything: []),
        (safetensors, "_whole", lambda number: number),
        (safetensors, "_check_name", lambda name: None),
        (files, "_unique", dict),
    ],
)
def test_control_a_reader_without_one_of_its_checks_is_caught(source, place, monkeypatch, where, check, instead):
    monkeypatch.setattr(where, check, instead)
    with pytest.raises(Exception):  # noqa: B017  each lets something else through
        fuzz_header_values(source, place, QUICK)


def test_control_a_reader_that_runs_pickles_is_caught(bin_folder, place, monkeypatch):
    content = (bin_folder / BIN).read_bytes()
    bomb = pickle.dumps(Bomb(str(place.parent / "ran")))
    (bin_folder / BIN).write_bytes(with_pickle(content, lambda old: bomb))
    assert survives(bin_folder, place) is None
    with pytest.raises(AssertionError), watched(place):
        pickle.loads(bomb)
    os.rmdir(place.parent / "ran")


class Bomb:
    def __init__(self, proof: str):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (self.proof,)
