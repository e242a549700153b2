"""`aquila-pd inspect`, hub ids, and folders that are something else: what a person is told."""

import json
from pathlib import Path

import checkpoint_factory as factory
import pytest

from aquila_pd.checkpoint import hub
from aquila_pd.checkpoint.inspect import main
from convert.paddle2torch import to_torch
from convert.torch2paddle import main as to_paddle


@pytest.fixture
def source(tmp_path) -> Path:
    config = factory.config(torch_dtype="bfloat16")
    return factory.write_safetensors(tmp_path / "source", config, factory.weights(config, dtype="bfloat16"), shards=3)


@pytest.fixture
def converted(source, tmp_path) -> Path:
    assert to_paddle(["--input", str(source), "--output", str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def test_a_torch_folder_is_described(source, capsys):
    assert main([str(source)]) == 0
    text = capsys.readouterr().out
    assert "a torch checkpoint of family aquila, safetensors" in text
    assert "2 layers, hidden 32, 4/2 heads, intermediate 64, vocabulary 80" in text
    values = sum(tensor.size for tensor in factory.load_folder(source).values())
    assert f"tensors   21, {values:,} parameters: 21 tensors bfloat16" in text
    assert text.count("  file      model-0000") == 3
    assert "would be  aquila for PaddleNLP, 21 tensors, bfloat16" in text


def test_a_paddle_folder_is_described_and_would_go_back(converted, capsys):
    capsys.readouterr()
    assert main([str(converted)]) == 0
    text = capsys.readouterr().out
    assert "a Paddle checkpoint of family aquila" in text
    assert "would be  llama for torch" in text
    assert "--check compares" in text


def test_check_names_the_file_that_changed(converted, capsys):
    assert main([str(converted), "--check"]) == 0
    assert "have the hashes of conversion-manifest.json" in capsys.readouterr().out
    weights = converted / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    (converted / "fusion_ops.py").unlink()
    assert main([str(converted), "--check"]) == 1
    message = capsys.readouterr().err
    assert "missing     fusion_ops.py" in message
    assert "changed     model.safetensors" in message


@pytest.mark.parametrize("content", ["[]", '{"files": {"../x": {"sha256": "0"}}}', '{"files": {"a": 3}}', "{}"])
def test_a_damaged_manifest_is_said(converted, capsys, content):
    (converted / "conversion-manifest.json").write_text(content)
    assert main([str(converted), "--check"]) == 1
    assert "conversion-manifest.json" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_its_config_is_described_and_refused(source, capsys):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 81}))
    assert main([str(source)]) == 1
    streams = capsys.readouterr()
    assert "a torch checkpoint of family aquila" in streams.out
    assert "lm_head.weight: file has [80, 32], config says [81, 32]" in streams.err


def test_gguf_and_a_config_alone(tmp_path, capsys):
    path = factory.write_gguf(tmp_path / "tiny.gguf", factory.config(), factory.weights(factory.config()), kind="Q8_0")
    assert main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "GGUF" in text and "Q8_0" in text
    factory.write_config(tmp_path / "config only", factory.config())
    assert main([str(tmp_path / "config only")]) == 0
    assert "config.json only, no weights" in capsys.readouterr().out


def test_pdparams_are_sent_through_save_pretrained(converted, tmp_path, capsys):
    from aquila_pd.modeling import AquilaForCausalLM

    AquilaForCausalLM.from_pretrained(str(converted)).save_pretrained(
        str(tmp_path / "pickled"), safe_serialization=False
    )
    argv = ["--output", str(tmp_path / "back"), "--input"]
    assert to_torch([*argv, str(tmp_path / "pickled")]) == 1
    assert ".save_pretrained(NEW_FOLDER)" in capsys.readouterr().err
    AquilaForCausalLM.from_pretrained(str(tmp_path / "pickled")).save_pretrained(str(tmp_path / "saved"))  # as it says
    assert to_torch([*argv, str(tmp_path / "saved")]) == 0


# ------------------------------------------------------------------------------------------------ hub ids


def test_a_path_that_exists_is_never_asked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BAAI" / "Aquila2-7B").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("it asked"))
    assert hub.find_input("BAAI/Aquila2-7B") == Path("BAAI/Aquila2-7B")
    assert hub.find_input("BAAI/Aquila2-8B") == Path("BAAI/Aquila2-8B")  # a slip in a folder that is here
    for text in ("/somewhere/else/folder", "name", "a/b/c", "../a/b", "./a/b"):
        assert hub.find_input(text) == Path(text)


def test_a_hub_id_is_fetched_and_converted(source, tmp_path, monkeypatch, capsys):
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options["allow_patterns"]))
        return str(source)

    names = ["config.json", "model-00001-of-00001.safetensors", "pytorch_model.bin", "original/x.safetensors", "a.md"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, repo_id: names)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    argv = ["--input", "BAAI/Aquila2-7B", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        to_paddle([*argv, "--dtype", "int3"])
    assert to_paddle([*argv, "--workers", "0"]) == 1
    assert asked == []  # nothing is fetched for a command that cannot run
    assert to_paddle([*argv, "--dry-run"]) == 0
    assert to_paddle(argv) == 0
    assert asked == [
        ("BAAI/Aquila2-7B", ["config.json"]),
        ("BAAI/Aquila2-7B", ["config.json", "model-00001-of-00001.safetensors"]),
    ]


def test_a_hub_id_that_cannot_be_fetched_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert to_paddle(["--input", "nobody/nothing", "--output", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: There is no folder nobody/nothing, and as a model id on the hub")
    assert "Traceback" not in message
