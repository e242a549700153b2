"""Torch's .bin files: every value as torch.load has it, without torch, and nothing that a file says is ever run.

The hostile files are put together by hand, one pickle operation after the other.
"""

import copyreg
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from paths import ROOT

from aquila_pd.checkpoint.sources import torch_bin
from aquila_pd.checkpoint.sources.torch_bin import TorchBinReader
from aquila_pd.formats import dtypes, safetensors, torch_pickle
from aquila_pd.utils.errors import CheckpointError, InstallationError

BIN = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
OLD = {"_use_new_zipfile_serialization": False}
# What a hostile file may cost. The seconds are the processor's; a third of them is enough on a machine that does
# nothing else.
SECONDS, MEGABYTES = 20, 100  # of a machine that may be busy: a bomb that goes off takes minutes


def saved(folder: Path, content: object, *, file: str = BIN, **options) -> Path:
    """A folder with config.json and what torch.save makes of the content."""
    import torch

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    torch.save(content, folder / file, **options)
    return folder


def refusal(folder: Path) -> str:
    """Why a folder is not read, quickly said and fit for a terminal."""
    begin = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        TorchBinReader(folder)
    assert time.process_time() - begin < SECONDS
    message = str(caught.value)
    assert all(letter.isprintable() or letter == "\n" for letter in message)
    assert len(message) < 3000
    return message


def numbers(tensor) -> np.ndarray:
    """A torch tensor through torch's own conversion to numpy."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal in dtype, shape and bits (NaNs too)."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()


def compare_with_torch(folder: Path, file: str = BIN) -> TorchBinReader:
    import torch

    expected = torch.load(folder / file, weights_only=True, map_location="cpu")
    reader = TorchBinReader(folder)
    assert set(reader.stored) == set(expected)
    for name, tensor in expected.items():
        stored = reader.stored[name]
        assert (stored.shape, stored.file) == (tuple(tensor.shape), file)
        assert dtypes.DTYPES[stored.dtype] == numbers(tensor).dtype
        same(reader.read(name), numbers(tensor))
    return reader


# ------------------------------------------------------------------------------------- files that torch.save writes


def every_dtype() -> dict:
    import torch

    values = torch.arange(-6, 9).reshape(3, 5)
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    kinds = {str(dtype): (values / 7).to(dtype) for dtype in floats} | {str(dtype): values.to(dtype) for dtype in whole}
    kinds["nan"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return kinds


def views() -> dict:
    import torch

    base = torch.arange(7 * 5 * 3, dtype=torch.float32).reshape(7, 5, 3)
    return {
        "whole": base,
        "tied": base,
        "rows": base[2:5],
        "columns": base[:, 1:4],
        "steps": base[::2, ::3],
        "one": base[3],
        "inner": base[:, :, 1],
        "transposed": base[0].T,
        "turned": base.permute(2, 0, 1),
        "expanded": base[0, 0].expand(4, 3),
        "last": base[6, 4, 2],
        "thin": base[:, 4:5, 2:3],
    }


def odd_sizes() -> dict:
    import torch

    return {
        "scalar": torch.tensor(2.5),
        "whole number": torch.tensor(-3),
        "nothing": torch.empty(0),
        "no rows": torch.empty(0, 5, dtype=torch.bfloat16),
        "no columns": torch.empty(4, 0),
        "slice of nothing": torch.zeros(3, 4)[3:3][:, 4:4],
        "one": torch.ones(1, 1, 1, 1),
        "中文.权重": torch.arange(3.0),
    }


def module() -> object:
    import torch

    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Embedding(5, 2))
    layers[0].register_buffer("inv_freq", torch.arange(3) / 7)
    return layers.state_dict()


def parameters() -> dict:
    import torch

    marked = torch.arange(6.0).reshape(2, 3)
    marked.origin = "a Python attribute"
    parameter = torch.nn.Parameter(torch.arange(8.0).reshape(4, 2).T)
    parameter.origin = "another"
    return {
        "plain": torch.nn.Parameter(torch.arange(6.0).reshape(3, 2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "with attributes": marked,
        "parameter with attributes": parameter,
        "buffer": torch.nn.Buffer(torch.arange(4.0)),
    }


def ordered() -> OrderedDict:
    return OrderedDict(sorted(every_dtype().items()))


KINDS = [every_dtype, views, odd_sizes, module, parameters, ordered]


@pytest.mark.parametrize("content", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "before 1.6"])
def test_every_value_is_the_one_torch_loads(tmp_path, content, options):
    reader = compare_with_torch(saved(tmp_path, content(), **options))
    assert len(reader.notes) == (options is OLD)
    reader.close()


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("content", [every_dtype, views, odd_sizes, parameters], ids=lambda kind: kind.__name__)
def test_later_pickle_protocols_are_read_too(tmp_path, content, protocol):
    """torch.load(weights_only=True) knows protocol 2 alone."""
    reader = TorchBinReader(saved(tmp_path, content(), pickle_protocol=protocol))
    for name, tensor in content().items():
        same(reader.read(name), numbers(tensor))


def test_control_strides_that_are_ignored_are_noticed(tmp_path, monkeypatch):
    folder = saved(tmp_path, views())

    def row_by_row(place):
        dtype = dtypes.DTYPES[place.dtype]
        count = int(np.prod(place.shape))
        return np.fromfile(place.file, dtype, count, offset=place.offset)[:count].reshape(place.shape)

    assert row_by_row(TorchBinReader(folder)._places["whole"]).shape == (7, 5, 3)
    monkeypatch.setattr(torch_bin.Place, "view", row_by_row)
    with pytest.raises(AssertionError):
        compare_with_torch(folder)


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("rows", [slice(None), slice(1, 3), slice(0, 0), slice(2, 99)], ids=str)
@pytest.mark.parametrize("columns", [slice(None), slice(1, 2), slice(1, None)], ids=str)
def test_parts_are_slices_of_the_whole(tmp_path, options, rows, columns):
    tensors = views() | odd_sizes()
    reader = TorchBinReader(saved(tmp_path, tensors, **options))
    for name, tensor in tensors.items():
        part = [rows, columns][: tensor.ndim]
        same(reader.read(name, *part), numbers(tensor)[(*part, ...)])


def test_wrapper_of_flagai_is_taken_off(tmp_path):
    content = {"module": OrderedDict(views()), "epoch": 3, "args": {"lr": 1e-5, 4: [1, (2, None)]}}
    reader = TorchBinReader(saved(tmp_path, content))
    assert set(reader.stored) == set(views())
    same(reader.read("turned"), numbers(views()["turned"]))


def test_shards_with_an_index_are_read_and_compared_with_it(tmp_path):
    tensors = views()
    first, second = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    files = {name: second if i % 3 else first for i, name in enumerate(tensors)}
    for file in (first, second):
        saved(tmp_path, {name: t for name, t in tensors.items() if files[name] == file}, file=file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    reader = TorchBinReader(tmp_path)
    for name, tensor in tensors.items():
        assert reader.stored[name].file == files[name]
        same(reader.read(name), numbers(tensor))

    saved(tmp_path, {"stray": tensors["one"], "whole": tensors["whole"]}, file=second)
    message = refusal(tmp_path)
    assert f"whole is in both {first} and {second}" in message
    assert f"tied is not in {second}, where {INDEX} says it is" in message
    assert f"stray is in {second}, but {INDEX} does not say so" in message


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, for what it would rather not save
def test_all_findings_come_together(tmp_path):
    import torch

    tensors = {
        "good": torch.ones(2),
        "unvalued": torch.empty(3, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
        "rows": torch.eye(3).to_sparse_csr(),
        "complex": torch.ones(2, dtype=torch.complex64),
        "small": torch.ones(2).to(torch.float8_e4m3fn),
        "unsigned": torch.ones(2, dtype=torch.uint16),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
        "unfinished": torch.ones(2, dtype=torch.complex64).conj().imag,
    }
    message = refusal(saved(tmp_path, tensors))
    for finding in (
        "unvalued in pytorch_model.bin is on the device meta: it was saved without its values",
        "sparse in pytorch_model.bin has the layout torch.sparse_coo; only dense tensors are read",
        "rows in pytorch_model.bin has the layout torch.sparse_csr",
        "complex in pytorch_model.bin has the dtype torch.complex64; known are F32, F16, BF16",
        "small in pytorch_model.bin has the dtype torch.float8_e4m3fn",
        "unsigned in pytorch_model.bin has the dtype torch.uint16",
        "quantized in pytorch_model.bin has the dtype torch.quint8",
        "unfinished in pytorch_model.bin was saved with a negation or conjugation still to be done",
    ):
        assert finding in message
    assert "good" not in message


@pytest.mark.parametrize(
    "content, found",
    [
        ({"epoch": 3, "a": None}, "'epoch' is a int, 'a' is a NoneType"),
        ({"nested": {"a": 1}, "list": [1]}, "'nested' is a dict, 'list' is a list"),
        ({"nested": OrderedDict(a=1), "set": {1}}, "'nested' is a OrderedDict, 'set' is a set"),
        ([1, 2], "it is a list"),
        ("text", "it is a str"),
        (7, "it is a int"),
        (OrderedDict.fromkeys(map(str, range(5000))), "'9' is a NoneType, 4,990 more"),
        ({"line\nbreak\x1b": None}, r"'line\nbreak\x1b' is a NoneType"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "before 1.6"])
def test_what_is_no_tensor_is_named(tmp_path, content, found, options):
    message = refusal(saved(tmp_path, content, **options))
    assert f"{BIN} does not hold tensors by name: " in message and found in message


def test_tensors_under_names_that_are_not_text_are_refused(tmp_path):
    import torch

    assert "a Tensor goes by a int" in refusal(saved(tmp_path, {0: torch.ones(2)}))


@pytest.mark.parametrize(
    "name, found",
    [
        ("a\x1b[2J", r"'a\x1b[2J' is no name of a tensor"),
        ("", "'' is no name of a tensor"),
        ("a" * 256, f"'{'a' * 200}... (256 characters)' is no name of a tensor"),
        ("ab" * 50_000, f"'{'ab' * 100}... (100,000 characters)' is no name of a tensor"),
    ],
    ids=["steering", "empty", "long", "longest"],
)
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "before 1.6"])
def test_names_that_no_tensor_has_are_refused(tmp_path, name, found, options):
    import torch

    assert found in refusal(saved(tmp_path / "source", {name: torch.ones(2)}, **options))
    TorchBinReader(saved(tmp_path / "control", {"a" * 255: torch.ones(2)}, **options))


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "before 1.6"])
def test_views_larger_than_their_storage_are_refused_and_smaller_ones_read(tmp_path, options):
    import torch

    base = torch.arange(6.0)
    fitting = {"repeated": base[4].expand(6), "rows": base[:3].expand(2, 3), "whole": base}
    compare_with_torch(saved(tmp_path / "control", fitting, **options))
    hostile = {
        "seven": base[0].expand(7),
        "row": base[:3].expand(3, 3),
        "endless": torch.zeros(1, dtype=torch.float16).expand(2**45),
    }
    message = refusal(saved(tmp_path / "hostile", {**fitting, **hostile}, **options))
    for finding in (
        f"seven in {BIN} has 7 elements, more than its storage of 24 bytes holds",
        f"row in {BIN} has 9 elements, more than its storage of 24 bytes holds",
        f"endless in {BIN} has 35,184,372,088,832 elements, more than its storage of 2 bytes holds",
    ):
        assert finding in message
    assert all(f"{name} in" not in message for name in fitting)


@pytest.mark.parametrize(
    "make, found",
    [
        (os.mkfifo, "is a named pipe, not a file"),
        (os.mkdir, "is a folder, not a file"),
        (lambda path: os.symlink("nowhere", path), "is a link that leads nowhere"),
    ],
)
def test_what_is_no_file_is_called_what_it_is(tmp_path, make, found):
    (tmp_path / "config.json").write_text("{}")
    make(tmp_path / BIN)
    assert f"{BIN} {found}" in refusal(tmp_path)


@pytest.mark.parametrize(
    "options, found",
    [({}, "BadZipFile: 'data.pkl' has another checksum"), (OLD, "UnpicklingError: Unsupported operand 240")],
    ids=["zip", "before 1.6"],
)
def test_damaged_pickle_is_called_damaged(tmp_path, options, found):
    folder = saved(tmp_path, views(), **options)
    content = (folder / BIN).read_bytes()
    place = content.index(b"ctorch")  # the operation c, which looks up a name
    (folder / BIN).write_bytes(content[:place] + b"\xf0" + content[place + 1 :])
    message = refusal(folder)
    assert f"{BIN} is damaged or cut off ({found}" in message
    assert "trust" not in message  # torch's own text proposes to load it unsafely


def test_files_without_checksums_are_read(tmp_path):
    import torch

    torch.serialization.set_crc32_options(False)
    try:
        compare_with_torch(saved(tmp_path, views()))
    finally:
        torch.serialization.set_crc32_options(True)


# --------------------------------------------------------------------------------------- mapped, in threads, no torch


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # the import fails
import numpy as np
from pathlib import Path
from aquila_pd.checkpoint.sources.torch_bin import TorchBinReader
reader = TorchBinReader(Path(sys.argv[1]))
np.savez(sys.argv[2], **{name: reader.read(name).astype(np.float64) for name in reader.stored})
"""


def without_torch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_zip_files_are_read_where_torch_is_not_installed(tmp_path):
    folder, result = saved(tmp_path / "source", every_dtype()), tmp_path / "found.npz"
    done = without_torch(str(folder), str(result))
    assert done.returncode == 0, done.stderr
    with np.load(result) as found:
        for name, tensor in every_dtype().items():
            np.testing.assert_array_equal(found[name], numbers(tensor).astype(np.float64))


def test_old_files_say_that_they_need_torch(tmp_path):
    folder = saved(tmp_path / "source", every_dtype(), **OLD)
    done = without_torch(str(folder), str(tmp_path / "found.npz"))
    assert done.returncode == 1
    assert InstallationError.__name__ in done.stderr
    assert "format from before 1.6, which only torch can read" in done.stderr
    assert 'pip install "aquila_pd[verify]"' in done.stderr


def test_arrays_are_read_only_maps_and_touch_nothing_until_used(tmp_path):
    reader = TorchBinReader(saved(tmp_path, views()))
    for name in views():
        array = reader.read(name, slice(0, 2))
        assert not array.flags.writeable
        base = array
        while isinstance(base, np.ndarray):
            base = base.base
        assert type(base).__name__ == "mmap"


@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "before 1.6"])
def test_several_threads_may_read_at_once(tmp_path, options):
    tensors = views()
    reader = TorchBinReader(saved(tmp_path, tensors, **options))

    def read(name: str) -> bool:
        array = reader.read(name)
        right = np.array_equal(array, numbers(tensors[name]))
        safetensors.release(array)
        return right

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(read, list(tensors) * 30))


def resident(path: Path) -> int:
    """Bytes of a mapped file that this process holds in memory."""
    pages, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = line.endswith(str(path))
        elif counts and line.startswith("Rss:"):
            pages += int(line.split()[1]) * 1024
    return pages


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what is resident")
@pytest.mark.parametrize("release", [True, pytest.param(False, id="control")])
def test_pages_that_were_read_do_not_stay(tmp_path, release):
    import torch

    size = 2**20  # elements, 4 MB each
    tensors = {f"layer.{i}": torch.full((2**10, 2**10), float(i)) for i in range(4)}
    tensors["turned"] = tensors["layer.3"].T
    reader = TorchBinReader(saved(tmp_path, tensors))
    held = []
    for name in tensors:
        held.append(reader.read(name, slice(0, None)))
        assert held[-1].sum() == size * int(name[-1].replace("d", "3"))
        if release:
            safetensors.release(held[-1])
    assert resident(tmp_path / BIN) < 2**20 if release else resident(tmp_path / BIN) > 12 * 2**20


# ------------------------------------------------------------------------------------ pickles put together by hand


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def whole(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def several(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def called(function: str, *arguments: bytes) -> bytes:
    return name(function) + several(*arguments) + b"R"


def storage(*, kind: str = "torch.FloatStorage", key: str = "0", count: int = 6, device: str = "cpu") -> bytes:
    return several(text("storage"), name(kind), text(key), text(device), whole(count)) + b"Q"


def tensor(*, shape=(2, 3), strides=(3, 1), offset=0, **of_storage) -> bytes:
    sizes = several(*map(whole, shape)), several(*map(whole, strides))
    function = "torch._utils._rebuild_tensor_v2"
    return called(function, storage(**of_storage), whole(offset), *sizes, b"\x89", called("collections.OrderedDict"))


def state(**values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in values.items()) + b"u."


NUMBERS = np.arange(6, dtype="<f4")


def packed(folder: Path, pickled: bytes, **entries: bytes) -> Path:
    """A zip as torch lays it out, written by zipfile; entries: by key of a storage, or by their whole name."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    content = {"t/data.pkl": pickled, "t/byteorder": b"little", "t/data/0": NUMBERS.tobytes(), "t/version": b"3\n"}
    content |= entries
    with zipfile.ZipFile(folder / BIN, "w") as file:
        for entry, value in content.items():
            file.writestr(entry, value)
    return folder


def test_control_a_file_put_together_by_hand_is_read(tmp_path):
    import torch

    packed(tmp_path, state(a=tensor(), b=tensor(shape=(3, 2), strides=(1, 3), device="cuda:1")))
    reader = compare_with_torch(tmp_path)
    same(reader.read("b"), NUMBERS.reshape(2, 3).T.copy())
    assert isinstance(torch.load(tmp_path / BIN)["a"], torch.Tensor)


# ---------------------------------------------------------------------------------------------- what would run code


def making(proof: Path) -> bytes:
    return text(str(proof))


def by_build(proof: Path) -> bytes:
    """A partial(print) that is given another function as its state, and then called."""
    kept = several(name("os.mkdir"), several(making(proof)), b"}", b"N")
    return called("functools.partial", name("builtins.print")) + kept + b"b" + b")R"


def by_newobj(proof: Path) -> bytes:
    """bytes.__new__(bytes, map.__new__(map, os.mkdir, [proof]))"""
    mapped = name("builtins.map") + several(name("os.mkdir"), b"](" + making(proof) + b"e") + b"\x81"
    return name("builtins.bytes") + several(mapped) + b"\x81"


def by_getattr(proof: Path) -> bytes:
    module = called("builtins.__import__", text("os"))
    return called("builtins.getattr", module, text("mkdir")) + several(making(proof)) + b"R"


RUNNING = {
    "reduce": (lambda proof: called("os.mkdir", making(proof)), "os.mkdir"),
    "inst": (lambda proof: b"(" + making(proof) + b"ios\nmkdir\n", "os.mkdir"),
    "obj": (lambda proof: b"(" + name("os.mkdir") + making(proof) + b"o", "os.mkdir"),
    "newobj": (by_newobj, "builtins.bytes"),
    "newobj_ex": (lambda proof: b"\x80\x04" + by_newobj(proof)[:-1] + b"}\x92", "builtins.bytes"),
    "build": (by_build, "functools.partial"),
    "eval": (lambda proof: called("builtins.eval", text(f"__import__('os').mkdir({str(proof)!r})")), "builtins.eval"),
    "exec": (
        lambda proof: called("__builtin__.exec", text(f"import os; os.mkdir({str(proof)!r})")),
        "__builtin__.exec",
    ),
    "getattr": (by_getattr, "builtins.getattr"),
    "stack global": (lambda proof: text("os") + text("mkdir") + b"\x93" + several(making(proof)) + b"R", "os.mkdir"),
    "dotted": (
        lambda proof: b"\x80\x04" + text("torch") + text("os.mkdir") + b"\x93" + several(making(proof)) + b"R",
        "torch.os.mkdir",
    ),
    "of an allowed name": (
        lambda proof: b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys") + b"\x93" + by_getattr(proof),
        "collections.OrderedDict.fromkeys",
    ),
    "extension": (lambda proof: b"\x82\xf0" + several(making(proof)) + b"R", "pickle extension 240"),
    "remembered": (
        lambda proof: name("os.mkdir") + b"q\x05" + b"0" + b"h\x05" + several(making(proof)) + b"R",
        "os.mkdir",
    ),
    "terminal": (
        lambda proof: called("os.mkdir", making(proof)) + text("\x1b[2J") + text("x") + b"\x93",
        "os.mkdir",
    ),
}


@pytest.fixture
def extension():
    copyreg.add_extension("os", "mkdir", 240)
    yield
    copyreg.remove_extension("os", "mkdir", 240)
    copyreg._extension_cache.pop(240, None)


@pytest.mark.parametrize("kind", RUNNING)
def test_nothing_a_file_says_is_run(tmp_path, extension, kind):
    make, wanted = RUNNING[kind]
    proof = tmp_path / "ran"
    message = refusal(packed(tmp_path / "source", state(a=tensor(), b=make(proof))))
    assert f"{BIN} would run code when loaded ({wanted}); it is refused. Ask its author for safetensors" in message
    assert not proof.exists()


@pytest.mark.parametrize("kind", RUNNING)
def test_control_pickle_runs_it(tmp_path, extension, kind):
    import torch  # noqa: F401  one of them goes through it

    proof = tmp_path / "ran"
    with suppress(Exception):  # what comes after it has run
        pickle.loads(b"\x80\x02" + RUNNING[kind][0](proof) + b".")
    assert proof.exists()


def test_the_name_of_what_would_run_cannot_steer_a_terminal(tmp_path):
    message = refusal(packed(tmp_path, state(a=text("\x1b[2J") + text("x\n") + b"\x93")))
    assert r"would run code when loaded (\x1b[2J.x\n)" in message


def test_whole_modules_are_refused(tmp_path):
    import torch

    message = refusal(saved(tmp_path, torch.nn.Linear(2, 2)))
    assert "would run code when loaded (torch.nn.modules.linear.Linear)" in message


ORDERED = "collections.OrderedDict"
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"


@pytest.mark.parametrize(
    "value, found",
    [
        (called(ORDERED, several(text("a"))), "takes 0 positional arguments"),
        (called("torch.FloatStorage", whole(10**12)), "a type is called"),
        (called("torch.Tensor", whole(10**12)), "a type is called"),
        (text("a") + b")R", "a str is called"),
        (called(ORDERED) + b")R", "a OrderedDict is called"),
        (name(ORDERED) + b")\x81", "the operation NEWOBJ is none"),
        (b"(" + name(ORDERED) + b"o", "the operation OBJ is none"),
        (name(ORDERED) + b"}(" + text("fromkeys") + name(ORDERED) + b"ub", "attributes are given to a type"),
        (called(FROM_TYPE, name(FROM_TYPE), name("torch.Tensor"), b")", b"N"), "not made as torch makes one"),
        (called(FROM_TYPE, name(ORDERED), name("torch.Tensor"), b")", b"N"), "not made as torch makes one"),
        (called("torch._utils._rebuild_parameter", text("a"), b"\x89", b"N"), "made of a str, not of a tensor"),
        (called("torch._utils._rebuild_tensor_v2", b"K\x01", b"K\x00", b")", b")"), "stands on a int"),
        (called("torch.serialization._get_layout", text("os.system")), "a layout that torch does not know"),
        (several(text("storage"), text("os.mkdir"), text("0"), text("cpu"), whole(6)) + b"Q", "is not described"),
        (several(text("module"), name("torch.FloatStorage"), text("0"), text("cpu"), whole(6)) + b"Q", "not described"),
        (text("a") + b"Q", "is not described as torch describes one"),
        (text("a") + b"(K\x01e", "something is appended to a str"),
        (name(ORDERED) + b"(K\x01K\x02u", "keys are set in a type"),
        (b"}(K\x01u", "ValueError"),
        (b"h\x63", "KeyError"),
        (b"t", "IndexError"),
        (b"00000000", "the operation POP is none"),
        (text("a") + b"K\x01\x93", "a name is not text"),
        (b"\x96" + struct.pack("<Q", 2**40), "expected 1099511627776 bytes"),
        (b"\x97", "the operation NEXT_BUFFER is none"),
        (b"\xf0", "opcode b'\\xf0' unknown"),
        (b"I1\n", "the operation INT is none"),
        (b"Pos\n", "the operation PERSID is none"),
    ],
)
def test_pickles_that_torch_does_not_write_are_damaged(tmp_path, value, found):
    message = refusal(packed(tmp_path, state(a=tensor(), b=value)))
    assert f"{BIN} is damaged or cut off (UnpicklingError: " in message
    assert found in message


# ------------------------------------------------------------------------------------------------ what would not end


DEEP = 100_000
BOMBS = {
    "long text": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b".",
    "longer text": b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b".",
    "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
    "long array": b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b".",
    "long number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "number of digits": b"\x80\x02L" + b"9" * 10**6 + b"L\n.",
    "long frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}]",
    "nested lists": b"\x80\x02" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "nested tuples": b"\x80\x02)" + b"\x85" * DEEP + b".",
    "nested dicts": b"\x80\x02" + (b"}" + text("a")) * 60_000 + b"}" + b"s" * 60_000 + b".",
    "list in itself": b"\x80\x02]q\x00h\x00a.",
    "dict in itself": b"\x80\x02}q\x00" + text("module") + b"h\x00s.",
    "doubling key": b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * 5000 + b"Ns.",
    "doubling value": b"\x80\x02}" + text("a") + b")" + b"q\x00h\x00\x86" * 5000 + b"s.",
    "marks": b"\x80\x02" + b"(" * 290_000 + b"t.",
    "lists": b"\x80\x02" + b"]" * 290_000 + b".",
    "dicts": b"\x80\x02" + b"}" * 290_000 + b".",
    "operations": b"\x80\x02" + b"N" * 1_000_000 + b".",
    "bytes": b"\x80\x02" + text("a" * 5_000_000) + b".",
    "calls": b"\x80\x02" + called(FROM_TYPE, *[name(FROM_TYPE), name("torch.Tensor"), b")", b"N"]) * 3000 + b".",
    "keys": b"\x80\x02}("
    + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(60_000))
    + b"u.",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_quickly(tmp_path, kind):
    message = refusal(packed(tmp_path, BOMBS[kind]))
    assert f"{BIN} is damaged or cut off (" in message or f"{BIN} does not hold tensors by name" in message


def memory(pickled: bytes) -> int:
    """Most bytes that were taken at once while reading."""
    tracemalloc.start()
    with suppress(pickle.UnpicklingError):
        torch_pickle.read_pickle(pickled)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_take_little_memory(kind):
    assert memory(BOMBS[kind]) < MEGABYTES * 10**6


def test_control_memory_is_noticed():
    assert memory(b"\x80\x02" + b"}" * 100_000 + b".") > 10**7


LARGE_NUMBER = state(a=tensor() + b"r" + struct.pack("<I", 2**32 - 1))
PLAINLY = """
import pickle, resource
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
pickle.loads(b"\\x80\\x02]r\\xff\\xff\\xff\\xff.")
"""


def test_large_number_of_a_remembered_value_takes_no_memory(tmp_path):
    assert memory(LARGE_NUMBER) < 10**6
    same(TorchBinReader(packed(tmp_path, LARGE_NUMBER)).read("a"), NUMBERS.reshape(2, 3))


def test_control_pickle_takes_gigabytes_for_it():
    done = subprocess.run([sys.executable, "-c", PLAINLY], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "MemoryError" in done.stderr


def test_pickles_cut_off_anywhere_are_refused(tmp_path):
    pickled = state(a=tensor(), b=called("torch._utils._rebuild_parameter", tensor(), b"\x88", called(ORDERED)))
    assert isinstance(torch_pickle.read_pickle(pickled), torch_pickle.Table)
    for length in range(len(pickled)):
        with pytest.raises(pickle.UnpicklingError):
            torch_pickle.read_pickle(pickled[:length])


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of pickletools, for names with a backslash
def test_flipped_bytes_never_lead_to_an_error_of_another_kind(tmp_path):
    import torch

    torch.serialization.set_crc32_options(False)  # or the checksum would find most of them
    content = (saved(tmp_path, module()) / BIN).read_bytes()
    torch.serialization.set_crc32_options(True)
    generator, refused = np.random.default_rng(5), 0
    for _ in range(600):
        flipped = bytearray(content)
        for place in generator.integers(0, len(content), generator.integers(1, 4)):
            flipped[place] = generator.integers(0, 256)
        (tmp_path / BIN).write_bytes(flipped)
        try:
            reader = TorchBinReader(tmp_path)
            for held in reader.stored:
                reader.read(held)
        except CheckpointError:
            refused += 1
    assert 100 < refused < 600


# --------------------------------------------------------------------------------------- zips that are not as they say


@pytest.mark.parametrize(
    "value, found",
    [
        (tensor(shape=(2, 4), strides=(4, 1)), "reaches to byte 32 of a storage of 24"),
        (tensor(strides=(4, 1)), "reaches to byte 28 of a storage of 24"),
        (tensor(offset=1), "reaches to byte 28 of a storage of 24"),
        (tensor(shape=(2**61, 1)), "more elements than any array can have"),
        (tensor(shape=(2**40, 2**40), strides=(0, 0)), "more elements than any array can have"),
        (tensor(shape=(0, 2**40, 2**40), strides=(1, 1, 1)), "more elements than any array can have"),
        (tensor(shape=(2, 2), strides=(2**61, 1)), "of a storage of 24"),
        (tensor(shape=(1,) * 40, strides=(1,) * 40), "has 40 dimensions"),
        (tensor(count=7), "lies in a storage of 7 torch.float32, which takes 24 bytes"),
        (tensor(count=2**40), "lies in a storage of 1,099,511,627,776 torch.float32, which takes 24 bytes"),
        (tensor(kind="torch.DoubleStorage"), "lies in a storage of 6 torch.float64, which takes 24 bytes"),
        (tensor(key="1"), "lies in the storage '1', which is not there"),
        (tensor(key="../data.pkl"), "lies in the storage '../data.pkl', which is not there"),
    ],
)
def test_tensors_that_do_not_lie_in_their_storage_are_named(tmp_path, value, found):
    message = refusal(packed(tmp_path, state(a=tensor(), b=value)))
    assert f"b in {BIN} " in message and found in message
    assert f"a in {BIN}" not in message


@pytest.mark.parametrize(
    "value",
    [
        tensor(offset=-1),
        tensor(strides=(-3, 1)),
        tensor(shape=(-2, 3)),
        tensor(shape=(2**64 - 1, 3)),
        tensor(strides=(2**62, 1)),
        tensor(offset=2**63),
        tensor(strides=(1,)),
        tensor(count=-6),
    ],
)
def test_numbers_that_no_tensor_has_are_damage(tmp_path, value):
    assert "is damaged or cut off (UnpicklingError: a " in refusal(packed(tmp_path, state(a=value)))


def test_size_one_may_have_any_stride_and_an_empty_tensor_any_offset(tmp_path):
    values = state(a=tensor(shape=(6, 1), strides=(1, 2**61)), b=tensor(shape=(0, 3), offset=99))
    reader = TorchBinReader(packed(tmp_path, values))
    same(reader.read("a"), NUMBERS.reshape(6, 1))
    assert reader.read("b").shape == (0, 3)


@pytest.mark.parametrize(
    "entries, found",
    [
        ({"t/byteorder": b"big"}, "has the byte order b'big', which is not read"),
        ({"t/byteorder": b"x" * 5000}, "has the byte order b'xxxxxxxx', which is not read"),
        ({"t/../../evil": b"a"}, "holds an entry that leads out of it, 't/../../evil'"),
        ({"..\\evil": b"a"}, "holds an entry that leads out of it"),
        ({"u/data.pkl": b"a"}, "is a zip, but not one of torch: it holds 2 data.pkl"),
        ({"t/constants.pkl": b"a"}, "is a TorchScript program"),
        ({"t/data/0": b""}, "lies in a storage of 6 torch.float32, which takes 0 bytes"),
    ],
)
def test_zips_that_torch_does_not_write_are_refused(tmp_path, entries, found):
    assert found in refusal(packed(tmp_path, state(a=tensor()), **entries))


def test_zip_of_something_else_is_named(tmp_path):
    folder = packed(tmp_path, state(a=tensor()))
    with zipfile.ZipFile(folder / BIN, "w") as file:
        file.writestr("word/document.xml", "<xml>")
    assert "is a zip, but not one of torch: it holds no data.pkl" in refusal(folder)


def test_file_without_a_byte_order_is_little(tmp_path):
    folder = packed(tmp_path, state(a=tensor()))
    with zipfile.ZipFile(folder / BIN, "w") as file:  # as torch before 2.0 wrote it
        file.writestr("archive/data.pkl", state(a=tensor()))
        file.writestr("archive/data/0", NUMBERS.tobytes())
    same(TorchBinReader(folder).read("a"), NUMBERS.reshape(2, 3))


def test_compressed_encrypted_and_repeated_entries_are_refused(tmp_path):
    folder = packed(tmp_path, state(a=tensor()))
    good = (folder / BIN).read_bytes()
    with zipfile.ZipFile(folder / BIN, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("t/data/1", bytes(1000))
    assert "holds the compressed or encrypted entry 't/data/1'" in refusal(folder)

    central = good.index(b"PK\x01\x02")
    (folder / BIN).write_bytes(good[: central + 8] + b"\x01" + good[central + 9 :])  # the flag
    assert "holds the compressed or encrypted entry 't/data.pkl'" in refusal(folder)

    (folder / BIN).write_bytes(good)
    with zipfile.ZipFile(folder / BIN, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("t/data/0", NUMBERS.tobytes())
    assert "holds the entry 't/data/0' twice" in refusal(folder)


def changed_entry(folder: Path, entry: bytes, place: int, value: bytes) -> Path:
    """The list of entries with other bytes at a place of one of its rows."""
    content = bytearray((folder / BIN).read_bytes())
    begin = content.rindex(entry) - 46 + place
    content[begin : begin + len(value)] = value
    (folder / BIN).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "place, value, found",
    [
        (20, struct.pack("<LL", 2**31, 2**31), "'data/0' reaches beyond the end of the file"),
        (20, struct.pack("<LL", 23, 24), "holds the compressed or encrypted entry"),
        (42, struct.pack("<L", 3), "no entry begins at byte 3, where 'data/0' should"),
        (42, struct.pack("<L", 2**31), "is damaged or cut off"),
        (42, struct.pack("<L", 2**32 - 1), "is damaged or cut off"),
    ],
)
def test_entries_that_are_not_where_the_list_says_are_refused(tmp_path, place, value, found):
    folder = changed_entry(packed(tmp_path, state(a=tensor())), b"t/data/0", place, value)
    assert found in refusal(folder)


def test_list_of_entries_that_is_absurdly_long_is_not_read(tmp_path):
    folder = packed(tmp_path, state(a=tensor()))
    with (folder / BIN).open("r+b") as file:
        file.truncate(2**30)
        file.seek(2**30)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, 2**29, 2**28, 0))
    assert "one of its lists takes 536,870,912 bytes, more than 4,194,304" in refusal(folder)


def test_file_cut_off_anywhere_is_refused(tmp_path):
    folder = saved(tmp_path, every_dtype())
    content = (folder / BIN).read_bytes()
    for length in range(1, len(content), 97):
        (folder / BIN).write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            TorchBinReader(folder)


# -------------------------------------------------------------------------------------------------------- over 4 GB


FOUR = 2**32


def local_row(entry: bytes, size: int) -> bytes:
    """Local header with the sizes in zip64's extra field."""
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    return (
        struct.pack("<4s5H3L2H", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, FOUR - 1, FOUR - 1, len(entry), 20) + entry + extra
    )


def central_row(entry: bytes, size: int, offset: int) -> bytes:
    extra = struct.pack("<HHQQQ", 1, 24, size, size, offset)
    fixed = (45, 45, 0, 0, 0, 0, 0, FOUR - 1, FOUR - 1, len(entry), 28, 0, 0, 0, 0, FOUR - 1)
    return struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *fixed) + entry + extra


def write_zip64(path: Path, entries: dict[str, bytes | int]) -> None:
    """A zip64 file; an entry given by its size is a hole that takes no room on the disk."""
    rows = b""
    with path.open("wb") as file:
        for entry, content in entries.items():
            size = content if isinstance(content, int) else len(content)
            rows += central_row(entry.encode(), size, file.tell())
            file.write(local_row(entry.encode(), size))
            file.seek(size, os.SEEK_CUR) if isinstance(content, int) else file.write(content)
        begin, count = file.tell(), len(entries)
        file.write(rows)
        end = file.tell()
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(rows), begin))
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, FOUR - 1, FOUR - 1, 0))


def test_storages_beyond_four_gigabytes_are_found(tmp_path):
    import torch

    count = FOUR // 4 + 500
    pickled = state(
        wide=tensor(shape=(4, count // 4), strides=(count // 4, 1), count=count),
        after=tensor(shape=(3, 2), strides=(1, 3), key="1"),
        end=tensor(shape=(5,), strides=(1,), offset=count - 5, count=count),
    )
    (tmp_path / "config.json").write_text("{}")
    write_zip64(
        tmp_path / BIN,
        {"t/data.pkl": pickled, "t/version": b"3\n", "t/data/0": count * 4, "t/data/1": NUMBERS.tobytes()},
    )
    with (tmp_path / BIN).open("r+b") as file:
        data = file.read(4096).index(b"t/data/0") + len("t/data/0") + 20
        file.seek(data + (count - 5) * 4)
        file.write(np.arange(1, 6, dtype="<f4").tobytes())
    try:
        reader = TorchBinReader(tmp_path)
        same(reader.read("after"), NUMBERS.reshape(2, 3).T.copy())
        same(reader.read("end"), np.arange(1, 6, dtype="<f4"))
        same(reader.read("wide", slice(3, 4), slice(count // 4 - 3, None)), np.float32([[3, 4, 5]]))
        assert not reader.read("wide", slice(0, 1), slice(0, 8)).any()
        expected = torch.load(tmp_path / BIN, mmap=True, weights_only=True)
        same(reader.read("end"), expected["end"].numpy())
        assert tuple(expected["wide"].shape) == reader.stored["wide"].shape
    finally:
        (tmp_path / BIN).unlink()
