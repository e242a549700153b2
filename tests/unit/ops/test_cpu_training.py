"""Attention with its gradient by hand is the plain twin: values and gradients."""

import numpy as np
import paddle
import pytest
from twins import assert_close

from aquila_pd import fusion_ops
from aquila_pd.ops import cpu_training, threads
from aquila_pd.ops.attention_mask import PackedMask

B, N, K, H = 2, 6, 2, 8
ROUNDING = 5e-6  # float32, values near 4, sums of at most 40 products in another order
ONE = [[1] * 40, [1] * 40]
SEVERAL = [[1] * 17 + [2] * 20 + [0] * 3, [1] * 3 + [2] + [3] * 36]


def both(function, segments):
    rng = np.random.default_rng(0)
    shapes = ([B, 40, N, H], [B, K, 40, H], [B, K, 40, H])
    given = [paddle.to_tensor(rng.standard_normal(s).astype("float32"), stop_gradient=False) for s in shapes]
    upstream = paddle.to_tensor(rng.standard_normal(shapes[0]).astype("float32"))
    y = function(*given, PackedMask(paddle.to_tensor(segments)))
    y.backward(upstream)
    return [y.numpy(), *(tensor.grad.numpy() for tensor in given)]


@pytest.mark.parametrize("segments", [ONE, SEVERAL])
@pytest.mark.parametrize("block", [7, 16, 40, 64])
def test_attention_and_its_gradients_are_the_plain_twins(monkeypatch, segments, block):
    monkeypatch.setattr(cpu_training, "BLOCK", block)
    right = both(fusion_ops.packed_attention, segments)
    for name, a, b in zip("yqkv", both(cpu_training.packed_attention, segments), right, strict=True):
        assert_close(a, b, ROUNDING, name)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_heads_are_shared_among_threads(monkeypatch, count):
    """3 threads have 2, 1 and 1 of the 4 heads of both rows; of 7 threads, 4."""
    monkeypatch.setattr(cpu_training, "BLOCK", 16)
    right = both(cpu_training.packed_attention, SEVERAL)
    threads.use(count)
    try:
        found = both(cpu_training.packed_attention, SEVERAL)
    finally:
        threads.use(1)
    for a, b in zip(found, right, strict=True):
        assert_close(a, b, 1e-6)


def test_a_tile_in_which_nobody_sees_anything_is_left_out(monkeypatch):
    monkeypatch.setattr(cpu_training, "BLOCK", 8)
    rows = [[1] * 8 + [2] * 12 + [3] * 12]
    tiles = cpu_training._tiles(PackedMask(paddle.to_tensor(rows)), N, K)
    assert [[tile.keys for tile in row] for row in tiles] == [[0], [1], [1, 2], [2, 3]]
    hidden = [[tile.bias is not None for tile in row] for row in tiles]
    assert hidden == [[True], [True], [True, True], [True, True]]
    tiles = cpu_training._tiles(PackedMask(paddle.ones([1, 20], "int64")), N, K)
    assert [[tile.bias is None for tile in row] for row in tiles] == [[False], [True, False], [True, True, False]]


def test_control_samples_that_see_each_other_are_noticed():
    wrong = both(cpu_training.packed_attention, ONE)
    for a, b in zip(wrong, both(fusion_ops.packed_attention, SEVERAL), strict=True):
        assert np.abs(a - b).max() > 1e4 * ROUNDING


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_stays_nan(which):
    given = [paddle.ones(s) for s in ([1, 5, N, H], [1, K, 5, H], [1, K, 5, H])]
    given[which][0, 1, 1] = float("nan")
    y = cpu_training.packed_attention(*given, PackedMask(paddle.ones([1, 5], "int64")))
    assert np.isnan(y.numpy()).any()


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none_and_the_others_theirs(frozen):
    """As with adapters on some of the projections, in the first layer."""

    def run(function):
        given = [paddle.to_tensor(x, stop_gradient=i == frozen) for i, x in enumerate(arrays)]
        function(*given, PackedMask(paddle.to_tensor(SEVERAL))).sum().backward()
        return [None if x.grad is None else x.grad.numpy() for x in given]

    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(s).astype("float32") for s in ([B, 40, N, H], [B, K, 40, H], [B, K, 40, H])]
    found, right = run(cpu_training.packed_attention), run(fusion_ops.packed_attention)
    assert [x is None for x in found] == [i == frozen for i in range(3)]
    for a, b in zip(found, right, strict=True):
        if b is not None:
            assert_close(a, b, ROUNDING)
