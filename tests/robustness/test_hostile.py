"""Hostile input to the converter: whatever a folder holds, it is converted rightly or refused in clear words.

Refused means: one named error that cannot steer a terminal, nothing written anywhere, no pipe waited for, and memory in
proportion to what was there to be read. Headers are packed here by hand, so that they can say what no library writes.
"""

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import checkpoint_factory as factory
import numpy as np
import pytest

from aquila_pd.checkpoint.convert import convert
from aquila_pd.formats import gguf as gguf_file
from aquila_pd.formats import safetensors
from aquila_pd.utils import errors, files
from aquila_pd.utils.errors import AquilaError, CheckpointError
from aquila_pd.utils.files import read_object

pytestmark = pytest.mark.timeout(60)  # a hang is a failure, not a long wait

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
NORM = "model.norm.weight"
STEERING = (
    "\n",
    "\x1b[2J",
    "\u202e",
    "\0",
    "\ud800",
    "\x9b31m",
    "\u2028",
)  # a line, ANSI, bidirectional, NUL, half a pair


# Known and not mended yet; a test that passes has lost the reason for its mark.


@pytest.fixture
def source(tmp_path) -> Path:
    """A sound folder with one safetensors file."""
    return factory.write_safetensors(tmp_path / "source", factory.config(), factory.weights(factory.config()))


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A sound folder with three shards and their index."""
    return factory.write_safetensors(tmp_path / "source", factory.config(), factory.weights(factory.config()), shards=3)


def everything_in(folder: Path) -> set[tuple[str, int]]:
    """Names with the time of their last change; links, pipes and devices are not followed."""
    found = [Path(place) / name for place, folders, names in os.walk(folder) for name in (*folders, *names)]
    return {(str(path), path.lstat().st_mtime_ns) for path in found}


def refusal(path: Path, **options) -> str:
    """The message with which a checkpoint below the temporary folder is refused, after proving the rest."""
    output = path.parent / "out"
    before = everything_in(path.parent)
    with pytest.raises(AquilaError) as error:
        convert(path, output, say=lambda line: None, **options)
    message = str(error.value)
    assert all(line.isprintable() for line in message.splitlines()), "it would steer a terminal"
    assert len(message) < 20_000
    assert everything_in(path.parent) == before
    return message


def converts(path: Path) -> bool:
    """Whether a folder converts, and to the values the safetensors library finds in it."""
    output = path.parent / "out"
    convert(path, output, say=lambda line: None)
    found, wanted = factory.load_folder(output), factory.expected(factory.load_folder(path))
    return found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes that Python held at most while it worked, beside what it held before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_control_a_sound_folder_is_not_refused(sharded):
    assert converts(sharded)
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        refusal(sharded, overwrite=True)


# ------------------------------------------------------------------------------------------- safetensors headers


def take_apart(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_together(file: Path, header: dict | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_header(file: Path, change: Callable[[dict], object]) -> None:
    """Change a header in place; what the change returns, if anything, takes its place."""
    header, data = take_apart(file)
    put_together(file, change(header) or header, data)


OFFSETS = {
    "overlapping": lambda a, b: [a - 64, b - 64],
    "reordered": lambda a, b: [b, a],
    "beyond the file": lambda a, b: [a, b + 4096],
    "negative": lambda a, b: [-1, b],
    "huge": lambda a, b: [2**70, 2**70 + 128],
    "of 4000 digits": lambda a, b: [a, 10**4000],
    "floats": lambda a, b: [float(a), float(b)],
    "texts": lambda a, b: [str(a), str(b)],
    "infinite": lambda a, b: [a, float("inf")],
    "three": lambda a, b: [a, b, b],
    "none": lambda a, b: None,
}


@pytest.mark.parametrize("kind", OFFSETS)
def test_header_whose_offsets_lie(source, kind):
    def change(header: dict) -> None:
        header[NORM]["data_offsets"] = OFFSETS[kind](*header[NORM]["data_offsets"])

    change_header(source / SINGLE, change)
    assert "not a complete safetensors checkpoint" in refusal(source)


DEEP = json.loads("[" * 900 + "]" * 900)
SHAPES = [
    [2**63],
    [2**62, 4],
    [0, 2**62],
    [10**4000],
    [-32],
    [32.0],
    [True],
    ["32"],
    [1] * 40 + [32],
    DEEP,
    [0],
    {},
    None,
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape)[:12])
def test_header_whose_shapes_lie(source, shape):
    change_header(source / SINGLE, lambda header: header[NORM].update(shape=shape))
    assert "model.safetensors" in refusal(source)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "", "f32", 5, None, [], {}, True, "\x1b[2JF32", "F32" * 10_000])
def test_header_with_an_unknown_dtype(source, dtype):
    change_header(source / SINGLE, lambda header: header[NORM].update(dtype=dtype))
    assert "has the dtype" in refusal(source)


@pytest.mark.parametrize("length", [0, 1, 3, 10**10, 2**63, 2**64 - 1])
def test_header_length_that_lies(source, length):
    content = (source / SINGLE).read_bytes()
    (source / SINGLE).write_bytes(struct.pack("<Q", length) + content[8:])
    assert "header" in refusal(source)


HEADERS = {
    "key twice": lambda text: text.replace('"dtype": "F32"', '"dtype": "F32", "dtype": "I32"', 1),
    "tensor twice": lambda text: text[:-1] + f', "{NORM}": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}}}',
    "pairs": lambda text: json.dumps([[name, list(body.items())] for name, body in json.loads(text).items()]),
    "nothing": lambda text: "{}",
    "a number": lambda text: "17",
    "NaN": lambda text: text[:-1] + ', "more": NaN}',
    "nested 100,000 deep": lambda text: text[:-1] + ', "more": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "UTF-16": lambda text: text.encode("utf-16"),
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_header_that_is_no_header(source, kind):
    def change(header: dict) -> bytes:
        text = HEADERS[kind](json.dumps(header))
        return text if isinstance(text, bytes) else text.encode()

    change_header(source / SINGLE, change)
    assert SINGLE in refusal(source)


@pytest.mark.parametrize("text", [*STEERING, "", "x" * 100_000])
def test_tensor_name_that_cannot_be_printed_is_shown_escaped(source, text):
    change_header(source / SINGLE, lambda header: header.update({text: header[NORM]}))
    assert f"'{files.shown(text)}' is no name of a tensor" in refusal(source)


def test_control_the_escaping_is_what_keeps_the_terminal_safe(source, monkeypatch):
    change_header(source / SINGLE, lambda header: header.update({"\x1b[2J": header[NORM]}))
    monkeypatch.setattr(safetensors, "shown", str)
    assert "[2J" in refusal(source)  # errors escape once more by themselves
    monkeypatch.setattr(errors, "printable", str)
    with pytest.raises(AssertionError, match="steer a terminal"):
        refusal(source)


def test_tensor_of_an_emoji_is_named_as_it_is(source):
    empty = {"dtype": "F32", "shape": [0]}
    change_header(source / SINGLE, lambda h: h.update({"😀": {**empty, "data_offsets": [max_end(h)] * 2}}))
    assert "unexpected  😀 [0]" in refusal(source)


def max_end(header: dict) -> int:
    return max(body["data_offsets"][1] for name, body in header.items() if name != "__metadata__")


def test_million_tensors_are_refused_before_they_are_made(source):
    rows = (f'"t{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(1_000_000))
    text = f"{{{','.join(rows)}}}".encode()
    put_together(source / SINGLE, text, bytes(1_000_000))
    assert peak_memory(lambda: safetensors.read_header(source / SINGLE)) < 3 * len(text)
    assert "it lists 1,000,000 tensors" in refusal(source)


def test_header_of_brackets_does_not_fill_the_memory(source, monkeypatch):
    text = b'{"a":[' + b"[]," * 1_500_000 + b"[]]}"
    put_together(source / SINGLE, text, b"")
    read = lambda: safetensors.read_header(source / SINGLE)  # noqa: E731
    assert peak_memory(read) < 5 * len(text)
    assert "1,500,003 brackets" in refusal(source)
    monkeypatch.setattr(files, "FEW", 10**9)
    assert peak_memory(read) > 15 * len(text), "control: this is what the check is for"


# ------------------------------------------------------------------------------------------- the index


FILES = (
    "../../etc/passwd",
    "/etc/passwd",
    "..\\passwd",
    "C:\\passwd",
    "",
    ".",
    "..",
    "a\0b",
    "\x1b[2J",
    "\ud800",
    "n" * 10_000,
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: ascii(file)[:12])
def test_index_naming_what_is_no_file_of_the_folder(sharded, file):
    change_index(sharded, lambda placed: placed.update({NORM: file}))
    message = refusal(sharded)
    assert "which is not a file of this folder" in message
    assert "root:" not in message


def change_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("file", [5, None, [], {}, True])
def test_index_naming_something_else_than_a_text(sharded, file):
    change_index(sharded, lambda placed: placed.update({NORM: file}))
    assert f"the file of {NORM} is {file!r}" in refusal(sharded)


@pytest.mark.parametrize(
    "file, found", [("folder", "is a folder, not a file"), ("config.json", "does not begin with a safetensors header")]
)
def test_index_naming_a_folder_or_a_file_of_another_kind(sharded, file, found):
    (sharded / "folder").mkdir()
    change_index(sharded, lambda placed: placed.update({NORM: file}))
    assert f"{file} {found}" in refusal(sharded)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "b"}, "weight_map": {}}',
        "NaN",
        "[" * 100_000,
    ],
)
def test_index_that_is_none(sharded, content):
    (sharded / INDEX).write_text(content)
    assert INDEX in refusal(sharded)


def test_tensor_in_two_shards(sharded):
    first = "model-00001-of-00003.safetensors"
    header, data = take_apart(sharded / first)
    end = max_end(header)
    header[NORM] = {"dtype": "F32", "shape": [32], "data_offsets": [end, end + 128]}
    put_together(sharded / first, header, data + bytes(128))
    assert f"{NORM} is in both {first} and model-00003-of-00003.safetensors" in refusal(sharded)


# ------------------------------------------------------------------------------------------- what is no file


def pipe(path: Path) -> None:
    os.mkfifo(path)


NO_FILES = {
    "is a named pipe, not a file": pipe,
    "is a folder, not a file": Path.mkdir,
    "is a device, not a file": lambda path: path.symlink_to("/dev/zero"),  # endless
    "is a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "leads nowhere": lambda path: path.symlink_to(path),
}
READ = (SINGLE, INDEX, CONFIG, "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_not_opened(source, name, kind):
    (source / name).unlink(missing_ok=True)
    NO_FILES[kind](source / name)
    assert kind in refusal(source)


@pytest.mark.parametrize("kind", NO_FILES)
def test_gguf_that_is_no_file_is_not_opened(source, kind):
    (source / SINGLE).unlink()
    NO_FILES[kind](source / "tiny.gguf")
    assert kind in refusal(source)


def test_source_that_is_a_pipe_or_a_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "it is a named pipe, not a file" in refusal(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    assert "it is a device, not a file" in refusal(tmp_path / "zero")


def test_file_name_that_steers_a_terminal(source):
    (source / SINGLE).rename(source / "\x1b[2J.gguf")
    assert "\\x1b[2J.gguf" in refusal(source)


def test_links_to_files_elsewhere_are_followed_as_a_cache_needs_it(sharded, tmp_path):
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate(sorted(sharded.iterdir())):
        path.rename(tmp_path / "blobs" / str(i))
        path.symlink_to(Path("..") / "blobs" / str(i))
    assert converts(sharded)


# ------------------------------------------------------------------------------------------- config.json and its like


def write_config(folder: Path, **changes) -> None:
    (folder / CONFIG).write_text(json.dumps(factory.config(**changes)))


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("by", [-1, 1])
def test_config_with_a_size_off_by_one(source, key, by):
    write_config(source, **{key: factory.CONFIG[key] + by})
    assert "config" in refusal(source)


LIES = [None, True, -1, 0, 1.5, "32", "", [], {}, [32], 10**12, 2**40, 10**400, float("nan"), 1e999, "\x1b[2J", DEEP]


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", LIES, ids=lambda value: ascii(value)[:8])
def test_config_with_a_size_that_is_none(source, key, value):
    write_config(source, **{key: value})
    if (key, value) == ("num_key_value_heads", None):
        assert "shape" in refusal(source)  # null means one for each query head
    else:
        assert "config" in refusal(source)


@pytest.mark.parametrize("value", LIES, ids=lambda value: ascii(value)[:8])
def test_first_generation_config_with_a_size_that_is_none(source, value):
    about = {"dim": value, "n_heads": 4, "n_layers": 2, "multiple_of": 16, "vocab_size": 80, "max_seq_len": 96}
    (source / CONFIG).write_text(json.dumps(about))
    assert "config" in refusal(source)


@pytest.mark.parametrize(
    "key", ["rope_theta", "rms_norm_eps", "rope_scaling", "eos_token_id", "tie_word_embeddings", "\x1b"]
)
@pytest.mark.parametrize("value", ["x", "\x1b[2J", {"a": {"\x1b": [1]}}, [[]], float("nan"), -1e999, DEEP])
def test_config_with_a_value_of_another_kind(source, key, value):
    write_config(source, **{key: value})
    assert "config" in refusal(source) or "rope_scaling" in refusal(source)


@pytest.mark.parametrize("name", [CONFIG, "generation_config.json"])
@pytest.mark.parametrize(
    "content, found",
    [
        (b"{" + b'"a":[' * 100_000, "is not JSON"),
        (b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", "nested more than 64 deep"),
        (b'{"a": NaN}', "nan is no number"),
        (b'{"a": [-Infinity]}', "-inf is no number"),
        (b'{"a": 1e999}', "inf is no number"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "is not JSON"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b'{"a": 1, "a": 2}', "a is there twice"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8"),
        ('{"a": "é"}'.encode("latin-1"), "is not UTF-8"),
        (b"[]", "holds a list"),
        (b"", "is not JSON"),
        (b"{}\0", "is not JSON"),
    ],
)
def test_json_that_could_not_be_written_again(source, name, content, found):
    (source / name).write_bytes(content)
    message = refusal(source)
    assert name in message
    assert found in message


@pytest.mark.parametrize("name", [CONFIG, "generation_config.json", INDEX, "tokenizer.json", "tokenizer.model"])
def test_gigabyte_of_nothing_is_not_read(source, name):
    with (source / name).open("wb") as file:
        file.truncate(10**9)  # takes no place on the disk
    assert peak_memory(lambda: refusal(source)) < 5_000_000
    assert "1,000,000,000 bytes" in refusal(source)


def test_config_in_utf8_with_a_byte_order_mark_is_read(source):
    (source / CONFIG).write_bytes(b"\xef\xbb\xbf" + (source / CONFIG).read_bytes())
    assert converts(source)


def test_ids_that_are_no_rows_are_not_written(source):
    write_config(source, eos_token_id=[79, 10**12], bos_token_id=-3)
    assert converts(source)
    written = json.loads((source.parent / "out" / CONFIG).read_text())
    assert (written["eos_token_id"], written["bos_token_id"]) == (None, None)


def test_control_a_reader_that_believes_json_is_noticed(source, monkeypatch):
    (source / CONFIG).write_text('{"a": 1, "a": 2}')
    monkeypatch.setattr(files, "_unique", dict)
    assert read_object(source / CONFIG, CheckpointError) == {"a": 2}


def test_config_of_ten_thousand_layers_is_not_answered_with_a_line_for_each(source):
    write_config(source, num_hidden_layers=10_000)
    assert "missing" in refusal(source)


def test_value_without_end_is_not_repeated_whole(source):
    write_config(source, hidden_size="x" * 1_000_000)
    assert "hidden_size" in refusal(source)


@pytest.mark.parametrize("value", [True, "x", [], {}, "\x1b[2J"])
def test_generation_option_that_is_no_number_is_not_passed_on(source, value):
    (source / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": value}))
    assert "temperature" in refusal(source)


# ------------------------------------------------------------------------------------------- tokenizer files

CHARSMAPS = [{"type": "Precompiled", "precompiled_charsmap": said} for said in ("", "AAAA", "/////w==")]
TOKENIZER_LIES = [
    *(
        (("model",), value)
        for value in (None, [], {}, {"type": "BPE"}, {"type": "WordLevel", "vocab": {}, "unk_token": "a"})
    ),
    *((("model", "vocab"), value) for value in (None, [], {"a": -1}, {"a": 2**40}, {"a": "0"}, {"a": 200})),
    *((("model", "merges"), value) for value in (None, [["a"]], [["a", "zz"]], ["a"], {})),
    *((("normalizer",), value) for value in ("x", {"type": "x"})),
    *((("normalizer",), value) for value in CHARSMAPS),
    *((("added_tokens",), value) for value in (None, {}, [{}], [{"id": -1, "content": "a"}])),
    *((("version",), value) for value in ("2.0", 1, "\x1b[2J")),
]


@pytest.mark.parametrize("path, value", TOKENIZER_LIES, ids=lambda part: ascii(part)[:40])
def test_tokenizer_json_that_lies(source, path, value):
    factory.write_byte_tokenizer(source, bos="[CLS]", eos="</s>", pad="<pad>")
    found = json.loads((source / "tokenizer.json").read_text())
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (source / "tokenizer.json").write_text(json.dumps(found))
    assert refusal(source)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("value", [5, True, [], [[]], "\x1b[2J", {}, {"content": 5}, {"content": None}, {"x": "a"}])
def test_special_token_that_is_none(source, name, value):
    factory.write_byte_tokenizer(source, bos="[CLS]", eos="</s>", pad="<pad>")
    (source / name).write_text(json.dumps({"bos_token": value, "eos_token": "</s>"}))
    if name == "special_tokens_map.json" and not value:
        assert converts(source)  # nothing is said, and tokenizer_config.json holds
    else:
        assert refusal(source)


@pytest.mark.parametrize(
    "vocabulary", ["[]", "{", '{"a": -1}', '{"a": 1.5}', '{"a": 0, "a": 1}', '{"\\ud800": 0}', '{"a": 1e999}']
)
def test_vocabulary_that_lies(source, vocabulary):
    (source / "vocab.json").write_text(vocabulary)
    (source / "merges.txt").write_text("#version: 0.2\n")
    assert refusal(source)


@pytest.mark.parametrize("merges", [b"a", b"a b c\n", b"a zz\n", b"\xff\xff", b"a\0b", b"\x1b[2J a\n"])
def test_merges_that_lie(source, merges):
    (source / "vocab.json").write_text('{"a": 0, "b": 1}')
    (source / "merges.txt").write_bytes(b"#version: 0.2\n" + merges)
    assert refusal(source)


# ------------------------------------------------------------------------------------------- GGUF


TEXT, LIST, U32, I32, U64, F32 = 8, 9, 4, 5, 10, 6


def text(value: str | bytes) -> bytes:
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def texts(*values: str | bytes) -> bytes:
    return struct.pack("<IQ", TEXT, len(values)) + b"".join(map(text, values))


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def metadata() -> dict[str, tuple[int, bytes]]:
    """Key -> kind and bytes, of the tiny model with a tokenizer."""
    about = factory.CONFIG
    sizes = {
        "vocab_size": about["vocab_size"],
        "context_length": about["max_position_embeddings"],
        "embedding_length": about["hidden_size"],
        "feed_forward_length": about["intermediate_size"],
        "block_count": about["num_hidden_layers"],
        "attention.head_count": about["num_attention_heads"],
        "attention.head_count_kv": about["num_key_value_heads"],
    }
    letters = ["a", "b", "ab", *(f"filler{i}" for i in range(about["vocab_size"] - 3))]
    return {
        "general.architecture": (TEXT, text("llama")),
        **{f"llama.{key}": (U32, u32(value)) for key, value in sizes.items()},
        "llama.attention.layer_norm_rms_epsilon": (F32, struct.pack("<f", 1e-5)),
        "tokenizer.ggml.model": (TEXT, text("gpt2")),
        "tokenizer.ggml.pre": (TEXT, text("gpt-2")),
        "tokenizer.ggml.tokens": (LIST, texts(*letters)),
        "tokenizer.ggml.merges": (LIST, texts("a b")),
        "tokenizer.ggml.eos_token_id": (U32, u32(79)),
    }


def rows() -> dict[str, dict]:
    """Name -> dimensions, kind and offset of each tensor, all float32 and one after the other."""
    found, place = {}, 0
    for hf, tensor in factory.weights(factory.config()).items():
        found[factory.gguf_name(hf)] = {"dims": tensor.shape[::-1], "kind": 0, "offset": place}
        place += tensor.nbytes  # each a multiple of 32
    return found


def pack(
    known: dict, tensors: dict, *, version: int = 3, counts: tuple[int, int] | None = None, order: str = "<"
) -> bytes:
    head = b"GGUF" + struct.pack(f"{order}IQQ", version, *(counts or (len(tensors), len(known))))
    for key, (kind, value) in known.items():
        head += text(key) + u32(kind) + value
    for name, row in tensors.items():
        dims = row["dims"]
        head += text(name) + struct.pack(
            f"<I{len(dims)}QIQ", row.get("count", len(dims)), *dims, row["kind"], row["offset"]
        )
    data = sum(tensor.nbytes for tensor in factory.weights(factory.config()).values())
    return head + bytes(-len(head) % 32) + bytes(data)


@pytest.fixture
def gguf(tmp_path) -> Path:
    return tmp_path / "tiny.gguf"


def test_control_the_gguf_packed_by_hand_converts(gguf):
    gguf.write_bytes(pack(metadata(), rows()))
    convert(gguf, gguf.parent / "out", say=lambda line: None)
    assert factory.load_folder(gguf.parent / "out")["aquila.norm.weight"].shape == (32,)


@pytest.mark.parametrize("version", [0, 1, 4, 2**31, 3 << 24])
def test_gguf_of_another_version_or_byte_order(gguf, version):
    gguf.write_bytes(pack(metadata(), rows(), version=version))
    assert ("its version is" if version < 5 else "big-endian") in refusal(gguf)


def test_big_endian_gguf_is_not_read_as_other_numbers(gguf, monkeypatch):
    import gguf as library

    big = library.GGUFEndian.BIG
    writer = library.GGUFWriter
    monkeypatch.setattr(library, "GGUFWriter", lambda path, kind: writer(path, kind, endianess=big))
    factory.write_gguf(gguf, factory.config(), factory.weights(factory.config()))
    assert "big-endian" in refusal(gguf)


@pytest.mark.parametrize("counts", [(2**60, 14), (20, 2**60), (2**64 - 1, 2**64 - 1), (20, 0), (0, 14), (10**6, 14)])
def test_gguf_whose_counts_lie(gguf, counts):
    gguf.write_bytes(pack(metadata(), rows(), counts=counts))
    assert "tiny.gguf" in refusal(gguf)


MORE = {
    "text without end": (TEXT, struct.pack("<Q", 2**60)),
    "list without end": (LIST, struct.pack("<IQ", U32, 2**60)),
    "texts without end": (LIST, struct.pack("<IQ", TEXT, 2**60)),
    "lists in lists": (LIST, struct.pack("<IQ", LIST, 1) * 3000 + struct.pack("<IQ", U32, 0)),
    "unknown kind": (99, b""),
    "list of an unknown kind": (LIST, struct.pack("<IQ", 99, 1)),
    "two million bytes": (LIST, struct.pack("<IQ", 0, 2_000_000) + bytes(2_000_000)),
}


@pytest.mark.parametrize("kind", MORE)
def test_gguf_whose_metadata_has_no_end(gguf, kind):
    gguf.write_bytes(pack({**metadata(), "more": MORE[kind]}, rows()))
    assert peak_memory(lambda: refusal(gguf)) < 5_000_000
    assert "damaged or cut off" in refusal(gguf)


@pytest.mark.parametrize(
    "key, value",
    [
        ("general.architecture", (U32, u32(1))),
        ("general.architecture", (TEXT, text(b"\xff"))),
        ("general.architecture", (TEXT, text("\x1b[2J"))),
        ("general.alignment", (U32, u32(0))),
        ("general.alignment", (U32, u32(3))),
        ("general.alignment", (TEXT, text("32"))),
        ("split.count", (TEXT, text("2"))),
        ("split.count", (LIST, struct.pack("<IQI", U32, 1, 2))),
        ("llama.context_length", (TEXT, text("96"))),
        ("llama.context_length", (F32, struct.pack("<f", float("nan")))),
        ("llama.context_length", (LIST, struct.pack("<IQII", U32, 2, 96, 96))),
        ("llama.embedding_length", (LIST, struct.pack("<IQII", U32, 2, 32, 33))),
        ("llama.vocab_size", (U64, struct.pack("<Q", 2**63))),
        ("llama.unknown", (TEXT, text("\x1b[2J"))),
        ("llama.\x1b[2J", (U32, u32(1))),
        ("llama.rope.scaling.type", (LIST, texts("linear"))),
        ("tokenizer.ggml.model", (TEXT, text("\x1b[2J"))),
        ("tokenizer.ggml.pre", (TEXT, text("\x1b[2J"))),
        ("tokenizer.ggml.tokens", (TEXT, text("a"))),
        ("tokenizer.ggml.tokens", (LIST, texts(*[b"\xff"] * 80))),
        ("tokenizer.ggml.tokens", (LIST, texts(*["a"] * 80))),
        ("tokenizer.ggml.merges", (LIST, texts("a"))),
        ("tokenizer.ggml.merges", (LIST, struct.pack("<IQI", U32, 1, 1))),
        ("tokenizer.ggml.token_type", (LIST, texts("a"))),
        ("tokenizer.ggml.eos_token_id", (TEXT, text("79"))),
        ("tokenizer.ggml.eos_token_id", (I32, struct.pack("<i", -1))),
        ("tokenizer.ggml.unknown_token_id", (U64, struct.pack("<Q", 2**63))),
        ("tokenizer.chat_template", (U32, u32(1))),
        ("tokenizer.chat_template", (TEXT, text(b"\xed\xa0\x80"))),
    ],
)
def test_gguf_whose_metadata_lies(gguf, key, value):
    gguf.write_bytes(pack({**metadata(), key: value}, rows()))
    assert refusal(gguf)


TENSOR_LIES = {
    "no dimensions": {"count": 0},
    "four billion dimensions": {"count": 2**32 - 1},
    "dimension of 2**63": {"dims": (2**63,)},
    "dimensions whose product is 0 in 64 bits": {"dims": (2**32, 2**32)},
    "another length": {"dims": (31,)},
    "empty": {"dims": (0,)},
    "unknown kind": {"kind": 99},
    "kind that was given up": {"kind": 4},
    "whole numbers": {"kind": 26},
    "half a block": {"kind": 8, "dims": (33,)},
    "offset beyond the file": {"offset": 2**40},
    "offset beyond 64 bits": {"offset": 2**64 - 32},
    "offset in another tensor": {"offset": 0},
    "offset between two multiples": {"offset": 1},
}


@pytest.mark.parametrize("kind", TENSOR_LIES)
def test_gguf_whose_tensors_lie(gguf, kind):
    tensors = rows()
    tensors["output_norm.weight"] |= TENSOR_LIES[kind]
    gguf.write_bytes(pack(metadata(), tensors))
    assert "tiny.gguf" in refusal(gguf)


@pytest.mark.parametrize("name", STEERING[:4])
def test_gguf_tensor_name_that_cannot_be_printed(gguf, name):
    gguf.write_bytes(pack(metadata(), {**rows(), name: rows()["output_norm.weight"]}))
    assert f"'{files.shown(name)}' is no name" in refusal(gguf)


@pytest.mark.parametrize("beginning", [struct.pack("<Q", 2**39), text("a") + struct.pack("<IQ", TEXT, 2**39), b""])
def test_terabyte_of_nothing_behind_a_gguf_header(gguf, beginning):
    gguf.write_bytes(pack({}, {}, counts=(1, 1))[:24] + beginning)
    os.truncate(gguf, 2**40)  # takes no place on the disk
    assert peak_memory(lambda: refusal(gguf)) < 5_000_000


def test_control_without_the_check_of_places_the_tensors_are_believed(gguf, monkeypatch):
    tensors = rows()
    tensors["output_norm.weight"]["offset"] = 0
    gguf.write_bytes(pack(metadata(), tensors))
    monkeypatch.setattr(gguf_file, "_misplaced", lambda *anything: [])
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        refusal(gguf)
