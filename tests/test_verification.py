"""--verify notices what it promises to: lost values, and models that do not compute the same."""

import json
from pathlib import Path

import checkpoint_factory as factory
import ml_dtypes
import numpy as np
import pytest

from aquila_pd import shards
from aquila_pd.checkpoint import moving, writing
from aquila_pd.checkpoint.convert import convert
from aquila_pd.checkpoint.sources import open_source
from aquila_pd.checkpoint.verify import content, logits
from aquila_pd.errors import VerificationError

QUIET = {"say": lambda text: None}


@pytest.fixture
def source(tmp_path) -> Path:
    config = factory.config(torch_dtype="bfloat16")
    return factory.write_safetensors(tmp_path / "source", config, factory.weights(config, dtype="bfloat16"), shards=2)


# ------------------------------------------------------------------------------------------------ content


def test_content_verification_notices_a_square_weight_left_untransposed(source, tmp_path, monkeypatch):
    square = "model.layers.1.self_attn.o_proj.weight"

    def forgetful(tensor, region):
        forget = tensor.shape == region.shape == (32, 32) and np.array_equal(tensor.T, weights[square])
        return moving.move(tensor.T if forget else tensor, region)

    weights = factory.load_folder(source)
    monkeypatch.setattr(writing, "move", forgetful)
    with pytest.raises(VerificationError, match=r"aquila\.layers\.1\.self_attn\.o_proj\.weight: [\d,]+ of 1,024"):
        convert(source, tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_content_verification_names_the_worst_place(source, tmp_path):
    convert(source, tmp_path / "out", **QUIET)
    info = shards.read_layout(tmp_path / "out")["aquila.layers.0.mlp.up_proj.weight"]
    value = np.memmap(info.file, ml_dtypes.bfloat16, "r+", info.offset, info.shape)  # [32, 64]; the source is [64, 32]
    value[5, 7] = 99.0
    value.flush()
    with open_source(source) as opened, pytest.raises(VerificationError, match=r"1 of 2,048; at \[7, 5\] .* output 99"):
        content.verify_content(opened, tmp_path / "out")


def test_widening_is_no_rounding(source, tmp_path):
    for dtype in (None, "float32"):
        summary = convert(source, tmp_path / str(dtype), dtype=dtype, **QUIET)
        assert summary.verified[0].sentence.startswith("content equal (")


# ------------------------------------------------------------------------------------------------ logits


@pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 4.0}])
def test_logits_agree_with_transformers_on_the_source(tmp_path, scaling):
    config = factory.config(rope_scaling=scaling)
    folder = factory.write_safetensors(tmp_path / "source", config, factory.weights(config))
    summary = convert(folder, tmp_path / "out", verify="logits", **QUIET)
    assert [check.kind for check in summary.verified] == ["content", "logits"]
    assert summary.verified[1].worst < logits.TOLERANCE


def test_logits_verification_notices_two_swapped_norms(tmp_path):
    config = factory.config()
    right = factory.weights(config)
    first, second = "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"
    factory.write_safetensors(tmp_path / "right", config, right)
    factory.write_safetensors(tmp_path / "wrong", config, {**right, first: right[second], second: right[first]})
    convert(tmp_path / "wrong", tmp_path / "out", **QUIET)
    with open_source(tmp_path / "right") as opened, pytest.raises(VerificationError, match="worst at row"):
        logits.verify_logits(opened, tmp_path / "out")


def dynamic_source(folder: Path, **changes) -> Path:
    config = factory.config(rope_scaling={"type": "dynamic", "factor": 4.0}, **changes)
    return factory.write_safetensors(folder, config, factory.weights(config))


def test_logits_verification_runs_beyond_max_positions_and_notices_a_lost_dynamic_scaling(tmp_path):
    folder = dynamic_source(tmp_path / "source")
    summary = convert(folder, tmp_path / "out", verify="logits", **QUIET)
    assert summary.verified[1].sentence.endswith(", on 192 positions, 96 beyond max_position_embeddings")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "rope_scaling": None}))
    with open_source(folder) as opened, pytest.raises(VerificationError, match="do not compute the same"):
        logits.verify_logits(opened, tmp_path / "out")


def test_logits_verification_says_when_dynamic_scaling_was_not_exercised(tmp_path):
    summary = convert(dynamic_source(tmp_path / "s", max_position_embeddings=2048), tmp_path / "out", verify="logits")
    assert "dynamic scaling was not exercised: it begins beyond 2048 positions, 96 were" in summary.last_line


@pytest.mark.parametrize(
    "name, words",
    [
        ("lm_head.weight", "192 of 15,360 are NaN or infinite in torch"),
        ("model.layers.0.self_attn.q_proj.weight", "cannot be compared: torch's 15,360 are all NaN or infinite"),
        ("model.layers.1.mlp.up_proj.weight", "because of the weights named above"),
    ],
)
def test_logits_of_weights_with_nan_are_compared_where_they_can_be(tmp_path, name, words):
    tensors = factory.weights(factory.config())
    tensors[name][3, 4] = np.nan
    folder = factory.write_safetensors(tmp_path / "source", factory.config(), tensors)
    assert words in convert(folder, tmp_path / "out", verify="logits", **QUIET).verified[1].sentence


def test_nan_on_one_side_only_is_a_difference():
    theirs, ids = np.random.default_rng(0).normal(size=(1, 4, 8)), np.zeros((1, 4), int)
    ours = theirs.copy()
    ours[0, 1, 2] = np.nan
    for nonfinite in (False, True):
        with pytest.raises(VerificationError, match="position 1, vocabulary id 2"):
            logits.compare_logits(theirs, ours, ids, nonfinite_weights=nonfinite)
    with pytest.raises(VerificationError, match="1 in torch, 0 in Paddle"):
        logits.compare_logits(ours, theirs, ids)
    assert "1 of 32 are NaN" in logits.compare_logits(ours, ours, ids).sentence
