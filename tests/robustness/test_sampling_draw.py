"""From a distribution to a token: penalties and bias, the draw itself, log-probabilities, what is no number."""

import numpy as np
import pytest
import torch
from generation_reference import adjusted, log_softmax, probabilities, row_of, sequence_of, unless_refused
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers.generation import logits_process as theirs

from aquila_pd.generation import SamplingParams, Sequence, sampler
from aquila_pd.utils.errors import GenerationError

ALMOST_ONE = np.nextafter(1.0, 0.0)

# ------------------------------------------------------------------------------------------ penalties and bias


def test_repetition_penalty_is_transformers_over_prompt_and_answer():
    logits = row_of("ordinary", 200, seed=4)
    prompt, tokens = [5, 9, 9, 120], [7, 5, 199]
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.4)(
        torch.tensor([prompt + tokens]), torch.tensor(logits)[None]
    )[0].numpy()
    found = sampler.adjusted(logits, sequence_of(SamplingParams(repetition_penalty=1.4), prompt, tokens))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found != logits).sum() == len({*prompt, *tokens})


def test_presence_counts_once_and_frequency_each_time_and_the_prompt_never():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    found = sampler.adjusted(np.zeros(6, dtype=np.float32), sequence_of(params, [0, 1, 1], [1, 3, 3, 3, 5]))
    assert found.tolist() == [0, -0.75, 0, -1.25, 0, -0.75]


def test_negative_penalties_encourage():
    params = SamplingParams(presence_penalty=-1.0, frequency_penalty=-0.5, repetition_penalty=0.5)
    logits = np.array([2.0, -2.0, 1.0], dtype=np.float32)
    # seen 0 and 1: 2 / .5 and -2 * .5; generated 1 twice: + 1 + 2 * .5
    assert sampler.adjusted(logits, sequence_of(params, [0], [1, 1])).tolist() == [4.0, 1.0, 1.0]


def test_bias_is_added_and_may_decide():
    logits = np.array([1.0, 5.0, 2.0], dtype=np.float32)
    params = SamplingParams(temperature=0, logit_bias={1: -100, 2: 1.5})
    assert sampler.adjusted(logits, sequence_of(params)).tolist() == [1.0, -95.0, 3.5]
    assert sampler.choose(logits, sequence_of(params)) == 2
    assert sampler.choose(logits, sequence_of(SamplingParams(temperature=0))) == 1


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    repetition=st.floats(0.2, 3.0),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    least=st.integers(0, 6),
)
def test_all_adjustments_together_are_those_of_the_slow_reference(seed, repetition, presence, frequency, least):
    rng = np.random.default_rng(seed)
    V = int(rng.integers(2, 90))
    logits = rng.normal(0, 3, V).astype(np.float32)
    prompt, tokens = rng.integers(0, V, rng.integers(1, 9)).tolist(), rng.integers(0, V, rng.integers(0, 7)).tolist()
    params = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        min_new_tokens=least,
        stop_ids=(0,),
        logit_bias={int(i): float(rng.normal()) for i in rng.integers(0, V, 3)},
    )
    found = sampler.adjusted(logits, sequence_of(params, prompt, tokens))
    np.testing.assert_allclose(found, adjusted(logits, params, prompt, tokens), rtol=1e-5, atol=1e-5)


def test_before_the_least_number_of_tokens_no_stop_id_is_drawn():
    logits = np.array([0.0, 50.0, 49.0, 1.0], dtype=np.float32)
    for fields in (dict(temperature=0), {}, dict(temperature=1e4, top_p=0.9999), dict(order="aquila", top_k=3)):
        params = SamplingParams(min_new_tokens=2, max_new_tokens=4, stop_ids=(1, 2), seed=1, **fields)
        early = {sampler.choose(logits, sequence_of(params, [0], [3] * made)) for made in (0, 1) for _ in range(40)}
        assert early <= {0, 3}
        assert sampler.choose(logits, sequence_of(SamplingParams(temperature=0, stop_ids=(1,)), [0], [3, 3])) == 1


HUGE = {
    "bias": dict(logit_bias={2: 1e39}),
    "presence": dict(presence_penalty=-1e39),
    "frequency": dict(frequency_penalty=-1e39),
}


@pytest.mark.parametrize("fields", HUGE.values(), ids=HUGE)
def test_an_encouragement_beyond_float32_wins_and_does_not_poison_the_row(fields):
    for temperature in (0, 1.0):
        params = unless_refused(temperature=temperature, seed=3, **fields)
        if params is not None:
            rows = [row_of("ordinary", 70, seed=i) for i in range(20)]
            assert {sampler.choose(row, sequence_of(params, [0], [2])) for row in rows} == {2}


def test_a_discouragement_beyond_float32_forbids():
    params = unless_refused(logit_bias=dict.fromkeys(range(69), -1e39), seed=3)
    assert params is None or sampler.choose(row_of("ordinary", 70, seed=1), sequence_of(params)) == 69


def test_a_repetition_penalty_beyond_float32_does_not_make_nan_of_a_zero_logit():
    for temperature in (0, 1.0):
        params = unless_refused(repetition_penalty=1e39, temperature=temperature, seed=1)
        if params is not None:
            logits = np.array([0.0, 5.0, 9.0], dtype=np.float32)
            assert np.isfinite(sampler.adjusted(logits, sequence_of(params, [0]))).all()
            assert {sampler.choose(logits, sequence_of(params, [0])) for _ in range(20)} <= {1, 2}


# -------------------------------------------------------------------------------------------------------- draw


@pytest.mark.parametrize("V", [1, 2, 255, 256, 257, 1000])
def test_frequencies_are_the_probabilities(V):
    rng = np.random.default_rng(V)
    weights = np.exp(rng.normal(0, 1.5, V)).astype(np.float32)
    weights[rng.random(V) < 0.3] = 0
    weights[V // 2] = 1
    drawn = np.array([sampler.draw(weights, u) for u in rng.random(20_000)])
    counts = np.bincount(drawn, minlength=V)
    assert counts[weights == 0].sum() == 0
    some = weights > 0
    expected = weights[some].astype(np.float64)
    expected *= len(drawn) / expected.sum()
    assert some.sum() == 1 or chisquare(counts[some], expected).pvalue > 1e-3


CHOICES = (
    {},
    dict(temperature=0.6),
    dict(top_p=0.95),
    dict(top_p=0.9, temperature=1.6),
    dict(top_p=0.51),
    dict(top_p=0.3),
    dict(top_p=0.9, top_k=1000),
    dict(top_p=0.9, top_k=12),
    dict(top_p=0.9, min_p=0.02),
    dict(top_k=5),
    dict(order="aquila", top_p=0.9, temperature=0.5),
)


def drawn_from(logits: np.ndarray, params: SamplingParams, times: int) -> np.ndarray:
    """How often each token is chosen, [V]."""
    sequence = sequence_of(params)
    tokens = [sampler.choose(logits, sequence) for _ in range(times)]
    return np.bincount(tokens, minlength=len(logits))


@pytest.mark.parametrize("fields", CHOICES, ids=str)
@pytest.mark.parametrize("V", [40, 700])
def test_tokens_are_chosen_as_often_as_the_slow_reference_says(fields, V):
    logits, params, times = row_of("ordinary", V, seed=V), SamplingParams(seed=8, **fields), 6000
    counts, p = drawn_from(logits, params, times), probabilities(logits, params)
    assert counts[p == 0].sum() == 0, "a token outside of what the filters leave"
    often = p * times >= 5
    observed, wanted = counts[often], p[often] * times
    if p[~often].sum() * times >= 1:
        observed, wanted = np.append(observed, counts[~often].sum()), np.append(wanted, p[~often].sum() * times)
    assert len(observed) == 1 or chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


@pytest.mark.parametrize("top_p", [0.5, 0.9])
def test_a_nucleus_among_equal_tokens_is_as_small_with_top_k_as_without(top_p):
    """Half-precision logits are full of equals."""
    logits = np.zeros(40, dtype=np.float32)
    sizes = {
        np.count_nonzero(drawn_from(logits, SamplingParams(seed=8, top_p=top_p, **fields), 3000))
        for fields in ({}, dict(top_k=40), dict(order="aquila"), dict(min_p=0.001))
    }
    assert sizes == {round(40 * top_p)}


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_ban_on_every_token_does_not_draw_for_ever():
    class Patience:
        def random(self) -> float:
            left.pop()
            return 0.5

    for fields in ({}, dict(top_p=0.9), dict(top_k=2), dict(temperature=0)):
        left = [0] * 1000
        params = SamplingParams(min_new_tokens=2, stop_ids=(0, 1, 2), seed=1, **fields)
        sequence = sequence_of(params, [0])
        sequence.random = Patience()
        try:
            token = sampler.choose(np.arange(3, dtype=np.float32), sequence)
        except GenerationError:
            continue
        assert token in range(3), fields


def test_control_chi_square_notices_a_draw_that_is_off_by_one():
    weights = np.array([0.4, 0.35, 0.25], dtype=np.float32)
    drawn = [(sampler.draw(weights, u) + 1) % 3 for u in np.random.default_rng(0).random(20_000)]
    assert chisquare(np.bincount(drawn), 20_000 * weights.astype(np.float64)).pvalue < 1e-6


def test_the_ends_of_the_unit_interval_fall_on_the_first_and_the_last_weight():
    for V in (1, 5, 256, 257, 700):
        for first, last in ((0, V - 1), (V // 3, V // 2)):
            weights = np.zeros(V, dtype=np.float32)
            weights[first] = weights[last] = 0.1
            assert sampler.draw(weights, 0.0) == first
            assert sampler.draw(weights, ALMOST_ONE) == last


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    V=st.integers(1, 1500),
    u=st.one_of(st.floats(0, ALMOST_ONE), st.sampled_from([0.0, 5e-324, 2.0**-53, 0.5, ALMOST_ONE])),
    zeros=st.floats(0, 0.999),
    spread=st.floats(0, 60),
)
def test_a_token_of_weight_zero_is_never_drawn_and_the_others_where_u_falls(seed, V, u, zeros, spread):
    rng = np.random.default_rng(seed)
    weights = np.exp(-spread * rng.random(V)).astype(np.float32)
    weights[rng.random(V) < zeros] = 0
    assume(weights.any())
    token = sampler.draw(weights, u)
    assert weights[token] > 0
    held = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    assert held[token] >= u - 1e-12 and (token == 0 or held[token - 1] <= u + 1e-12)


def test_every_border_between_two_weights_is_hit_without_leaving_them():
    """u at and around each cumulative share: where roundings of blocks and of the whole could disagree."""
    rng = np.random.default_rng(9)
    weights = rng.random(600).astype(np.float32)
    weights[rng.random(600) < 0.5] = 0
    shares = np.cumsum(weights, dtype=np.float64) / weights.sum(dtype=np.float64)
    for share in np.unique(shares):
        for u in (np.nextafter(share, 0), share, np.nextafter(share, 2)):
            assert weights[sampler.draw(weights, float(min(max(u, 0.0), ALMOST_ONE)))] > 0


def test_a_seed_decides_and_another_seed_or_index_differs():
    logits = np.zeros(10_000, dtype=np.float32)

    def drawn(seed, index=0):
        sequence = Sequence(index, [1], SamplingParams(seed=seed))
        return [sampler.choose(logits, sequence) for _ in range(8)]

    assert drawn(3) == drawn(3)
    assert len({tuple(drawn(*key)) for key in ((3, 0), (3, 1), (4, 0), (2**64 - 1, 0), (0, 3), (0, 0))}) == 6
    assert drawn(None) != drawn(None)


def test_first_tokens_of_neighbouring_seeds_are_independent_of_each_other():
    logits = np.zeros(16, dtype=np.float32)
    tokens = [sampler.choose(logits, Sequence(0, [1], SamplingParams(seed=seed))) for seed in range(4000)]
    counts = np.zeros((16, 16))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    assert chisquare(counts.ravel()).pvalue > 1e-3


# -------------------------------------------------------------------------------------------- logprobs and finite


@pytest.mark.parametrize("kind", ["ordinary", "nearly flat", "steep", "one huge", "large offset", "ties", "all equal"])
@pytest.mark.parametrize("V", [1, 2, 65, 5003])
def test_logprobs_are_log_softmax(kind, V):
    logits = row_of(kind, V, seed=6)
    expected = log_softmax(logits)
    for token in {0, V // 2, V - 1, int(logits.argmax())}:
        for top in (0, 1, 5, V, V + 3):
            found = sampler.logprob_of(logits, token, top)
            assert found.id == token
            assert found.logprob == pytest.approx(expected[token], abs=1e-5)
            assert len(found.top) == min(top, V)
            assert len({i for i, _ in found.top}) == len(found.top)
            values = [value for _, value in found.top]
            assert values == sorted(values, reverse=True)
            np.testing.assert_allclose(values, np.sort(expected)[::-1][: len(values)], atol=1e-5)
            np.testing.assert_allclose(values, [expected[i] for i, _ in found.top], atol=1e-5)


def test_logprobs_are_plain_python_that_json_can_write():
    found = sampler.logprob_of(row_of("ordinary", 70, seed=1), 5, 3)
    assert all(type(i) is int and type(p) is float for i, p in found.top) and type(found.logprob) is float


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 4999])
def test_one_number_that_is_none_is_found_anywhere(bad, place):
    logits = row_of("ordinary", 5000, seed=7)
    assert sampler.finite(logits)
    logits[place] = bad
    assert not sampler.finite(logits)


def test_infinities_that_cancel_are_found_and_sums_that_overflow_are_not_taken_for_one():
    assert not sampler.finite(np.array([np.inf, 1.0, -np.inf], dtype=np.float32))
    assert sampler.finite(np.full(5000, 3e38, dtype=np.float32))
    assert sampler.finite(np.array([3e38, 3e38, -3e38], dtype=np.float32))
