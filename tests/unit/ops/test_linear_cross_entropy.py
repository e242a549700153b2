"""The loss that never holds its logits is the plain one: values and gradients, against numpy in float64."""

import numpy as np
import paddle
import pytest
from twins import assert_close

from aquila_pd.configuration import AquilaConfig
from aquila_pd.modeling import AquilaForCausalLM, AquilaPretrainingCriterion
from aquila_pd.ops import linear_cross_entropy as cross_entropy
from aquila_pd.ops.linear_cross_entropy import linear_cross_entropy
from aquila_pd.utils.errors import AquilaError

N, D, V = 37, 24, 101
ROUNDING = 2e-6  # float32 sums of 101 products


@pytest.fixture
def numbers():
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape).astype("float32") for shape in ((N, D), (D, V)))
    return x, weight, rng.integers(0, V, N)


def in_float64(x, weight, labels):
    """Loss, gradient of x, gradient of the weight."""
    x, weight = x.astype("float64"), weight.astype("float64")
    z = x @ weight
    e = np.exp(z - z.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    every = np.arange(len(labels))
    losses = np.log(e.sum(-1)) + z.max(-1) - z[every, labels]
    p[every, labels] -= 1
    return losses.sum(), p @ weight.T, x.T @ p


def found(x, weight, labels, *, transposed=False, factor=1.0, frozen=()):
    """The same three; None for what gets no gradient."""
    x = paddle.to_tensor(x, stop_gradient="x" in frozen)
    weight = paddle.to_tensor(weight.T.copy() if transposed else weight, stop_gradient="weight" in frozen)
    loss = linear_cross_entropy(x, weight, paddle.to_tensor(labels), transposed=transposed)
    (loss * factor).backward()
    gradients = [None if tensor.grad is None else tensor.grad.numpy() for tensor in (x, weight)]
    if transposed and gradients[1] is not None:
        gradients[1] = gradients[1].T
    return float(loss), *gradients


@pytest.mark.parametrize("rows", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("transposed", [False, True])
def test_loss_and_gradients_are_those_of_float64(numbers, monkeypatch, rows, transposed):
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 4 * V * rows)
    for factor in (1.0, 0.25):
        loss, dx, dw = found(*numbers, transposed=transposed, factor=factor)
        right = in_float64(*numbers)
        assert loss == pytest.approx(right[0], rel=ROUNDING)
        assert_close(dx, right[1] * factor, ROUNDING, "x")
        assert_close(dw, right[2] * factor, 2 * ROUNDING, "weight")


def test_control_a_lost_block_or_a_label_beside_is_noticed(numbers, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 4 * V * 5)
    right = in_float64(*numbers)
    x, weight, labels = numbers
    assert abs(found(x, weight, (labels + 1) % V)[0] / right[0] - 1) > 100 * ROUNDING
    monkeypatch.setattr(cross_entropy, "_add_product", lambda total, x, part, transposed: x.t() @ part)
    assert np.abs(found(*numbers)[2] - right[2]).max() > 100 * ROUNDING


def test_what_is_frozen_gets_no_gradient_and_the_other_its_own(numbers):
    right = in_float64(*numbers)
    _, dx, dw = found(*numbers, frozen=["weight"])
    assert dw is None
    assert_close(dx, right[1], ROUNDING)
    _, dx, dw = found(*numbers, frozen=["x"])
    assert dx is None
    assert_close(dw, right[2], 2 * ROUNDING)


def test_without_a_gradient_there_is_the_same_loss_and_nothing_is_kept(numbers):
    x, weight, labels = (paddle.to_tensor(a) for a in numbers)
    weight.stop_gradient = False
    with paddle.no_grad():
        loss = linear_cross_entropy(x, weight, labels)
    assert loss.stop_gradient and float(loss) == pytest.approx(in_float64(*numbers)[0], rel=ROUNDING)


def test_huge_logits_have_their_exact_loss(numbers):
    """Paddle's own kernel stops at 64 for a label."""
    x, weight, labels = numbers
    right = in_float64(x * 100, weight, labels)
    assert right[0] / N > 100
    loss, dx, _ = found(x * 100, weight, labels)
    assert loss == pytest.approx(right[0], rel=ROUNDING)
    assert_close(dx, right[1], 1e-4)  # exp() of differences of numbers near 1000


@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("vocabulary", [7, V])
def test_nan_makes_the_loss_nan(numbers, where, vocabulary):
    x, weight, labels = numbers
    weight = weight[:, :vocabulary].copy()
    (x if where == "x" else weight)[3, 4] = np.nan
    assert np.isnan(found(x, weight, labels % vocabulary)[0])


def test_labels_outside_of_the_vocabulary_are_refused(numbers):
    x, weight, labels = (paddle.to_tensor(a) for a in numbers)
    for wrong in (-100, V):
        labels[3] = wrong
        with pytest.raises(AquilaError, match="the vocabulary has 101"):
            linear_cross_entropy(x, weight, labels)


# ------------------------------------------------------------------------------------------------ in the model


def gradients_of(tied: bool, pick) -> tuple[float, dict]:
    paddle.seed(0)
    sizes = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    model = AquilaForCausalLM(
        AquilaConfig(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, pad_token_id=None, **sizes)
    )
    rng = np.random.default_rng(1)
    ids, labels = rng.integers(0, V, [2, 9]), rng.integers(0, V, [2, 9])
    labels[0, 3:7] = labels[1, 0] = -100
    ids, labels = paddle.to_tensor(ids), paddle.to_tensor(labels)
    for _ in range(2):  # gradients add up
        loss = pick(model(ids, labels=labels, return_dict=True), labels)
        loss.backward()
    return float(loss), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_the_models_loss_is_the_criterions(tied, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 4 * V * 4)
    loss, gradients = gradients_of(tied, lambda output, labels: output.loss)
    plain, others = gradients_of(tied, lambda output, labels: AquilaPretrainingCriterion()(output.logits, labels))
    assert loss == pytest.approx(plain, rel=ROUNDING)
    assert gradients.keys() == others.keys()
    for name in others:
        assert_close(gradients[name], others[name], 1e-6, name)
