"""Adapters against peft on the same numbers: logits, gradients, training; and what putting on and merging promise."""

import numpy as np
import paddle
import pytest
import torch
import twins
from lora_twins import KINDS, our_logits, our_loss, pair, spec, theirs_as_ours, torch_logits

from aquila_pd.adapters import lora
from aquila_pd.adapters.lora import adapter_state, attach, load_adapter_state, merge
from aquila_pd.utils.errors import AquilaError, CheckpointError, ConfigError

# ---------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_pefts(kind):
    theirs, ours = pair(spec(**KINDS[kind]))
    ids = twins.ids()
    twins.assert_close(our_logits(ours, ids), torch_logits(theirs, ids), 1e-4, "logits")

    theirs.train(), ours.train()
    theirs(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss.backward()
    our_loss(ours, ids).backward()
    expected, state = theirs_as_ours(theirs, gradients=True), adapter_state(ours)
    assert expected.keys() == state.keys()
    for name, gradient in expected.items():
        twins.assert_close(state[name].grad, gradient, 1e-4 * np.abs(gradient).max(), f"gradient of {name}")


@pytest.mark.parametrize("broken", ["transposed A", "forgotten scaling"])
def test_control_broken_arithmetic_is_noticed(broken):
    theirs, ours = pair(spec(targets=("q_proj",)))
    for layer in (block.self_attn.q_proj for block in ours.aquila.layers):
        if broken == "forgotten scaling":
            layer.scaling = 1.0
        else:
            layer.lora_A.set_value(layer.lora_A.numpy().T.reshape(layer.lora_A.shape))
    ids = twins.ids()
    with pytest.raises(AssertionError, match="logits differ"):
        twins.assert_close(our_logits(ours, ids), torch_logits(theirs, ids), 1e-4, "logits")


def training_losses(theirs, ours, steps: int = 20) -> tuple[list[float], list[float]]:
    """Losses of the same AdamW on the same batches."""
    theirs.train(), ours.train()
    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    trained = [p for p in ours.parameters() if not p.stop_gradient]
    ours_optimizer = paddle.optimizer.AdamW(
        1e-2, beta1=0.9, beta2=0.95, epsilon=1e-8, parameters=trained, weight_decay=0.1
    )
    found = []
    for step in range(steps):
        ids = twins.ids(seed=step % 4)
        loss = theirs(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss
        ours_now = our_loss(ours, ids)
        found.append((loss.item(), ours_now.item()))
        loss.backward(), ours_now.backward()
        optimizer.step(), ours_optimizer.step()
        optimizer.zero_grad(), ours_optimizer.clear_grad()
    return tuple(map(list, zip(*found, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_of_training_have_pefts_losses(kind):
    theirs, ours = training_losses(*pair(spec(**KINDS[kind])))
    twins.assert_close(np.array(ours), np.array(theirs), 2e-4, "losses")
    assert ours[-1] < ours[0] - 0.5, "the optimizer did nothing"


def test_control_another_alpha_gives_other_losses():
    theirs, ours = pair(spec())
    for layer in (block.self_attn.q_proj for block in ours.aquila.layers):
        layer.scaling *= 1.1
    losses, our_losses = training_losses(theirs, ours)
    with pytest.raises(AssertionError, match="losses differ"):
        twins.assert_close(np.array(our_losses), np.array(losses), 2e-4, "losses")


class Masked(torch.nn.Module):
    """A dropout without chance: every third value goes, the others grow."""

    def forward(self, x):
        return x * torch.from_numpy(mask(x.shape[-1]))


def mask(width: int) -> np.ndarray:
    return np.float32(np.arange(width) % 3 != 0) * np.float32(1.5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_put_where_peft_puts_it(kind, monkeypatch):
    asked = spec(**KINDS[kind], dropout=0.3)
    theirs, ours = pair(asked)
    for module in theirs.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Masked()

    def dropout(x, rate, training):
        return x * paddle.to_tensor(mask(x.shape[-1])) if training else x

    monkeypatch.setattr(lora.F, "dropout", dropout)
    ids = twins.ids()
    still = our_logits(ours, ids)
    theirs.train(), ours.train()
    expected = torch_logits(theirs, ids)
    twins.assert_close(our_logits(ours, ids), expected, 1e-4, "logits")
    assert np.abs(still.numpy() - expected.numpy()).max() > 0.1, "control: the mask does something"


# ------------------------------------------------------------------------------------------------ putting on


def test_a_new_adapter_changes_nothing_and_freezes_the_rest():
    _, model = twins.pair()
    ids = twins.ids()
    before, names = our_logits(model, ids), set(model.state_dict())
    placed = attach(model, spec(targets=("q_proj", "down_proj")))
    assert placed[:2] == ["aquila.layers.0.self_attn.q_proj", "aquila.layers.0.mlp.down_proj"] and len(placed) == 4
    twins.assert_close(our_logits(model, ids), before.numpy(), 0)
    assert {name for name, p in model.named_parameters() if not p.stop_gradient} == set(adapter_state(model))
    assert set(model.state_dict()) - names == set(adapter_state(model)), "base weights keep their names"
    assert names <= set(model.state_dict())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_base_weights_still_load_under_their_names(kind):
    _, model = twins.pair()
    attach(model, spec(**KINDS[kind]))
    state = model.state_dict()
    weight = state["aquila.layers.1.mlp.up_proj.weight"] * 2
    model.set_state_dict({**state, "aquila.layers.1.mlp.up_proj.weight": weight})
    layer = model.aquila.layers[1].mlp.up_proj
    x = paddle.randn([3, 32])
    twins.assert_close(layer.base(x), paddle.matmul(x, weight).numpy(), 1e-6)


def test_the_first_values_are_pefts_kaiming_and_follow_the_seed():
    def values(seed: int):
        _, model = twins.pair()
        paddle.seed(seed)
        attach(model, spec(r=16))
        return {name: tensor.numpy() for name, tensor in adapter_state(model).items()}

    found, again, other = values(5), values(5), values(6)
    assert all((found[name] == again[name]).all() for name in found)
    A = {name: value for name, value in found.items() if name.endswith("lora_A")}
    assert all((value != other[name]).any() for name, value in A.items())
    assert all((value == 0).all() for name, value in found.items() if name.endswith("lora_B"))
    for name, value in A.items():  # uniform within 1 / sqrt(in): the bound is nearly reached and never passed
        bound = 1 / np.sqrt(value.shape[0])
        assert 0.95 * bound < np.abs(value).max() <= bound, name
        assert abs(value.std() - bound / np.sqrt(3)) < 0.1 * bound, name


def test_dropout_is_on_in_training_only_and_keeps_the_mean():
    _, model = twins.pair()
    attach(model, spec(dropout=0.5, targets=("q_proj",)))
    layer = model.aquila.layers[0].self_attn.q_proj
    layer.lora_B.set_value(paddle.randn(layer.lora_B.shape))
    x = paddle.randn([1, 32]).expand([4000, 32])
    plain = layer(x)
    layer.train()
    noisy = layer(x)
    assert float((noisy - plain).abs().max()) > 0.1
    error = (noisy.mean(axis=0) - plain[0]).abs().max() / noisy.std(axis=0).max()
    assert float(error) < 5 / np.sqrt(4000)  # five standard errors


@pytest.mark.parametrize("kind", KINDS)
def test_recompute_gives_the_same_gradients(kind):
    _, model = twins.pair()
    attach(model, spec(**KINDS[kind]))
    for name, parameter in adapter_state(model).items():
        if name.endswith("lora_B"):
            parameter.set_value(paddle.randn(parameter.shape) * 0.1)
    model.train()

    def gradients() -> dict:
        model.clear_gradients()
        our_loss(model, twins.ids()).backward()
        return {name: p.grad.numpy() for name, p in adapter_state(model).items()}

    plain = gradients()
    model.recompute_enable()
    again = gradients()
    for name, gradient in plain.items():
        twins.assert_close(again[name], gradient, 1e-6, name)
        assert np.abs(gradient).max() > 0, name


# ---------------------------------------------------------------------------------------------- what is refused


def test_an_unknown_target_is_named_with_the_right_ones():
    with pytest.raises(ConfigError, match=r"targets\.0: it is 'q_porj' and must be 'q_proj'"):
        spec(targets=("q_porj", "v_proj"))


def test_all_means_the_seven_projections():
    _, model = twins.pair()
    assert len(attach(model, spec(targets=("all",)))) == 2 * 7


def test_fused_projections_are_refused_with_what_to_do():
    _, model = twins.pair()
    model.fuse_projections()
    with pytest.raises(AquilaError, match=r"unfuse_projections\(\)"):
        attach(model, spec())
    model.unfuse_projections()
    attach(model, spec())
    with pytest.raises(AquilaError, match="cannot be fused"):
        model.fuse_projections()
    with pytest.raises(AquilaError, match="has adapters already"):
        attach(model, spec())


def test_settings_that_cannot_be_are_all_named():
    with pytest.raises(ConfigError) as caught:
        spec(r=0, alpha=float("nan"), dropout=1.0)
    assert all(f"  {name}: it is " in str(caught.value) for name in ("r", "alpha", "dropout"))


def test_a_state_that_does_not_fit_is_named_whole_and_nothing_is_loaded():
    _, model = twins.pair()
    attach(model, spec(targets=("q_proj",)))
    before = {name: tensor.numpy() for name, tensor in adapter_state(model).items()}
    state = {name: value + 1 for name, value in before.items()}
    q = "aquila.layers.0.self_attn.q_proj."
    del state[q + "lora_A"]
    state[q + "lora_B"] = np.zeros([4, 7], np.float32)
    state["aquila.layers.0.self_attn.k_proj.lora_A"] = np.zeros([32, 4], np.float32)
    with pytest.raises(CheckpointError) as caught:
        load_adapter_state(model, state)
    assert [line.split()[0] for line in str(caught.value).splitlines()[1:-1]] == ["missing", "unexpected", "shape"]
    assert all((tensor.numpy() == before[name]).all() for name, tensor in adapter_state(model).items())


def test_a_model_with_adapters_is_not_saved_as_a_plain_one(tmp_path):
    _, model = twins.pair()
    attach(model, spec())
    for safe in (True, False):
        with pytest.raises(AquilaError, match="not merged"):
            model.save_pretrained(tmp_path / "saved", safe_serialization=safe)
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.pdparams"))


# ---------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_plain_and_computes_the_same(kind, tmp_path):
    _, ours = pair(spec(**KINDS[kind], targets=("q_proj", "o_proj", "up_proj", "down_proj")))
    _, plain = twins.pair()
    ids = twins.ids()
    before = our_logits(ours, ids)
    assert len(merge(ours)) == 8
    twins.assert_close(our_logits(ours, ids), before.numpy(), 1e-5, "merged logits")
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert {type(layer) for layer in ours.sublayers()} == {type(layer) for layer in plain.sublayers()}
    ours.save_pretrained(tmp_path)
    with pytest.raises(AquilaError, match="no adapters"):
        merge(ours)


def test_a_half_precision_weight_is_rounded_once():
    linear = paddle.nn.Linear(32, 16, bias_attr=False)
    linear.to(dtype="bfloat16")
    holder = paddle.nn.Layer()
    holder.q_proj = linear
    weight = linear.weight.astype("float32").numpy()
    attach(holder, spec(targets=("q_proj",)))
    layer = holder.q_proj
    layer.lora_B.set_value(paddle.randn(layer.lora_B.shape))
    expected = weight + layer.scaling * layer.lora_A.numpy() @ layer.lora_B.numpy()
    assert layer.lora_A.dtype == paddle.float32, "adapters of a half-precision base are float32"
    merge(holder)
    assert holder.q_proj.weight.dtype == paddle.bfloat16
    rounded = paddle.to_tensor(expected).astype("bfloat16").astype("float32")
    twins.assert_close(holder.q_proj.weight.astype("float32"), rounded.numpy(), 0)
