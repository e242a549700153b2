"""--verify notices what it promises to: lost values, and models that do not compute the same."""

import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import checkpoint_factory as factory
import ml_dtypes
import numpy as np
import pytest
import verify_factory
from verify_factory import PACKED

from aquila_pd.checkpoint import sources
from aquila_pd.checkpoint.convert import convert
from aquila_pd.checkpoint.io import shard_writer, stream_copy
from aquila_pd.checkpoint.sources import gguf, open_source
from aquila_pd.checkpoint.sources.packed import awq, gptq
from aquila_pd.checkpoint.verify import content, logits
from aquila_pd.formats import nf4, safetensors
from aquila_pd.utils.errors import ConfigError, VerificationError

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
        return stream_copy.move(tensor.T if forget else tensor, region)

    weights = factory.load_folder(source)
    monkeypatch.setattr(shard_writer, "move", forgetful)
    with pytest.raises(VerificationError, match=r"aquila\.layers\.1\.self_attn\.o_proj\.weight: [\d,]+ of 1,024"):
        convert(source, tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_content_verification_names_the_worst_place(source, tmp_path):
    convert(source, tmp_path / "out", **QUIET)
    info = safetensors.read_layout(tmp_path / "out")["aquila.layers.0.mlp.up_proj.weight"]
    value = np.memmap(info.file, ml_dtypes.bfloat16, "r+", info.offset, info.shape)  # [32, 64]; the source is [64, 32]
    value[5, 7] = 99.0
    value.flush()
    with open_source(source) as opened, pytest.raises(VerificationError, match=r"1 of 2,048; at \[7, 5\] .* output 99"):
        content.verify_content(opened, tmp_path / "out")


def test_widening_is_no_rounding(source, tmp_path):
    for dtype in (None, "float32"):
        summary = convert(source, tmp_path / str(dtype), dtype=dtype, **QUIET)
        assert summary.verified[0].sentence.startswith("content equal (")


def test_content_verification_by_itself_names_what_is_missing_unexpected_and_misshapen(source, tmp_path):
    convert(source, tmp_path / "out", **QUIET)
    tensors = factory.load_folder(tmp_path / "out")
    tensors["aquila.extra"] = tensors.pop("lm_head.weight").copy()
    tensors["aquila.norm.weight"] = tensors["aquila.norm.weight"][:-1].copy()
    verify_factory.paddle_folder(tmp_path / "wrong", factory.config(torch_dtype="bfloat16"), tensors)
    with open_source(source) as opened, pytest.raises(VerificationError) as caught:
        content.verify_content(opened, tmp_path / "wrong")
    lines = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    assert lines == [
        "missing     lm_head.weight",
        "unexpected  aquila.extra",
        "shape       aquila.norm.weight: [32] was due, the file has [31]",
    ]


def test_the_worst_place_is_not_a_nan_that_both_sides_have(tmp_path):
    tensors = factory.weights(factory.config())
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3, 4] = np.nan
    folder = factory.write_safetensors(tmp_path / "source", factory.config(), tensors)
    altered = {**tensors, name: tensors[name].copy()}
    altered[name][9, 8] += 0.5
    verify_factory.paddle_folder(tmp_path / "out", factory.config(), factory.expected(altered))
    with open_source(folder) as opened, pytest.raises(VerificationError, match=r"1 of 2,048; at \[9, 8\] the source"):
        content.verify_content(opened, tmp_path / "out")


def test_a_source_written_after_its_output_is_remarked_on(source, tmp_path):
    convert(source, tmp_path / "out", **QUIET)
    verify_factory.altered("aquila.norm.weight", "").apply(tmp_path / "out")
    made = (tmp_path / "out" / "model.safetensors").stat().st_mtime
    for seconds, said in ((-10, False), (10, True)):
        for file in source.glob("*.safetensors"):
            os.utime(file, (made + seconds, made + seconds))
        with open_source(source) as opened, pytest.raises(VerificationError) as caught:
            content.verify_content(opened, tmp_path / "out")
        assert ("of the source was written after the output was" in str(caught.value)) == said
        assert "Convert again" in str(caught.value)


def test_comparing_packed_tensors_takes_the_memory_of_a_tile(tmp_path, monkeypatch):
    config = factory.config(vocab_size=20_000, num_hidden_layers=1)
    folder = factory.write_gguf(tmp_path / "tall.gguf", config, factory.weights(config), kind="Q8_0")
    convert(folder, tmp_path / "out", dtype="bfloat16", **QUIET)
    monkeypatch.setattr(content, "buffer_size", lambda workers: 2**18)
    with open_source(folder) as opened:
        tracemalloc.start()
        content.verify_content(opened, tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # [4096, 32] in float32 is half a megabyte, and unpacking makes a few of it; all rows would be 2.6 MB a time
    assert peak < 2.5e6


# ---------------------------------------------------------------------------------------- what stored numbers mean


@pytest.mark.parametrize("kind", PACKED)
def test_what_has_to_be_unpacked_is_worked_out_a_second_time(tmp_path, kind):
    summary = convert(verify_factory.packed_source(tmp_path, kind), tmp_path / "out", **QUIET)
    assert "of them worked out anew from the stored numbers" in summary.verified[0].sentence


def test_what_is_only_handed_out_is_not(source, tmp_path):
    assert "anew" not in convert(source, tmp_path / "out", **QUIET).verified[0].sentence


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"order": "shuffled"},
        {"order": "absent", "size": 24},  # a last group of 8
        {"order": "zeros"},
        {"size": -1},
        {"less": 0, "label": "gptq_v2"},
        {"less": 0, "sym": True},  # labelled wrongly
        {"sym": True, "label": "gptq_v2"},
        {"sym": True},
    ],
    ids=str,
)
def test_every_kind_of_gptq_is_worked_out_as_the_converter_does(tmp_path, bits, options):
    folder = verify_factory.packed_source(tmp_path, "gptq", bits=bits, **options)
    assert "anew" in convert(folder, tmp_path / "out", dtype="float16", **QUIET).verified[0].sentence


def _natural_order(words):
    return (
        np.stack([words.view(np.uint32) >> np.uint32(4 * i) & 15 for i in range(8)], 2)
        .reshape(len(words), -1)
        .astype("<i2")
    )


def _wrong_dialect():
    """One that takes w1 for w3."""
    swapped = {"blk.{i}.ffn_gate.weight": "blk.{i}.ffn_up.weight", "blk.{i}.ffn_up.weight": "blk.{i}.ffn_gate.weight"}
    return replace(gguf.DIALECT, names={swapped.get(name, name): hf for name, hf in gguf.DIALECT.names.items()})


RIGHT = {"gptq": gptq.unpack, "nf4": nf4.Decoder._unpack}
WRONG = {
    "zero points of gptq": ("gptq", gptq.GPTQMatrix, "_true_zeros", lambda self, zeros: zeros),
    "words of gptq": ("gptq", gptq, "unpack", lambda words, bits: RIGHT["gptq"](words, bits)[::-1]),
    "order of awq": ("awq", awq, "unpack", _natural_order),
    "halves of nf4": ("nf4", nf4.Decoder, "_unpack", lambda s, c, *rest: RIGHT["nf4"](s, c >> 4 | c << 4, *rest)),
    "offset of nf4": ("nf4 double", nf4.Nested, "unpack", lambda s, c, i: s.table[c] * s.scales[i // s.blocksize]),
    "rotary rows of gguf": ("gguf", sources, "rotate_half_rows", lambda weight, heads: weight),
    "names of gguf": ("gguf", gguf.GGUFReader, "dialect", _wrong_dialect()),
    "rotary rows of v1": ("aquila_v1", sources, "rotate_half_rows", lambda weight, heads: weight),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_reader_that_reads_wrongly_is_found_out_although_the_output_equals_it(tmp_path, monkeypatch, wrong):
    kind, owner, name, broken = WRONG[wrong]
    folder = verify_factory.packed_source(tmp_path, kind)
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(VerificationError, match=r"(?s)it reads wrongly:.*recomputed  model\.layers\.0.*report it"):
        convert(folder, tmp_path / "out", **QUIET)


# ------------------------------------------------------------------------------------------------ logits


@pytest.mark.parametrize("kind", ["gptq", "awq", "nf4", "wrapped", "aquila_v1"])
def test_logits_that_transformers_cannot_compute_are_refused_before_anything_is_written(tmp_path, kind):
    if kind == "wrapped":
        folder = verify_factory.write_wrapped_bin(tmp_path / kind, factory.config(), factory.weights(factory.config()))
    else:
        folder = verify_factory.packed_source(tmp_path, kind)
    with pytest.raises(ConfigError, match=r"(?s)Logits of .* cannot be compared: .*--level layerwise"):
        convert(folder, tmp_path / "out", verify="logits", **QUIET)
    assert not (tmp_path / "out").exists()


def test_logits_of_a_plain_bin_are_not_refused(tmp_path):
    with open_source(factory.write_bin(tmp_path, factory.config(), factory.weights(factory.config()))) as opened:
        logits.check_logits_possible(opened)


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
