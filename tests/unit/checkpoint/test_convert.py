"""Conversion, judged by decoders that do not share the table: hand-written names, numpy, torch and transformers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoint_factory as factory
import ml_dtypes
import numpy as np
import pytest
from checkpoint_factory import load_folder
from safetensors.numpy import load_file

from aquila_pd.architecture.families.dialect import Dialect, rotate_half_rows
from aquila_pd.checkpoint import convert as convert_module
from aquila_pd.checkpoint.bundle import CODE, SHIMS, bundled_files, write_bundle
from aquila_pd.checkpoint.convert import convert
from aquila_pd.checkpoint.io import stream_copy
from aquila_pd.checkpoint.io.manifest import MANIFEST
from aquila_pd.checkpoint.sources import open_source
from aquila_pd.checkpoint.verify import logits
from aquila_pd.formats import safetensors
from aquila_pd.utils.errors import VerificationError
from aquila_pd.utils.files import files_under
from convert.torch2paddle import main

QUIET = {"say": lambda text: None}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert found[name].tobytes() == np.ascontiguousarray(value).tobytes(), f"{name} differs"


@pytest.fixture
def source(tmp_path) -> Path:
    config = factory.config(torch_dtype="bfloat16")
    return factory.write_safetensors(tmp_path / "source", config, factory.weights(config, dtype="bfloat16"), shards=2)


# ------------------------------------------------------------------------------------------------ golden folders


@pytest.mark.parametrize("name", ["tiny-7b", "tiny-34b", "tiny-16k", "tiny-ntk", "tiny-tied"])
def test_golden_folder_holds_every_value_where_a_hand_written_mapping_puts_it(shared, tmp_path, name):
    convert(shared / "goldens" / name, tmp_path / "out", max_shard_size="3MB", **QUIET)
    assert_same(load_folder(tmp_path / "out"), factory.expected(load_folder(shared / "goldens" / name)))
    theirs = json.loads((shared / "goldens" / name / "config.json").read_text())
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("vocab_size", "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling", "eos_token_id"):
        assert ours[key] == theirs[key]
    assert ours["dtype"] == ours["torch_dtype"] == theirs["torch_dtype"]
    assert "auto_map" not in ours


def test_bin_files_give_the_same_bytes_as_safetensors_and_inv_freq_is_dropped_aloud(shared, tmp_path, capsys):
    golden, only_bin = shared / "goldens" / "tiny-16k", tmp_path / "bin"
    only_bin.mkdir()
    for path in [*golden.glob("*.bin*"), golden / "config.json", golden / "generation_config.json"]:
        shutil.copy(path, only_bin)
    assert main(["--input", str(only_bin), "--output", str(tmp_path / "a")]) == 0
    assert "dropped   4 tensors, model.layers.0.self_attn.rotary_emb.inv_freq first" in capsys.readouterr().out
    assert main(["--input", str(golden), "--output", str(tmp_path / "b")]) == 0
    assert factory.digests(tmp_path / "a") == factory.digests(tmp_path / "b")


def test_flagai_v1_is_renamed_and_its_rotary_rows_reordered(shared, tmp_path):
    import torch

    convert(shared / "goldens" / "v1-flagai", tmp_path / "out", **QUIET)
    state = torch.load(shared / "goldens" / "v1-flagai" / "pytorch_model.bin", weights_only=True)["module"]
    found = load_folder(tmp_path / "out")
    assert len(found) == len(state)
    heads, width = 4, 64
    for i in range(2):
        for theirs, ours in {"wq": "q", "wk": "k"}.items():
            w = state[f"layers.{i}.attention.{theirs}.weight"]
            w = w.view(heads, width // heads // 2, 2, width).transpose(1, 2).reshape(width, width)
            assert np.array_equal(found[f"aquila.layers.{i}.self_attn.{ours}_proj.weight"], w.T.numpy())
        for theirs, ours in {"w1": "gate", "w3": "up", "w2": "down"}.items():
            w = state[f"layers.{i}.feed_forward.{theirs}.weight"].T.numpy()
            assert np.array_equal(found[f"aquila.layers.{i}.mlp.{ours}_proj.weight"], w)
        norm = state[f"layers.{i}.ffn_norm.weight"].numpy()
        assert np.array_equal(found[f"aquila.layers.{i}.post_attention_layernorm.weight"], norm)
    assert np.array_equal(found["aquila.embed_tokens.weight"], state["tok_embeddings.weight"].numpy())
    assert np.array_equal(found["lm_head.weight"], state["output.weight"].T.numpy())


def test_flagai_state_dict_without_its_wrapper_makes_no_difference(shared, tmp_path):
    import torch

    golden = shared / "goldens" / "v1-flagai"
    state = torch.load(golden / "pytorch_model.bin", weights_only=True)["module"]
    factory.write_config(tmp_path / "bare", json.loads((golden / "config.json").read_text()))
    torch.save(state, tmp_path / "bare" / "pytorch_model.bin")
    convert(tmp_path / "bare", tmp_path / "a", **QUIET)
    convert(golden, tmp_path / "b", **QUIET)
    assert factory.digests(tmp_path / "a") == factory.digests(tmp_path / "b")


def test_v1_logits_are_those_of_the_original_and_without_reordering_they_are_not(shared, tmp_path, monkeypatch):
    golden = np.load(shared / "goldens" / "v1-flagai" / "golden.npz")
    ids, wanted = golden["input_ids"], golden["logits_fp32"]

    def worst(output: str) -> float:
        convert(shared / "goldens" / "v1-flagai", tmp_path / output, **QUIET)
        return float(np.abs(logits.paddle_logits(tmp_path / output, ids) - wanted).max())

    assert worst("right") < 1e-4
    monkeypatch.setattr(Dialect, "heads_of", lambda self, name: None)
    assert worst("wrong") > 0.1


# ------------------------------------------------------------------------------------------------ GGUF


@pytest.mark.parametrize("kind", ["F16", "F32", "BF16", "Q8_0", "Q4_1"])
def test_gguf_gives_what_transformers_reads_from_it(tmp_path, kind):
    config = factory.config(tie_word_embeddings=kind == "Q8_0")
    path = factory.write_gguf(tmp_path / "tiny.gguf", config, factory.weights(config), kind=kind)
    summary = convert(path, tmp_path / "out", verify="none", **QUIET)
    with open_source(path) as opened:
        state = logits._gguf_model(opened)[1]["state_dict"]
    dtype = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind, np.float32)
    theirs = {name: np.asarray(value) for name, value in state.items()}
    wanted = {name: value.astype(np.float32 if value.ndim == 1 else dtype) for name, value in theirs.items()}
    assert_same(load_folder(tmp_path / "out"), factory.expected(wanted))
    assert summary.plan.config["rms_norm_eps"] == 1e-5  # float32 metadata, read as the decimal that was meant
    assert summary.plan.config["tie_word_embeddings"] is (kind == "Q8_0")


def test_gguf_logits_agree_and_without_reordering_q_and_k_they_do_not(tmp_path, monkeypatch):
    config = factory.config()
    path = factory.write_gguf(tmp_path / "tiny.gguf", config, factory.weights(config))
    assert convert(path, tmp_path / "out", verify="logits", **QUIET).verified[1].worst < logits.TOLERANCE
    monkeypatch.setattr(Dialect, "heads_of", lambda self, name: None)
    with pytest.raises(VerificationError, match="do not compute the same"):
        convert(path, tmp_path / "wrong", verify="logits", **QUIET)
    assert not (tmp_path / "wrong").exists()


def test_rotary_rows_are_reordered_per_head():
    weight = np.arange(16).reshape(8, 2)
    assert rotate_half_rows(weight, 2)[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]
    assert np.array_equal(rotate_half_rows(factory.interleave(weight, 2), 2), weight)


def test_folder_with_one_gguf_is_that_gguf(tmp_path):
    config = factory.config()
    path = factory.write_gguf(tmp_path / "folder" / "tiny.gguf", config, factory.weights(config))
    convert(path.parent, tmp_path / "out", **QUIET)
    assert (tmp_path / "out" / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------ dtype, files


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_rounds_to_nearest_even(tmp_path, dtype):
    import torch

    config = factory.config()
    tensors = factory.weights(config)
    factory.write_safetensors(tmp_path / "source", config, tensors)
    summary = convert(tmp_path / "source", tmp_path / "out", dtype=dtype, **QUIET)
    found = load_folder(tmp_path / "out")
    for name, value in factory.expected(tensors).items():
        rounded = torch.from_numpy(np.ascontiguousarray(value)).to(getattr(torch, dtype))
        assert np.array_equal(found[name].astype(np.float32), rounded.float().numpy()), name
    assert summary.plan.config["dtype"] == dtype


def test_what_overflows_is_an_error_that_names_every_tensor(tmp_path, capsys):
    config = factory.config()
    tensors = factory.weights(config)
    tensors["model.norm.weight"][3:5] = 1e6
    tensors["lm_head.weight"][7, 7] = -1e6
    tensors["lm_head.weight"][8, 8] = np.inf  # stored so: a warning only
    factory.write_safetensors(tmp_path / "source", config, tensors)
    argv = ["--input", str(tmp_path / "source"), "--output", str(tmp_path / "out"), "--dtype"]
    assert main([*argv, "float16"]) == 1
    message = capsys.readouterr().err
    assert "model.norm.weight: 2 values too large for float16" in message
    assert "lm_head.weight: 1 value too large for float16" in message
    assert "--dtype bfloat16" in message
    assert not (tmp_path / "out").exists()
    assert main([*argv, "bfloat16"]) == 0
    text = capsys.readouterr().out
    assert "lm_head.weight holds 1 NaN or infinite values; they were kept" in text
    assert "content equal after rounding to bfloat16 (" in text


@pytest.mark.parametrize("shape", [(256, 64), (1000, 37), (264, 1030), (7, 5), (33,)])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_moving_is_numpys_transpose(shape, dtype):
    rng = np.random.default_rng(1)
    tensor = rng.normal(size=shape).astype(dtype)
    for wanted in (dtype, np.float16, ml_dtypes.bfloat16):
        region = np.zeros(shape[::-1], wanted)
        assert stream_copy.move(tensor.T, region) == stream_copy.Counts()
        assert np.array_equal(region, tensor.T.astype(wanted))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_every_value_that_is_not_finite_is_seen(dtype, value):
    tensor = np.full((40, 24), -3.0, dtype)
    assert stream_copy.all_finite(tensor)
    tensor[17, 5] = value
    assert not stream_copy.all_finite(tensor)


def test_shards_stay_below_the_limit_and_the_index_is_complete(source, tmp_path):
    convert(source, tmp_path / "out", max_shard_size="20KB", **QUIET)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    tensors = load_folder(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert sorted(index["weight_map"]) == sorted(tensors)
    for file in files:
        assert sum(value.nbytes for value in load_file(tmp_path / "out" / file).values()) <= 20_000


def test_two_runs_give_the_same_bytes_and_the_source_stays_as_it_was(source, tmp_path):
    before = factory.snapshot(source)
    convert(source, tmp_path / "a", max_shard_size="20KB", **QUIET)
    convert(source, tmp_path / "b", max_shard_size="20KB", **QUIET)
    assert factory.digests(tmp_path / "a") == factory.digests(tmp_path / "b")
    assert factory.snapshot(source) == before


def test_overwrite_leaves_only_the_new_files(source, tmp_path):
    convert(source, tmp_path / "out", max_shard_size="20KB", **QUIET)
    convert(source, tmp_path / "out", overwrite=True, **QUIET)
    assert [path.name for path in (tmp_path / "out").glob("model*.safe*")] == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_dry_run_writes_nothing(source, tmp_path, capsys):
    before = factory.snapshot(tmp_path)
    assert main(["--input", str(source), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "21 tensors, bfloat16" in text
    assert "Dry run: nothing was written." in text
    assert factory.snapshot(tmp_path) == before


def test_report_says_what_was_done(source, tmp_path):
    report = tmp_path / "report.json"
    argv = ["--input", str(source), "--output", str(tmp_path / "out"), "--report", str(report)]
    assert main([*argv, "--max-shard-size", "20KB"]) == 0
    found = json.loads(report.read_text())
    assert found["tensors"] == 21
    assert found["bytes"] == sum(value.nbytes for value in load_folder(tmp_path / "out").values())
    assert [shard["file"] for shard in found["shards"]] == sorted(
        p.name for p in (tmp_path / "out").glob("*.safetensors")
    )
    assert found["verified"][0]["kind"] == "content"
    assert {*found["files"], MANIFEST} == set(files_under(tmp_path / "out"))
    assert found["versions"]["numpy"] == np.__version__


def test_tied_head_that_is_stored_is_dropped_with_the_reason(tmp_path, capsys):
    config = factory.config(tie_word_embeddings=True)
    tensors = factory.weights(config)
    factory.write_safetensors(
        tmp_path / "source", config, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    )
    assert main(["--input", str(tmp_path / "source"), "--output", str(tmp_path / "out")]) == 0
    assert "lm_head.weight first: the config ties the head to the embedding" in capsys.readouterr().out
    assert_same(load_folder(tmp_path / "out"), factory.expected(tensors))


def test_ids_are_the_tokenizers_and_the_plan_says_so(tmp_path, capsys):
    config = factory.config()
    factory.write_safetensors(tmp_path / "source", config, factory.weights(config))
    factory.write_byte_tokenizer(tmp_path / "source", bos="[CLS]", eos="</s>", pad="<|endoftext|>")
    assert main(["--input", str(tmp_path / "source"), "--output", str(tmp_path / "out")]) == 0
    assert "eos_token_id: config.json says 79, the tokenizer 2; the tokenizer's is written" in capsys.readouterr().out
    for file in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "out" / file).read_text())
        assert [written[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 0]
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_old_torch_format_is_read_and_said(tmp_path, capsys):
    config = factory.config()
    tensors = factory.weights(config)
    factory.write_bin(tmp_path / "source", config, tensors, _use_new_zipfile_serialization=False)
    assert main(["--input", str(tmp_path / "source"), "--output", str(tmp_path / "out")]) == 0
    assert "cannot be mapped" in capsys.readouterr().out
    assert_same(load_folder(tmp_path / "out"), factory.expected(tensors))


def test_sampling_options_become_paddlenlps(source, tmp_path):
    options = {"do_sample": True, "top_p": 0.9, "max_length": 512, "eos_token_id": [79, 5], "transformers_version": "4"}
    (source / "generation_config.json").write_text(json.dumps(options))
    convert(source, tmp_path / "out", **QUIET)
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    wanted = {
        "bos_token_id": 78,
        "eos_token_id": [79, 5],
        "pad_token_id": 0,
        "decode_strategy": "sampling",
        "top_p": 0.9,
    }
    assert found == wanted


def written_generation(source: Path, output: Path, **generation) -> tuple[dict, str]:
    """generation_config.json of a conversion, and all warnings."""
    (source / "generation_config.json").write_text(json.dumps(generation))
    summary = convert(source, output, **QUIET)
    return json.loads((output / "generation_config.json").read_text()), "\n".join(summary.warnings)


def test_scalar_eos_of_the_generation_config_is_kept_and_said(source, tmp_path):
    found, warnings = written_generation(source, tmp_path / "out", eos_token_id=5)
    assert found["eos_token_id"] == 5
    assert "eos_token_id: config.json says 79, generation_config.json 5; each file is written as it was" in warnings
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 79


def test_tokenizers_ids_win_over_the_generation_configs(source, tmp_path):
    factory.write_byte_tokenizer(source, bos="[CLS]", eos="</s>", pad="<|endoftext|>")  # eos 2
    found, warnings = written_generation(source, tmp_path / "a", eos_token_id=5)
    assert found["eos_token_id"] == 2
    assert "eos_token_id: generation_config.json says 5, the tokenizer 2; the tokenizer's is written" in warnings
    found, _ = written_generation(source, tmp_path / "b", eos_token_id=[5, 2])
    assert found["eos_token_id"] == [5, 2]


# ------------------------------------------------------------------------------------------------ shards


def test_saved_tensors_come_back_and_a_smaller_save_leaves_no_old_shards(tmp_path):
    tensors = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.array([1.0, np.nan], np.float16),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }
    assert len(safetensors.save_tensors(tmp_path, tensors.items(), max_shard_size=50)) == 3
    assert_same(load_folder(tmp_path), tensors)
    assert safetensors.save_tensors(tmp_path, tensors.items()) == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same({info.name: safetensors.view(info) for info in safetensors.read_layout(tmp_path).values()}, tensors)


def test_uint16_is_paddles_bfloat16_in_both_directions(tmp_path):
    bits = np.array([0x3F80, 0x4000], np.uint16)  # 1.0 and 2.0
    safetensors.save_tensors(tmp_path, [("w", bits)])
    path = tmp_path / "model.safetensors"
    assert b'"dtype":"BF16"' in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b'"dtype":"BF16"', b'"dtype":"U16" '))  # as the published release has it
    (info,) = safetensors.read_layout(tmp_path).values()
    assert safetensors.view(info).tolist() == [1.0, 2.0]


# ------------------------------------------------------------------------------------------------ code


LEFT_OUT = (
    "gguf",
    "sentencepiece",
    "tiktoken",
    "cpu_training",
    "torch",
    "checkpoint/",
    "adapters/",
    "sft/",
    "generation/",
)


def test_the_bundle_is_a_verbatim_copy_beside_four_one_line_modules(tmp_path):
    written = write_bundle(tmp_path)
    copies = set(written) - set(SHIMS)
    assert len(copies) == len(written) - 4 and all(name.startswith(f"{CODE}/") for name in copies)
    package = Path(convert_module.__file__).resolve().parents[1]
    for name in copies:
        assert (tmp_path / name).read_bytes() == (package / name.removeprefix(f"{CODE}/")).read_bytes()
    for shim, module in SHIMS.items():
        lines = (tmp_path / shim).read_text("utf-8").splitlines()
        assert [line for line in lines if line[0] != "#"] == [f"from {CODE}.{module} import *"]


def test_the_bundle_has_the_model_and_the_tokenizer_and_not_the_way_there():
    files = bundled_files()
    assert {"__init__.py", "modeling.py", "tokenizer.py", "tokenization/chat_templates.py"} <= set(files)
    assert [file for file in files if any(part in file for part in LEFT_OUT)] == []


def test_a_module_that_is_imported_when_another_is_loaded_is_in_the_bundle(tmp_path):
    """Whether it is imported as a module, as a name out of one, or from a folder; but not inside functions."""
    for name, text in {
        "__init__.py": "",
        "configuration.py": "from .parts import a\nif True:\n    from . import b\n",
        "modeling.py": "class C:\n    from .parts.deep.c import value\n",
        "tokenizer.py": "def later():\n    from . import never\n",
        "fusion_ops.py": "import json\nfrom .b import (\n    x,\n)\n",
        "parts/__init__.py": "",
        "parts/a.py": "from ..d import y\n",
        "parts/deep/__init__.py": "",
        "parts/deep/c.py": "value = 1\n",
        **{f"{name}.py": "" for name in ("b", "d", "never")},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    roots = {"__init__.py", "configuration.py", "modeling.py", "tokenizer.py", "fusion_ops.py"}
    others = {"b.py", "d.py", "parts/__init__.py", "parts/a.py", "parts/deep/__init__.py", "parts/deep/c.py"}
    assert set(bundled_files(tmp_path)) == roots | others


def test_converter_runs_from_a_checkout_and_loads_neither_paddle_nor_torch(source, tmp_path):
    script = Path(convert_module.__file__).resolve().parents[2] / "convert" / "torch2paddle.py"
    probe = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as exit: assert exit.code == 0, exit.code\n"
        "print([name for name in ('paddle', 'paddlenlp', 'torch', 'transformers') if name in sys.modules])"
    )
    argv = [sys.executable, "-c", probe, str(script), "--input", str(source), "--output", str(tmp_path / "out")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Converted 21 tensors" in done.stdout
