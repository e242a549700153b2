"""Rows that hold several samples: logits, gradients and loss are those of the samples by themselves."""

import numpy as np
import paddle
import pytest
from twins import assert_close, paddle_model, torch_model

from aquila_pd import fusion_ops
from aquila_pd.ops.attention_mask import Mask, PackedMask
from aquila_pd.utils.errors import AquilaError

LENGTHS = (5, 1, 9, 3)
PADDING = 4


def packed_row(rng, lengths=LENGTHS, padding=PADDING):
    """(samples, ids [1, T], segments [1, T])."""
    samples = [rng.integers(1, 90, n) for n in lengths]
    ids = np.concatenate([*samples, np.zeros(padding, int)])
    segments = np.concatenate([*(np.full(n, i + 1) for i, n in enumerate(lengths)), np.zeros(padding, int)])
    return samples, paddle.to_tensor(ids[None]), paddle.to_tensor(segments[None])


def model(kind="gqa", **changes):
    made = paddle_model(torch_model(kind, **changes), kind, **changes)
    made.eval()
    return made


def gradients(made, loss) -> dict:
    made.clear_gradients()
    loss.backward()
    return {name: p.grad.numpy() for name, p in made.named_parameters() if p.grad is not None}


def summed(made, ids, labels, **more):
    """The sum of the losses over all labels that are not -100."""
    logits = made(ids, return_dict=True, **more).logits
    return paddle.nn.functional.cross_entropy(
        logits.reshape([-1, logits.shape[-1]]), labels.reshape([-1]), reduction="none", ignore_index=-100
    ).sum()


@pytest.mark.parametrize("block", [256, 4])
def test_packed_logits_and_gradients_are_those_of_the_samples_alone(monkeypatch, block):
    monkeypatch.setattr(fusion_ops, "QUERY_BLOCK", block)
    made = model()
    samples, ids, segments = packed_row(np.random.default_rng(1))
    labels = [np.concatenate([s[1:], [-100]]) for s in samples]
    row = paddle.to_tensor(np.concatenate([*labels, np.full(PADDING, -100)])[None])

    logits = made(ids, segment_ids=segments, return_dict=True).logits.numpy()[0]
    at = 0
    for sample in samples:
        alone = made(paddle.to_tensor(sample[None]), return_dict=True).logits.numpy()[0]
        assert_close(logits[at : at + len(sample)], alone, 1e-5)
        at += len(sample)

    packed = gradients(made, summed(made, ids, row, segment_ids=segments))
    pairs = zip(samples, labels, strict=True)
    one_by_one = sum(summed(made, paddle.to_tensor(s[None]), paddle.to_tensor(y[None])) for s, y in pairs)
    for name, expected in gradients(made, one_by_one).items():
        assert_close(packed[name], expected, 1e-5, name)


def test_control_without_segments_the_samples_see_each_other():
    made = model()
    samples, ids, segments = packed_row(np.random.default_rng(1))
    right = made(ids, segment_ids=segments, return_dict=True).logits.numpy()[0]
    wrong = made(ids, position_ids=PackedMask(segments).positions, return_dict=True).logits.numpy()[0]
    first = len(samples[0])
    assert_close(right[:first], wrong[:first], 1e-5)
    assert np.abs(right[first:-PADDING] - wrong[first:-PADDING]).max() > 1e-3


BOUNDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 6}


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        {"type": "llama3", "factor": 2.0, **BOUNDS},
        {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 6},
    ],
    ids=lambda scaling: scaling["type"],
)
def test_scaled_rotary_counts_in_each_sample_for_itself(scaling):
    """With dynamic NTK a sample beyond max positions stretches its own base and nobody else's."""
    made = model(rope_scaling=scaling, max_position_embeddings=12)
    samples, ids, segments = packed_row(np.random.default_rng(2), lengths=(5, 20, 4))
    logits = made(ids, segment_ids=segments, return_dict=True).logits.numpy()[0]
    at = 0
    for sample in samples:
        alone = made(paddle.to_tensor(sample[None]), return_dict=True).logits.numpy()[0]
        assert_close(logits[at : at + len(sample)], alone, 1e-5)
        at += len(sample)


def test_rows_of_a_batch_have_borders_of_their_own():
    made = model()
    rng = np.random.default_rng(3)
    first, second = packed_row(rng, lengths=(7, 6), padding=2), packed_row(rng, lengths=(3, 12), padding=0)
    both = made(
        paddle.concat([first[1], second[1]]), segment_ids=paddle.concat([first[2], second[2]]), return_dict=True
    )
    for i, (_, ids, segments) in enumerate((first, second)):
        assert_close(both.logits[i : i + 1], made(ids, segment_ids=segments, return_dict=True).logits.numpy(), 1e-5)


def test_recompute_gives_the_same_gradients():
    made = model()
    made.train()
    _, ids, segments = packed_row(np.random.default_rng(1))
    plain = gradients(made, made(ids, segment_ids=segments, return_dict=True).logits.square().mean())
    made.recompute_enable()
    again = gradients(made, made(ids, segment_ids=segments, return_dict=True).logits.square().mean())
    assert plain.keys() == again.keys()
    for name, expected in plain.items():
        assert_close(again[name], expected, 1e-6, name)


def test_attentions_of_a_packed_row_can_be_looked_at():
    made = model()
    _, ids, segments = packed_row(np.random.default_rng(1))
    shown = made(ids, segment_ids=segments, output_attentions=True, return_dict=True)
    assert_close(shown.logits, made(ids, segment_ids=segments, return_dict=True).logits.numpy(), 1e-5)
    weights, allowed = shown.attentions[0].numpy()[0], PackedMask(segments).full().numpy()[0, 0]
    assert weights[:, ~allowed].max() < 1e-20  # Paddle's CPU softmax ends at exp(-64) in place of zero
    assert_close(weights.sum(axis=-1), np.ones(weights.shape[:2]), 1e-5)


def test_the_drawing_of_the_mask_is_true():
    mask = PackedMask(paddle.to_tensor([[1, 1, 1, 2, 2, 0]]))
    assert mask.starts.tolist() == [[0, 0, 0, 3, 3, 5]]
    assert mask.ends.tolist() == [[3, 3, 3, 5, 5, 6]]
    assert mask.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    drawn = ["x.....", "xx....", "xxx...", "...x..", "...xx.", ".....x"]
    assert ["".join("x" if x else "." for x in row) for row in mask.full().numpy()[0, 0]] == drawn


def test_a_mask_or_a_cache_beside_segments_is_refused():
    made = model()
    _, ids, segments = packed_row(np.random.default_rng(1))
    for more in ({"attention_mask": paddle.ones_like(ids)}, {"use_cache": True}):
        with pytest.raises(AquilaError, match="segment_ids say who sees whom"):
            made.aquila(ids, segment_ids=segments, **more)


def test_flashmask_is_given_the_row_from_which_each_key_is_hidden(monkeypatch):
    """The kernel's own arithmetic, in numpy: it runs on a GPU only."""
    given = {}

    def kernel(q, k, v, *, startend_row_indices, causal):
        given.update(rows=startend_row_indices.numpy(), causal=causal)
        T = q.shape[1]
        query, key = np.arange(T)[:, None], np.arange(T)[None]
        sees = (key <= query) & (query < given["rows"][:, :, :, 0][:, :, None, :])  # [B, 1, T, T]
        cast = [x.astype("float32") for x in (q, k.transpose([0, 2, 1, 3]), v.transpose([0, 2, 1, 3]))]
        return fusion_ops.attention(*cast, Mask(paddle.to_tensor(sees))).astype(q.dtype)

    monkeypatch.setattr(fusion_ops.F, "flashmask_attention", kernel)
    q, k, v, mask = fusion_ops._packed_samples("bfloat16")[0]
    found = fusion_ops.fused_packed_attention(q, k, v, mask).astype("float32")
    exact = fusion_ops.packed_attention(*(x.astype("float32") for x in (q, k, v)), mask)
    assert given["causal"] and given["rows"].dtype == np.int32 and given["rows"].shape == (2, 1, 128, 1)
    assert_close(found, exact.numpy(), 0.02)
