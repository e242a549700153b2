"""The forms a CPU computes in, against the plain twins: odd sizes, many blocks, spare room, NaN, several threads."""

import numpy as np
import paddle
import pytest
from twins import assert_close, ids, paddle_model, torch_model

from aquila_pd import fusion_ops
from aquila_pd.ops import cpu, threads
from aquila_pd.ops.attention_mask import Mask, causal_mask
from aquila_pd.ops.rope import Angles

B, K, G, H = 2, 3, 2, 16


@pytest.fixture(params=[1, 2, 4])
def count(request):
    threads.use(request.param)
    yield request.param
    threads.use(1)


def normal(*shape: int, seed: int = 0):
    return paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape).astype("float32"))


def inputs(T: int, S: int):
    return normal(B, T, K * G, H), normal(B, K, S, H, seed=1), normal(B, K, S, H, seed=2)


def padded(T: int, S: int) -> Mask:
    return Mask(causal_mask(paddle.arange(S) >= paddle.to_tensor([[0], [3]]), T))


MASKS = {
    "none": lambda T, S: None,
    "padded": padded,
    "causal": lambda T, S: Mask.of_chunk(T, S, S),
    "room to spare": lambda T, S: Mask.of_chunk(T, S - 5, S),
    "one row for all": lambda T, S: Mask(padded(T, S).allowed[:, :, -1:]),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("T", "S"), [(1, 40), (37, 37), (37, 64), (16, 21)])
def test_attention_equals_the_plain_twin_in_few_and_in_many_blocks(monkeypatch, kind, T, S):
    S += 5 if kind == "room to spare" else 0
    q, k, v = inputs(T, S)
    expected = fusion_ops.attention(q, k, v, MASKS[kind](T, S)).numpy()
    with paddle.no_grad():
        assert_close(cpu.attention(q, k, v, MASKS[kind](T, S)), expected, 2e-6)
        monkeypatch.setattr(cpu, "SCORES", 1)  # blocks of 16 queries
        assert_close(cpu.attention(q, k, v, MASKS[kind](T, S)), expected, 2e-6)


def test_control_a_mask_whose_end_is_off_by_one_is_noticed():
    q, k, v = inputs(16, 40)
    right, wrong = Mask.of_chunk(16, 30, 40), Mask(Mask.of_chunk(16, 30, 40).allowed, end=29)
    with paddle.no_grad():
        expected = fusion_ops.attention(q, k, v, right).numpy()
        assert_close(cpu.attention(q, k, v, right), expected, 2e-6)
        with pytest.raises(AssertionError):
            assert_close(cpu.attention(q, k, v, wrong), expected, 1e-2)


@pytest.mark.parametrize("T", [1, 20])
def test_nan_stays_where_it_belongs(T):
    q, k, v = inputs(T, 32)
    q[0, T - 1] = float("nan")
    with paddle.no_grad():
        found = cpu.attention(q, k, v, Mask.of_chunk(T, 32, 32)).numpy()
    assert np.isnan(found[0, T - 1]).all()
    assert np.isfinite(found[0, : T - 1]).all() and np.isfinite(found[1]).all()


def test_what_is_hidden_has_no_weight_at_all():
    """Paddle's softmax leaves exp(-64) of it, which values of 1e30 would show."""
    q, k, v = inputs(8, 8)
    v[:, :, 7] = 1e30
    with paddle.no_grad():
        found = cpu.attention(q, k, v, Mask.of_chunk(8, 8, 8)).numpy()
    assert np.abs(found[:, :7]).max() < 10 < np.abs(found[:, 7]).max()


def test_rope_equals_the_plain_twin_forward_and_backward():
    def run(twin):
        q, k = normal(B, 7, 6, H), normal(B, 7, 2, H, seed=1)
        q.stop_gradient = k.stop_gradient = False
        angles = normal(B, 7, 1, H // 2, seed=2) * 5
        angles = paddle.concat([angles, angles], axis=-1)
        turned = twin(q, k, Angles(paddle.cos(angles), paddle.sin(angles)))
        loss = sum((x * normal(*x.shape, seed=3)).sum() for x in turned)
        return [*turned, *paddle.grad(loss, [q, k])]

    for found, expected in zip(run(cpu.rope), run(fusion_ops.rope), strict=True):
        assert_close(found, expected.numpy(), 1e-6)


def away_from_one(*shape):
    return normal(*shape, seed=4) + 3


ROUNDING = {"rms_norm": 4e-6, "swiglu": 1e-6}  # of values; two units of the largest of RMSNorm, which are above 16
OPERATIONS = {
    "rms_norm": lambda module: lambda x, weight: module.rms_norm(x, weight, 1e-2),
    "swiglu": lambda module: module.swiglu,
}
INPUTS = {
    "rms_norm": lambda: [normal(2, 5, 48), away_from_one(48)],
    "swiglu": lambda: [normal(2, 5, 48), normal(2, 5, 48, seed=1)],
}


def with_gradients(name: str, module, frozen: int | None = None, change=lambda inputs: None):
    """The operation's value and the gradients of its inputs, None for the frozen one."""
    given = INPUTS[name]()
    change(given)
    for number, tensor in enumerate(given):
        tensor.stop_gradient = number == frozen
    y = OPERATIONS[name](module)(*given)
    (y * normal(*y.shape, seed=5)).sum().backward()
    return [y.numpy(), *(None if tensor.grad is None else tensor.grad.numpy() for tensor in given)]


@pytest.mark.parametrize("frozen", [None, 0, 1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_by_hand_are_the_plain_twins(name, frozen):
    expected = with_gradients(name, fusion_ops, frozen)
    for found, right in zip(with_gradients(name, cpu, frozen), expected, strict=True):
        assert (found is None) == (right is None)
        if right is not None:
            assert_close(found, right, 3e-6)


@pytest.mark.parametrize("name", OPERATIONS)
def test_control_other_inputs_have_other_gradients(name):
    def change(inputs):
        inputs[0][1, 4, 47] += 0.5

    expected = with_gradients(name, fusion_ops)
    for found, right in zip(with_gradients(name, cpu, change=change), expected, strict=True):
        assert np.abs(found - right).max() > 1e-3


@pytest.mark.parametrize("name", OPERATIONS)
def test_without_gradients_the_value_is_the_plain_twins(name):
    with paddle.no_grad():
        expected = OPERATIONS[name](fusion_ops)(*INPUTS[name]()).numpy()
        assert_close(OPERATIONS[name](cpu)(*INPUTS[name]()), expected, ROUNDING[name])
    found = OPERATIONS[name](cpu)(*INPUTS[name]())  # frozen inputs: nothing to keep for a backward pass
    assert_close(found, expected, ROUNDING[name])
    assert found.stop_gradient


@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 5, 48), (600, 512)])  # alone, few, and enough for two threads
def test_rms_norm_without_paddles_kernel_is_the_plain_twin(monkeypatch, shape):
    """On a processor without AVX-512; everywhere the same."""
    monkeypatch.setattr(cpu, "HAS_KERNEL", False)
    monkeypatch.setattr(cpu, "fused_rms_norm", None)  # not called
    x, weight = normal(*shape), away_from_one(shape[-1])
    with paddle.no_grad():
        found, expected = (module.rms_norm(x, weight, 1e-2) for module in (cpu, fusion_ops))
        assert_close(found, expected.numpy(), 1e-6 * np.abs(expected.numpy()).max())
        assert np.abs((cpu.rms_norm(x, weight, 2e-2) - expected).numpy()).max() > 1e-3


def test_rows_are_lowered_in_place_exactly_as_by_a_subtraction():
    x, rows = normal(2, 3, 7), normal(2, 3, 1, seed=1)
    rows[0, 1] = float("inf")
    rows[1, 2] = float("nan")
    expected = (x - rows).numpy()
    found = cpu.less_rows_(x, rows)
    assert found is x
    np.testing.assert_array_equal(x.numpy(), expected)


@pytest.mark.parametrize("rows", [(1, 1), (1,), (1, 3), (2, 2), (3, 3)])
@pytest.mark.parametrize(("in_", "out"), [(32, 24), (30, 7), (9, 8)])
@paddle.no_grad()
def test_a_product_in_parts_is_the_product(count, monkeypatch, rows, in_, out):
    monkeypatch.setattr(cpu, "LARGE", 64)  # numbers: all but the smallest
    x, weight = normal(*rows, in_), normal(in_, out, seed=1)
    expected = x.numpy() @ weight.numpy()
    assert_close(cpu.product(x, weight), expected, 1e-5)
    assert cpu.product(x, weight).shape == [*rows, out]


@paddle.no_grad()
def test_there_are_as_many_parts_as_threads(count, monkeypatch):
    monkeypatch.setattr(cpu, "LARGE", 256)
    seen = []
    matmul = cpu._C_ops.matmul

    class Spy:
        def __getattr__(self, name):
            return getattr(paddle._C_ops, name)

        def matmul(self, x, y, *how):
            seen.append(x.shape)
            return matmul(x, y, *how)

    monkeypatch.setattr(cpu, "_C_ops", Spy())
    cpu.product(normal(1, 1, 32), normal(32, 8))
    cpu.product(normal(1, 3, 32), normal(32, 8))
    cpu.product(normal(1, 3, 32), normal(32, 7))  # a small weight
    cpu.product(normal(3, 3, 32), normal(32, 8))  # many rows
    one, three = ([1, 1, 32], [1, 3, 32]) if count == 1 else ([count, 1, 32 // count], [count, 3, 32 // count])
    products = [shape for shape in seen if shape != [count, 1]]  # not the sums of parts
    assert products == [one, three, [1, 3, 32], [3, 3, 32]]


def test_a_fused_model_says_the_same_with_any_number_of_threads(count):
    model = paddle_model(torch_model())
    tokens = paddle.to_tensor(ids()[:1])
    expected = model(tokens)[0].numpy()
    model.fuse_projections()
    with paddle.no_grad():
        _, cache = model(tokens[:, :-1], use_cache=True)
        last, _ = model(tokens[:, -1:], past_key_values=cache)
    assert_close(last[:, -1], expected[:, -1], 1e-5)


def test_one_thread_is_for_a_while(monkeypatch):
    said = []
    monkeypatch.setattr(threads.paddle.base.core, "set_num_threads", said.append)
    threads.use(3)
    with pytest.raises(KeyError), threads.one():
        raise KeyError
    assert said == [3, 1, 3] and threads.count() == 3
    with threads.one():
        with threads.one():
            pass
        assert said == [3, 1, 3, 1], "the inner one leaves it at one"
    assert said.pop() == 3 and said.pop() == 1
    threads.use(1)
    with threads.one():
        assert said == [3, 1, 3, 1]
    assert said == [3, 1, 3, 1]


def test_training_takes_the_plain_attention_and_running_the_other(monkeypatch):
    taken = []
    for module in (cpu, fusion_ops):
        function = module.attention

        def spy(*arguments, function=function, name=module.__name__):
            taken.append(name)
            return function(*arguments)

        monkeypatch.setattr(module, "attention", spy)
    twins = next(twins for twins in fusion_ops.TWINS if twins.name == "attention")
    twins = fusion_ops.replace(twins, plain=fusion_ops.attention, fused=cpu.attention)
    attention = fusion_ops._function(twins, fusion_ops.Choice("attention", "fused", ""), "cpu")
    q, k, v = inputs(4, 4)
    attention(q, k, v, None)
    with paddle.no_grad():
        attention(q, k, v, None)
    assert taken == ["aquila_pd.fusion_ops", "aquila_pd.ops.cpu"]
