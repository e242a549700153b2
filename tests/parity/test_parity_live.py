"""Torch beside Paddle on tiny random models: logits, hidden states, loss, gradients, greedy ids, training.

Torch is transformers' LLaMA, which in fp32 is the same function as Aquila2. Each check has a control that breaks
one thing and must be noticed.
"""

import numpy as np
import paddle
import pytest
import torch
from twins import (
    KINDS,
    adamw,
    assert_close,
    gradient_norm,
    ids,
    is_projection,
    paddle_model,
    paddle_name,
    pair,
    shifted,
    to_paddle,
    torch_model,
)

LOGITS = 1e-4  # summation order of fp32 in two frameworks; logits here are of size 10


def torch_logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(torch.tensor(tokens), **kwargs).logits


def paddle_logits(model, tokens, **kwargs):
    with paddle.no_grad():
        return model(paddle.to_tensor(tokens), **kwargs)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_every_hidden_state(kind):
    reference, model = pair(kind)
    tokens = ids()
    with torch.no_grad():
        expected = reference(torch.tensor(tokens), output_hidden_states=True, output_attentions=True)
    with paddle.no_grad():
        found = model(paddle.to_tensor(tokens), output_hidden_states=True, output_attentions=True, return_dict=True)
    assert_close(found.logits, expected.logits, LOGITS, "logits")
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for i, (a, b) in enumerate(zip(found.hidden_states, expected.hidden_states, strict=True)):
        assert_close(a, b, 2e-5, f"hidden state {i}")
    for i, (a, b) in enumerate(zip(found.attentions, expected.attentions, strict=True)):
        assert_close(a, b, 1e-6, f"attention {i}")


@pytest.mark.parametrize("kind", ["gqa", "linear", "dynamic"])
def test_longer_than_max_positions(kind):
    reference, model = pair(kind)
    tokens = ids(length=60)  # max_position_embeddings is 24
    assert_close(paddle_logits(model, tokens), torch_logits(reference, tokens), LOGITS)
    short = ids(length=9)
    # Dynamic scaling depends on this input's length alone: the long one before leaves no trace.
    assert_close(paddle_logits(model, short), torch_logits(torch_model(kind), short), LOGITS)


def test_control_scaling_is_seen_by_the_long_test():
    reference, _ = pair("gqa")
    tokens = ids(length=60)
    for kind in ("linear", "dynamic"):
        with pytest.raises(AssertionError):
            assert_close(paddle_logits(paddle_model(reference, kind), tokens), torch_logits(reference, tokens), LOGITS)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["gqa", "mha"])
def test_padding(kind, side):
    reference, model = pair(kind)
    tokens, keep = ids(3, 12), np.ones([3, 12], dtype=np.int64)
    for row, pads in enumerate((0, 5, 11)):
        where = slice(0, pads) if side == "left" else slice(12 - pads, 12)
        tokens[row, where], keep[row, where] = 0, 0
    positions = np.where(keep, keep.cumsum(-1) - 1, 1)
    expected = torch_logits(
        reference, tokens, attention_mask=torch.tensor(keep), position_ids=torch.tensor(positions)
    ).numpy()
    for mask in (keep, keep.astype(bool), keep.astype("float32")):
        found = paddle_logits(model, tokens, attention_mask=paddle.to_tensor(mask)).numpy()
        assert np.isfinite(found).all(), "no row may be NaN, pads included"
        real = keep.astype(bool)
        assert_close(found[real], expected[real], LOGITS, f"{side} padding, {mask.dtype}")


def test_left_padding_counts_positions_from_the_first_real_token():
    """Rotary embedding is relative, so logits cannot show wrong positions; the cached keys do."""
    model = paddle_model(torch_model())
    tokens = ids(1, 7)
    padded = np.concatenate([np.zeros([1, 4], dtype=np.int64), tokens], axis=1)
    keep = paddle.to_tensor(padded != 0)
    with paddle.no_grad():
        alone = model(paddle.to_tensor(tokens), use_cache=True)[1]
        shifted_right = model(paddle.to_tensor(padded), attention_mask=keep, use_cache=True)[1]
        wrong = model(
            paddle.to_tensor(padded), attention_mask=keep, position_ids=paddle.arange(11).unsqueeze(0), use_cache=True
        )[1]
    assert_close(shifted_right[0][0][:, 4:], alone[0][0], 1e-5, "keys of layer 0")
    with pytest.raises(AssertionError):
        assert_close(wrong[0][0][:, 4:], alone[0][0], 1e-2, "keys of layer 0 with positions that count the pads")


@pytest.mark.parametrize("chunks", [[1] * 11, [4, 1, 6], [7, 4]], ids=["steps", "mixed", "chunks"])
@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_and_chunks_equal_one_pass(kind, chunks):
    reference, model = pair(kind)
    tokens = ids()
    cache, found, start = None, [], 0
    with paddle.no_grad():
        for size in chunks:
            part = paddle.to_tensor(tokens[:, start : start + size])
            logits, cache = model(part, past_key_values=cache, use_cache=True)
            found.append(logits)
            start += size
    assert_close(paddle.concat(found, axis=1), torch_logits(reference, tokens), LOGITS)


def test_control_a_mask_aligned_to_the_first_key_is_noticed(monkeypatch):
    """Wrong for chunks over a cache and for nothing else."""
    import aquila_pd.modeling as modeling
    from aquila_pd.ops.attention_mask import Mask

    reference, model = pair()
    tokens = paddle.to_tensor(ids())
    right = modeling.causal_mask

    def top_left(keep, T):
        S = keep.shape[1]
        return right(keep, S)[:, :, :T]

    monkeypatch.setattr(modeling, "causal_mask", top_left)
    # without `end`, which would tell a fast twin that nothing but causality hides keys
    monkeypatch.setattr(modeling, "Mask", lambda sees, end: Mask(sees))
    with paddle.no_grad():
        first, cache = model(tokens[:, :4], use_cache=True)
        second, _ = model(tokens[:, 4:], past_key_values=cache)
    expected = torch_logits(reference, ids())
    assert_close(first, expected[:, :4], LOGITS)
    with pytest.raises(AssertionError):
        assert_close(second, expected[:, 4:], 1e-2)


def test_control_keys_rotated_by_one_position_too_many_are_noticed():
    reference, model = pair()
    tokens = paddle.to_tensor(ids())
    with paddle.no_grad():
        _, cache = model(tokens[:, :6], use_cache=True)
        late = paddle.arange(7, 12).unsqueeze(0).tile([2, 1])
        found, _ = model(tokens[:, 6:], position_ids=late, past_key_values=cache)
    with pytest.raises(AssertionError):
        assert_close(found, torch_logits(reference, ids())[:, 6:], 1e-3)


def test_cached_chunks_with_left_padding():
    reference, model = pair()
    tokens = ids(2, 12)
    tokens[1, :5] = 0
    keep = (tokens != 0).astype(np.int64)
    positions = torch.tensor(np.where(keep, keep.cumsum(-1) - 1, 1))
    expected = torch_logits(reference, tokens, attention_mask=torch.tensor(keep), position_ids=positions).numpy()
    with paddle.no_grad():
        _, cache = model(paddle.to_tensor(tokens[:, :7]), attention_mask=paddle.to_tensor(keep[:, :7]), use_cache=True)
        found, _ = model(
            paddle.to_tensor(tokens[:, 7:]),
            attention_mask=paddle.to_tensor(keep),
            past_key_values=cache,
            use_cache=True,
        )
    assert_close(found, expected[:, 7:], LOGITS)


def _labels(tokens):
    labels = tokens.copy()
    labels[0, :4] = -100
    labels[1, -3:] = -100
    return labels


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient(kind):
    reference, model = pair(kind)
    tokens = ids()
    tokens[0, 5] = 0  # the pad id in the middle of text: used forward, no gradient from the embedding
    labels = _labels(tokens)
    expected = reference(torch.tensor(tokens), labels=torch.tensor(labels)).loss
    expected.backward()
    loss = model(paddle.to_tensor(tokens), labels=paddle.to_tensor(shifted(labels)))[0]
    loss.backward()
    assert abs(float(loss) - expected.item()) <= 1e-5
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, weight in reference.named_parameters():
        found, wanted = gradients[paddle_name(name)], to_paddle(name, weight.grad)
        assert_close(found, wanted, 1e-5 + 1e-4 * np.abs(wanted).max(), f"gradient of {name}")
        relative = gradient_norm(found) / gradient_norm(wanted) - 1
        assert abs(relative) <= 1e-4, f"gradient norm of {name} off by {relative:.1e}"


def test_control_a_wrong_backward_pass_is_noticed(monkeypatch):
    """The forward pass stays right: only gradients can tell."""
    import aquila_pd.modeling as modeling
    from aquila_pd.fusion_ops import Ops, swiglu

    def no_gradient_through_up(gate, up):
        return swiglu(gate, up.detach())

    monkeypatch.setattr(modeling, "select", lambda: Ops(swiglu=no_gradient_through_up))
    with pytest.raises(AssertionError):
        test_loss_and_every_gradient("gqa")


def test_control_labels_that_are_not_shifted_change_the_loss():
    reference, model = pair()
    tokens = ids()
    expected = reference(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.item()
    wrong = float(model(paddle.to_tensor(tokens), labels=paddle.to_tensor(tokens))[0])
    assert abs(wrong - expected) > 0.1


@pytest.mark.parametrize("kind", ["gqa", "tied"])
def test_twenty_training_steps_side_by_side(kind):
    train_side_by_side(kind)


def train_side_by_side(kind, **changes):
    """Twenty steps in both frameworks; controls change Paddle's optimizer."""
    reference, model = pair(kind)
    model.train()
    batches = ids(rows=4 * 3, length=10).reshape(4, 3, 10)
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ours = adamw(model, **changes)
    for step in range(20):
        tokens = batches[step % 4]
        expected = reference(torch.tensor(tokens), labels=torch.tensor(tokens)).loss
        theirs.zero_grad()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        theirs.step()
        loss = model(paddle.to_tensor(tokens), labels=paddle.to_tensor(shifted(tokens)))[0]
        loss.backward()
        ours.step()
        ours.clear_grad()
        # AdamW divides by the square root of tiny second moments, which magnifies rounding as steps go by.
        assert abs(float(loss) - expected.item()) <= 2e-4, f"step {step}: {float(loss)} instead of {expected.item()}"
    for name, weight in reference.named_parameters():
        found = model.state_dict()[paddle_name(name)]
        assert_close(found, to_paddle(name, weight), 1e-3, f"{name} after 20 steps")


@pytest.mark.parametrize("what", [dict(beta2=0.999), dict(grad_clip=None), dict(weight_decay=0.0)], ids=str)
def test_control_another_optimizer_is_noticed(what):
    with pytest.raises(AssertionError):
        train_side_by_side("gqa", **what)


BROKEN = {
    "norms swapped": lambda name: (
        name.replace("input_layernorm", "post_attention_layernorm")
        if "input_layernorm" in name
        else name.replace("post_attention_layernorm", "input_layernorm")
    ),
    "gate and up swapped": lambda name: (
        name.replace("gate_proj", "up_proj") if "gate_proj" in name else name.replace("up_proj", "gate_proj")
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_control_swapped_weights_are_noticed(what):
    reference, model = pair("mha")
    right = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    for name, parameter in model.state_dict().items():
        parameter.set_value(right[BROKEN[what](name)])
    with pytest.raises(AssertionError):
        assert_close(paddle_logits(model, ids()), torch_logits(reference, ids()), 1e-2)


def test_control_one_square_weight_left_untransposed_is_noticed():
    reference, model = pair("mha")
    name = "aquila.layers.1.self_attn.q_proj.weight"
    assert is_projection(name)
    weight = model.state_dict()[name]
    assert weight.shape == [32, 32]  # no shape check can see it
    weight.set_value(weight.numpy().T.copy())
    with pytest.raises(AssertionError):
        assert_close(paddle_logits(model, ids()), torch_logits(reference, ids()), 1e-2)


def test_control_interleaved_rope_is_noticed(monkeypatch):
    reference = torch_model()
    import aquila_pd.modeling as modeling
    from aquila_pd.fusion_ops import Ops

    def interleaved(q, k, angles):
        cos, sin = angles

        def turn(x):
            pairs = x.reshape([*x.shape[:-1], -1, 2])
            half = cos.shape[-1] // 2
            c, s = cos[..., :half], sin[..., :half]
            a, b = pairs[..., 0], pairs[..., 1]
            return paddle.stack([a * c - b * s, b * c + a * s], axis=-1).reshape(x.shape)

        return turn(q), turn(k)

    monkeypatch.setattr(modeling, "select", lambda: Ops(rope=interleaved))
    model = paddle_model(reference)
    with pytest.raises(AssertionError):
        assert_close(paddle_logits(model, ids()), torch_logits(reference, ids()), 1e-2)
