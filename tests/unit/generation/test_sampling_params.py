"""SamplingParams: what has no meaning is refused by name, all at once; what has one is kept as it was given."""

import dataclasses
import math

import numpy as np
import pytest
from effort import tries
from hypothesis import given, settings
from hypothesis import strategies as st

from aquila_pd.generation import SamplingParams
from aquila_pd.utils.errors import AquilaError, GenerationError

NAN, INF = math.nan, math.inf

# name -> values without a meaning; the message has to say the name
WRONG = {
    "max_new_tokens": [0, -1, 1.0, 2.5, "8", None, True, NAN],
    "min_new_tokens": [-1, 1.5, "1", None, False],
    "temperature": [-0.1, NAN, INF, -INF, "1", None, True, [1.0], 1 + 0j],
    "top_k": [-1, 1.0, "5", None, True],
    "top_p": [0.0, -0.5, 1.0000001, 2, NAN, INF, "1", None, True],
    "min_p": [-0.01, 1.01, NAN, INF, "0", None, False],
    "repetition_penalty": [0.0, -1.0, NAN, INF, "1", None, True],
    "presence_penalty": [NAN, INF, -INF, "0", None, True],
    "frequency_penalty": [NAN, INF, -INF, "0", None, True],
    "seed": [-1, 2**64, 1.0, "1", True],
    "logprobs": [-1, 1.5, "2", True, False],
    "n": [0, -1, 1.0, "1", None, True],
    "order": ["", "Standard", "top_p", None, 1, ["standard"]],
}
RIGHT = {
    "max_new_tokens": [1, 10**9],
    "temperature": [0, 0.0, 1e-8, 1, 100.0],
    "top_k": [0, 1, 10**9],
    "top_p": [1e-6, 0.5, 1, 1.0],
    "min_p": [0, 0.0, 0.5, 1, 1.0],
    "repetition_penalty": [0.1, 1, 1.0, 10.0],
    "presence_penalty": [-2, -2.0, 0, 2.0],
    "frequency_penalty": [-2, -2.0, 0, 2.0],
    "logit_bias": [{}, {0: -100}, {5: 1.5, 7: 0}],
    "stop_ids": [(), (0,), (3, 4, 3)],
    "seed": [None, 0, 2**64 - 1],
    "logprobs": [None, 0, 20],
    "prompt_logprobs": [False, True],
    "n": [1, 128],
    "order": ["standard", "aquila"],
}


def refusal(**fields) -> str:
    with pytest.raises(GenerationError) as caught:
        SamplingParams(**fields)
    return str(caught.value)


def test_the_defaults_are_the_published_ones():
    assert dataclasses.asdict(SamplingParams()) == {
        "max_new_tokens": 256,
        "min_new_tokens": 0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "stop_ids": (),
        "seed": None,
        "logprobs": None,
        "prompt_logprobs": False,
        "n": 1,
        "order": "standard",
    }


def test_fields_are_given_by_name_and_never_change():
    with pytest.raises(TypeError):
        SamplingParams(10)
    params = SamplingParams(temperature=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.0
    assert hash(params) == hash(SamplingParams(temperature=0.5)) and params == SamplingParams(temperature=0.5)
    assert params != SamplingParams(temperature=0.6)
    assert SamplingParams(logit_bias={1: 1.0}) != SamplingParams(logit_bias={1: 2.0})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_without_meaning_is_refused_by_its_name_and_shown(name, value):
    said = refusal(**{name: value})
    assert f"  {name}: it is {value!r}" in said
    others = WRONG.keys() - {name}
    assert not any(f"  {other}: " in said for other in others)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RIGHT.items() for value in values])
def test_control_a_value_with_a_meaning_is_kept_as_it_is(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_every_finding_stands_in_one_message():
    fields = {name: values[-1] for name, values in WRONG.items()}
    said = refusal(**fields, stop_ids=(3, -4, "x"), logit_bias={-9: 1.0, 2: NAN, 6: 0.5})
    for name in WRONG:
        assert said.count(f"  {name}: it is ") == 1, name
    assert "-4" in said and "'x'" in said and "-9" in said and "nan" in said
    assert "stop_ids.0" not in said and "logit_bias.6" not in said  # those two are right


@pytest.mark.parametrize("stop", [-1, 1.0, "1", None, True, NAN])
def test_a_stop_id_that_is_no_token_id_is_shown(stop):
    assert f"  stop_ids.1: it is {stop!r}" in refusal(stop_ids=(1, stop))


@pytest.mark.parametrize("token", [-1, "1", 1.0, True])
def test_a_bias_of_what_is_no_token_id_is_shown(token):
    said = refusal(logit_bias={token: 1.0})
    assert "  logit_bias." in said and f".[key]: it is {token!r}" in said


@pytest.mark.parametrize("bias", [NAN, INF, None, True])
def test_a_bias_that_is_none_is_shown(bias):
    assert f"  logit_bias.7: it is {bias!r}" in refusal(logit_bias={7: bias})


def test_no_tokens_at_all_are_for_scoring_only():
    assert SamplingParams(max_new_tokens=0, prompt_logprobs=True).max_new_tokens == 0
    assert "max_new_tokens: it is 0" in refusal(max_new_tokens=0)
    assert "max_new_tokens: it is -1" in refusal(max_new_tokens=-1, prompt_logprobs=True)


def test_more_tokens_at_least_than_at_most_is_a_contradiction():
    said = refusal(min_new_tokens=6, max_new_tokens=5)
    assert "min_new_tokens" in said and "max_new_tokens" in said and "6" in said and "5" in said
    assert SamplingParams(min_new_tokens=5, max_new_tokens=5).min_new_tokens == 5


def test_a_contradiction_is_found_beside_other_findings():
    assert "min_new_tokens" in refusal(min_new_tokens=6, max_new_tokens=5, top_k=-1)


@pytest.mark.parametrize(
    "name", ["temperature", "presence_penalty", "frequency_penalty", "repetition_penalty", "top_p"]
)
def test_a_whole_number_too_large_for_a_float_is_refused_by_name(name):
    """JSON can carry one: 1 and four hundred zeros."""
    assert name in refusal(**{name: 10**400})


def test_a_bias_too_large_for_a_float_is_refused():
    assert "logit_bias" in refusal(logit_bias={3: 10**400})


@pytest.mark.parametrize("name", ["stop_ids", "logit_bias"])
@pytest.mark.parametrize("value", [5, None, 1.5], ids=repr)
def test_collections_of_the_wrong_kind_are_refused_by_name(name, value):
    assert name.removesuffix("_ids") in refusal(**{name: value})


@pytest.mark.parametrize("value", ["yes", None, 2, 0.0], ids=repr)
def test_whether_to_score_the_prompt_is_true_or_false(value):
    assert "prompt_logprobs" in refusal(prompt_logprobs=value)


@pytest.mark.parametrize(
    "ids", [[5, 6], {5, 6}, range(5, 7), dict.fromkeys((5, 6))], ids=lambda ids: type(ids).__name__
)
def test_stop_ids_in_any_collection_become_a_tuple(ids):
    params = SamplingParams(stop_ids=ids)
    assert isinstance(params.stop_ids, tuple) and sorted(params.stop_ids) == [5, 6]
    hash(params)


def test_stop_ids_out_of_a_generator_are_not_lost():
    assert SamplingParams(stop_ids=(i for i in (5, 6))).stop_ids == (5, 6)


def test_a_bias_changed_by_its_owner_afterwards_does_not_reach_checked_parameters():
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[-1] = NAN
    assert dict(params.logit_bias) == {3: 1.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", np.int64(5)),
        ("top_k", np.int32(5)),
        ("seed", np.uint64(2**64 - 1)),
        ("temperature", np.float32(0.5)),
        ("temperature", np.float64(0.5)),
        ("top_p", np.float16(0.5)),
        ("stop_ids", (np.int64(5),)),
        ("logit_bias", {np.int64(5): np.float32(0.5)}),
    ],
)
def test_a_numpy_number_is_the_same_number_or_refused_by_name(name, value):
    """Never a third thing, such as a warning, another number or another exception."""
    try:
        params = SamplingParams(**{name: value})
    except GenerationError as refused:
        assert name.removesuffix("_ids") in str(refused)
    else:
        assert getattr(params, name) == value


@pytest.mark.parametrize("value", [np.nan, np.float64("nan"), np.float32("inf"), np.bool_(True), np.array([1.0, 2.0])])
def test_a_numpy_value_without_meaning_is_refused_as_well(value):
    assert "temperature: it is" in refusal(temperature=value)
    assert "logit_bias.3: it is" in refusal(logit_bias={3: value})


def test_what_is_just_above_zero_is_allowed_or_the_message_does_not_say_above_zero():
    try:
        SamplingParams(top_p=1e-12, repetition_penalty=1e-12)
    except GenerationError as refused:
        assert "above 0 " not in str(refused) and "above 0;" not in str(refused)


def test_a_hostile_value_is_shown_cut_and_escaped():
    said = refusal(order="\x1b[2J" + "x" * 100_000)
    assert "\x1b" not in said and len(said) < 5000


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3), st.lists(st.integers())
)


@settings(max_examples=tries(66, 200), deadline=None, derandomize=True, database=None)
@given(fields=st.dictionaries(st.sampled_from([*WRONG]), ANYTHING, max_size=6))
def test_whatever_is_given_there_are_parameters_or_a_named_error(fields):
    try:
        params = SamplingParams(**fields)
    except AquilaError as refused:
        assert any(name in str(refused) for name in fields)
    else:
        assert params.max_new_tokens >= 1 and params.n >= 1 and params.temperature >= 0 and 0 < params.top_p <= 1


# ------------------------------------------------------------------------------ one place for a sampling parameter


def test_a_described_field_is_an_option_and_a_key_of_requests():
    """A new parameter is a field, its use in the sampler and a key of the protocol; nothing else lists it."""
    import argparse

    from aquila_pd.chat.options import add_sampling, sampling_of
    from aquila_pd.generation.sampling_params import described
    from aquila_pd.serving.protocol import Asked

    assert {"temperature", "top_k", "min_p", "repetition_penalty"} <= set(described()) <= set(Asked.model_fields)
    parser = argparse.ArgumentParser()
    add_sampling(parser)
    parser.add_argument("--seed", type=int)
    given_values = {name: kind(1) for name, (kind, _) in described().items()}
    words = [word for name, value in given_values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    params = sampling_of(parser.parse_args(words))
    assert {name: getattr(params, name) for name in given_values} == given_values
    plain = sampling_of(parser.parse_args([]))
    assert (plain.temperature, plain.top_k, plain.top_p, plain.min_p) == (1.0, 15, 0.9, 0.0), "BAAI's own"


def test_numbers_of_a_request_reach_the_engine_under_their_own_names():
    from aquila_pd.generation.sampling_params import described
    from aquila_pd.serving.protocol import Asked
    from aquila_pd.serving.sampling import sampling_params

    def made(**asked):
        more = dict(stop_ids=(), max_new_tokens=5, vocab_size=10, logprobs=None)
        return sampling_params(Asked.model_validate(asked), **more)

    values = {name: kind(1) for name, (kind, _) in described().items()}
    assert {name: getattr(made(**values), name) for name in values} == values
    assert made(**dict.fromkeys(values)) == made(), "null is as good as left out"
    assert (made(top_k=-1).top_k, made(top_p=0).top_p) == (0, 1e-9)
