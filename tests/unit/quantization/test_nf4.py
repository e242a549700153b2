"""NF4 against bitsandbytes value for value, the layer against plain arithmetic, and what packing a model promises."""

import bitsandbytes.functional as bnb
import checkpoint_factory as factory
import ml_dtypes
import numpy as np
import paddle
import pytest
import torch
import twins
from lora_twins import KINDS, our_logits, our_loss, peft_model, spec, theirs_as_ours, torch_logits

from aquila_pd import AquilaForCausalLM
from aquila_pd.adapters.lora import adapter_state, attach, load_adapter_state, merge
from aquila_pd.checkpoint.convert import convert
from aquila_pd.formats.nf4 import BLOCK, LEVELS, dequantize, nested_levels, quantize_magnitudes
from aquila_pd.quantization import nf4
from aquila_pd.quantization.encode import quantize
from aquila_pd.quantization.loading import load_quantized
from aquila_pd.quantization.nf4 import NF4Linear, dequantize_model, quantize_model
from aquila_pd.utils.errors import AquilaError, CheckpointError, ConfigError

# [out, in]: whole blocks in a row; rows shorter than a block; blocks over the ends of rows; a last short block; odd
SHAPES = [(64, 64), (300, 4096), (512, 1000), (52, 32), (7, 9), (3, 5), (1, 64)]


def matrix(shape, seed: int = 0, scale: float = 0.02) -> np.ndarray:
    """Normal values with a few outliers, as trained weights have them."""
    rng = np.random.default_rng(seed)
    values = rng.normal(scale=scale, size=shape)
    values.flat[:: max(7, values.size // 50)] *= 6
    return values.astype(np.float32)


def round_trip(weight: np.ndarray) -> np.ndarray:
    """The values [out, in] float32 that a weight has after packing."""
    return dequantize(quantize(weight, "a weight"))


def theirs(weight: np.ndarray, *, double: bool = True):
    """bitsandbytes' packed bytes and their state."""
    tensor = torch.from_numpy(weight.view(np.int16)).view(torch.bfloat16) if weight.dtype.itemsize == 2 else None
    tensor = torch.from_numpy(weight) if tensor is None else tensor
    packed, state = bnb.quantize_4bit(tensor, blocksize=BLOCK, compress_statistics=double, quant_type="nf4")
    return packed.numpy().reshape(-1), state


def by_hand(packed) -> np.ndarray:
    """The values of a packed matrix, one step after the other in float32; nothing of the package but its fields."""
    codes = np.stack([packed.codes >> 4, packed.codes & 15], axis=1).reshape(-1)[: np.prod(packed.shape)]
    absmax = bnb.create_dynamic_map().numpy()[packed.absmax]
    absmax = absmax * np.repeat(packed.nested, 256)[: len(absmax)] + packed.offset
    values = bnb.get_4bit_type("nf4", device="cpu").numpy()[codes] * np.repeat(absmax, 64)[: len(codes)]
    return values.reshape(packed.shape)


# ------------------------------------------------------------------------------------------ bitsandbytes' values


def test_the_levels_are_bitsandbytes():
    assert (bnb.get_4bit_type("nf4", device="cpu").numpy() == LEVELS).all()
    assert (nested_levels() == bnb.create_dynamic_map().numpy()).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["fp32", "bf16"])
def test_codes_and_magnitudes_are_bitsandbytes(shape, dtype):
    weight = matrix(shape).astype(dtype)
    ours, (codes, state) = quantize(weight), theirs(weight)
    assert (ours.codes == codes).all() and ours.codes.dtype == np.uint8
    # The mean of the magnitudes: torch's sum depends on the processor's vectors, ours is rounded from float64.
    offset = np.float32(state.offset.item())
    assert abs(ours.offset - offset) <= 2 * np.spacing(offset)
    # Everything else is equal to the last bit, given the same mean.
    _, plain = theirs(weight, double=False)
    absmax, nested, _ = quantize_magnitudes(plain.absmax.numpy(), offset)
    assert (absmax == state.absmax.numpy()).all() and (nested == state.state2.absmax.numpy()).all()
    if ours.offset == offset:
        assert (ours.absmax == absmax).all() and (ours.nested == nested).all()


def test_the_nested_levels_follow_bitsandbytes_grid():
    rng = np.random.default_rng(1)
    for scale in 10.0 ** np.arange(-6, 4):
        magnitudes = (np.abs(rng.normal(size=256 * 200)) * scale).astype(np.float32)
        zero = np.float32(0)
        levels, nested, _ = quantize_magnitudes(magnitudes, zero)
        expected, state = bnb.quantize_blockwise(torch.from_numpy(magnitudes), blocksize=256)
        assert (levels == expected.numpy()).all() and (nested == state.absmax.numpy()).all()
        nearest = np.abs(magnitudes.reshape(-1, 256)[..., None] / nested[:, None, None] - nested_levels()).argmin(-1)
        assert 0 < (nearest.reshape(-1) != levels).mean() < 0.01, (
            "control: the plain nearest level is another, at times"
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacked_values_are_bitsandbytes(shape):
    weight = matrix(shape)
    packed, (codes, state) = quantize(weight), theirs(weight)
    assert (dequantize(packed) == by_hand(packed)).all()
    packed.offset = np.float32(state.offset.item())
    packed.absmax, packed.nested = state.absmax.numpy(), state.state2.absmax.numpy()
    if shape[1] % BLOCK == 0:  # its CPU kernel takes wrong magnitudes where a row does not begin with a block
        expected = bnb.dequantize_4bit(torch.from_numpy(codes).reshape(-1, 1), state)
        assert (dequantize(packed) == expected.numpy()).all()
    assert np.abs(dequantize(packed) - weight).max() < 0.16 * np.abs(weight).max()


def test_zeros_and_single_large_values_survive():
    weight = np.zeros((4, 64), np.float32)
    assert (round_trip(weight) == 0).all()
    weight[2, 5] = 3.0
    assert (quantize(weight).codes == theirs(weight)[0]).all()
    found = round_trip(weight)
    assert abs(found[2, 5] - 3.0) < 0.02 and (np.delete(found.reshape(-1), 133) == 0).all()


@pytest.mark.parametrize("what", ["halves of bytes swapped", "blocks along the inputs", "no offset"])
def test_control_another_reading_is_noticed(what):
    weight = matrix((128, 64))
    packed = quantize(weight)
    right = dequantize(packed)
    if what == "halves of bytes swapped":
        packed.codes = packed.codes << 4 | packed.codes >> 4
    elif what == "blocks along the inputs":  # Paddle's order in place of torch's
        packed = quantize(np.ascontiguousarray(weight.T))
        packed.shape = (128, 64)
    else:
        packed.offset = np.float32(0)
    assert np.abs(dequantize(packed) - weight).max() > 2 * np.abs(right - weight).max()


def test_a_transposed_view_and_other_strips_give_the_same_bytes(monkeypatch):
    weight = matrix((300, 96))
    whole = quantize(weight)
    monkeypatch.setattr("aquila_pd.quantization.encode.STRIP", 1000)
    for same in (weight, np.ascontiguousarray(weight.T).T, np.asfortranarray(weight)):
        cut = quantize(same)
        assert (cut.codes == whole.codes).all() and (cut.absmax == whole.absmax).all() and cut.offset == whole.offset


def test_the_bytes_are_a_little_more_than_half_of_the_values():
    packed = quantize(matrix((1024, 1024)))
    assert packed.nbytes == 2**20 // 2 + 2**20 // 64 + 2**20 // 64 // 256 * 4 + 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_cannot_be_kept_are_named(bad):
    weight = matrix((64, 64))
    weight[3, 4] = bad
    with pytest.raises(CheckpointError, match=r"layers\.3\.q_proj holds NaN or infinite"):
        quantize(weight, "layers.3.q_proj")


# ------------------------------------------------------------------------------------------------ the layer


def layer_of(shape, seed: int = 0) -> tuple[NF4Linear, np.ndarray]:
    """A layer of a weight [out, in], and the values [in, out] it should compute with."""
    weight = matrix(shape, seed)
    linear = paddle.nn.Linear(*shape[::-1], bias_attr=False)
    linear.weight.set_value(weight.T)
    return NF4Linear.from_linear(linear, "it"), round_trip(weight).T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strip", [2**24, 64], ids=["whole", "in strips"])
def test_the_layer_computes_with_the_unpacked_weight(shape, strip, monkeypatch):
    monkeypatch.setattr(nf4, "STRIP", strip)
    layer, weight = layer_of(shape)
    assert (layer.dense_weight().numpy() == weight).all()
    x = paddle.randn([2, 3, shape[1]])
    x.stop_gradient = False
    y, upstream = layer(x), paddle.randn([2, 3, shape[0]])
    y.backward(upstream)
    # sums of up to 4096 products in another order
    twins.assert_close(y.detach(), x.numpy() @ weight, 1e-5, "output")
    twins.assert_close(x.grad, upstream.numpy() @ weight.T, 1e-5, "gradient")


def kept_for_backward(layer, x) -> list[int]:
    """Sizes of the tensors that autograd keeps of a layer's forward pass."""
    sizes = []

    def keep(tensor):
        sizes.append(int(np.prod(tensor.shape)))
        return tensor

    with paddle.autograd.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    y.sum().backward()
    return sizes


def test_no_unpacked_weight_is_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(nf4, "STRIP", 64 * 64)
    layer, _ = layer_of((300, 64))
    x = paddle.randn([2, 64])
    x.stop_gradient = False
    assert kept_for_backward(layer, x) == []
    assert x.grad is not None
    assert 300 * 64 in kept_for_backward(layer.to_linear(), x), "control: a plain product keeps its weight"


def test_casting_a_model_leaves_the_codes_alone():
    layer, weight = layer_of((52, 32))
    holder = paddle.nn.LayerList([layer, paddle.nn.Linear(2, 2)])
    holder.to(dtype="bfloat16")
    assert holder[1].weight.dtype == paddle.bfloat16
    assert [buffer.dtype for buffer in layer.buffers()] == [paddle.uint8, paddle.uint8, paddle.float32, paddle.float32]
    assert (layer.dense_weight().numpy() == weight).all()


# ------------------------------------------------------------------------------------------------ whole models


def test_a_packed_model_is_the_model_of_the_rounded_weights():
    torch_one, model = twins.pair()
    names = quantize_model(model)
    assert len(names) == 14 and names[0] == "aquila.layers.0.self_attn.q_proj"
    with torch.no_grad():
        for name, parameter in torch_one.named_parameters():
            if "_proj." in name:
                parameter.copy_(torch.from_numpy(round_trip(parameter.numpy())))
    ids = twins.ids()
    twins.assert_close(our_logits(model, ids), torch_logits(torch_one, ids), 1e-4, "logits")
    assert quantize_model(model) == [], "what is packed is left alone"


def test_the_same_weights_give_the_same_codes_and_a_state_dict_restores_them():
    _, first = twins.pair()
    _, second = twins.pair()
    quantize_model(first, "down_proj"), quantize_model(second, ["down_proj"])
    states = [model.state_dict() for model in (first, second)]
    assert list(states[0]) == list(states[1])
    assert all((states[0][name].numpy() == states[1][name].numpy()).all() for name in states[0])
    codes = "aquila.layers.1.mlp.down_proj.codes"
    kept = {name: paddle.to_tensor(value.numpy()) for name, value in states[0].items()}
    states[1][codes].set_value(paddle.zeros_like(states[1][codes]))
    second.set_state_dict(kept)
    assert (second.state_dict()[codes].numpy() == kept[codes].numpy()).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_packed_gives_the_codes_of_packing_what_was_loaded(tmp_path, dtype):
    config = factory.config(torch_dtype=dtype)
    source = factory.write_safetensors(tmp_path / "hf", config, factory.weights(config, dtype=dtype), shards=2)
    convert(source, tmp_path / "pd", verify="none", say=lambda line: None)
    loaded = load_quantized(tmp_path / "pd", ("q_proj", "up_proj"))
    packed = AquilaForCausalLM.from_pretrained(str(tmp_path / "pd"))
    quantize_model(packed, ("q_proj", "up_proj"))
    found, expected = loaded.state_dict(), packed.state_dict()
    assert list(found) == list(expected)
    assert all((found[name].numpy() == expected[name].numpy()).all() for name in found)
    assert loaded.aquila.layers[0].mlp.up_proj.dtype == "float32"
    ids = twins.ids() % 70
    twins.assert_close(our_logits(loaded, ids), our_logits(packed, ids).numpy(), 0)


def test_loading_packed_names_what_is_missing(tmp_path):
    config = factory.config()
    convert(
        factory.write_safetensors(tmp_path / "hf", config, factory.weights(config)),
        tmp_path / "pd",
        verify="none",
        say=lambda line: None,
    )
    with pytest.raises(ConfigError, match="did you mean 'q_proj'"):
        load_quantized(tmp_path / "pd", "q_prj")
    (tmp_path / "pd" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_quantized(tmp_path / "pd")


def test_what_cannot_be_packed_or_saved_is_refused_with_what_to_do(tmp_path):
    _, model = twins.pair()
    attach(model, spec(targets=("q_proj",)))
    with pytest.raises(AquilaError, match="pack the weights first"):
        quantize_model(model)
    _, model = twins.pair()
    quantize_model(model)
    with pytest.raises(AquilaError, match=r"dequantize_model\(\)"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(AquilaError, match="cannot be fused"):
        model.fuse_projections()
    ids = twins.ids()
    before = our_logits(model, ids)
    assert len(dequantize_model(model)) == 14
    model.save_pretrained(tmp_path / "saved")
    again = AquilaForCausalLM.from_pretrained(str(tmp_path / "saved")).eval()
    twins.assert_close(our_logits(again, ids), before.numpy(), 1e-5)


# ---------------------------------------------------------------------------------------------------- QLoRA


def qlora_pair(kind: str):
    """A torch model of the rounded weights with peft's adapters, and ours of packed weights with the same ones."""
    asked = spec(**KINDS[kind])
    torch_one, model = twins.pair()
    quantize_model(model)
    with torch.no_grad():
        for name, parameter in torch_one.named_parameters():
            if "_proj." in name:
                parameter.copy_(torch.from_numpy(round_trip(parameter.numpy())))
    theirs_one = peft_model(torch_one, asked)
    attach(model, asked)
    load_adapter_state(model, theirs_as_ours(theirs_one))
    return theirs_one, model


@pytest.mark.parametrize("kind", KINDS)
def test_qlora_has_pefts_logits_and_gradients(kind):
    theirs_one, ours = qlora_pair(kind)
    ids = twins.ids()
    twins.assert_close(our_logits(ours, ids), torch_logits(theirs_one, ids), 1e-4, "logits")
    theirs_one.train(), ours.train()
    theirs_one(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss.backward()
    expected = theirs_as_ours(theirs_one, gradients=True)
    for recompute in (False, True):
        ours.clear_gradients()
        if recompute:
            ours.recompute_enable()
        our_loss(ours, ids).backward()
        state = adapter_state(ours)
        assert expected.keys() == state.keys()
        for name, gradient in expected.items():
            twins.assert_close(state[name].grad, gradient, 1e-4 * np.abs(gradient).max(), f"gradient of {name}")


@pytest.mark.parametrize("kind", KINDS)
def test_qlora_merges_onto_the_weights_it_was_trained_on(kind, tmp_path):
    _, ours = qlora_pair(kind)
    ids = twins.ids()
    before = our_logits(ours, ids)
    merge(ours)
    twins.assert_close(our_logits(ours, ids), before.numpy(), 1e-5, "merged logits")
    assert not list(ours.buffers()) and not [n for n in ours.state_dict() if "lora" in n or "codes" in n]
    ours.save_pretrained(tmp_path)


def test_qlora_merges_onto_the_original_weights_on_request(tmp_path):
    _, plain = twins.pair()
    plain.save_pretrained(tmp_path / "base")
    asked = spec(targets=("q_proj", "down_proj"))
    _, ours = twins.pair()
    quantize_model(ours, ("q_proj", "up_proj"))
    attach(ours, asked), attach(plain, asked)
    for name, parameter in adapter_state(ours).items():
        parameter.set_value(paddle.randn(parameter.shape) * 0.1)
        adapter_state(plain)[name].set_value(parameter)
    ids = twins.ids()
    with pytest.raises(CheckpointError, match="complete safetensors"):
        merge(ours, onto=tmp_path)
    expected = our_logits(plain, ids)
    assert np.abs((our_logits(ours, ids) - expected).numpy()).max() > 0.1, "control: packed weights are others"
    merge(ours, onto=tmp_path / "base")
    twins.assert_close(our_logits(ours, ids), expected.numpy(), 1e-5, "merged logits")
