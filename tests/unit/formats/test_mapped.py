"""Weights read from files: mapped or converted, never shared with what is on the disk; joined while they are read."""

import shutil

import ml_dtypes
import numpy as np
import paddle
import pytest
from twins import assert_close, ids, paddle_model, torch_model

from aquila_pd import AquilaForCausalLM
from aquila_pd.formats.dtypes import DTYPES
from aquila_pd.formats.mapped import BLOCK, Maps, empty, read_into
from aquila_pd.formats.safetensors import read_layout, save_tensors, view
from aquila_pd.ops.fused_linear import FusedLinear

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


def stored(folder, array, name="w"):
    """One tensor written into a folder, as a file says where it is."""
    folder.mkdir(exist_ok=True)
    save_tensors(folder, [("norm", np.ones(16, np.float32)), (name, array)])
    return read_layout(folder)[name]


@pytest.fixture
def folder(tmp_path):
    paddle_model(torch_model()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tokens():
    return paddle.to_tensor(ids())


def mapped(model) -> list[bool]:
    """Of each parameter, whether it lies in a file of the process's list of maps."""
    with open("/proc/self/maps") as file:
        lines = [line.split() for line in file if ".safetensors" in line]
    areas = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    return [any(low <= parameter.data_ptr() < high for low, high in areas) for parameter in model.parameters()]


# ------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("tag", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("wanted", [F32, BF16, np.dtype(np.float16)], ids=str)
def test_blocks_are_converted_as_the_whole_is(tmp_path, tag, wanted):
    rows = 3 * BLOCK // (64 * DTYPES[tag].itemsize) + 5  # several blocks, the last one short
    values = np.random.default_rng(0).standard_normal([rows, 64]) * 100
    values[7] = [*[np.inf, -np.inf, np.nan, 1e38, -0.0, 1e-40], *values[7, 6:]]
    with np.errstate(over="ignore"):
        info = stored(tmp_path / tag, values.astype(DTYPES[tag]))
        expected = np.array(view(info)).astype(wanted)
    out = empty(info.shape, wanted)
    read_into(info, out)
    np.testing.assert_array_equal(out.astype(F32), expected.astype(F32))
    assert out.ctypes.data % 64 == 0


def test_columns_of_a_larger_matrix_are_read_into(tmp_path):
    values = np.random.default_rng(0).standard_normal([700, 600]).astype(BF16)
    whole = np.full([700, 1000], 7.0, F32)
    read_into(stored(tmp_path, values), whole[:, 300:900])
    np.testing.assert_array_equal(whole[:, 300:900], values.astype(F32))
    assert (whole[:, :300] == 7).all() and (whole[:, 900:] == 7).all()


def test_a_file_cut_off_since_its_header_was_read_is_an_error(tmp_path):
    info = stored(tmp_path, np.ones([100, 16], np.float32))
    info.file.write_bytes(info.file.read_bytes()[:-64])
    with pytest.raises(OSError, match="cut off while w was read"):
        read_into(info, empty(info.shape, F32))
    with pytest.raises(OSError, match="cut off while w was read"):
        Maps().array(info)


def test_only_aligned_values_of_the_same_dtype_are_mapped(tmp_path):
    info = stored(tmp_path, np.ones([100, 16], np.float32))
    assert Maps.fits(info, F32)
    assert not Maps.fits(info, BF16)
    save_tensors(tmp_path, [("norm", np.ones(3, np.float32)), ("w", np.ones([100, 16], np.float32))])
    assert not Maps.fits(read_layout(tmp_path)["w"], F32)


# ------------------------------------------------------------------------------------------------- models


def test_float32_weights_are_mapped_and_converted_ones_are_not(folder):
    assert any(mapped(AquilaForCausalLM.from_pretrained(folder)))
    assert not any(mapped(AquilaForCausalLM.from_pretrained(folder, dtype="bfloat16")))


def test_weights_mapped_read_and_read_before_are_the_same(folder, tokens, monkeypatch):
    """The plain way, one copy out of a view of the file, beside the two others."""
    expected = {name: np.array(view(info)) for name, info in read_layout(folder).items()}
    for fits in (Maps.fits, lambda info, dtype: False):
        monkeypatch.setattr(Maps, "fits", staticmethod(fits))
        for name, parameter in AquilaForCausalLM.from_pretrained(folder).state_dict().items():
            np.testing.assert_array_equal(parameter.numpy(), expected[name], err_msg=name)


def test_training_a_mapped_model_never_reaches_its_file(folder, tokens):
    before = (folder / "model.safetensors").read_bytes()
    model, other = AquilaForCausalLM.from_pretrained(folder), AquilaForCausalLM.from_pretrained(folder)
    expected = other(tokens)[0]
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=model.parameters())
    model(tokens, labels=tokens)[0].backward()
    optimizer.step()
    assert any(mapped(model)), "or this shows nothing: the optimizer writes into the map"
    with pytest.raises(AssertionError):
        assert_close(model(tokens)[0], expected, 1e-3)
    assert_close(other(tokens)[0], expected, 0.0)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_model_is_saved_where_it_was_loaded_from(folder, tokens, size):
    model = AquilaForCausalLM.from_pretrained(folder)
    with paddle.no_grad():
        model.lm_head.weight.set_value(model.lm_head.weight * 2)
    expected = model(tokens)[0]
    model.save_pretrained(folder, max_shard_size=size)
    assert_close(model(tokens)[0], expected, 0.0)
    assert_close(AquilaForCausalLM.from_pretrained(folder)(tokens)[0], expected, 0.0)


def test_a_model_outlives_its_folder(folder, tokens):
    model = AquilaForCausalLM.from_pretrained(folder)
    expected = model(tokens)[0]
    shutil.rmtree(folder)
    assert_close(model(tokens)[0], expected, 0.0)


@pytest.mark.parametrize("half", [False, True])
def test_projections_joined_while_read_are_those_joined_afterwards(folder, tokens, half):
    if half:
        AquilaForCausalLM.from_pretrained(folder, dtype="bfloat16").save_pretrained(folder)
    plain = AquilaForCausalLM.from_pretrained(folder)
    model = AquilaForCausalLM.from_pretrained(folder, fused=True)
    found = {name: layer for name, layer in model.named_sublayers() if isinstance(layer, FusedLinear)}
    assert len([layer for layer in found.values() if len(layer.names) > 1]) == 4, "q/k/v and gate/up of two layers"
    assert_close(model(tokens)[0], plain(tokens)[0], 1e-5)
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    for name, parameter in plain.state_dict().items():
        np.testing.assert_array_equal(state[name].numpy(), parameter.numpy(), err_msg=name)
    plain.fuse_projections()
    assert found.keys() == {name for name, layer in plain.named_sublayers() if isinstance(layer, FusedLinear)}
    for name, layer in plain.named_sublayers():
        if isinstance(layer, FusedLinear):
            assert vars(found[name]).keys() == vars(layer).keys()
            assert found[name].weight.stop_gradient == layer.weight.stop_gradient
            assert (found[name].names, found[name].widths) == (layer.names, layer.widths)
            np.testing.assert_array_equal(found[name].weight.numpy(), layer.weight.numpy())
    model.unfuse_projections()
    assert_close(model(tokens)[0], plain(tokens)[0], 1e-5)
