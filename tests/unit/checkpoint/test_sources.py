"""What the readers of checkpoints and of config.json accept, and how they name what they do not."""

import json
import os
import struct
from pathlib import Path

import checkpoint_factory as factory
import numpy as np
import pytest

from aquila_pd.architecture.families import find_family
from aquila_pd.checkpoint.plan import make_plan
from aquila_pd.checkpoint.sources import open_source
from aquila_pd.checkpoint.targets import find_target
from aquila_pd.formats import safetensors
from aquila_pd.utils.errors import CheckpointError, ConfigError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"
INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"


@pytest.fixture
def folder(tmp_path) -> Path:
    return factory.write_safetensors(tmp_path / "source", factory.config(), factory.weights(factory.config()), shards=2)


@pytest.fixture
def bin_folder(tmp_path) -> Path:
    return factory.write_bin(tmp_path / "source", factory.config(), factory.weights(factory.config()))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    return str(caught.value)


def save_bin(folder: Path, content: object) -> None:
    import torch

    torch.save(content, folder / BIN)


def tensors_in(folder: Path) -> dict:
    import torch

    return torch.load(folder / BIN, weights_only=True)


# --------------------------------------------------------------------------------------------- Git LFS pointers


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-00002.safetensors"])
def test_lfs_pointer_in_a_safetensors_folder_is_named(folder, name):
    (folder / name).write_bytes(POINTER)
    message = refusal(folder)
    assert f"{name} is a Git LFS pointer, not the file itself" in message
    assert "git lfs pull" in message


def test_lfs_pointer_in_place_of_a_single_file_bin_or_gguf_is_named(bin_folder, tmp_path):
    (bin_folder / BIN).write_bytes(POINTER)
    assert f"{BIN} is a Git LFS pointer" in refusal(bin_folder)
    (bin_folder / BIN).rename(bin_folder / "model.safetensors")
    assert "model.safetensors is a Git LFS pointer" in refusal(bin_folder)
    (tmp_path / "tiny.gguf").write_bytes(POINTER)
    assert "tiny.gguf is a Git LFS pointer" in refusal(tmp_path / "tiny.gguf")


# ------------------------------------------------------------------------------------------------- .bin files


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html>",
        b'{"error": "Repository not found"}',
        bytes(500),
        bytes(range(200, 250)),
        b"\x20\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32","shape":[1]}',
    ],
    ids=["html", "json", "zeros", "noise", "safetensors"],
)
def test_bin_that_is_no_torch_file_is_not_accused_of_running_code(bin_folder, content):
    (bin_folder / BIN).write_bytes(content)
    message = refusal(bin_folder)
    assert f"{BIN} is not a torch file: it begins with {content[:16]!r}" in message
    assert "would run code" not in message


def test_control_a_whole_module_would_run_code(bin_folder):
    import torch

    save_bin(bin_folder, torch.nn.Linear(2, 2))
    assert "would run code when loaded" in refusal(bin_folder)


def test_bin_of_parameters_is_read_like_one_of_tensors(bin_folder):
    import torch

    tensors = tensors_in(bin_folder)
    save_bin(bin_folder, {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()})
    with open_source(bin_folder) as source:
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(source.read(name), tensor.numpy())


def test_bin_tensors_without_values_or_not_dense_are_named(bin_folder):
    import torch

    tensors = tensors_in(bin_folder)
    tensors["model.norm.weight"] = torch.empty(32, device="meta")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to_sparse()
    save_bin(bin_folder, tensors)
    message = refusal(bin_folder)
    assert "model.norm.weight in pytorch_model.bin is on the device meta" in message
    assert "lm_head.weight in pytorch_model.bin has the layout torch.sparse_coo" in message


# ----------------------------------------------------------------------------------------- safetensors headers


def with_header(path: Path, header: str) -> None:
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(128))


@pytest.mark.parametrize(
    "shape, offsets, found",
    [
        ("[Infinity]", "[0, 128]", "inf is not a whole number"),
        ("[32.7]", "[0, 128]", "32.7 is not a whole number"),
        ('["32"]', "[0, 128]", "'32' is not a whole number"),
        ("[32, true]", "[0, 128]", "True is not a whole number"),
        ("[-4, -8]", "[0, 128]", "-4 is not a whole number"),
        ("[32]", "[0, 1e400]", "inf is not a whole number"),
        ("[32]", "[-0.5, 128]", "-0.5 is not a whole number"),
    ],
)
def test_header_with_numbers_that_are_no_counts(tmp_path, shape, offsets, found):
    path = tmp_path / "model.safetensors"
    with_header(path, f'{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}')
    infos, findings = safetensors.read_header(path)
    assert infos == []
    assert findings == [f"model.safetensors has a damaged header (ValueError: {found})"]


def test_json_nested_deeper_than_python_can_read_is_named(folder):
    deep = "[" * 200_000
    with_header(folder / "model-00001-of-00002.safetensors", deep)
    assert "model-00001-of-00002.safetensors has a damaged header (RecursionError" in refusal(folder)
    (folder / INDEX).write_text(deep)
    assert f"{INDEX} is not an index with a weight_map (RecursionError" in refusal(folder)
    (folder / "config.json").write_text(deep)
    assert "config.json is not JSON" in refusal(folder)


def test_byte_order_mark_in_config_and_index_is_skipped(folder):
    for name in ("config.json", INDEX):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    with open_source(folder) as source:
        assert source.fields["hidden_size"] == 32
        assert set(source.tensors) == set(factory.weights(factory.config()))


# ------------------------------------------------------------------------------------------------------- GGUF


def test_gguf_with_text_that_is_not_utf8_is_named(tmp_path):
    path = factory.write_gguf(tmp_path / "tiny.gguf", factory.config(), factory.weights(factory.config()))
    content = path.read_bytes()
    assert content.count(b"\x05\0\0\0\0\0\0\0llama") == 1
    path.write_bytes(content.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lla\xffa"))
    assert "tiny.gguf: its metadata general.architecture is damaged" in refusal(path)


@pytest.mark.parametrize("pre, noted", [(b"gpt-2", False), (b"default", True)])
def test_gguf_that_does_not_name_its_pre_tokenizer_is_noted_in_the_plan(tmp_path, monkeypatch, pre, noted):
    import gguf

    add = gguf.GGUFWriter.add_tokenizer_pre
    monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_pre", lambda writer, _: add(writer, pre.decode()))
    path = factory.write_gguf(tmp_path / "tiny.gguf", factory.config(), factory.weights(factory.config()))
    with open_source(path) as source:
        notes = [
            note
            for note in make_plan(source, TO_PADDLE, dtype=None, max_shard_size="5GB").notes
            if "pre-tokenizer" in note
        ]
    assert len(notes) == noted
    assert not noted or "tokenizer.ggml.pre is 'default'" in notes[0]


def test_closed_gguf_is_no_longer_mapped(tmp_path):
    path = factory.write_gguf(tmp_path / "tiny.gguf", factory.config(), factory.weights(factory.config()))
    with open_source(path) as source:
        tensor = source.read("model.norm.weight")
        maps = Path("/proc/self/maps")
        assert not maps.exists() or str(path) in maps.read_text()
        del tensor
    assert not maps.exists() or str(path) not in maps.read_text()


# ------------------------------------------------------------------------------------------------ config.json


def fields(**changes) -> dict:
    config = factory.config(**changes)
    config = {key: value for key, value in config.items() if value is not ...}
    return find_family(config).fields(config)


def config_refusal(**changes) -> str:
    with pytest.raises(ConfigError) as caught:
        fields(**changes)
    return str(caught.value)


NEEDS_CODE = "needs code in aquila_pd/families"
TO_PADDLE = find_target("paddle")
REMOVE = "remove it from a copy of config.json"


def test_advice_fits_what_was_found():
    unknown, bad = config_refusal(moe=True), config_refusal(rms_norm_eps="small")
    assert NEEDS_CODE in unknown and REMOVE in unknown and "Correct bad values" not in unknown
    assert NEEDS_CODE not in bad and "Correct bad values in a copy of config.json" in bad
    both = config_refusal(moe=True, rms_norm_eps="small", hidden_size=...)
    assert REMOVE in both and "Fetch config.json again" in both
    assert REMOVE not in config_refusal(hidden_act="gelu")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), pytest.param(10**400, id="huge"), 0, -1.0, True])
def test_numbers_that_are_not_finite_are_refused(value):
    assert "rope_theta is" in config_refusal(rope_theta=value)


def test_absurd_number_of_layers_is_refused_before_their_names_are_made():
    assert "num_hidden_layers is 10000000; more than 10000" in config_refusal(num_hidden_layers=10**7)
    assert fields(num_hidden_layers=10_000)["num_hidden_layers"] == 10_000


def test_double_precision_is_written_as_single(tmp_path):
    weights = {name: tensor.astype(np.float64) for name, tensor in factory.weights(factory.config()).items()}
    folder = factory.write_safetensors(tmp_path / "source", factory.config(torch_dtype="float64"), weights)
    with open_source(folder) as source:
        plan = make_plan(source, TO_PADDLE, dtype=None, max_shard_size="5GB")
    assert plan.config["dtype"] == "float32"
    assert {entry.dtype for shard in plan.shards for entry in shard.entries} == {"F32"}


OLD = {"rope_theta": ..., "rope_scaling": ...}


@pytest.mark.parametrize(
    "new, theta, scaling",
    [
        ({"rope_theta": 5e5, "rope_type": "default"}, 5e5, None),
        (
            {"rope_theta": 1e6, "rope_type": "dynamic", "factor": 4, "original_max_position_embeddings": 96},
            1e6,
            {"type": "dynamic", "factor": 4.0},
        ),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}, 1e4, {"type": "linear", "factor": 2.0}),
        (None, 1e4, None),
    ],
)
def test_rope_parameters_of_transformers_5_are_read(new, theta, scaling):
    found = fields(**OLD, rope_parameters=new)
    assert (found["rope_theta"], found["rope_scaling"]) == (theta, scaling)


def test_rope_parameters_may_repeat_the_older_keys():
    new = {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}
    old = {"type": "linear", "factor": 2}
    found = fields(rope_parameters=new, rope_theta=1_000_000, rope_scaling=old)
    assert (found["rope_theta"], found["rope_scaling"]) == (1e6, {"type": "linear", "factor": 2.0})


@pytest.mark.parametrize(
    "new, old, found",
    [
        ({"rope_theta": 5e5}, {"rope_theta": 1e4}, "rope_theta is 10000.0, but rope_parameters says 500000.0"),
        (
            {"rope_theta": 1e4, "rope_type": "default"},
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling is {'type': 'linear', 'factor': 2.0}, but rope_parameters says None",
        ),
        ({"rope_type": "longrope", "factor": 4.0}, {}, "unknown type 'longrope'"),
        ({"full_attention": {"rope_theta": 1e4}}, {}, "unknown key 'full_attention'"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, {}, "partial_rotary_factor = 0.5"),
        ([1e4], {}, "rope_parameters is [10000.0], not a mapping"),
    ],
)
def test_rope_parameters_that_contradict_or_mean_another_model(new, old, found):
    assert found in config_refusal(rope_parameters=new, **old)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_original_positions_of_a_scaling_must_be_the_models(kind):
    scaling = {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 96}
    assert fields(rope_scaling=scaling)["rope_scaling"] == {"type": kind, "factor": 2.0}
    message = config_refusal(rope_scaling={**scaling, "original_max_position_embeddings": 48})
    assert "original_max_position_embeddings is 48, max_position_embeddings is 96" in message


# ---------------------------------------------------------------------------------------------- writing small files


def test_small_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    safetensors.write_json(path, {"a": 1})

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        safetensors.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
