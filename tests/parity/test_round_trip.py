"""From torch to Paddle and back: every bit, the same config, and logits of models that other libraries load.

Judged by numpy, transformers and PaddleNLP's own LLaMA; weights are compared with what was put in, by name and bits.
"""

import json
from pathlib import Path

import checkpoint_factory as factory
import numpy as np
import paddle
import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from twins import BASE, LLAMA3, assert_close, ids, paddle_model, torch_model

from aquila_pd import AquilaConfig
from aquila_pd.architecture.families import FAMILIES
from aquila_pd.checkpoint.command import main, to_torch
from aquila_pd.checkpoint.convert import convert

QUIET = {"say": lambda text: None}
SAME = 1e-6  # the same weights in the same library
OTHER = 1e-4  # the same weights in fp32 in another library
TOKENS = ids() % factory.CONFIG["vocab_size"]
SEEN = 1e-2  # what another model differs by at least


def there_and_back(source: Path, folder: Path, *, to: str = "aquila", back: str = "llama") -> Path:
    """Convert to Paddle and back, with other shards each time; the folder that came back."""
    convert(source, folder / "paddle", architecture=to, max_shard_size="20KB", **QUIET)
    convert(folder / "paddle", folder / "back", framework="torch", architecture=back, max_shard_size="31KB", **QUIET)
    return folder / "back"


def stored(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """name -> (dtype, shape, bytes) of all files of a folder, read by torch's safetensors."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}, path.name
            for name in file.keys():  # noqa: SIM118  not a dict
                tensor = file.get_tensor(name)
                content = tensor.view(torch.uint8).numpy().tobytes()
                found[name] = (str(tensor.dtype).removeprefix("torch."), list(tensor.shape), content)
    return found


def as_stored(tensors: dict[str, np.ndarray]) -> dict[str, tuple[str, list[int], bytes]]:
    return {name: (value.dtype.name, list(value.shape), value.tobytes()) for name, value in tensors.items()}


def differing(found: dict, wanted: dict) -> list[str]:
    """Names of tensors that are not the same on both sides."""
    return sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))


def torch_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of a folder that transformers loads strictly, in fp32."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert (type(model).__module__, type(model).__name__) == ("transformers.models.llama.modeling_llama", "LlamaForCausalLM")  # fmt: skip  # noqa: E501
    return logits_of(model, tokens)


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()


def llama_of(config: dict, tensors: dict[str, np.ndarray]) -> LlamaForCausalLM:
    """transformers' own model of these weights, in fp32; no file and nothing of ours is involved."""
    known = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "torch_dtype")}
    model = LlamaForCausalLM(LlamaConfig(**known))
    model.load_state_dict({name: torch.from_numpy(value.astype(np.float32)) for name, value in tensors.items()})
    return model


def paddle_logits(model: paddle.nn.Layer, tokens: np.ndarray) -> np.ndarray:
    model.eval()
    with paddle.no_grad():
        found = model(paddle.to_tensor(tokens))
    return (found[0] if isinstance(found, tuple) else found).astype("float32").numpy()


# ------------------------------------------------------------------------------------------------ every bit


def weights_of(dtype: str, config: dict) -> dict[str, np.ndarray]:
    """Random bits of a dtype; "mixed": bfloat16 with norms in float32."""
    tensors = factory.weights(config, dtype="bfloat16" if dtype == "mixed" else dtype)
    wide = {name: value.astype(np.float32) for name, value in tensors.items() if value.ndim == 1}
    return factory.any_bits({**tensors, **wide} if dtype == "mixed" else tensors)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # one test below is about it
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "mixed"])
@pytest.mark.parametrize(("to", "back"), [(to, back) for to in ("aquila", "llama") for back in ("llama", "aquila")])
def test_every_tensor_comes_back_bit_for_bit(tmp_path, to, back, dtype, tied):
    config = factory.config(torch_dtype="bfloat16" if dtype == "mixed" else dtype, tie_word_embeddings=tied)
    tensors = weights_of(dtype, config)
    with np.errstate(invalid="ignore"):
        assert any(np.isnan(value).any() for value in tensors.values())
    factory.write_safetensors(tmp_path / "source", config, tensors, shards=3)
    found = there_and_back(tmp_path / "source", tmp_path, to=to, back=back)
    assert differing(stored(found), as_stored(tensors)) == []


@pytest.mark.filterwarnings("error")
def test_signalling_nans_are_counted_without_a_warning_of_python(tmp_path):
    config = factory.config(torch_dtype="bfloat16")
    tensors = factory.weights(config, dtype="bfloat16")
    tensors["model.norm.weight"].view(np.uint16)[:3] = [0x7F81, 0xFFA0, 0x7FC0]  # two that signal, one that is quiet
    factory.write_safetensors(tmp_path / "source", config, tensors)
    summary = convert(tmp_path / "source", tmp_path / "out", **QUIET)
    assert "model.norm.weight holds 3 NaN or infinite values; they were kept" in summary.warnings


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_control_one_flipped_bit_is_noticed(tmp_path):
    config = factory.config(torch_dtype="bfloat16")
    tensors = weights_of("bfloat16", config)
    factory.write_safetensors(tmp_path / "source", config, tensors)
    found = there_and_back(tmp_path / "source", tmp_path)
    tensors["model.layers.1.self_attn.o_proj.weight"].view(np.uint16)[3, 5] ^= 1
    assert differing(stored(found), as_stored(tensors)) == ["model.layers.1.self_attn.o_proj.weight"]


def test_there_and_back_twice_gives_the_same_files(tmp_path):
    factory.FAMILY_FOLDERS["aquila"](tmp_path / "source")
    once = there_and_back(tmp_path / "source", tmp_path / "once", back="aquila")
    twice = there_and_back(once, tmp_path / "twice", back="aquila")
    assert factory.digests(once) == factory.digests(twice)
    assert factory.digests(tmp_path / "once" / "paddle") == factory.digests(tmp_path / "twice" / "paddle")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back_in_hugging_faces_form(tmp_path, name):
    assert name in factory.FAMILY_FOLDERS, f"the family {name} is new: write a folder of it in checkpoint_factory.py"
    source = tmp_path / "source"
    config, tensors = factory.FAMILY_FOLDERS[name](source)
    if name == "paddlenlp_llama":  # a Paddle checkpoint already
        convert(source, tmp_path / "torch", framework="torch", **QUIET)
        source = tmp_path / "torch"
    for to in ("aquila", "llama"):
        found = there_and_back(source, tmp_path / to, to=to)
        assert differing(stored(found), as_stored(tensors)) == []
        assert_close(torch_logits(found, TOKENS), logits_of(llama_of(config, tensors), TOKENS), SAME)


# ------------------------------------------------------------------------------------------------ what is said


PROVENANCE = {"_name_or_path", "transformers_version", "architectures", "torch_dtype", "model_type", "dtype"}
PROVENANCE.add("_from_model_config")  # whether the options came from config.json


def meaning(config: object) -> dict:
    return {key: value for key, value in config.to_dict().items() if key not in PROVENANCE}


@pytest.fixture(params=["gqa", "mha", "tied", "theta", "linear"])
def llama(request, tmp_path):
    """(torch model, its folder as transformers saves it), with sampling options."""
    model = torch_model(request.param)
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.9, top_k=40, max_new_tokens=17)
    model.generation_config.eos_token_id = [100, 5]
    model.save_pretrained(tmp_path / "source", max_shard_size="30KB")
    return model, tmp_path / "source"


@pytest.mark.parametrize("to", ["aquila", "llama"])
def test_transformers_reads_the_same_config_and_computes_the_same(llama, tmp_path, to):
    model, source = llama
    found = there_and_back(source, tmp_path, to=to)
    assert meaning(AutoConfig.from_pretrained(found)) == meaning(AutoConfig.from_pretrained(source))
    assert json.loads((found / "config.json").read_text())["torch_dtype"] == "float32"
    assert_close(torch_logits(found, ids()), logits_of(model, ids()), SAME)


@pytest.mark.parametrize("to", ["aquila", "llama"])
def test_generation_options_mean_the_same(llama, tmp_path, to):
    _, source = llama
    found = there_and_back(source, tmp_path, to=to)
    ours, theirs = (meaning(GenerationConfig.from_pretrained(folder)) for folder in (found, source))
    assert {key: (ours.get(key), theirs.get(key)) for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)} == {}


def test_control_one_transposed_square_weight_moves_the_logits(llama, tmp_path):
    model, source = llama
    found = there_and_back(source, tmp_path)
    for path in found.glob("*.safetensors"):
        tensors = factory.load_file(path)
        for name in [name for name in tensors if name.endswith("o_proj.weight")]:
            tensors[name] = np.ascontiguousarray(tensors[name].T)
        factory.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(AssertionError, match="differ by"):
        assert_close(torch_logits(found, ids()), logits_of(model, ids()), SEEN)


def test_the_architecture_aquila_is_said_where_it_was_asked_for(tmp_path):
    factory.FAMILY_FOLDERS["aquila"](tmp_path / "source")
    config = json.loads((there_and_back(tmp_path / "source", tmp_path, back="aquila") / "config.json").read_text())
    theirs = json.loads((tmp_path / "source" / "config.json").read_text())
    missing = {"transformers_version"}
    assert {key: config.get(key) for key in theirs if key not in missing} == {
        key: value for key, value in theirs.items() if key not in missing
    }


@pytest.mark.parametrize("to", ["aquila", "llama"])
def test_the_tokenizer_comes_back_and_makes_the_same_ids(tmp_path, to):
    factory.FAMILY_FOLDERS["llama"](tmp_path / "source")
    factory.write_byte_tokenizer(tmp_path / "source", bos="[CLS]", eos="</s>", pad="<|endoftext|>")
    found = AutoTokenizer.from_pretrained(there_and_back(tmp_path / "source", tmp_path, to=to))
    original = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "source" / "tokenizer.json"))
    for text in ("abc", "head", "[CLS]ab</s>", "a<|endoftext|>b", "hgfedcba"):
        assert found(text, add_special_tokens=False)["input_ids"] == original.encode(text, add_special_tokens=False)
    assert [found.bos_token_id, found.eos_token_id, found.pad_token_id] == [1, 2, 0]


# ------------------------------------------------------------------------------------------------ the published layout


@pytest.mark.parametrize("tag", ["U16", "BF16"])
def test_the_published_paddle_layout_goes_to_torch(tmp_path, tag):
    folder, tensors = tmp_path / "published", factory.weights(BASE, dtype="bfloat16")
    turned = list(factory.expected(tensors).items())
    assert all(name.startswith("aquila.") or name == "lm_head.weight" for name, _ in turned)
    placed = {}
    for i, part in enumerate((turned[:9], turned[9:]), 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        factory.write_raw(folder / file, dict(part), tags={"bfloat16": tag})
        placed |= {name: file for name, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    AquilaConfig(**BASE, architectures=["AquilaForCausalLM"], dtype="bfloat16").save_pretrained(folder)
    convert(folder, tmp_path / "torch", framework="torch", **QUIET)
    assert differing(stored(tmp_path / "torch"), as_stored(tensors)) == []
    assert_close(torch_logits(tmp_path / "torch", ids()), logits_of(llama_of(BASE, tensors), ids()), SAME)


# ------------------------------------------------------------------------------------------------ PaddleNLP's LLaMA


def paddlenlp_llama(**changes):
    """PaddleNLP's own LLaMA with weights large enough for a mistake to be seen."""
    from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**{**BASE, "dtype": "float32", **changes}))
    rng = np.random.default_rng(11)
    for name, parameter in model.state_dict().items():
        shape = parameter.shape
        value = 0.3 + 0.2 * rng.random(shape) if "norm" in name else 0.25 * rng.normal(size=shape)
        parameter.set_value(value.astype("float32"))
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling_type": "linear", "rope_scaling_factor": 4.0},
        {"rope_theta": 100.0, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}},
        {"tie_word_embeddings": True},
    ],
    ids=["plain", "linear", "llama3", "tied"],
)
def test_a_folder_saved_by_paddlenlps_own_llama_computes_the_same_in_torch(tmp_path, changes):
    model = paddlenlp_llama(**changes)
    model.save_pretrained(str(tmp_path / "paddle"), safe_serialization=True)
    convert(tmp_path / "paddle", tmp_path / "torch", framework="torch", **QUIET)
    found = torch_logits(tmp_path / "torch", ids())
    assert_close(found, paddle_logits(model, ids()), OTHER)
    with pytest.raises(AssertionError, match="differ by"):
        assert_close(found[::-1], paddle_logits(model, ids()), SEEN)


@pytest.mark.parametrize("kind", ["gqa", "mha", "tied", "linear", "theta", "llama3"])
def test_paddlenlps_own_llama_loads_what_is_made_for_it(tmp_path, monkeypatch, kind):
    from paddlenlp.transformers import LlamaForCausalLM
    from paddlenlp.utils.log import logger

    said = []
    monkeypatch.setattr(logger, "warning", lambda text, *rest: said.append(str(text)))
    reference = torch_model(kind)
    reference.save_pretrained(tmp_path / "torch")
    convert(tmp_path / "torch", tmp_path / "paddle", architecture="llama", **QUIET)
    model = LlamaForCausalLM.from_pretrained(str(tmp_path / "paddle"))
    if kind == "tied":  # PaddleNLP counts its second name of the embedding; the logits tell that it is no other weight
        said = [text for text in said if "['lm_head.weight']" not in text]
    assert not [text for text in said if "not initialized" in text or "not used" in text], said
    assert_close(paddle_logits(model, ids()), logits_of(reference, ids()), OTHER)


# ------------------------------------------------------------------------------------------------ fine-tuned


def train(model: paddle.nn.Layer, steps: int = 4) -> None:
    """Steps of SGD on random tokens, large enough to be another model afterwards."""
    optimizer = paddle.optimizer.SGD(0.3, parameters=[p for p in model.parameters() if not p.stop_gradient])
    model.train()
    for step in range(steps):
        tokens = paddle.to_tensor(ids(seed=step))
        loss = model(input_ids=tokens, labels=tokens)
        (loss[0] if isinstance(loss, tuple) else loss).backward()
        optimizer.step()
        optimizer.clear_grad()
    model.eval()


def assert_torch_has_the_trained_model(folder: Path, trained: np.ndarray, base: np.ndarray) -> None:
    convert(folder, folder.with_name("back"), framework="torch", **QUIET)
    found = torch_logits(folder.with_name("back"), ids())
    assert_close(found, trained, OTHER)
    with pytest.raises(AssertionError, match="differ by"):
        assert_close(found, base, SEEN)


@pytest.mark.parametrize("kind", ["gqa", "tied"])
def test_a_model_trained_in_paddle_computes_the_same_in_torch(tmp_path, kind):
    reference = torch_model(kind)
    model = paddle_model(reference, kind)
    train(model)
    model.save_pretrained(tmp_path / "trained", max_shard_size="20KB")
    assert_torch_has_the_trained_model(tmp_path / "trained", paddle_logits(model, ids()), logits_of(reference, ids()))


def test_a_merged_lora_model_computes_the_same_in_torch(tmp_path):
    from paddlenlp.peft import LoRAConfig, LoRAModel

    reference = torch_model()
    model = paddle_model(reference)
    lora = LoRAModel(
        model, LoRAConfig(target_modules=[".*q_proj.*", ".*v_proj.*", ".*down_proj.*"], r=4, lora_alpha=32)
    )
    lora.mark_only_lora_as_trainable()
    train(lora)
    trained = paddle_logits(lora, ids())
    lora.merge()
    lora.model.save_pretrained(tmp_path / "merged")
    assert_torch_has_the_trained_model(tmp_path / "merged", trained, logits_of(reference, ids()))


def test_paddlenlps_llama_trained_and_saved_computes_the_same_in_torch(tmp_path):
    model = paddlenlp_llama()
    base = paddle_logits(model, ids())
    train(model)
    model.save_pretrained(str(tmp_path / "trained"), safe_serialization=True)
    assert_torch_has_the_trained_model(tmp_path / "trained", paddle_logits(model, ids()), base)


# ------------------------------------------------------------------------------------------------ wrong directions


def test_a_paddle_folder_is_not_converted_to_paddle(tmp_path, capsys):
    factory.FAMILY_FOLDERS["aquila"](tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "aquila", **QUIET)
    convert(tmp_path / "source", tmp_path / "llama", architecture="llama", **QUIET)
    factory.FAMILY_FOLDERS["paddlenlp_llama"](tmp_path / "paddlenlp")
    for name in ("aquila", "llama", "paddlenlp"):
        for options in ((), ("--architecture", "llama"), ("--dtype", "float16")):
            argv = ["--input", str(tmp_path / name), "--output", str(tmp_path / "out"), *options]
            assert main(argv) == 1
            message = capsys.readouterr().err
            assert "is a Paddle checkpoint already" in message
            assert "convert/paddle2torch.py" in message
            assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["aquila", "llama", "aquila_v1"])
def test_a_torch_folder_is_not_converted_to_torch(tmp_path, capsys, name):
    factory.FAMILY_FOLDERS[name](tmp_path / "source")
    assert to_torch(["--input", str(tmp_path / "source"), "--output", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "is not a Paddle checkpoint" in message
    assert "convert/torch2paddle.py" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
