"""RopeScaling: numbers against transformers' and by hand, the strict reading, and what each consumer asks it."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from aquila_pd.architecture.rope_scaling import KNOWN, RopeScaling, scaling_type
from aquila_pd.utils.errors import ConfigError

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
ROUNDINGS = 4e-7  # relative; of a few float32 operations, 1.2e-7 each


def read(value: object, theta: float = 1e4, head_dim: int = 128, positions: int = 8192) -> RopeScaling:
    return RopeScaling.read(value, theta=theta, head_dim=head_dim, max_position_embeddings=positions)


def theirs(value: dict | None, theta: float, head_dim: int, positions: int, length: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies and attention factor as transformers computes them."""
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        rope_theta=theta,
        max_position_embeddings=positions,
        rope_scaling=value and dict(value),
    )
    kind = value["rope_type"] if value else "default"
    found, factor = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=length)
    return found.numpy(), factor


def refusal(value: object, **model) -> str:
    with pytest.raises(ConfigError) as caught:
        read(value, **model)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"rope_type": "linear", "factor": 8.0},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 4.0},
        LLAMA31,
        {**LLAMA31, "factor": 32.0},
        {
            **LLAMA31,
            "factor": 3,
            "low_freq_factor": 1.5,
            "high_freq_factor": 5,
            "original_max_position_embeddings": 300,
        },
        YARN,
        {**YARN, "factor": 2},  # the ratio of the two contexts is what counts
        {**YARN, "original_max_position_embeddings": 8192},
        {"rope_type": "yarn", "factor": 4},
        {"rope_type": "yarn", "factor": 1.0},
        {**YARN, "beta_fast": 16, "beta_slow": 2.5},
        {**YARN, "beta_fast": 1.0, "beta_slow": 1.0},
        {**YARN, "truncate": False},
        {**YARN, "truncate": True, "beta_fast": None},
        {**YARN, "attention_factor": 1.3},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
        {**YARN, "mscale": 0.7},  # alone it does nothing
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2, "attention_factor": 1.1},
    ],
    ids=lambda value: " ".join(map(str, value.values())) if value else "none",
)
@pytest.mark.parametrize(("theta", "head_dim"), [(1e4, 128), (500_000, 64), (1e6, 80), (100.0, 8)])
def test_frequencies_and_attention_factor_are_those_of_transformers(value, theta, head_dim):
    ours = read(value, theta, head_dim)
    for length in (1, 8192, 20_000):
        frequencies, factor = theirs(value, theta, head_dim, 8192, length)
        found = ours.inverse_frequencies(length)
        assert found.dtype == np.float32 and found.shape == (head_dim // 2,)
        assert np.abs(found / frequencies - 1).max() < ROUNDINGS
        assert ours.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (LLAMA31, {"low_freq_factor": 1.01}),
        (LLAMA31, {"original_max_position_embeddings": 8193}),
        (YARN, {"original_max_position_embeddings": 2049}),
        (YARN, {"beta_slow": 2.0}),
        (YARN, {"truncate": False}),
    ],
)
def test_control_another_parameter_gives_other_frequencies(right, wrong):
    frequencies, _ = theirs(right, 1e4, 128, 8192, 1)
    found = read({**right, **wrong}).inverse_frequencies()
    assert np.abs(found / frequencies - 1).max() > 100 * ROUNDINGS


def test_llama3_by_hand():
    """H = 8, theta = 16: plain frequencies 1, 1/2, 1/4, 1/8, wavelengths 6.3, 12.6, 25.1, 50.3.

    Original context 50: below 12.5 the pair stays, above 50 it is divided by 8, and two lie between.
    """
    said = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = read({**said, "original_max_position_embeddings": 50}, 16.0, 8)
    smooth = [(50 / (2 * math.pi * width) - 1) / 3 for width in (2, 4)]  # 0.993, 0.330
    between = [plain * (s + (1 - s) / 8) for plain, s in zip((1 / 2, 1 / 4), smooth, strict=True)]
    assert np.allclose(model.inverse_frequencies(), [1, *between, 1 / 8 / 8], rtol=1e-6, atol=0)


def test_yarn_by_hand():
    """H = 8, theta = 16, original context 64: pair i turns 64 / (2 pi 2^i) = 10.19 / 2^i times.

    6 times falls on pair log2(10.19 / 6) = 0.76, down to 0; once on 3.35, up to 4: a ramp of 0, 1/4, 1/2, 3/4.
    """
    said = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 6, "beta_slow": 1}
    model = read(said, 16.0, 8, 256)
    plain, ramp = np.array([1, 1 / 2, 1 / 4, 1 / 8]), np.array([0, 1 / 4, 1 / 2, 3 / 4])
    assert np.allclose(model.inverse_frequencies(), plain * (1 - ramp) + plain / 4 * ramp, rtol=1e-6, atol=0)
    assert model.attention_factor == pytest.approx(1 + 0.1 * math.log(4))


def test_only_dynamic_scaling_looks_at_the_length():
    for kind in KNOWN:
        value = {**(LLAMA31 if kind == "llama3" else {"factor": 2.0}), "rope_type": kind}
        scaling = read(value)
        short, trained, long = (scaling.inverse_frequencies(length) for length in (1, 8192, 8193))
        assert (short == trained).all()
        assert scaling.depends_on_length == (kind == "dynamic") == bool((short != long).any())


# ------------------------------------------------------------------------------------------------ what else is asked


@pytest.mark.parametrize(
    ("value", "context", "said"),
    [
        (None, 8192, "no scaling"),
        ({"type": "default"}, 8192, "no scaling"),
        ({"type": "linear", "factor": 8}, 65536, "scaling linear x8"),
        ({"type": "dynamic", "factor": 1.5}, 12288, "scaling dynamic x1.5"),
        (LLAMA31, 8192, "scaling llama3 x8"),
        (YARN, 8192, "scaling yarn x4"),
        ({"type": "yarn", "factor": 4.0}, 32768, "scaling yarn x4"),
        ({**YARN, "factor": 2.0}, 8192, "scaling yarn x4 (not by its factor, 2)"),
    ],
)
def test_context_length_and_words(value, context, said):
    scaling = read(value)
    assert (scaling.context_length, scaling.description) == (context, said)


@pytest.mark.parametrize(
    "value",
    [
        {"type": "linear", "factor": 2.0},
        {key: value for key, value in LLAMA31.items() if key != "rope_type"} | {"type": "llama3"},
        {"type": "yarn", "factor": 4.0},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "attention_factor": 1.5},
        {"type": "yarn", "factor": 4.0, "beta_fast": 16.0, "mscale": 0.0, "mscale_all_dim": 1.0, "truncate": False},
    ],
)
def test_what_was_said_is_said_again_and_nothing_more(value):
    scaling = read(value)
    assert scaling.to_config() == value and list(scaling.to_config())[:2] == ["type", "factor"]
    assert scaling.to_hf() == {**value, "rope_type": value["type"]}
    assert read(scaling.to_config()) == read(scaling.to_hf()) == scaling
    whole = {key: int(x) if isinstance(x, float) and x == int(x) else x for key, x in value.items()}
    assert repr(read(whole).to_config()) == repr(scaling.to_config())  # 4 and 4.0 are written alike
    assert LlamaConfig(rope_scaling=scaling.to_hf()).rope_scaling["rope_type"] == value["type"]


def test_it_is_frozen_and_its_dict_is_a_copy():
    scaling = read(YARN)
    with pytest.raises(FrozenInstanceError):
        scaling.theta = 1.0
    scaling.to_config()["factor"] = 9.0
    assert read(YARN) == scaling and hash(scaling) == hash(read(YARN))


def test_the_type_alone_needs_no_complete_fields():
    assert scaling_type({"rope_scaling": {"type": "linear", "factor": 2.0}}) == "linear"
    assert scaling_type({"rope_scaling": {"rope_type": "yarn"}}) == "yarn"
    assert scaling_type({}) == scaling_type({"rope_scaling": None}) == "default"


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "dynamic", "yarn"])
def test_what_paddlenlps_llama_computes(kind):
    value = {**(LLAMA31 if kind == "llama3" else {"factor": 2.0}), "rope_type": kind}
    assert read(value).runs_on_paddlenlp == (kind in ("default", "linear", "llama3"))
    if kind == "llama3":
        assert read(value).to_paddlenlp()["rope_scaling"] == {**value, "type": "llama3"}
    if kind in ("default", "linear"):
        named = {"default": (None, 1.0), "linear": ("linear", 2.0)}[kind]
        assert tuple(read(value).to_paddlenlp().values()) == named


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("yarn", ["it is not a mapping"]),
        ({"factor": 0.5}, ["it names no type", "factor is 0.5, not a finite number of at least 1"]),
        ({"type": "linear", "rope_type": "yarn", "factor": 2}, ["type and rope_type differ: ['linear', 'yarn']"]),
        ({"type": "longrope", "short_factor": [1.0]}, ["unknown type 'longrope'", "unknown key 'short_factor'"]),
        ({"type": "su", "factor": 2.0}, ["unknown type 'su'"]),
        ({"type": "mrope", "mrope_section": [1]}, ["unknown type 'mrope'"]),
        ({"type": "linear"}, ["factor is None"]),
        ({"type": "linear", "factor": 2.0, "beta_fast": 32}, ["unknown key 'beta_fast' = 32"]),
        ({"type": "linear", "factor": True}, ["factor is True"]),
        (
            {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 48},
            ["original_max_position_embeddings is 48, max_position_embeddings is 8192"],
        ),
        (
            {"type": "llama3", "factor": 8.0},
            [
                "low_freq_factor is None, not a finite number above 0",
                "high_freq_factor is None",
                "original_max_position_embeddings is None, not a positive whole number",
            ],
        ),
        ({**LLAMA31, "low_freq_factor": 4.0}, ["high_freq_factor is 4.0, not above low_freq_factor 4.0"]),
        ({**LLAMA31, "low_freq_factor": 0, "truncate": True}, ["low_freq_factor is 0", "unknown key 'truncate'"]),
        ({**LLAMA31, "original_max_position_embeddings": 8192.5}, ["original_max_position_embeddings is 8192.5"]),
        ({**YARN, "original_max_position_embeddings": 0}, ["original_max_position_embeddings is 0"]),
        ({**YARN, "original_max_position_embeddings": 16384}, ["is 16384, above max_position_embeddings 8192"]),
        ({**YARN, "beta_fast": 1.0, "beta_slow": 2.0}, ["beta_fast is 1.0, below beta_slow 2.0"]),
        (
            {**YARN, "beta_slow": -1, "truncate": 1, "mscale": "a"},
            ["beta_slow is -1", "truncate is 1", "mscale is 'a'"],
        ),
        ({**YARN, "attention_factor": math.inf, "factor": 10**400}, ["attention_factor is inf", "factor is 1000"]),
        ({**YARN, "low_freq_factor": 1.0}, ["unknown key 'low_freq_factor'"]),
    ],
)
def test_what_cannot_be_used_is_told_with_all_findings_and_what_is_known(value, found):
    message = refusal(value)
    assert not [words for words in found if words not in message]
    assert "one of: linear, dynamic, llama3, yarn" in message
    assert "llama3 also needs low_freq_factor, high_freq_factor, original_max_position_embeddings" in message


def test_yarn_needs_a_base_above_one():
    assert "rope_theta is 1.0; yarn needs a base above 1" in refusal(YARN, theta=1.0)
