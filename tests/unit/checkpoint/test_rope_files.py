"""llama3 and yarn in files: Hugging Face's config.json there and back, plans in words, GGUF metadata and divisors."""

import json
from pathlib import Path

import checkpoint_factory as factory
import gguf
import numpy as np
import pytest

from aquila_pd.checkpoint import inspect
from aquila_pd.checkpoint.convert import convert
from aquila_pd.checkpoint.sources import open_source
from aquila_pd.checkpoint.sources.gguf_rope import scaling_of_divisors
from aquila_pd.checkpoint.verify import logits
from aquila_pd.utils.errors import AquilaError, ConfigError

QUIET = {"say": lambda text: None}
LLAMA3 = {
    "type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
YARN_IN_FULL = {
    **YARN,
    "attention_factor": 1.25,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 0.5,
    "mscale_all_dim": 1.0,
    "truncate": False,
}
FORMS = {"llama3": LLAMA3, "yarn": YARN, "yarn in full": YARN_IN_FULL, "bare yarn": {"type": "yarn", "factor": 4.0}}


def config(scaling: dict | None, **changes) -> dict:
    """Wavelengths of 6, 20, 63 and 199 positions: on both sides of the original contexts above."""
    said = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 100.0}
    return factory.config(**said, rope_scaling=scaling, **changes)


def write_hf(folder: Path, config: dict) -> Path:
    return factory.write_safetensors(folder, config, factory.weights(config))


def said_in(folder: Path) -> str:
    """rope_scaling of a config.json, to the byte."""
    return json.dumps(json.loads((folder / "config.json").read_text())["rope_scaling"])


# ------------------------------------------------------------------------------------------------ config.json


@pytest.mark.parametrize("name", FORMS)
def test_there_and_back_says_the_same_and_computes_what_transformers_does(tmp_path, name):
    scaling = {**FORMS[name], "rope_type": FORMS[name]["type"]}
    source = write_hf(tmp_path / "source", config(scaling))
    summary = convert(source, tmp_path / "paddle", verify="logits", **QUIET)
    assert summary.verified[1].worst < logits.TOLERANCE
    assert said_in(tmp_path / "paddle") == json.dumps(FORMS[name])
    convert(tmp_path / "paddle", tmp_path / "back", framework="torch", **QUIET)
    assert said_in(tmp_path / "back") == said_in(source)
    assert factory.load_folder(tmp_path / "back").keys() == factory.load_folder(source).keys()


def test_transformers_5_says_it_in_rope_parameters(tmp_path):
    new = {"rope_theta": 100.0, "rope_type": "llama3", **{key: x for key, x in LLAMA3.items() if key != "type"}}
    said = {key: x for key, x in config(None, rope_parameters=new).items() if key not in ("rope_theta", "rope_scaling")}
    with open_source(write_hf(tmp_path, said)) as source:
        assert (source.fields["rope_theta"], source.fields["rope_scaling"]) == (100.0, LLAMA3)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        (LLAMA3, "theta 100, 96 positions, scaling llama3 x8"),
        (YARN, "theta 100, 96 positions, scaling yarn x4"),
        ({**YARN, "factor": 2.0}, "scaling yarn x4 (not by its factor, 2)"),
    ],
)
def test_plan_and_inspect_name_the_scaling(tmp_path, capsys, scaling, words):
    source, said = write_hf(tmp_path / "source", config(scaling)), []
    convert(source, tmp_path / "paddle", verify="none", say=said.append)
    assert words in "\n".join(map(str, said))
    assert inspect.main([str(tmp_path / "paddle")]) == 0
    assert words in capsys.readouterr().out


def test_paddlenlps_llama_is_not_made_of_yarn(tmp_path):
    with pytest.raises(ConfigError, match=r"does not compute rope_scaling 'yarn' as torch does\. Use --architecture"):
        convert(write_hf(tmp_path / "source", config(YARN)), tmp_path / "out", architecture="llama", **QUIET)


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 2.0}, {"type": "llama3"}, "llama3"])
def test_a_dict_that_paddlenlps_llama_would_not_look_at_is_refused(tmp_path, scaling):
    source = write_hf(tmp_path / "source", config(LLAMA3))
    convert(source, tmp_path / "paddle", architecture="llama", **QUIET)
    with open_source(tmp_path / "paddle") as opened:
        assert opened.family.name == "paddlenlp_llama" and opened.fields["rope_scaling"] == LLAMA3
    said = json.loads((tmp_path / "paddle" / "config.json").read_text())
    (tmp_path / "paddle" / "config.json").write_text(json.dumps({**said, "rope_scaling": scaling}))
    with pytest.raises(ConfigError, match="with rope_type 'llama3' only"):
        open_source(tmp_path / "paddle")


# ------------------------------------------------------------------------------------------------ GGUF


@pytest.mark.parametrize(
    "scaling",
    [LLAMA3, YARN, {**YARN, "attention_factor": 1.25, "beta_fast": 16.0, "beta_slow": 2.0}],
    ids=["llama3", "yarn", "yarn with its options"],
)
def test_gguf_gives_the_numbers_of_the_config_it_was_made_from(tmp_path, scaling):
    said = config(scaling)
    path = factory.write_gguf(tmp_path / "tiny.gguf", said, factory.weights(said), kind="F32")
    summary = convert(path, tmp_path / "out", verify="logits", **QUIET)
    assert summary.plan.config["rope_scaling"] == scaling
    assert summary.verified[1].worst < logits.TOLERANCE  # transformers, with the scaling as it was read
    with open_source(write_hf(tmp_path / "hf", said)) as source:
        ids, _ = logits.token_ids_for(source.fields)
        wanted = logits.torch_logits(source, ids)
    found = logits.paddle_logits(tmp_path / "out", ids)
    assert np.abs(found - wanted).max() < 1e-5
    other = logits.token_ids_for(said)[0][:, ::-1].copy()
    assert np.abs(logits.paddle_logits(tmp_path / "out", other) - wanted).max() > 1e-2  # the control
    convert(tmp_path / "out", tmp_path / "back", framework="torch", **QUIET)
    assert said_in(tmp_path / "back") == json.dumps({**scaling, "rope_type": scaling["type"]})


def test_divisors_are_no_tensor_of_the_model_and_are_told_in_the_plan(tmp_path):
    said = config(LLAMA3)
    path = factory.write_gguf(tmp_path / "tiny.gguf", said, factory.weights(said))
    summary = convert(path, tmp_path / "out", **QUIET)
    assert summary.plan.dropped == () and "rope_freqs.weight" not in factory.load_folder(tmp_path / "out")
    assert [note for note in summary.plan.notes if "rope_freqs.weight is read as rope_scaling" in note]


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (16.0, 4096)])
@pytest.mark.parametrize(("theta", "size"), [(500_000.0, 128), (500_000.0, 64), (10_000.0, 8)])
def test_published_parameters_are_found(factor, original, theta, size):
    said = {**LLAMA3, "factor": factor, "original_max_position_embeddings": original}
    divisors = factory.llama3_divisors({**factory.config(hidden_size=4 * size, rope_theta=theta), "rope_scaling": said})
    found = scaling_of_divisors(np.array(divisors, np.float32), theta)
    assert (found["factor"], found["original_max_position_embeddings"]) == (factor, original)


def test_other_divisors_are_an_error_and_ones_are_none():
    said = {**factory.config(hidden_size=512, rope_theta=500_000.0), "rope_scaling": LLAMA3}
    right = np.array(factory.llama3_divisors(said), np.float32)
    assert scaling_of_divisors(right, 500_000.0) == LLAMA3
    for wrong in (right * 1.001, right[::-1], np.full(64, np.nan), np.zeros(64), np.full(64, np.inf), -right):
        with pytest.raises(ConfigError, match="no llama3 scaling with low_freq_factor 1 and high_freq_factor 4"):
            scaling_of_divisors(wrong, 500_000.0)
    assert scaling_of_divisors(np.ones(64, np.float32), 500_000.0) is None


@pytest.fixture
def gguf_with(tmp_path, monkeypatch):
    """Write a GGUF file of this scaling with more in its header."""

    def write(scaling: dict | None, change) -> Path:
        add = factory.add_gguf_scaling
        with monkeypatch.context() as patch:
            patch.setattr(factory, "add_gguf_scaling", lambda writer, said: (add(writer, said), change(writer)))
            return factory.write_gguf(tmp_path / "tiny.gguf", config(scaling), factory.weights(config(scaling)))

    return write


def divisors(*values: float):
    return lambda writer: writer.add_tensor("rope_freqs.weight", np.array(values, np.float32))


@pytest.mark.parametrize(
    ("scaling", "change", "words"),
    [
        (None, divisors(1, 1, 3, 2), "divides the rotary frequencies by 1 to 3, as no llama3 scaling"),
        (None, divisors(1, 1, 8), "rope_freqs.weight [3] in a model of 4 pairs to a head"),
        (YARN, divisors(1, 1, 8, 8), "rope_freqs.weight [4] beside other rope scaling, {'type': 'yarn'"),
        (YARN, lambda w: w.add_rope_scaling_yarn_ext_factor(0.5), "unknown key   llama.rope.scaling.yarn_ext_factor"),
        (YARN, lambda w: w.add_rope_scaling_yarn_log_mul(0.1), "unknown key   llama.rope.scaling.yarn_log_multiplier"),
        (YARN, lambda w: w.add_rope_scaling_yarn_beta_slow(64.0), "beta_fast is 32.0, below beta_slow 64.0"),
        ({**YARN, "factor": 2.0}, lambda w: None, "has factor 2, but its context_length 96 is 4 times its original"),
        (
            {**YARN, "attention_factor": 1.25},
            lambda w: w.add_rope_scaling_attn_factors(1.1),
            "unknown key   llama.rope.scaling.attn_factor",
        ),
        (
            {"type": "linear", "factor": 2.0},
            lambda w: w.add_rope_scaling_yarn_beta_slow(2.0),
            "unknown key   llama.rope.scaling.yarn_beta_slow",
        ),
        (None, lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "unknown type 'longrope'"),
    ],
)
def test_gguf_that_says_what_a_config_json_cannot_is_refused(gguf_with, scaling, change, words):
    with pytest.raises(AquilaError) as caught, open_source(gguf_with(scaling, change)):
        pass
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("times", "wanted"),
    [(1.0, {}), (1.5, {"attention_factor": 1.7079442}), (0.8782489, {"attention_factor": 1.0})],
)
def test_gguf_attention_factor_comes_on_top_of_yarns_own_and_equal_contexts_are_left_out(gguf_with, times, wanted):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 96}
    with open_source(gguf_with(scaling, lambda writer: writer.add_rope_scaling_attn_factors(times))) as source:
        assert source.fields["rope_scaling"] == {"type": "yarn", "factor": 4.0, **wanted}
