"""The model as a Paddle layer: masks, caches, outputs, recompute, resizing, classification, configuration."""

import numpy as np
import paddle
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification
from twins import BASE, assert_close, fill, ids, paddle_model, pair, shifted, torch_model

from aquila_pd import (
    AquilaConfig,
    AquilaForCausalLM,
    AquilaForSequenceClassification,
    AquilaModel,
    AquilaPretrainingCriterion,
)
from aquila_pd.model.kv_cache import KVCache
from aquila_pd.ops.attention_mask import causal_mask
from aquila_pd.utils.errors import AquilaError, ConfigError


@pytest.fixture
def model():
    return paddle_model(torch_model())


def tensor(array):
    return paddle.to_tensor(array)


# ------------------------------------------------------------------------------------------------ masks


def test_the_mask_is_the_drawing_in_its_docstring():
    keep = tensor([[False, False, True, True, True]])
    drawn = ["x....", ".x...", "..x..", "..xx.", "..xxx"]
    assert causal_mask(keep, 5)[0, 0].tolist() == [[c == "x" for c in row] for row in drawn]
    assert causal_mask(keep, 2)[0, 0].tolist() == [[c == "x" for c in row] for row in drawn[3:]]


@paddle.no_grad()
def test_a_four_dimensional_mask_is_final(model):
    """Two samples packed into one row: with a block mask and positions reset, each gives what it gives alone."""
    tokens = ids(1, 10)
    block = np.zeros([1, 1, 10, 10], dtype=bool)
    block[..., :4, :4] = np.tril(np.ones([4, 4]))
    block[..., 4:, 4:] = np.tril(np.ones([6, 6]))
    positions = tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    alone = [model(tensor(part))[0] for part in (tokens[:, :4], tokens[:, 4:])]
    expected = paddle.concat(alone, axis=1)
    additive = np.where(block, 0.0, np.finfo(np.float32).min).astype(np.float32)
    for mask in (block, block[:, 0], block.astype(np.int64), block.astype(np.float32), additive):
        found = model(tensor(tokens), attention_mask=tensor(mask), position_ids=positions)[0]
        assert_close(found, expected, 1e-5)
    with pytest.raises(AssertionError):
        assert_close(model(tensor(tokens), position_ids=positions)[0], expected, 1e-2)


def test_a_mask_of_the_wrong_length_is_refused(model):
    with pytest.raises(AquilaError, match=r"shape \[2, 5\]; expected \[2, 11\]"):
        model(tensor(ids()), attention_mask=paddle.ones([2, 5]))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones([2, 1, 11, 10], dtype=bool), r"shape \[2, 1, 11, 10\]"),
        (np.ones([11], dtype=bool), r"shape \[11\]"),
        (np.ones([2, 3, 11, 11], dtype=bool), r"shape \[2, 3, 11, 11\]"),
        (np.full([2, 1, 11, 11], -0.5, dtype=np.float32), "values from -0.5 to -0.5"),
        (np.zeros([2, 1, 11, 11], dtype=np.float32), "values from 0 to 0"),
        (np.linspace(0, 1, 242, dtype=np.float32).reshape([2, 1, 11, 11]), "values from 0 to 1"),
    ],
    ids=["keys", "1-D", "heads", "bias", "ambiguous", "weights"],
)
def test_a_mask_that_could_be_misread_is_refused(model, mask, message):
    with pytest.raises(AquilaError, match=message):
        model(tensor(ids()), attention_mask=tensor(mask))


@paddle.no_grad()
def test_a_full_mask_over_a_cache(model):
    tokens = tensor(ids(1, 10))
    expected = model(tokens, use_cache=False)[0][:, 6:]
    cache = model(tokens[:, :6], use_cache=True)[1]
    mask = paddle.tril(paddle.ones([10, 10], dtype="int64"))[6:].unsqueeze([0, 1])
    assert_close(model(tokens[:, 6:], attention_mask=mask, past_key_values=cache)[0], expected, 1e-5)


def test_no_row_is_nan_even_when_everything_is_padding(model):
    for shape in ([2, 11], [2, 11, 11]):
        logits = model(tensor(ids()), attention_mask=paddle.zeros(shape, dtype="int64"))[0]
        assert bool(paddle.isfinite(logits).all())


# ------------------------------------------------------------------------------------------------ cache


def test_cache_grows_and_keeps_what_it_held():
    rng = np.random.default_rng(0)
    whole = rng.standard_normal([2, 3, 300, 4]).astype("float32")
    cache, start = KVCache(1), 0
    for size in (1, 100, 27, 1, 129, 42):
        new = tensor(whole[:, :, start : start + size].swapaxes(1, 2))
        k, v = cache.append(0, new, -new)
        start += size
        assert (k.numpy()[:, :, :start] == whole[:, :, :start]).all()
        assert (v.numpy()[:, :, :start] == -whole[:, :, :start]).all()
        assert (k.numpy()[:, :, start:] == 0).all() and k.shape[2] == cache.capacity >= start
    assert cache.length == start == 300 and cache.capacity < 2 * 300
    assert cache[0][0].shape == [2, 300, 3, 4]


@paddle.no_grad()
def test_paddlenlps_tuple_cache_goes_in_and_comes_out(model):
    tokens = tensor(ids())
    expected = model(tokens)[0][:, 6:]
    ours = model(tokens[:, :6], use_cache=True)[1]
    as_tuple = ours.to_tuple()
    assert as_tuple[0][0].shape == [2, 6, 2, 4]  # [B, S, K, H], PaddleNLP's layout
    logits, cache = model(tokens[:, 6:], past_key_values=as_tuple, use_cache=True)
    assert isinstance(cache, tuple) and cache[1][1].shape == [2, 11, 2, 4]
    assert_close(logits, expected, 1e-5)
    assert ours.length == 6, "a tuple given in is not changed"


@paddle.no_grad()
def test_cache_reorders_rows(model):
    tokens = tensor(ids(3, 8))
    cache = model(tokens[:, :7], use_cache=True)[1]
    order = tensor([2, 0, 0])
    cache.reorder(order)
    found = model(paddle.index_select(tokens[:, 7:], order), past_key_values=cache, use_cache=True)[0]
    assert_close(found, paddle.index_select(model(tokens)[0][:, 7:], order), 1e-5)


# ---------------------------------------------------------------------------------------------- outputs


def test_tuple_and_dict_forms(model):
    tokens = tensor(ids())
    everything = dict(use_cache=True, output_hidden_states=True, output_attentions=True)
    loss, logits, cache, hidden, attentions = model(tokens, labels=tokens, **everything)
    named = model(tokens, labels=tokens, return_dict=True, **everything)
    assert float(loss) == float(named.loss) and (logits == named.logits).all()
    assert isinstance(cache, KVCache) and isinstance(named.past_key_values, KVCache)
    assert len(hidden) == len(named.hidden_states) == 3 and len(attentions) == len(named.attentions) == 2
    assert len(model(tokens, use_cache=False)) == 1
    assert_close(attentions[0].sum(axis=-1), np.ones([2, 8, 11]), 1e-5)


@paddle.no_grad()
def test_logits_of_the_last_positions_only(model):
    tokens = tensor(ids())
    assert_close(model(tokens, logits_to_keep=2)[0], model(tokens)[0][:, -2:], 1e-6)


@paddle.no_grad()
def test_embeddings_as_input(model):
    tokens = tensor(ids())
    embeds = model.aquila.embed_tokens(tokens)
    assert_close(model(inputs_embeds=embeds)[0], model(tokens)[0], 1e-6)
    for both in (dict(input_ids=tokens, inputs_embeds=embeds), {}):
        with pytest.raises(AquilaError, match="either input_ids or inputs_embeds"):
            model(**both)


# ------------------------------------------------------------------------------------------------- loss


def test_loss_is_the_mean_over_valid_labels():
    criterion = AquilaPretrainingCriterion()
    logits, labels = paddle.randn([2, 3, 7]), tensor([[1, -100, 3], [-100, -100, 6]])
    log_p = paddle.nn.functional.log_softmax(logits)
    expected = -(log_p[0, 0, 1] + log_p[0, 2, 3] + log_p[1, 2, 6]) / 3
    assert abs(float(criterion(logits, labels)) - float(expected)) < 1e-6
    assert float(criterion(logits, paddle.full([2, 3], -100))) == 0.0


@pytest.mark.parametrize("vocab", [7, 128])
def test_nan_logits_make_a_nan_loss(vocab):
    """Paddle's own cross-entropy gives log V for them on a CPU, the loss of a fresh model."""
    logits = paddle.randn([2, 3, vocab])
    logits[1, 2, 5] = float("nan")
    assert np.isnan(float(AquilaPretrainingCriterion()(logits, paddle.ones([2, 3], dtype="int64"))))


def test_pad_row_is_used_but_not_trained_through_the_embedding(model):
    tokens = ids()
    tokens[:, 4] = 0
    assert not np.allclose(model.aquila.embed(tensor(tokens))[0, 4].numpy(), 0), "Paddle's padding_idx gives zeros"
    model(tensor(tokens), labels=tensor(shifted(tokens)))[0].backward()
    gradient = model.aquila.embed_tokens.weight.grad.numpy()
    assert (gradient[0] == 0).all() and (gradient[tokens[0, 0]] != 0).any()


# -------------------------------------------------------------------------------------------- recompute


def test_recompute_gives_the_same_gradients_and_can_be_disabled(model):
    tokens, labels = tensor(ids()), tensor(shifted(ids()))

    def gradients():
        model.clear_gradients()
        loss = model(tokens, labels=labels)[0]
        loss.backward()
        return float(loss), {name: p.grad.numpy() for name, p in model.named_parameters()}

    model.train()
    plain_loss, plain = gradients()
    model.recompute_enable()
    assert model.aquila.enable_recompute
    calls = []
    handle = model.aquila.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    loss, found = gradients()
    assert len(calls) == 2, "the layer ran forward once more for the backward pass"
    with paddle.no_grad():
        running = float(model(tokens, labels=labels)[0])
    assert loss == running, "its first pass is that of a model that only runs, whose attention rounds otherwise"
    assert abs(loss - plain_loss) < 1e-6
    for name, gradient in plain.items():
        assert_close(found[name], gradient, 1e-6, name)
    model.recompute_disable()
    calls.clear()
    gradients()
    handle.remove()
    assert len(calls) == 1


def test_recompute_works_under_frozen_embeddings(model):
    """As LoRA trains: the first layer's input has no gradient, and every layer must be run again all the same."""
    tokens, labels = tensor(ids()), tensor(shifted(ids()))
    model.train()
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = "q_proj" not in name
    model(tokens, labels=labels)[0].backward()
    expected = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    assert len(expected) == 2
    model.clear_gradients()
    model.recompute_enable()
    calls = []
    for layer in model.aquila.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    model(tokens, labels=labels)[0].backward()
    assert len(calls) == 4
    for name, gradient in expected.items():
        assert_close(dict(model.named_parameters())[name].grad, gradient, 1e-6, name)


def test_what_recompute_cannot_do_is_refused(model):
    model.train()
    model.recompute_enable()
    with pytest.raises(AquilaError, match="cannot fill a cache"):
        model(tensor(ids()), use_cache=True)


def test_no_cache_is_made_where_nobody_generates(model):
    tokens = tensor(ids())
    assert len(model(tokens, labels=tokens)) == 2
    model.train()
    assert len(model(tokens)) == 1
    assert len(model(tokens, use_cache=True)) == 2


def test_combinations_without_meaning_are_refused(model):
    tokens = tensor(ids())
    with pytest.raises(AquilaError, match="logits_to_keep"):
        model(tokens, labels=tokens, logits_to_keep=1)
    with pytest.raises(AquilaError, match="2 pairs"):
        model(tokens, past_key_values=((None, None),))
    if paddle.device.get_device() == "cpu":
        model.to(dtype="bfloat16")
        with pytest.raises(AquilaError, match=r"no CPU kernels to compute in paddle\.bfloat16"):
            model(tokens)


# ----------------------------------------------------------------------------------------------- resize


@pytest.mark.parametrize("kind", ["gqa", "tied"])
@pytest.mark.parametrize("size", [120, 90])
def test_resize_token_embeddings(kind, size):
    model = paddle_model(torch_model(kind), kind)
    tokens = tensor(ids() % 89 + 1)
    with paddle.no_grad():
        before = model(tokens)[0]
        model.resize_token_embeddings(size)
        after = model(tokens)[0]
    n = min(size, 101)
    assert after.shape[-1] == size == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert_close(after[..., :n], before[..., :n], 1e-6)
    if size > 101:
        new = model.get_input_embeddings().weight[101:].numpy()
        assert 0.01 < new.std() < 0.03, "new rows are drawn like a new model's"
    model.train()
    model(tokens, labels=tokens)[0].backward()
    assert model.get_input_embeddings().weight.grad.shape[0] == size


# --------------------------------------------------------------------------------------- classification


def classifiers(**changes):
    fields = {**BASE, "num_labels": 3, **changes}
    torch.manual_seed(11)
    reference = LlamaForSequenceClassification(LlamaConfig(**fields, attn_implementation="eager")).eval()
    with torch.no_grad():
        for weight in reference.parameters():
            weight.copy_(0.25 * torch.randn_like(weight))
    model = AquilaForSequenceClassification(AquilaConfig(**fields))
    fill(model, reference.state_dict())
    model.eval()
    return reference, model


def test_sequence_classification_equals_torch():
    reference, model = classifiers()
    tokens, labels = ids(3, 9), np.array([2, 0, 1])
    tokens[1, 6:] = 0
    tokens[2, 2:] = 0
    keep = (tokens != 0).astype(np.int64)
    expected = reference(torch.tensor(tokens), attention_mask=torch.tensor(keep), labels=torch.tensor(labels))
    for mask in (tensor(keep), None):  # without a mask the pad id tells where a row ends
        loss, logits = model(tensor(tokens), attention_mask=mask, labels=tensor(labels), use_cache=False)
        assert_close(logits, expected.logits, 1e-5)
        assert abs(float(loss) - expected.loss.item()) < 1e-5
    loss.backward()
    assert model.score.weight.grad is not None


@pytest.mark.parametrize(
    ("changes", "labels", "dtype"),
    [
        (dict(num_labels=1), [0.5, -1.0], "float32"),
        (dict(num_labels=3), [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]], "float32"),
    ],
    ids=["regression", "several labels"],
)
def test_other_classification_problems_equal_torch(changes, labels, dtype):
    reference, model = classifiers(**changes)
    tokens, labels = ids(2, 6), np.array(labels, dtype=dtype)
    expected = reference(torch.tensor(tokens), labels=torch.tensor(labels)).loss
    loss = model(tensor(tokens), labels=tensor(labels))[0]
    assert abs(float(loss) - expected.item()) < 1e-5


def test_a_batch_without_a_way_to_know_its_ends_is_refused():
    _, model = classifiers(pad_token_id=None)
    with pytest.raises(AquilaError, match="needs an attention_mask or a pad_token_id"):
        model(tensor(ids()))


# ---------------------------------------------------------------------------------------- configuration


def test_huggingface_and_paddle_spellings_read_alike():
    hf = AquilaConfig.from_dict(
        {**BASE, "torch_dtype": "bfloat16", "rope_scaling": {"rope_type": "linear", "factor": 8}}
    )
    ours = AquilaConfig.from_dict({**BASE, "dtype": "bfloat16", "rope_scaling": {"type": "linear", "factor": 8.0}})
    assert hf == ours and hf.dtype == "bfloat16" and hf.head_dim == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden_act="gelu"), "gelu"),
        (dict(num_attention_heads=5), "num_attention_heads"),
        (dict(num_key_value_heads=3), "num_key_value_heads"),
        (dict(rope_scaling={"type": "longrope", "factor": 4.0}), "longrope"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(num_hidden_layer=2), "unknown key num_hidden_layer"),
        (dict(rope_parameters={"rope_type": "linear", "factor": 4.0}), "unknown key rope_parameters"),
        (dict(sliding_window=128), "sliding_window is 128"),
        (dict(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'"),
        (dict(rope_theta=0), "rope_theta is 0"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings is 'false'"),
        (dict(head_dim=16), "head_dim is 16"),
        (dict(attention_bias=True), "attention_bias is True"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        AquilaConfig(**{**BASE, **changes})


@pytest.mark.parametrize(("size", "billions"), [("7b", 7.3), ("34b", 33.9), ("70b", 70.1)])
def test_named_sizes_have_the_published_number_of_parameters(size, billions):
    from aquila_pd.architecture.weight_map import weights

    count = sum(int(np.prod(w.hf_shape)) for w in weights(AquilaConfig.named(size).dims))
    assert abs(count / 1e9 - billions) < 0.3
    with pytest.raises(ConfigError, match="Known: 7b, 34b, 70b"):
        AquilaConfig.named("8b")


def test_new_models_start_at_the_initializer_range():
    model = AquilaForCausalLM(AquilaConfig(**{**BASE, "initializer_range": 0.05, "intermediate_size": 500}))
    assert abs(float(model.aquila.layers[0].mlp.up_proj.weight.std()) - 0.05) < 0.002
    assert (model.aquila.norm.weight == 1).all()
    assert isinstance(model.aquila, AquilaModel) and model.base_model is model.aquila


def test_training_and_evaluation_agree():
    """There is no dropout anywhere: a model fresh from training answers the same in both modes."""
    _, model = pair()
    tokens = tensor(ids())
    model.train()
    trained = model(tokens)[0]
    model.eval()
    assert_close(trained, model(tokens, use_cache=False)[0].numpy(), 0.0)
