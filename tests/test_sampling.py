"""From logits to a token: against upstream's numbers, against transformers, against whole sorts in float64."""

import numpy as np
import pytest
import torch
from generation_reference import adjusted, log_softmax, probabilities
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers.generation import logits_process as theirs

from aquila_pd.errors import GenerationError
from aquila_pd.generation import SamplingParams, Sequence, sampling

ALMOST_ONE = np.nextafter(1.0, 0.0)
FLOAT32 = 2e-6  # weights are float32, the references' float64: absolute, of probabilities
NOTHING = 1e-35  # float32 has no smaller numbers to speak of


def ours(logits, params: SamplingParams) -> np.ndarray:
    """The distribution [V] that a token is drawn from."""
    row = np.array(logits, dtype=np.float32)
    ids, weights = sampling.candidates(row.copy(), params)
    ids = np.arange(len(row)) if ids is None else ids
    assert (np.diff(ids) > 0).all(), "candidates stand in the order of their ids, each once"
    assert np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0
    dense = np.zeros(len(row))
    dense[ids] = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    return dense


def unless_refused(**fields) -> SamplingParams | None:
    """For values far beyond float32: refusing them by name is as good as taking them for what they say."""
    try:
        return SamplingParams(**fields)
    except GenerationError as refused:
        assert any(name in str(refused) for name in fields)
        return None


def sequence_of(params: SamplingParams, prompt=(1,), tokens=()) -> Sequence:
    return Sequence(0, list(prompt), params, tokens=list(tokens))


def assert_equal_but_for_ties(found: np.ndarray, expected: np.ndarray, logits, what: object = "") -> None:
    """Equal distributions; where equal logits are cut between, which of them is left is nobody's business."""
    assert (found > NOTHING).sum() == (expected > NOTHING).sum(), what
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=0, atol=FLOAT32, err_msg=str(what))
    if len(np.unique(logits)) == len(logits):
        np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32, err_msg=str(what))


# --------------------------------------------------------------------------------------------- upstream's numbers

ORDERS = {"aquila": "probs_aquila_order_topp_topk_temp", "standard": "probs_hf_order_temp_topk_topp"}
TIED = 2  # the row whose equal logits torch's sort cuts arbitrarily


@pytest.fixture
def golden(shared) -> dict:
    with np.load(shared / "goldens" / "sampling.npz") as file:
        return dict(file)


def golden_params(golden: dict, case: int, order: str) -> SamplingParams:
    top_p, top_k, temperature = golden[f"c{case}.params"]
    return SamplingParams(top_p=float(top_p), top_k=int(top_k), temperature=float(temperature), order=order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", range(5))
def test_both_orders_give_the_recorded_probabilities(golden, case, order):
    expected = golden[f"c{case}.{ORDERS[order]}"]
    for row, logits in enumerate(golden["logits"]):
        found = ours(logits, golden_params(golden, case, order))
        wanted = expected[row]
        if row == TIED:
            found, wanted = np.sort(found), np.sort(wanted)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6, err_msg=f"row {row}")
        assert ((found > 0) == (wanted > 0)).all(), row


def test_control_each_order_fails_against_the_others_numbers(golden):
    other = {"aquila": "standard", "standard": "aquila"}
    for order in ORDERS:
        found = ours(golden["logits"][0], golden_params(golden, 0, order))
        assert np.abs(found - golden[f"c0.{ORDERS[other[order]]}"][0]).max() > 1e-3


def test_the_orders_differ_where_a_hot_temperature_widens_the_nucleus():
    logits = np.log(np.array([0.6, 0.3, 0.1]))
    settings_ = dict(temperature=2.0, top_p=0.85)
    aquila, standard = (ours(logits, SamplingParams(order=order, **settings_)) for order in ("aquila", "standard"))
    assert (aquila > 0).tolist() == [True, True, False]  # .6 + .3 hold .85 before the temperature
    roots = np.sqrt([0.6, 0.3, 0.1])  # .473, .335, .193: all three are needed after it
    np.testing.assert_allclose(standard, roots / roots.sum(), atol=FLOAT32)
    np.testing.assert_allclose(aquila[:2], roots[:2] / roots[:2].sum(), atol=FLOAT32)


def test_the_orders_differ_where_top_k_comes_before_the_nucleus():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    params = dict(top_k=2, top_p=0.55)
    # standard: of .4 and .3 the first holds .571; aquila: .4 does not hold .55 of everything
    assert (ours(logits, SamplingParams(**params)) > 0).tolist() == [True, False, False, False]
    assert (ours(logits, SamplingParams(order="aquila", **params)) > 0).tolist() == [True, True, False, False]


# ------------------------------------------------------------------------------------------------- transformers

ROWS = {
    "ordinary": lambda rng, V: rng.normal(0, 3, V),
    "nearly flat": lambda rng, V: rng.normal(0, 1e-3, V),
    "steep": lambda rng, V: rng.normal(0, 40, V),
    "one huge": lambda rng, V: np.where(np.arange(V) == V // 3, 3e4, rng.normal(0, 2, V)),
    "large offset": lambda rng, V: 1e4 + rng.normal(0, 3, V).astype(np.float32).astype(np.float64),
    "mostly banned": lambda rng, V: np.where(rng.random(V) < 0.8, -np.inf, rng.normal(0, 3, V)),
    "one allowed": lambda rng, V: np.where(np.arange(V) == V - 1, -5.0, -np.inf),
    "ties": lambda rng, V: rng.integers(-3, 3, V).astype(np.float64),
    "all equal": lambda rng, V: np.full(V, 1.25),
}
SIZES = (1, 2, 3, 63, 64, 65, 129, 1000, 5003)
SETTINGS = (
    {},
    dict(temperature=0.7),
    dict(temperature=1e-8),
    dict(temperature=50.0),
    dict(top_k=1),
    dict(top_k=7),
    dict(top_k=64),
    dict(top_k=100_000),
    dict(top_p=0.9),
    dict(top_p=1e-6),
    dict(top_p=0.999999),
    dict(min_p=0.1),
    dict(min_p=1.0),
    dict(temperature=1.7, top_k=40, top_p=0.8, min_p=0.05),
    dict(temperature=0.3, top_k=5, top_p=0.5),
)


def row_of(kind: str, V: int, seed: int) -> np.ndarray:
    row = ROWS[kind](np.random.default_rng(seed), V).astype(np.float32)
    if not np.isfinite(row).any():
        row[0] = 0.0
    return row


def transformers_distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What transformers' warpers leave, in float64 so that the answer is theirs and not a rounding."""
    scores, ids = torch.tensor(logits, dtype=torch.float64)[None], torch.zeros([1, 1], dtype=torch.int64)
    scores = scores - scores.max()  # theirs overflows at tiny temperatures
    warpers = [theirs.TemperatureLogitsWarper(float(params.temperature))]
    if params.top_k:
        warpers.append(theirs.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(theirs.TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(theirs.MinPLogitsWarper(params.min_p))
    for warper in warpers:
        scores = warper(ids, scores)
    return torch.softmax(scores, -1)[0].numpy()


def borderline(logits: np.ndarray, params: SamplingParams) -> bool:
    """Whether a share lies so near to top_p, or a weight to min_p, that float32 may fall on either side."""
    x = np.array(logits, dtype=np.float64)
    p = np.sort(np.exp(log_softmax((x - x.max()) / params.temperature)))[::-1]
    if params.top_k:
        p = p[p >= p[min(params.top_k, len(p)) - 1]]
    p = p / p.sum()
    share = np.abs(np.cumsum(p) - params.top_p).min() < 1e-6 if params.top_p < 1 else False
    weight = np.abs(p / p[0] - params.min_p)[p < p[0]]
    return bool(share or (params.min_p and weight.size and weight.min() < 1e-6))


@pytest.mark.parametrize("kind", ROWS)
def test_the_standard_order_is_transformers(kind):
    compared = 0
    for number, V in enumerate(SIZES):
        logits = row_of(kind, V, seed=number)
        for fields in SETTINGS:
            params = SamplingParams(**fields)
            if borderline(logits, params):
                continue
            found, expected = ours(logits, params), transformers_distribution(logits, params)
            assert_equal_but_for_ties(found, expected, logits, f"V={V} {fields}")
            compared += 1
    assert compared > len(SIZES) * len(SETTINGS) * 0.6, "too few of these rows say anything"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ROWS)
def test_both_orders_are_what_whole_sorts_make(kind, order):
    compared = 0
    for number, V in enumerate((1, 3, 65, 300, 1500)):
        logits = row_of(kind, V, seed=100 + number)
        for fields in SETTINGS:
            params = SamplingParams(order=order, **fields)
            heat = 1.0 if order == "aquila" else params.temperature
            if borderline(logits, SamplingParams(**{**fields, "temperature": heat, "min_p": 0.0})):
                continue
            if borderline(logits, SamplingParams(min_p=params.min_p, temperature=params.temperature)):
                continue
            assert_equal_but_for_ties(ours(logits, params), probabilities(logits, params), logits, f"V={V} {fields}")
            compared += 1
    assert compared > 5 * len(SETTINGS) * 0.6


def test_control_a_wrong_k_or_share_is_seen():
    logits = row_of("ordinary", 300, seed=1)
    for right, wrong in ((dict(top_k=7), dict(top_k=8)), (dict(top_p=0.9), dict(top_p=0.91))):
        expected = transformers_distribution(logits, SamplingParams(**wrong))
        with pytest.raises(AssertionError):
            assert_equal_but_for_ties(ours(logits, SamplingParams(**right)), expected, logits)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32),
    V=st.integers(1, 9000),
    spread=st.sampled_from([0.0, 1e-4, 0.1, 1.0, 5.0, 30.0]),
    levels=st.sampled_from([None, 2, 5, 40]),
    top_p=st.floats(1e-4, 0.9999),
)
def test_a_nucleus_is_the_fewest_likeliest_tokens_that_hold_the_share(seed, V, spread, levels, top_p):
    rng = np.random.default_rng(seed)
    logits = (rng.integers(0, levels, V) if levels else rng.standard_normal(V)) * spread
    weights = np.exp(logits - logits.max()).astype(np.float32)
    kept = sampling.nucleus(weights, top_p)
    assert (np.diff(kept) > 0).all() and len(kept) >= 1
    inside, outside = weights[kept], np.delete(weights, kept)
    assert not len(outside) or inside.min() >= outside.max()
    total, held = weights.sum(dtype=np.float64), inside.sum(dtype=np.float64)
    assert held >= top_p * total * (1 - 1e-9)
    assert len(kept) == 1 or held - inside.min() < top_p * total * (1 + 1e-9)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32), V=st.integers(1, 9000), k=st.integers(1, 400), levels=st.sampled_from([None, 1, 3, 50])
)
def test_the_largest_are_the_k_largest_and_their_equals(seed, V, k, levels):
    rng = np.random.default_rng(seed)
    x = (rng.integers(-levels, levels, V) if levels else rng.standard_normal(V)).astype(np.float32)
    x[rng.random(V) < 0.1] = -np.inf
    expected = np.flatnonzero(x >= np.sort(x)[-min(k, V)])
    np.testing.assert_array_equal(sampling.largest(x, k), expected)


def test_logits_are_left_as_they_are():
    params = SamplingParams(
        temperature=0.5, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.3, logit_bias={3: 1.0}, presence_penalty=1
    )
    for order in ORDERS:
        logits = row_of("ordinary", 300, seed=2)
        before = logits.copy()
        sampling.choose(logits, sequence_of(SamplingParams(**{**vars(params), "order": order}), tokens=[4]))
        np.testing.assert_array_equal(logits, before)


def test_the_sharpest_temperature_is_greedy_and_the_hottest_is_flat():
    logits = row_of("ordinary", 300, seed=3)
    for cold in (1e-8, 1e-30, 1e-300):
        assert ours(logits, SamplingParams(temperature=cold))[logits.argmax()] == 1.0, cold
    np.testing.assert_allclose(ours(logits, SamplingParams(temperature=1e20)), 1 / 300, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1e20, 1e38, 1e39, 1e300])
def test_a_banned_token_stays_banned_at_any_temperature(temperature):
    params = unless_refused(temperature=temperature)
    if params is not None:
        logits = row_of("ordinary", 70, seed=3)
        logits[[3, 66]] = -np.inf
        found = ours(logits, params)
        assert found[3] == found[66] == 0
        np.testing.assert_allclose(np.delete(found, [3, 66]), 1 / 68, rtol=1e-5)


# ------------------------------------------------------------------------------------------ penalties and bias


def test_repetition_penalty_is_transformers_over_prompt_and_answer():
    logits = row_of("ordinary", 200, seed=4)
    prompt, tokens = [5, 9, 9, 120], [7, 5, 199]
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.4)(
        torch.tensor([prompt + tokens]), torch.tensor(logits)[None]
    )[0].numpy()
    found = sampling.adjusted(logits, sequence_of(SamplingParams(repetition_penalty=1.4), prompt, tokens))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found != logits).sum() == len({*prompt, *tokens})


def test_presence_counts_once_and_frequency_each_time_and_the_prompt_never():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    found = sampling.adjusted(np.zeros(6, dtype=np.float32), sequence_of(params, [0, 1, 1], [1, 3, 3, 3, 5]))
    assert found.tolist() == [0, -0.75, 0, -1.25, 0, -0.75]


def test_negative_penalties_encourage():
    params = SamplingParams(presence_penalty=-1.0, frequency_penalty=-0.5, repetition_penalty=0.5)
    logits = np.array([2.0, -2.0, 1.0], dtype=np.float32)
    # seen 0 and 1: 2 / .5 and -2 * .5; generated 1 twice: + 1 + 2 * .5
    assert sampling.adjusted(logits, sequence_of(params, [0], [1, 1])).tolist() == [4.0, 1.0, 1.0]


def test_bias_is_added_and_may_decide():
    logits = np.array([1.0, 5.0, 2.0], dtype=np.float32)
    params = SamplingParams(temperature=0, logit_bias={1: -100, 2: 1.5})
    assert sampling.adjusted(logits, sequence_of(params)).tolist() == [1.0, -95.0, 3.5]
    assert sampling.choose(logits, sequence_of(params)) == 2
    assert sampling.choose(logits, sequence_of(SamplingParams(temperature=0))) == 1


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
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
    found = sampling.adjusted(logits, sequence_of(params, prompt, tokens))
    np.testing.assert_allclose(found, adjusted(logits, params, prompt, tokens), rtol=1e-5, atol=1e-5)


def test_before_the_least_number_of_tokens_no_stop_id_is_drawn():
    logits = np.array([0.0, 50.0, 49.0, 1.0], dtype=np.float32)
    for fields in (dict(temperature=0), {}, dict(temperature=1e4, top_p=0.9999), dict(order="aquila", top_k=3)):
        params = SamplingParams(min_new_tokens=2, max_new_tokens=4, stop_ids=(1, 2), seed=1, **fields)
        early = {sampling.choose(logits, sequence_of(params, [0], [3] * made)) for made in (0, 1) for _ in range(40)}
        assert early <= {0, 3}
        assert sampling.choose(logits, sequence_of(SamplingParams(temperature=0, stop_ids=(1,)), [0], [3, 3])) == 1


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
            assert {sampling.choose(row, sequence_of(params, [0], [2])) for row in rows} == {2}


def test_a_discouragement_beyond_float32_forbids():
    params = unless_refused(logit_bias=dict.fromkeys(range(69), -1e39), seed=3)
    assert params is None or sampling.choose(row_of("ordinary", 70, seed=1), sequence_of(params)) == 69


def test_a_repetition_penalty_beyond_float32_does_not_make_nan_of_a_zero_logit():
    for temperature in (0, 1.0):
        params = unless_refused(repetition_penalty=1e39, temperature=temperature, seed=1)
        if params is not None:
            logits = np.array([0.0, 5.0, 9.0], dtype=np.float32)
            assert np.isfinite(sampling.adjusted(logits, sequence_of(params, [0]))).all()
            assert {sampling.choose(logits, sequence_of(params, [0])) for _ in range(20)} <= {1, 2}


# -------------------------------------------------------------------------------------------------------- draw


@pytest.mark.parametrize("V", [1, 2, 255, 256, 257, 1000])
def test_frequencies_are_the_probabilities(V):
    rng = np.random.default_rng(V)
    weights = np.exp(rng.normal(0, 1.5, V)).astype(np.float32)
    weights[rng.random(V) < 0.3] = 0
    weights[V // 2] = 1
    drawn = np.array([sampling.draw(weights, u) for u in rng.random(20_000)])
    counts = np.bincount(drawn, minlength=V)
    assert counts[weights == 0].sum() == 0
    some = weights > 0
    expected = weights[some].astype(np.float64)
    expected *= len(drawn) / expected.sum()
    assert some.sum() == 1 or chisquare(counts[some], expected).pvalue > 1e-3


def test_control_chi_square_notices_a_draw_that_is_off_by_one():
    weights = np.array([0.4, 0.35, 0.25], dtype=np.float32)
    drawn = [(sampling.draw(weights, u) + 1) % 3 for u in np.random.default_rng(0).random(20_000)]
    assert chisquare(np.bincount(drawn), 20_000 * weights.astype(np.float64)).pvalue < 1e-6


def test_the_ends_of_the_unit_interval_fall_on_the_first_and_the_last_weight():
    for V in (1, 5, 256, 257, 700):
        for first, last in ((0, V - 1), (V // 3, V // 2)):
            weights = np.zeros(V, dtype=np.float32)
            weights[first] = weights[last] = 0.1
            assert sampling.draw(weights, 0.0) == first
            assert sampling.draw(weights, ALMOST_ONE) == last


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
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
    token = sampling.draw(weights, u)
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
            assert weights[sampling.draw(weights, float(min(max(u, 0.0), ALMOST_ONE)))] > 0


def test_a_seed_decides_and_another_seed_or_index_differs():
    logits = np.zeros(10_000, dtype=np.float32)

    def drawn(seed, index=0):
        sequence = Sequence(index, [1], SamplingParams(seed=seed))
        return [sampling.choose(logits, sequence) for _ in range(8)]

    assert drawn(3) == drawn(3)
    assert len({tuple(drawn(*key)) for key in ((3, 0), (3, 1), (4, 0), (2**64 - 1, 0), (0, 3), (0, 0))}) == 6
    assert drawn(None) != drawn(None)


def test_first_tokens_of_neighbouring_seeds_are_independent_of_each_other():
    logits = np.zeros(16, dtype=np.float32)
    tokens = [sampling.choose(logits, Sequence(0, [1], SamplingParams(seed=seed))) for seed in range(4000)]
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
            found = sampling.logprob_of(logits, token, top)
            assert found.id == token
            assert found.logprob == pytest.approx(expected[token], abs=1e-5)
            assert len(found.top) == min(top, V)
            assert len({i for i, _ in found.top}) == len(found.top)
            values = [value for _, value in found.top]
            assert values == sorted(values, reverse=True)
            np.testing.assert_allclose(values, np.sort(expected)[::-1][: len(values)], atol=1e-5)
            np.testing.assert_allclose(values, [expected[i] for i, _ in found.top], atol=1e-5)


def test_logprobs_are_plain_python_that_json_can_write():
    found = sampling.logprob_of(row_of("ordinary", 70, seed=1), 5, 3)
    assert all(type(i) is int and type(p) is float for i, p in found.top) and type(found.logprob) is float


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 4999])
def test_one_number_that_is_none_is_found_anywhere(bad, place):
    logits = row_of("ordinary", 5000, seed=7)
    assert sampling.finite(logits)
    logits[place] = bad
    assert not sampling.finite(logits)


def test_infinities_that_cancel_are_found_and_sums_that_overflow_are_not_taken_for_one():
    assert not sampling.finite(np.array([np.inf, 1.0, -np.inf], dtype=np.float32))
    assert sampling.finite(np.full(5000, 3e38, dtype=np.float32))
    assert sampling.finite(np.array([3e38, 3e38, -3e38], dtype=np.float32))
