"""Bad input to the converter: one clear message, a failing exit status, nothing half done, an untouched source.

Every test here goes through the command line, in this process or as a process of its own.
"""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import checkpoint_factory as factory
import numpy as np
import pytest

from aquila_pd.architecture.families import FAMILIES, find_family
from aquila_pd.checkpoint import transaction
from aquila_pd.checkpoint.io import output, shard_writer, stream_copy
from aquila_pd.formats import safetensors
from aquila_pd.utils.errors import ConfigError
from convert.torch2paddle import main


@pytest.fixture
def source(tmp_path) -> Path:
    return factory.write_safetensors(tmp_path / "source", factory.config(), factory.weights(factory.config()), shards=3)


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(*options) runs the converter on <tmp_path>/source and returns its message, after proving the rest."""

    def run(*options: str, name: str = "source", place: Path | None = None) -> str:
        place = place or tmp_path / "out"
        before = factory.snapshot(tmp_path)
        capsys.readouterr()
        status = main(["--input", str(tmp_path / name), "--output", str(place), *options])
        message = capsys.readouterr().err
        assert status == 1
        assert message.startswith("error: ")
        assert message.count("error: ") == 1
        assert "Traceback" not in message
        assert factory.snapshot(tmp_path) == before
        assert not [path for path in tmp_path.rglob("*") if ".partial" in path.name or ".replaced" in path.name]
        return message

    return run


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SECOND = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


# ------------------------------------------------------------------------------------------------ damaged files


def test_truncated_shard_is_named_with_both_sizes(source, refused):
    size = (source / SECOND).stat().st_size
    os.truncate(source / SECOND, size - 100)
    assert f"{SECOND} is cut off: its header says {size:,} bytes, the file has {size - 100:,}" in refused()


def test_index_naming_a_missing_file(source, refused):
    (source / SECOND).unlink()
    message = refused()
    assert f"{SECOND} does not exist" in message
    assert "Fetch" in message


def test_shard_absent_from_the_index(source, refused):
    shutil.copy(source / SECOND, source / "model-00004-of-00004.safetensors")
    assert f"model-00004-of-00004.safetensors is there, but {INDEX} does not name it" in refused()


def test_tensor_in_another_file_than_the_index_says(source, refused):
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    message = refused()
    assert f"model.norm.weight is not in model-00001-of-00003.safetensors, where {INDEX} says it is" in message
    assert f"model.norm.weight is in model-00003-of-00003.safetensors, but {INDEX} does not say so" in message


def test_zero_byte_file(source, refused):
    (source / SECOND).write_bytes(b"")
    assert f"{SECOND} has zero bytes" in refused()


def test_shards_without_an_index(source, refused):
    (source / INDEX).unlink()
    assert f"{INDEX} does not exist, but there are 3 shards" in refused()


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"weight_map": 3}', b"\xff\xfe"])
def test_damaged_index(source, refused, content):
    (source / INDEX).write_bytes(content)
    assert f"{INDEX} is not an index with a weight_map" in refused()


def test_index_leading_out_of_the_folder(source, refused):
    (source / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}}))
    assert "'../secret.safetensors', which is not a file of this folder" in refused()


@pytest.mark.parametrize("content", [b"abc", b"\xff" * 64, (30).to_bytes(8, "little") + b"{" * 30])
def test_damaged_header(source, refused, content):
    (source / SECOND).write_bytes(content)
    message = refused()
    assert SECOND in message
    assert "header" in message


def test_all_damage_is_reported_together(source, refused):
    (source / SECOND).write_bytes(b"")
    (source / "model-00003-of-00003.safetensors").unlink()
    shutil.copy(source / "model-00001-of-00003.safetensors", source / "model-00009-of-00009.safetensors")
    message = refused()
    for finding in ("has zero bytes", "does not exist", "model-00009-of-00009.safetensors is there"):
        assert finding in message


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\x03\0\0\0" + b"\xff" * 40, b"something else"])
def test_damaged_gguf(tmp_path, refused, content):
    (tmp_path / "tiny.gguf").write_bytes(content)
    assert "tiny.gguf" in refused(name="tiny.gguf")


def test_truncated_gguf(tmp_path, refused):
    path = factory.write_gguf(tmp_path / "tiny.gguf", factory.config(), factory.weights(factory.config()))
    os.truncate(path, path.stat().st_size * 2 // 3)
    assert "is damaged or cut off" in refused(name="tiny.gguf")


def test_truncated_bin(tmp_path, refused):
    factory.write_bin(tmp_path / "source", factory.config(), factory.weights(factory.config()))
    path = tmp_path / "source" / "pytorch_model.bin"
    os.truncate(path, path.stat().st_size // 2)
    assert "pytorch_model.bin is damaged or cut off" in refused()
    path.write_bytes(b"")
    assert "pytorch_model.bin has zero bytes" in refused()


class Bomb:
    """What a hostile checkpoint holds: an object whose unpickling calls a function."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, refused, zipped):
    import torch

    factory.write_config(tmp_path / "source", factory.config())
    path = tmp_path / "source" / "pytorch_model.bin"
    torch.save({"model.norm.weight": Bomb(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
    message = refused()
    assert "would run code when loaded" in message
    assert "mkdir" in message
    assert "weights_only" not in message  # torch's own text proposes to load it unsafely
    assert not (tmp_path / "ran").exists()


def test_nan_in_a_weight_is_reported_and_not_fatal(tmp_path, capsys):
    tensors = factory.weights(factory.config(), dtype="bfloat16")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4:6] = np.nan
    tensors["model.norm.weight"][0] = -np.inf
    factory.write_safetensors(tmp_path / "source", factory.config(torch_dtype="bfloat16"), tensors)
    assert main(["--input", str(tmp_path / "source"), "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "warning   model.layers.1.mlp.up_proj.weight holds 2 NaN or infinite values; they were kept" in text
    assert "warning   model.norm.weight holds 1 NaN" in text


# ------------------------------------------------------------------------------------------------ config and weights


def test_wrong_vocabulary_in_config(source, refused):
    change_json(source / "config.json", vocab_size=81)
    message = refused()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert f"shape       {name}: file has [80, 32], config says [81, 32] (model-0000" in message
    assert "Nothing was written." in message


def test_missing_unexpected_and_misshapen_tensors_are_reported_together(tmp_path, refused):
    tensors = factory.weights(factory.config())
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:70].copy()
    factory.write_safetensors(tmp_path / "source", factory.config(), tensors)
    message = refused()
    assert "missing     model.norm.weight" in message
    assert "unexpected  model.layers.0.self_attn.q_proj.bias [32] (model.safetensors)" in message
    assert "shape       lm_head.weight: file has [70, 32], config says [80, 32] (model.safetensors)" in message


def test_weights_that_are_no_floats(tmp_path, refused):
    tensors = factory.weights(factory.config())
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    factory.write_safetensors(tmp_path / "source", factory.config(), tensors)
    assert "dtype       lm_head.weight: I8, not a float" in refused()


def test_unknown_model_type_lists_the_known_families(source, refused):
    change_json(source / "config.json", model_type="mistral")
    message = refused()
    assert "model_type 'mistral'" in message
    assert "aquila, aquila_v1, llama" in message
    assert "--family" in message


def test_family_option_reads_an_unknown_model_type(source, tmp_path):
    change_json(source / "config.json", model_type="sphinx")
    assert main(["--input", str(source), "--output", str(tmp_path / "out"), "--family", "aquila"]) == 0


def test_unknown_rope_scaling_type(source, refused):
    change_json(source / "config.json", rope_scaling={"type": "longrope", "factor": 4.0})
    message = refused()
    assert "unknown type 'longrope'" in message
    assert "linear, dynamic, llama3, yarn" in message


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sliding_chunks": 4, "moe": True}, ["unknown key   moe = True", "unknown key   sliding_chunks = 4"]),
        ({"attention_bias": True, "hidden_act": "gelu"}, ["attention_bias = True", "hidden_act = 'gelu'"]),
        ({"head_dim": 16}, ["head_dim = 16", "only 8 is known"]),
        ({"num_attention_heads": 5}, ["hidden_size 32 does not divide into 5", "5 attention heads cannot share 2"]),
        ({"num_hidden_layers": 0, "vocab_size": "80"}, ["num_hidden_layers is 0", "vocab_size is '80'"]),
        ({"rms_norm_eps": None, "tie_word_embeddings": 1}, ["rms_norm_eps is None", "tie_word_embeddings is 1"]),
        ({"rope_scaling": {"factor": 0.5}}, ["names no type", "factor is 0.5"]),
        ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2}}, ["type and rope_type differ"]),
        ({"quantization_config": {"bits": 4}}, ["quant_method = None", "bitsandbytes NF4"]),
    ],
)
def test_config_that_means_another_model(source, refused, changes, words):
    change_json(source / "config.json", **changes)
    message = refused()
    assert not [word for word in words if word not in message]


def test_config_without_sizes(source, refused):
    config = factory.config()
    del config["hidden_size"], config["vocab_size"]
    (source / "config.json").write_text(json.dumps(config))
    message = refused()
    assert "missing key   hidden_size" in message
    assert "missing key   vocab_size" in message


@pytest.mark.parametrize("content", [None, "", "[1]", "{"])
def test_config_that_is_no_config(source, refused, content):
    (source / "config.json").unlink()
    if content is not None:
        (source / "config.json").write_text(content)
    assert "config.json" in refused()


def test_families_read_their_defaults_and_each_only_its_own():
    assert set(FAMILIES) >= {"aquila", "aquila_v1", "llama"}
    short = {key: factory.CONFIG[key] for key in ("model_type", "vocab_size", "hidden_size", "intermediate_size")}
    short |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    fields = find_family(short).fields(short)
    # upstream's config class has LLaMA's defaults, which no published checkpoint means
    assert [fields[key] for key in ("rms_norm_eps", "rope_theta", "num_key_value_heads")] == [1e-6, 1e4, 4]
    with pytest.raises(ConfigError, match="No family is called 'gpt'"):
        find_family(short, "gpt")


def test_tied_config_with_a_head_of_its_own(tmp_path, refused):
    config = factory.config(tie_word_embeddings=True)
    tensors = factory.weights(factory.config())
    factory.write_safetensors(tmp_path / "source", config, tensors)
    message = refused()
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    assert '"tie_word_embeddings": false' in message


def test_paddle_folder_as_source_is_recognised(source, tmp_path, refused):
    assert main(["--input", str(source), "--output", str(tmp_path / "paddle")]) == 0
    assert "It needs no conversion" in refused(name="paddle")


def test_folder_without_a_checkpoint_and_path_without_a_folder(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint" in refused(name="empty")
    assert "There is no checkpoint at" in refused(name="absent")


def test_tokenizer_that_cannot_be_read_stops_before_any_weight(source, refused):
    (source / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in refused()


def test_tokenizer_with_more_ids_than_the_model_has_rows(tmp_path, refused):
    config = factory.config(vocab_size=10, bos_token_id=1, eos_token_id=2)
    factory.write_safetensors(tmp_path / "source", config, factory.weights(config))
    factory.write_byte_tokenizer(tmp_path / "source", bos="[CLS]", eos="</s>", pad="<|endoftext|>")  # ids 0 to 10
    message = refused()
    assert "makes ids up to 10" in message
    assert "the model has 10 rows" in message


def test_gguf_with_more_tokens_than_rows(tmp_path, refused, monkeypatch):
    tokens = factory.add_gguf_tokenizer
    monkeypatch.setattr(factory, "add_gguf_tokenizer", lambda writer, size: tokens(writer, size + 3))
    factory.write_gguf(tmp_path / "tiny.gguf", factory.config(), factory.weights(factory.config()))
    message = refused(name="tiny.gguf")
    assert "makes ids up to 82" in message
    assert "the model has 80 rows" in message


def test_sentencepiece_model_that_is_none_stops_the_plan(source, refused):
    (source / "tokenizer.model").write_bytes(b"pieces")
    assert "tokenizer.model" in refused()


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "generation_config.json is not JSON"),
        ('{"eos_token_id": [79, 80]}', "eos_token_id lists [80], but the model has 80 rows"),
        ('{"bos_token_id": "[CLS]"}', "bos_token_id is '[CLS]', not a token id"),
    ],
)
def test_damaged_generation_config_is_noticed_in_the_plan(source, refused, monkeypatch, content, words):
    monkeypatch.setattr(transaction, "staging", lambda *args, **kwargs: pytest.fail("it started"))
    (source / "generation_config.json").write_text(content)
    assert words in refused()


# ------------------------------------------------------------------------------------------------ the output


def test_output_that_exists(source, tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "--overwrite" in refused()
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(place=tmp_path / "file")


def test_overwrite_does_not_delete_what_it_did_not_make(source, tmp_path, refused):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    assert "it holds no conversion-manifest.json" in refused("--overwrite")
    shutil.rmtree(tmp_path / "out")
    assert main(["--input", str(source), "--output", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "photos").mkdir()
    (tmp_path / "out" / "photos" / "one.jpg").write_text("mine")
    message = refused("--overwrite")
    assert "is not replaced, although --overwrite says so" in message
    assert "it holds photos, which the conversion did not write" in message


def test_failing_overwrite_keeps_the_earlier_output(source, tmp_path, refused, monkeypatch):
    assert main(["--input", str(source), "--output", str(tmp_path / "out")]) == 0

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_writer, "write_shard", full)
    assert "No space left on device" in refused("--overwrite")


def test_output_in_the_source_and_the_source_in_the_output(source, tmp_path, refused):
    assert "never written to" in refused(place=source)
    assert "never written to" in refused(place=source / "paddle")
    assert "holds the source" in refused("--overwrite", place=tmp_path)
    assert "lies in the source" in refused("--report", str(source / "report.json"))


def test_disk_without_room_is_noticed_before_starting(source, refused, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    monkeypatch.setattr(transaction, "staging", lambda output: pytest.fail("it started"))
    message = refused()
    assert "0.00 GB free" in message
    assert "Make room" in message


def test_disk_that_fills_up_on_the_way(source, refused, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_writer, "write_shard", full)
    assert "No space left on device" in refused()


def test_read_only_place(source, tmp_path, refused, monkeypatch):
    # simulated, since permissions do not stop root: first as os.access tells it, then as the file system does
    with monkeypatch.context() as patch:
        patch.setattr(output.os, "access", lambda path, mode: False)
        assert "is read-only" in refused()

    def read_only(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert "Read-only file system" in refused()


def test_report_into_a_folder_that_does_not_exist(source, tmp_path, refused):
    assert "does not exist" in refused("--report", str(tmp_path / "nowhere" / "report.json"))


def test_source_that_may_not_be_read(source, tmp_path, refused, monkeypatch):
    def forbidden(info):
        raise PermissionError(errno.EACCES, "Permission denied", str(info.file))

    monkeypatch.setattr(safetensors, "view", forbidden)
    assert "Permission denied" in refused()


def test_failed_run_writes_no_report(source, tmp_path, refused):
    change_json(source / "config.json", vocab_size=81)
    refused("--report", str(tmp_path / "report.json"))


# ------------------------------------------------------------------------------------------------ options, Ctrl-C


@pytest.mark.parametrize("size", ["five", "5G", "0GB"])
def test_size_that_is_no_size_is_noticed_before_the_source_is_opened(refused, size):
    message = refused("--max-shard-size", size, name="absent")
    assert f"{size!r} cannot be read" in message
    assert "5GB" in message


def test_logits_of_a_format_that_transformers_does_not_read(shared, tmp_path, capsys):
    argv = ["--input", str(shared / "goldens" / "v1-flagai"), "--output", str(tmp_path / "out"), "--verify", "logits"]
    assert main(argv) == 1
    assert "--verify content" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [[], ["--input", "a"], ["--input", "a", "--output", "b", "--dtype", "int8"]])
def test_wrong_arguments_are_status_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_interruption_half_way_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    before = factory.snapshot(tmp_path)
    moved = []

    def interrupted(tensor, region):
        moved.append(tensor)
        if len(moved) == 10:
            raise KeyboardInterrupt
        return stream_copy.move(tensor, region)

    monkeypatch.setattr(shard_writer, "move", interrupted)
    assert main(["--input", str(source), "--output", str(tmp_path / "new" / "deep" / "out")]) == 130
    assert "Interrupted. Nothing was left behind" in capsys.readouterr().err
    assert factory.snapshot(tmp_path) == before
    assert not (tmp_path / "new").exists()
