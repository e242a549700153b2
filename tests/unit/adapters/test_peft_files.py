"""Adapters on disk: ours in transformers + peft, peft's in ours, and files that are no adapter for this model."""

import json
import os

import numpy as np
import paddle
import pytest
import torch
import twins
from lora_twins import KINDS, our_logits, peft_model, spec, torch_logits
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from aquila_pd.adapters.lora import adapter_state, attach, load_adapter_state
from aquila_pd.adapters.peft_files import CONFIG, NOTES, TENSORS, load, open_adapter, read, save
from aquila_pd.quantization.nf4 import quantize_model
from aquila_pd.utils.errors import CheckpointError, OutputError

TARGETS = ("q_proj", "o_proj", "up_proj", "down_proj")


def adapted(asked):
    """Our model with random adapters."""
    _, model = twins.pair()
    attach(model, asked)
    for parameter in adapter_state(model).values():
        parameter.set_value(parameter * 0.8 + paddle.randn(parameter.shape) * 0.2)
    return model


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter of ours on two projections, and the model it is of."""
    model = adapted(spec(targets=("q_proj", "up_proj")))
    save(tmp_path / "adapter", model, spec(targets=("q_proj", "up_proj")), base="the base")
    return tmp_path / "adapter", model


def edit(folder, **changes) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


# ---------------------------------------------------------------------------------------------- to peft and back


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_ours_and_computes_the_same(kind, tmp_path):
    asked = spec(**KINDS[kind], targets=TARGETS)
    model = adapted(asked)
    save(tmp_path, model, asked, base="some/model")
    torch_one, _ = twins.pair()
    theirs = PeftModel.from_pretrained(torch_one, tmp_path)
    ids = twins.ids()
    twins.assert_close(torch_logits(theirs, ids), our_logits(model, ids).numpy(), 1e-4, "logits")
    assert not [n for n, p in theirs.named_parameters() if "lora" in n and not p.abs().sum()], "all were found"
    assert theirs.peft_config["default"].base_model_name_or_path == "some/model"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_ours_loads_pefts_and_computes_the_same(kind, dtype, tmp_path):
    asked = spec(**KINDS[kind], targets=TARGETS)
    torch_one, model = twins.pair()
    theirs = peft_model(torch_one, asked)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    theirs.save_pretrained(tmp_path)
    theirs.float()
    assert load(model, tmp_path) == asked
    ids = twins.ids()
    twins.assert_close(our_logits(model, ids), torch_logits(theirs, ids), 1e-4, "logits")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_comes_back_to_the_last_bit_and_saves_the_same_bytes(kind, tmp_path):
    asked = spec(**KINDS[kind], targets=TARGETS, alpha=6.5, dropout=0.1)
    model = adapted(asked)
    save(tmp_path / "one", model, asked)
    _, other = twins.pair()
    assert load(other, tmp_path / "one") == asked
    state = adapter_state(model)
    assert all((value.numpy() == state[name].numpy()).all() for name, value in adapter_state(other).items())
    load_adapter_state(other, read(tmp_path / "one"))
    save(tmp_path / "two", other, asked)
    for name in (CONFIG, TENSORS, NOTES):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_names_and_layout_in_the_file_are_pefts(saved):
    folder, model = saved
    found = load_file(folder / TENSORS)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    assert (found[name] == model.aquila.layers[1].mlp.up_proj.lora_B.numpy().T).all() and len(found) == 8


def test_control_a_factor_stored_the_other_way_round_is_noticed(saved):
    folder, model = saved
    tensors = load_file(folder / TENSORS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T.reshape(tensors[name].shape))  # the shape says nothing
    save_file(tensors, folder / TENSORS)
    _, other = twins.pair()
    load(other, folder)
    ids = twins.ids()
    with pytest.raises(AssertionError, match="differ"):
        twins.assert_close(our_logits(other, ids), our_logits(model, ids).numpy(), 1e-4)


def test_what_was_packed_is_remembered_and_a_difference_is_said(tmp_path, caplog):
    asked = spec(targets=("q_proj",))
    _, model = twins.pair()
    quantize_model(model, ("v_proj", "q_proj"))
    attach(model, asked)
    save(tmp_path, model, asked)
    assert open_adapter(tmp_path).packed == ("q_proj", "v_proj")
    _, same = twins.pair()
    quantize_model(same, ("q_proj", "v_proj"))
    load(same, tmp_path)
    assert "packed" not in caplog.text
    _, plain = twins.pair()
    load(plain, tmp_path)
    assert "was trained with q_proj, v_proj packed in NF4; this model has no weight" in caplog.text


def test_values_go_into_adapters_that_are_attached_already(saved):
    folder, model = saved
    _, other = twins.pair()
    attach(other, spec(targets=("q_proj", "up_proj"), dropout=0.3))
    parameters = {name: id(parameter) for name, parameter in adapter_state(other).items()}
    load(other, folder)
    assert {name: id(parameter) for name, parameter in adapter_state(other).items()} == parameters
    assert (
        other.aquila.layers[0].mlp.up_proj.lora_B.numpy() == model.aquila.layers[0].mlp.up_proj.lora_B.numpy()
    ).all()


# ------------------------------------------------------------------------------------------------ bad files


def test_everything_wrong_with_the_tensors_is_named_and_nothing_is_attached(saved):
    folder, _ = saved
    tensors = load_file(folder / TENSORS)
    prefix = "base_model.model.model.layers.0."
    del tensors[prefix + "self_attn.q_proj.lora_B.weight"]
    tensors[prefix + "mlp.up_proj.lora_A.weight"] = np.zeros((4, 31), np.float32)
    tensors[prefix.replace("0", "7") + "mlp.up_proj.lora_A.weight"] = np.zeros((4, 32), np.float32)
    save_file(tensors, folder / TENSORS)
    _, model = twins.pair()
    names = list(model.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load(model, folder)
    lines = str(caught.value).splitlines()[1:-1]
    assert [line.split()[:2] for line in lines] == [
        ["missing", prefix + "self_attn.q_proj.lora_B.weight"],
        ["unexpected", prefix.replace("0", "7") + "mlp.up_proj.lora_A.weight"],
        ["shape", prefix + "mlp.up_proj.lora_A.weight:"],
    ]
    assert list(model.state_dict()) == names


def test_a_projection_that_the_config_names_and_the_file_lacks_is_missed(saved):
    folder, _ = saved
    edit(folder, target_modules=["q_proj", "up_proj", "v_proj"])
    _, model = twins.pair()
    with pytest.raises(CheckpointError, match=r"missing     base_model\.model\.model\.layers\.0\.self_attn\.v_proj"):
        load(model, folder)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(bias="all"), "bias = 'all'"),
        (dict(peft_type="IA3"), "peft_type = 'IA3'"),
        (dict(init_lora_weights="pissa"), "init_lora_weights = 'pissa'"),
        (dict(rank_pattern={"q_proj": 8}), "rank_pattern = "),
        (dict(modules_to_save=["lm_head"]), "modules_to_save = "),
        (dict(layers_to_transform=[0]), "layers_to_transform = "),
        (dict(a_later_invention=3), "a_later_invention = 3"),
        (dict(target_modules=["q_proj", "lm_head"]), "target_modules has 'lm_head'"),
        (dict(target_modules=7), "target_modules is 7"),
        (dict(r="8"), "r is '8'"),
        (dict(lora_alpha=True), "alpha is True"),
        (dict(lora_dropout=1.0), "dropout is 1.0"),
        (dict(use_dora="yes"), "dora is 'yes'"),
    ],
)
def test_what_is_not_known_is_refused_by_name(saved, change, said):
    folder, _ = saved
    edit(folder, **change)
    with pytest.raises(CheckpointError) as caught:
        open_adapter(folder)
    assert said in str(caught.value)


def test_neutral_keys_of_any_version_are_fine(saved):
    folder, _ = saved
    edit(folder, corda_config=None, a_later_invention=False, loftq_config={}, target_modules=r".*\.(q|up)_proj")
    assert open_adapter(folder).spec == spec(targets=("q_proj", "up_proj"))


def test_names_and_dtypes_of_something_else_are_refused(saved):
    folder, _ = saved
    tensors = load_file(folder / TENSORS)
    save_file({**tensors, "lora_A.weight": np.zeros((2, 2), np.float32)}, folder / TENSORS)
    with pytest.raises(CheckpointError, match=r"unexpected  lora_A\.weight"):
        open_adapter(folder)
    save_file({name: value.astype(np.int8) for name, value in tensors.items()}, folder / TENSORS)
    with pytest.raises(CheckpointError, match="I8, not one of F32"):
        open_adapter(folder)
    (folder / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=f"{TENSORS} does not exist"):
        open_adapter(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(CheckpointError, match="holds no adapter"):
        open_adapter(folder)


# ------------------------------------------------------------------------------------------------ writing


def test_a_write_that_fails_leaves_no_adapter_and_no_parts(saved, monkeypatch):
    folder, model = saved

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        save(folder, model, spec(targets=("q_proj", "up_proj")))
    assert CONFIG not in os.listdir(folder) and not [name for name in os.listdir(folder) if "partial" in name]


def test_a_model_without_adapters_has_none_to_save(tmp_path):
    _, model = twins.pair()
    with pytest.raises(OutputError, match="no adapters"):
        save(tmp_path / "adapter", model, spec())
    assert not (tmp_path / "adapter").exists()
