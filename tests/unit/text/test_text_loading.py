"""A folder loaded to talk with: what makes it fit, and what is said of folders that do not."""

import json

import numpy as np
import pytest
from chat_factory import EOS, tiny_chat_folder, tiny_torch_folder
from checkpoint_factory import config, weights, write_bin, write_gguf
from safetensors.numpy import load_file, save_file

from aquila_pd.checkpoint.convert import convert
from aquila_pd.generation import SamplingParams
from aquila_pd.modeling import AquilaForCausalLM
from aquila_pd.text.loading import load
from aquila_pd.utils.errors import CheckpointError, ConfigError

PARAMS = SamplingParams(max_new_tokens=4, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat_folder(tmp_path_factory.mktemp("loading") / "AquilaChat2-tiny", "aquila-v1")


def change_json(file, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_converted_folder_is_ready_to_talk(folder):
    loaded = load(folder, threads=1, slots=3, max_length=100)
    assert loaded.name == "AquilaChat2-tiny" and loaded.prompts.name == "aquila-v1"
    assert loaded.engine.max_length == 100 and not loaded.model.training
    assert loaded.stop_ids == (EOS,) and EOS in loaded.prompts.stop_ids
    assert any("qkv" in name for name, _ in loaded.model.named_sublayers()), "projections are joined"
    (sequence,) = loaded.engine.generate([loaded.prompts.encode([{"role": "user", "content": "你好"}])], PARAMS)[0]
    assert len(sequence.tokens) == 4


def test_without_a_template_there_are_no_prompts_until_one_is_named(tmp_path, monkeypatch):
    folder = tiny_chat_folder(tmp_path / "base", None)
    loaded = load(folder, threads=1)
    assert loaded.prompts is None
    with pytest.raises(ConfigError, match="--template NAME"):
        loaded.require_prompts()
    assert load(folder, threads=1, template="aquila-v2").require_prompts().name == "aquila-v2"
    with pytest.raises(ConfigError, match="aquila-v1"):
        load(folder, threads=1, template="aquila-v9")
    monkeypatch.setattr(AquilaForCausalLM, "from_pretrained", lambda *args, **options: pytest.fail("weights are read"))
    with pytest.raises(ConfigError, match="has no chat template"):
        load(folder, threads=1, needs_template=True)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "gguf"])
def test_a_torch_checkpoint_is_sent_to_the_converter(tmp_path, kind):
    source = tmp_path / "AquilaChat2-7B"
    if kind == "safetensors":
        tiny_torch_folder(source)
    elif kind == "bin":
        write_bin(source, {}, {"model.norm.weight": np.ones(2, "float32")})
    else:
        source = write_gguf(tmp_path / "AquilaChat2-7B.gguf", config(), weights(config()))
    with pytest.raises(CheckpointError) as error:
        load(source, threads=1)
    assert f"aquila-pd convert --input {source} --output AquilaChat2-7B-PD" in str(error.value)


def test_paddlenlps_own_llama_folder_is_called_that(tmp_path):
    convert(tiny_torch_folder(tmp_path / "torch"), tmp_path / "llama", architecture="llama", say=lambda line: None)
    with pytest.raises(CheckpointError, match="PaddleNLP's own LlamaForCausalLM"):
        load(tmp_path / "llama", threads=1)


def test_folders_that_are_none_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, words in {"absent": "does not exist", "file": "is a file", "empty": "holds no weights"}.items():
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path / name, threads=1)


def test_a_tokenizer_of_another_model_is_noticed(tmp_path):
    folder = tiny_chat_folder(tmp_path / "chat", vocab_size=321)
    assert load(folder, threads=1)  # control: rows without tokens do no harm
    tensors = load_file(folder / "model.safetensors")
    tensors["aquila.embed_tokens.weight"] = tensors["aquila.embed_tokens.weight"][:300]
    tensors["lm_head.weight"] = np.ascontiguousarray(tensors["lm_head.weight"][:, :300])
    save_file(tensors, folder / "model.safetensors")
    change_json(folder / "config.json", vocab_size=300, bos_token_id=1, eos_token_id=2)
    with pytest.raises(CheckpointError, match="320 tokens, the model 300 rows"):
        load(folder, threads=1)


def test_ids_out_of_another_vocabulary_do_not_end_answers(tmp_path, caplog):
    """Published files name eos 2, LLaMA's: an ordinary token here."""
    folder = tiny_chat_folder(tmp_path / "chat")
    change_json(folder / "config.json", eos_token_id=2)
    change_json(folder / "generation_config.json", eos_token_id=[EOS, 0])
    loaded = load(folder, threads=1)
    assert loaded.stop_ids == (EOS, 0)
    assert "eos_token_id in config.json is 2, no special token" in caplog.text


def test_threads_must_be_some(folder):
    with pytest.raises(ConfigError, match="threads is 0"):
        load(folder, threads=0)


def test_loading_says_nothing(folder, capfd):
    load(folder, threads=1)
    assert capfd.readouterr() == ("", "")


def test_weights_that_paddlenlp_has_saved_are_loaded_too(folder, tmp_path):
    """.pdparams, as its Trainer writes them."""
    before = load(folder, threads=1)
    other = tmp_path / "pdparams"
    AquilaForCausalLM.from_pretrained(str(folder)).save_pretrained(str(other), safe_serialization=False)
    before.tokenizer.save_pretrained(str(other))
    assert next(other.glob("*.pdparams"))
    prompt = before.prompts.encode([{"role": "user", "content": "Hello"}])
    tokens = [one.engine.generate([prompt], PARAMS)[0][0].tokens for one in (before, load(other, threads=1))]
    assert tokens[0] == tokens[1]
