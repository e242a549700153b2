"""From logits to a token: against upstream's numbers, against transformers, against whole sorts in float64."""

import numpy as np
import pytest
import torch
from effort import tries
from generation_reference import ROWS, log_softmax, probabilities, row_of, sequence_of, unless_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from aquila_pd.generation import SamplingParams, sampler

FLOAT32 = 2e-6  # weights are float32, the references' float64: absolute, of probabilities
NOTHING = 1e-35  # float32 has no smaller numbers to speak of


def ours(logits, params: SamplingParams) -> np.ndarray:
    """The distribution [V] that a token is drawn from."""
    row = np.array(logits, dtype=np.float32)
    ids, weights = sampler.candidates(row.copy(), params)
    ids = np.arange(len(row)) if ids is None else ids
    assert (np.diff(ids) > 0).all(), "candidates stand in the order of their ids, each once"
    assert np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0
    dense = np.zeros(len(row))
    dense[ids] = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    return dense


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


@settings(max_examples=tries(100, 300), deadline=None, derandomize=True, database=None)
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
    kept = sampler.nucleus(weights, top_p)
    assert (np.diff(kept) > 0).all() and len(kept) >= 1
    inside, outside = weights[kept], np.delete(weights, kept)
    assert not len(outside) or inside.min() >= outside.max()
    total, held = weights.sum(dtype=np.float64), inside.sum(dtype=np.float64)
    assert held >= top_p * total * (1 - 1e-9)
    assert len(kept) == 1 or held - inside.min() < top_p * total * (1 + 1e-9)


@settings(max_examples=tries(100, 300), deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 2**32), V=st.integers(1, 9000), k=st.integers(1, 400), levels=st.sampled_from([None, 1, 3, 50])
)
def test_the_largest_are_the_k_largest_and_their_equals(seed, V, k, levels):
    rng = np.random.default_rng(seed)
    x = (rng.integers(-levels, levels, V) if levels else rng.standard_normal(V)).astype(np.float32)
    x[rng.random(V) < 0.1] = -np.inf
    expected = np.flatnonzero(x >= np.sort(x)[-min(k, V)])
    np.testing.assert_array_equal(sampler.largest(x, k), expected)


def test_logits_are_left_as_they_are():
    params = SamplingParams(
        temperature=0.5, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.3, logit_bias={3: 1.0}, presence_penalty=1
    )
    for order in ORDERS:
        logits = row_of("ordinary", 300, seed=2)
        before = logits.copy()
        sampler.choose(logits, sequence_of(SamplingParams(**{**vars(params), "order": order}), tokens=[4]))
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
