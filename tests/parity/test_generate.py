"""PaddleNLP's generate() on Aquila equals Hugging Face's, in every form an input can take."""

import numpy as np
import paddle
import pytest
import torch
from twins import KINDS, assert_close, ids, paddle_model, pair, torch_model

from aquila_pd.ops.fused_linear import FusedLinear
from aquila_pd.utils.errors import GenerationError

NEW = 12


@pytest.fixture(scope="module")
def models():
    return pair("gqa")


def hf_greedy(reference, tokens, **kwargs):
    kwargs = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, **kwargs}
    tokens = torch.tensor(np.asarray(tokens))
    with torch.no_grad():
        return reference.generate(tokens, do_sample=False, **kwargs)[:, tokens.shape[1] :].numpy()


def greedy(model, tokens=None, **kwargs):
    kwargs = {"max_new_tokens": NEW, **kwargs}
    tokens = None if tokens is None else paddle.to_tensor(tokens)
    return model.generate(tokens, **kwargs)[0].numpy()


@pytest.fixture
def endless(models):
    """A model without an end token, so that every run is NEW tokens long."""
    _, model = models
    before = model.config.eos_token_id, model.generation_config.eos_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    yield model
    model.config.eos_token_id, model.generation_config.eos_token_id = before


PROMPT = ids(2, 6)
LEFT_PADDED = np.where(np.arange(6)[None] < np.array([[0], [3]]), 0, PROMPT)
KEEP = (LEFT_PADDED != 0).astype(np.int64)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_without_a_mask(models, endless, use_cache):
    expected = hf_greedy(models[0], PROMPT)
    assert (greedy(endless, PROMPT, use_cache=use_cache) == expected).all()


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize(
    "mask", [KEEP, KEEP.astype(bool), KEEP.astype("float32"), None], ids=["int", "bool", "float", "none"]
)
def test_left_padding_with_and_without_a_mask(models, endless, mask, use_cache):
    expected = hf_greedy(models[0], LEFT_PADDED, attention_mask=torch.tensor(KEEP))
    mask = {} if mask is None else {"attention_mask": paddle.to_tensor(mask)}
    assert (greedy(endless, LEFT_PADDED, use_cache=use_cache, **mask) == expected).all()


def test_control_a_mask_that_keeps_the_padding_changes_the_ids(models, endless):
    expected = hf_greedy(models[0], LEFT_PADDED, attention_mask=torch.tensor(KEEP))
    assert (greedy(endless, LEFT_PADDED, attention_mask=paddle.ones([2, 6], dtype="int64")) != expected).any()


def test_a_one_token_prompt(models, endless):
    assert (greedy(endless, PROMPT[:, :1]) == hf_greedy(models[0], PROMPT[:, :1])).all()


def test_int32_ids(models, endless):
    assert (greedy(endless, PROMPT.astype("int32")) == hf_greedy(models[0], PROMPT)).all()


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
def test_embeddings_as_input(models, endless, use_cache, padded):
    tokens, keep = (LEFT_PADDED, KEEP) if padded else (PROMPT, np.ones_like(PROMPT))
    embeds = endless.aquila.embed_tokens(paddle.to_tensor(tokens))
    mask = {"attention_mask": paddle.to_tensor(keep)} if padded else {}
    expected = hf_greedy(models[0], tokens, attention_mask=torch.tensor(keep))
    assert (greedy(endless, inputs_embeds=embeds, use_cache=use_cache, **mask) == expected).all()


def test_positions_given_by_hand(models, endless):
    positions = paddle.to_tensor(np.where(KEEP, KEEP.cumsum(-1) - 1, 1))
    found = greedy(endless, LEFT_PADDED, attention_mask=paddle.to_tensor(KEEP), position_ids=positions)
    assert (found == hf_greedy(models[0], LEFT_PADDED, attention_mask=torch.tensor(KEEP))).all()


def test_longer_than_the_first_cache(models, endless):
    """More tokens than one allocation holds, far past max_position_embeddings."""
    expected = hf_greedy(models[0], PROMPT[:1], max_new_tokens=150)
    assert (greedy(endless, PROMPT[:1], max_new_tokens=150) == expected).all()


@pytest.mark.parametrize("minimum", [0, 1, 9])
def test_several_end_tokens_and_a_minimum_of_new_tokens(models, minimum):
    reference, model = models
    free = hf_greedy(reference, PROMPT)
    ends = [int(free[0, 3]), int(free[1, 5])]  # both appear on the greedy path
    expected = hf_greedy(reference, PROMPT, eos_token_id=ends, min_new_tokens=minimum)
    found = greedy(model, PROMPT, eos_token_id=ends, min_new_tokens=minimum)
    assert found.shape == expected.shape and (found == expected).all()


def test_rows_that_ended_are_filled_with_pad(models):
    reference, model = models
    end = int(hf_greedy(reference, PROMPT)[0, 2])
    assert (greedy(model, PROMPT, eos_token_id=end) == hf_greedy(reference, PROMPT, eos_token_id=end)).all()


def test_temperature_zero_is_greedy(models, endless):
    expected = hf_greedy(models[0], PROMPT)
    for how in (dict(do_sample=True), dict(decode_strategy="sampling"), {}):
        assert (greedy(endless, PROMPT, temperature=0.0, **how) == expected).all()


def test_sampling_follows_its_seed_and_top_k_of_one_is_greedy(models, endless):
    def sampled(seed, **kwargs):
        paddle.seed(seed)
        return greedy(endless, PROMPT, do_sample=True, temperature=2.0, **kwargs)

    assert (sampled(1) == sampled(1)).all()
    assert (sampled(1) != sampled(2)).any()
    assert (sampled(1, top_k=1) == hf_greedy(models[0], PROMPT)).all()
    assert sampled(1, num_return_sequences=3).shape == (6, NEW)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_beams_with_our_cache_equal_beams_without(models, endless, use_cache):
    found = greedy(endless, LEFT_PADDED, num_beams=4, use_cache=use_cache)
    assert found.shape == (2, NEW)
    # Length penalty 0 leaves the sum of log probabilities, where PaddleNLP's and HF's scores agree.
    expected = hf_greedy(models[0], LEFT_PADDED, num_beams=4, length_penalty=0.0, attention_mask=torch.tensor(KEEP))
    assert (greedy(endless, LEFT_PADDED, num_beams=4, length_penalty=0.0, use_cache=use_cache) == expected).all()


def test_scores_are_returned_beside_the_ids(models):
    found, scores = models[1].generate(paddle.to_tensor(PROMPT), max_new_tokens=3)
    assert found.shape == [2, 3] and scores.shape == [2, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("how", [{}, dict(do_sample=True), dict(num_beams=2)], ids=["greedy", "sampling", "beams"])
def test_logits_that_are_no_numbers_raise_a_named_error(bad, how):
    model = paddle_model(torch_model())
    weight = model.lm_head.weight.numpy()
    weight[:, 40] = bad
    model.lm_head.weight.set_value(weight)
    with pytest.raises(GenerationError, match="NaN or infinite logits for row 0"):
        model.generate(paddle.to_tensor(PROMPT), max_new_tokens=3, **how)


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_a_nan_anywhere_in_attention_reaches_the_logits(part):
    """Paddle's CPU softmax turns NaN scores into ordinary weights."""
    model = paddle_model(torch_model())
    weight = getattr(model.aquila.layers[0].self_attn, part).weight
    damaged = weight.numpy()
    damaged[3, 2] = float("nan")
    weight.set_value(damaged)
    with pytest.raises(GenerationError, match="NaN or infinite logits"):
        model.generate(paddle.to_tensor(PROMPT), max_new_tokens=2)


def test_an_unknown_parameter_is_named(models):
    with pytest.raises(GenerationError, match="knows no max_tokens"):
        models[1].generate(paddle.to_tensor(PROMPT), max_tokens=3)


def test_fused_projections_generate_the_same(models, endless):
    endless.fuse_projections()
    assert any(isinstance(layer, FusedLinear) for layer in endless.sublayers())
    try:
        assert (greedy(endless, PROMPT) == hf_greedy(models[0], PROMPT)).all()
    finally:
        endless.unfuse_projections()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind):
    """Prompts shorter than max positions: beyond them dynamic scaling has as many answers as caches."""
    reference = torch_model(kind)
    model = paddle_model(reference, kind)
    assert (greedy(model, PROMPT) == hf_greedy(reference, PROMPT, eos_token_id=100)).all()


def test_control_wrong_weights_change_the_ids(models, endless):
    expected = hf_greedy(models[0], PROMPT)
    weight = endless.aquila.layers[1].mlp.down_proj.weight
    right = weight.numpy()
    weight.set_value(right * 0.5)
    try:
        assert (greedy(endless, PROMPT) != expected).any()
    finally:
        weight.set_value(right)


def test_a_prefix_cache_with_more_than_one_token_behind_it(models, endless):
    with paddle.no_grad():
        cache = endless(paddle.to_tensor(PROMPT[:, :3]), use_cache=True)[1]
    assert (greedy(endless, PROMPT, past_key_values=cache) == hf_greedy(models[0], PROMPT)).all()


def test_lists_and_arrays_as_ids(models, endless):
    expected = hf_greedy(models[0], PROMPT)
    for given in (PROMPT, PROMPT.tolist()):
        assert (endless.generate(given, max_new_tokens=NEW)[0].numpy() == expected).all()


@pytest.mark.parametrize(
    ("tokens", "how", "message"),
    [
        (PROMPT[0], {}, r"shape \[6\]"),
        (PROMPT[:, :0], {}, r"shape \[2, 0\]"),
        (PROMPT, dict(max_new_tokens=0), "max_new_tokens is 0"),
        (PROMPT, dict(temperature=-1.0), "temperature is -1.0"),
        (PROMPT, dict(num_beams=2, eos_token_id=[100, 3]), "knows one end token"),
        (PROMPT, dict(attention_mask=paddle.ones([2, 1, 6, 6])), "not 4-D"),
    ],
    ids=["1-D", "empty", "no tokens", "negative", "beams", "mask"],
)
def test_requests_without_meaning_are_refused(models, tokens, how, message):
    with pytest.raises(GenerationError, match=message):
        models[1].generate(paddle.to_tensor(tokens), **how)


def test_the_prompt_is_run_once_and_each_step_one_token(models):
    _, model = models
    widths = []
    handle = model.aquila.layers[0].register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    first = greedy(model, PROMPT, max_new_tokens=5, min_new_tokens=5)
    handle.remove()
    assert widths == [6, 1, 1, 1, 1]
    assert_close(model(paddle.to_tensor(PROMPT))[0][:, -1].argmax(-1), first[:, 0], 0)
