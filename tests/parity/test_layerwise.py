"""The layer-by-layer proof: right models pass, each thing done wrong is found, at its place, and small errors too."""

from pathlib import Path

import checkpoint_factory as factory
import numpy as np
import pytest
import verify_factory
from twins import LLAMA3, YARN
from verify_factory import MUTATIONS, Mutation

from aquila_pd.architecture.weight_map import weights
from aquila_pd.checkpoint import sources
from aquila_pd.checkpoint.convert import convert
from aquila_pd.checkpoint.sources import open_source
from aquila_pd.checkpoint.sources.packed import gptq
from aquila_pd.checkpoint.verify.comparison import Sides, compare_folders
from aquila_pd.checkpoint.verify.content import verify_content
from aquila_pd.checkpoint.verify.drift import FACTOR, DriftTotal, LogitTotal, drift
from aquila_pd.checkpoint.verify.layerwise import Proof, run_layerwise
from aquila_pd.checkpoint.verify.logits import token_ids_for
from aquila_pd.formats import safetensors
from aquila_pd.utils.errors import VerificationError


def numeric_part(torch: Path, paddle: Path, ids: np.ndarray | None = None) -> Proof:
    """The run by itself, whatever the two config files say."""
    with open_source(torch) as source:
        sides = Sides(source, paddle, {}, safetensors.read_layout(paddle), weights(source.dims))
        return run_layerwise(sides, token_ids_for(source.fields)[0][0] if ids is None else ids)


def failing(proof: Proof) -> list[str]:
    return [place.name for place in proof.places if not place.isolated.proven]


# -------------------------------------------------------------------------------------------- right models


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"torch_dtype": "bfloat16", "seed": 1},
        {"torch_dtype": "float16", "seed": 2},
        {"dtype": "bfloat16", "seed": 3},
        {"torch_dtype": "bfloat16", "dtype": "float32"},
        {"num_key_value_heads": 4, "intermediate_size": 88, "seed": 4},
        {"tie_word_embeddings": True},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5},
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 40},
        {"rope_scaling": LLAMA3, "rope_theta": 100.0},
        {"rope_scaling": YARN, "rope_theta": 100.0},
    ],
    ids=lambda changes: ", ".join(f"{key} {value}" for key, value in changes.items()) or "as it is",
)
def test_a_right_model_is_proven_with_room_to_spare(tmp_path, changes):
    proof = numeric_part(*verify_factory.both(tmp_path, **changes))
    assert proof.verified().sentence.startswith("3 layers equal on ")
    assert [place.name for place in proof.places][:3] == ["embedding", "layer 0, attention", "layer 0, MLP"]
    assert proof.independent and proof.logits["ours"].agreement == 1.0
    # measured over seeds, shapes and dtypes: up to 2.1; the limit is FACTOR
    assert max(place.isolated.ratio for place in proof.places) < FACTOR / 2


def test_what_rounding_costs_is_told_apart_from_what_the_layers_cost(tmp_path):
    proof = numeric_part(*verify_factory.both(tmp_path, dtype="bfloat16"))
    last = proof.places[-1]
    assert 1e-3 < last.rounding.rms < 0.1  # bfloat16 keeps 8 bits
    assert last.accumulated.ours.rms < 1e-6
    assert proof.logits["stored"].largest_kl > 1e6 * proof.logits["ours"].largest_kl


@pytest.mark.parametrize("kind", ["bin", "wrapped", "gguf"])
def test_other_sources_are_proven_and_it_is_said_who_read_them(tmp_path, kind):
    config = verify_factory.config()
    tensors = factory.weights(config)
    if kind == "bin":
        source = factory.write_bin(tmp_path / "torch", config, tensors)
    elif kind == "wrapped":
        source = verify_factory.write_wrapped_bin(tmp_path / "torch", config, tensors)
    else:
        tensors = {n: t if t.ndim == 1 else t.astype(np.float16).astype(np.float32) for n, t in tensors.items()}
        source = factory.write_gguf(tmp_path / "tiny.gguf", config, tensors)
    paddle = verify_factory.paddle_folder(tmp_path / "paddle", config, factory.expected(tensors))
    proof = numeric_part(source, paddle)
    sentence = proof.verified().sentence
    assert proof.independent == (kind != "gguf")
    assert ("were read by this project's own reader" in sentence) == ("worked out anew" in sentence) == (kind == "gguf")


FLAGAI = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1", "up_proj": "w3"}
FLAGAI |= {"down_proj": "w2", "self_attn": "attention", "mlp": "feed_forward", "input_layernorm": "attention_norm"}
FLAGAI |= {"post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings", "lm_head": "output"}


def test_a_checkpoint_of_the_first_generation_is_proven(tmp_path):
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = verify_factory.config(num_key_value_heads=4, intermediate_size=88, **ids)
    tensors = factory.weights(config)
    stored = {}
    for name, value in tensors.items():
        theirs = ".".join(FLAGAI.get(part, part) for part in name.removeprefix("model.").split("."))
        stored[theirs] = factory.interleave(value, 4) if name.split(".")[-2] in ("q_proj", "k_proj") else value
    said = {"dim": 32, "n_heads": 4, "n_layers": 3, "multiple_of": 8, "vocab_size": 80, "max_seq_len": 96}
    said |= {"norm_eps": 1e-5, "initializer_range": 0.02}
    source = factory.write_safetensors(tmp_path / "torch", said, stored)
    paddle = verify_factory.paddle_folder(tmp_path / "paddle", config, factory.expected(tensors))
    with open_source(source) as opened:
        sides = compare_folders(opened, paddle)
        proof = run_layerwise(sides, token_ids_for(opened.fields)[0][0])
    assert proof.verified() and not proof.independent


# ----------------------------------------------------------------------------------------------- wrong ones


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_thing_done_wrong_is_found_at_its_place(tmp_path, mutation: Mutation):
    torch, paddle = verify_factory.both(tmp_path)
    mutation.apply(paddle)
    with open_source(torch) as source:
        if mutation.tensors:
            sides = compare_folders(source, paddle)
            with pytest.raises(VerificationError, match="values "):
                verify_content(source, sides.folder)
        else:
            with pytest.raises(VerificationError, match=f"config +{mutation.settings[0][0]}: the source says"):
                compare_folders(source, paddle)
    proof = numeric_part(torch, paddle)
    with pytest.raises(VerificationError) as caught:
        proof.verified()
    assert set(failing(proof)) == set(mutation.places)
    assert any(f"  {place}: drift" in str(caught.value) for place in mutation.places)


def test_control_the_unbroken_model_passes_the_same_checks(tmp_path):
    torch, paddle = verify_factory.both(tmp_path)
    Mutation("none", ()).apply(paddle)
    with open_source(torch) as source:
        sides = compare_folders(source, paddle)
        verify_content(source, paddle)
        proof = run_layerwise(sides, token_ids_for(source.fields)[0][0])
    assert proof.verified() and failing(proof) == []


def test_a_row_of_the_embedding_that_no_token_asks_for_is_compared_too(tmp_path):
    torch, paddle = verify_factory.both(tmp_path, dtype="bfloat16")
    ids = np.arange(10, 40)
    assert failing(numeric_part(torch, paddle, ids)) == []
    verify_factory.altered("aquila.embed_tokens.weight", "embedding").apply(paddle)  # in row 5
    proof = numeric_part(torch, paddle, ids)
    assert failing(proof) == ["embedding"] and proof.places[0].accumulated.proven
    with pytest.raises(VerificationError, match="embedding: drift"):
        proof.verified()


@pytest.mark.parametrize("kind", ["gptq", "aquila_v1"])
def test_rows_and_words_read_wrongly_are_found_although_both_sides_have_them(tmp_path, monkeypatch, kind):
    source = verify_factory.packed_source(tmp_path, kind)
    monkeypatch.setattr(gptq.GPTQMatrix, "_true_zeros", lambda self, zeros: zeros)
    monkeypatch.setattr(sources, "rotate_half_rows", lambda weight, heads: weight)
    convert(source, tmp_path / "out", verify="none", say=lambda text: None)
    with pytest.raises(VerificationError, match="it reads wrongly"):
        numeric_part(source, tmp_path / "out")


def test_a_lost_dynamic_scaling_is_found_beyond_max_position_embeddings(tmp_path):
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 40}
    torch, paddle = verify_factory.both(tmp_path, **scaling)
    Mutation("lost", (), None, (("rope_scaling", None),)).apply(paddle)
    assert failing(numeric_part(torch, paddle)) == list(verify_factory.ATTENTION)
    within = np.arange(40)  # where the scaling does nothing yet
    assert failing(numeric_part(torch, paddle, within)) == []


@pytest.mark.parametrize(
    ("right", "lost"), [(LLAMA3, {"low_freq_factor": 1.1}), (YARN, {"attention_factor": 1.0})], ids=["llama3", "yarn"]
)
def test_a_scaling_that_is_a_little_wrong_is_found(tmp_path, right, lost):
    torch, paddle = verify_factory.both(tmp_path, rope_scaling=right, rope_theta=100.0)
    Mutation("lost", (), None, (("rope_scaling", {**right, **lost}),)).apply(paddle)
    assert failing(numeric_part(torch, paddle)) == list(verify_factory.ATTENTION)


def test_an_error_in_how_the_layer_puts_its_halves_together_is_found(tmp_path, monkeypatch):
    torch, paddle = verify_factory.both(tmp_path)
    from aquila_pd.modeling import DecoderLayer

    right = DecoderLayer.forward
    monkeypatch.setattr(DecoderLayer, "forward", lambda self, x, *how: right(self, x, *how) + 1e-4 * x)
    proof = numeric_part(torch, paddle)
    assert failing(proof) == []  # the halves are right
    with pytest.raises(VerificationError, match="up to layer 0, MLP: drift"):
        proof.verified()


def test_a_source_that_computes_nan_is_no_reference(tmp_path):
    config = verify_factory.config()
    tensors = factory.weights(config)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    source = factory.write_safetensors(tmp_path / "torch", config, tensors)
    paddle = verify_factory.paddle_folder(tmp_path / "paddle", config, factory.expected(tensors))
    with pytest.raises(VerificationError, match=r"(?s)no reference.*layer 1, MLP: torch in float32 is inf away"):
        numeric_part(source, paddle).verified()


# ----------------------------------------------------------------------------------------------- statistics


def test_drift_is_relative_to_a_value_and_to_the_median_of_its_token():
    reference = np.array([[3.0, -4.0, 5.0], [0.0, 2.0, 1000.0]])
    found = reference + np.array([[0.0, 0.8, 0.0], [0.5, 0.0, 10.02]])
    expected = np.array([0.0, 0.8 / 8, 0.0, 0.5 / 2, 0.0, 10.02 / 1002])
    assert drift(found, reference).largest == pytest.approx(0.25)
    assert drift(found, reference).rms == pytest.approx((expected**2).mean() ** 0.5)
    assert drift(np.array([[np.nan, 1.0]]), np.ones((1, 2))).largest == np.inf
    assert drift(np.zeros((1, 2)), np.zeros((1, 2))).largest == 0  # a padding row


@pytest.mark.parametrize("size", [1e-6, 1e-2, 3.0])
def test_statistics_of_sliced_logits_are_those_of_whole_ones(size):
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(7, 50)) * 4
    found = reference + rng.normal(size=reference.shape) * size
    sliced = LogitTotal(7)
    for first in range(0, 50, 12):
        sliced.add(found[:, first : first + 12], reference[:, first : first + 12], first)
    result = sliced.result()
    p, q = (np.exp(x.astype(np.longdouble)) for x in (reference, found))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    kl = (p * np.log(p / q)).sum(1).astype(float)
    assert result.largest_kl == pytest.approx(kl.max(), rel=1e-5) and result.mean_kl == pytest.approx(
        kl.mean(), rel=1e-5
    )
    assert result.agreement == (reference.argmax(1) == found.argmax(1)).mean()
    at = np.unravel_index(np.abs(reference - found).argmax(), reference.shape)
    assert (result.worst[0].position, result.worst[0].vocabulary_id) == at
    assert result.worst[0].found == found[at] and result.worst[0].reference == reference[at]


def test_drift_in_pieces_is_drift_of_the_whole():
    rng = np.random.default_rng(0)
    reference, found = rng.normal(size=(2, 6, 8))
    total = DriftTotal()
    for rows in (slice(0, 4), slice(4, 6)):
        total.add(found[rows], reference[rows])
    whole = drift(found, reference)
    assert (total.drift().rms, total.drift().largest) == pytest.approx((whole.rms, whole.largest))
