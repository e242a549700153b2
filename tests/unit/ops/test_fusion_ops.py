"""Plain and fused twins on the same numbers, the probe that chooses, and fused projections that stay out of files."""

import dataclasses

import numpy as np
import paddle
import pytest
from twins import assert_close, ids, paddle_model, shifted, torch_model

from aquila_pd import fusion_ops
from aquila_pd.fusion_ops import TWINS, Choice
from aquila_pd.ops import fused_linear
from aquila_pd.ops.attention_mask import Mask, causal_mask
from aquila_pd.runtime import mkl
from aquila_pd.utils.errors import AquilaError

TWIN = {twins.name: twins for twins in TWINS}


def needs_a_processor_for(name: str) -> None:
    """Paddle's kernel of RMSNorm for CPUs kills a process whose processor lacks AVX-512."""
    if name == "rms_norm" and paddle.device.get_device() == "cpu" and not mkl.has_avx512():
        pytest.skip("Paddle's CPU kernel of RMSNorm needs AVX-512, which this processor has not")


@pytest.mark.parametrize("name", TWIN)
def test_twins_agree_forward_and_backward(name):
    needs_a_processor_for(name)
    twins = TWIN[name]
    for number, sample in enumerate(twins.samples("float32")):
        expected = fusion_ops._run(twins, twins.plain, sample)
        try:
            with fusion_ops._native_stderr_closed():
                found = fusion_ops._run(twins, twins.fused, twins.samples("float32")[number])
        except Exception as error:
            missing = fusion_ops._first_line(error)
            if "not registered" not in missing:
                raise
            pytest.skip(f"no fused {name} on {paddle.device.get_device()}: {missing}")
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, 2e-5, f"{name}, sample {number}")


@paddle.no_grad()
def test_fused_rms_norm_agrees_where_only_its_forward_kernel_exists():
    needs_a_processor_for("rms_norm")
    for dtype in ("float32", "bfloat16", "float16") if paddle.device.get_device() != "cpu" else ("float32",):
        x, weight, eps = TWIN["rms_norm"].samples(dtype)[0]
        found = fusion_ops.fused_rms_norm(x, weight, eps).astype("float32")
        assert_close(found, fusion_ops.rms_norm(x, weight, eps).astype("float32").numpy(), 1e-6)


def test_attention_in_query_blocks_equals_one_block(monkeypatch):
    q, k, v, mask = TWIN["attention"].samples("float32")[1]
    expected = fusion_ops.attention(q, k, v, mask).numpy()
    monkeypatch.setattr(fusion_ops, "QUERY_BLOCK", 3)
    assert_close(fusion_ops.attention(q, k, v, mask), expected, 1e-6)
    last = Mask(mask.allowed[:, :, -1:])
    assert_close(fusion_ops.attention(q, k, v, last), fusion_ops.attention_with_weights(q, k, v, last.allowed)[0], 1e-6)
    no_mask = fusion_ops.attention_with_weights(q, k, v, None)[0].numpy()
    assert_close(fusion_ops.attention(q, k, v, None), no_mask, 1e-6)


def test_attention_equals_the_formula():
    """Against per-head numpy with repeated keys: the grouping of heads is not taken from the code under test."""
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal(s).astype("float32") for s in ([2, 3, 6, 8], [2, 2, 5, 8], [2, 2, 5, 8]))
    mask = Mask(causal_mask(paddle.to_tensor([[True] * 5, [False, True, True, True, True]]), 3))
    found = fusion_ops.attention(*map(paddle.to_tensor, (q, k, v)), mask).numpy()
    for b in range(2):
        for head in range(6):
            scores = q[b, :, head] @ k[b, head // 3].T / np.sqrt(8)
            scores = np.where(mask.allowed[b, 0].numpy(), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            expected = weights / weights.sum(-1, keepdims=True) @ v[b, head // 3]
            assert_close(found[b, :, head], expected, 1e-5, f"row {b}, head {head}")


def _choose(plain, fused, like="swiglu", **changes):
    changes = {"on_cpu": None, "no_backward_on": (), **changes}
    return fusion_ops._choose(dataclasses.replace(TWIN[like], plain=plain, fused=fused, **changes), "cpu")


def test_the_probe_refuses_a_kernel_that_is_wrong_forward_or_backward():
    plain = fusion_ops.swiglu
    assert _choose(plain, plain).chosen == "fused"

    wrong = _choose(plain, lambda gate, up: plain(gate, up) * 1.001)
    assert wrong.chosen == "plain" and "values are off" in wrong.reason
    no_gradient = _choose(plain, lambda gate, up: plain(gate, up.detach()) + 0.0 * up)
    assert no_gradient.chosen == "plain" and "gradients are off" in no_gradient.reason
    nan = _choose(plain, lambda gate, up: plain(gate, up) * float("nan"))
    assert nan.chosen == "plain"

    def broken(gate, up):
        raise RuntimeError("(NotFound) The kernel `op` is not registered.")

    assert "The kernel `op` is not registered" in _choose(plain, broken).reason


def test_the_probe_sees_a_mask_aligned_to_the_wrong_end():
    """Right for a prompt and for one token, wrong only for a chunk over a cache."""

    def top_left(q, k, v, mask):
        T, S = q.shape[1], k.shape[2]
        if mask is None or T in (1, S):
            return fusion_ops.attention(q, k, v, mask)
        wrong = paddle.arange(S).unsqueeze(0) <= paddle.arange(T).unsqueeze(1)
        return fusion_ops.attention(q, k, v, Mask(wrong.unsqueeze([0, 1])))

    assert _choose(fusion_ops.attention, fusion_ops.attention, "attention").chosen == "fused"
    assert _choose(fusion_ops.attention, top_left, "attention").chosen == "plain"


def test_the_probe_demands_aquilas_order_of_rounding():
    """LLaMA's order passes any tolerance; here the rounding is done in numpy's half precision, as a GPU would."""

    def llamas_order(x, weight, eps):
        h = x.astype("float32")
        h = (h * paddle.rsqrt((h * h).mean(axis=-1, keepdim=True) + eps)).astype(x.dtype)
        return (h.astype("float32") * weight.astype("float32")).astype(x.dtype)

    twins = dataclasses.replace(TWIN["rms_norm"], fused=llamas_order)
    for dtype in ("bfloat16", "float16"):
        assert "another order" in fusion_ops._probe(twins, dtype)
        assert fusion_ops._probe(dataclasses.replace(twins, equal_share=0.0), dtype) is None, "close it is"
        assert fusion_ops._probe(dataclasses.replace(twins, fused=fusion_ops.rms_norm), dtype) is None


def test_every_choice_has_a_reason():
    made = fusion_ops.choices()
    assert [choice.name for choice in made] == [*(twins.name for twins in TWINS), "projections"]
    assert all(isinstance(choice, Choice) and choice.reason and choice.chosen in ("plain", "fused") for choice in made)


def test_the_choice_is_made_when_the_model_is_built():
    reference = torch_model()
    with fusion_ops.using("plain"):
        plain = paddle_model(reference)
    automatic = paddle_model(reference)
    assert plain.aquila.layers[0].mlp.swiglu is fusion_ops.swiglu
    tokens = paddle.to_tensor(ids())
    assert_close(automatic(tokens)[0], plain(tokens)[0].numpy(), 1e-5)
    assert list(automatic.state_dict()) == list(plain.state_dict())
    with pytest.raises(ValueError, match="none of"), fusion_ops.using("fast"):
        pass


def test_a_probe_leaves_the_users_random_numbers_alone():
    paddle.seed(1)
    expected = paddle.randn([4]).tolist()
    paddle.seed(1)
    fusion_ops._probe(TWIN["swiglu"], "float32")
    assert paddle.randn([4]).tolist() == expected


# ------------------------------------------------------------------------------------ fused projections


def test_fused_projections_change_neither_numbers_nor_names():
    model = paddle_model(torch_model())
    tokens, labels = paddle.to_tensor(ids()), paddle.to_tensor(shifted(ids()))
    before, logits = {k: v.numpy() for k, v in model.state_dict().items()}, model(tokens)[0].numpy()

    model.fuse_projections()
    attention = model.aquila.layers[0].self_attn
    assert isinstance(attention.qkv_proj, fused_linear.FusedLinear) and not hasattr(attention, "q_proj")
    assert_close(model(tokens)[0], logits, 1e-5)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all((after[name].numpy() == before[name]).all() for name in before)
    model(tokens, labels=labels)[0].backward()
    assert attention.qkv_proj.weight.grad.shape == [32, 48]

    model.set_state_dict({name: paddle.to_tensor(value * 0.5) for name, value in before.items()})
    assert isinstance(attention.qkv_proj, fused_linear.FusedLinear)
    model.set_state_dict({name: paddle.to_tensor(value) for name, value in before.items()})
    assert_close(model(tokens)[0], logits, 1e-5)

    model.unfuse_projections()
    assert attention.qkv_proj is None
    assert all((model.state_dict()[name].numpy() == before[name]).all() for name in before)
    assert_close(model(tokens)[0], logits, 1e-6)


def test_what_cannot_be_fused_is_refused():
    model = paddle_model(torch_model())
    attention = model.aquila.layers[0].self_attn
    attention.k_proj.weight.stop_gradient = True
    with pytest.raises(AquilaError, match="freeze all parts or none"):
        model.fuse_projections()
    attention.k_proj.weight.stop_gradient = False

    class Adapted(paddle.nn.Linear):
        pass

    attention.q_proj = Adapted(32, 32, bias_attr=False)
    with pytest.raises(AquilaError, match="q_proj is a Adapted"):
        model.fuse_projections()


def test_fused_projections_never_reach_a_file(tmp_path):
    model = paddle_model(torch_model())
    model.save_pretrained(tmp_path / "plain")
    model.fuse_projections()
    model.save_pretrained(tmp_path / "fused")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "fused" / file).read_bytes(), file
