"""The right tokens and log-probabilities, against a decoder in numpy that knows no cache."""

import numpy as np
import pytest
from generation_reference import (
    CLOSE,
    KINDS,
    Ear,
    Reference,
    adjusted,
    expected,
    forward_logits,
    greedy,
    log_softmax,
    probabilities,
    run,
    some_ids,
    tiny_model,
)
from scipy.stats import chisquare

from aquila_pd.generation import Engine, PromptTooLong, SamplingParams

V = 101


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def reference(model):
    return Reference(model)


# ------------------------------------------------------------------------------------------------ right tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_models_own_forward(kind):
    model = tiny_model(kind)
    ids = some_ids(70)
    np.testing.assert_allclose(Reference(model).logits(ids), forward_logits(model, ids), atol=5e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_full_recomputation_with_every_kind_of_model(kind, fused):
    model = tiny_model(kind)
    reference = Reference(model)
    if fused:
        model.fuse_projections()
    engine = Engine(model, slots=3, prefill_chunk=9, max_length=256)
    for length in (1, 2, 8, 9, 10, 24, 25, 100):
        prompt = some_ids(length, seed=3)
        answer = reference.greedy(prompt, 14)
        assert answer.margin > 5e-6, length
        (sequence,) = engine.generate([prompt], greedy(14, logprobs=0))[0]
        assert sequence.tokens == answer.tokens, length
        np.testing.assert_allclose([p.logprob for p in sequence.logprobs], answer.logprobs, atol=CLOSE)


def test_control_another_model_answers_otherwise_and_answers_vary(model, reference):
    prompt = some_ids(30)
    answer = expected(reference, prompt, 14)
    assert len(set(answer)) > 5
    other = Engine(tiny_model(seed=6)).generate([prompt], greedy(14))[0][0]
    assert other.tokens != answer
    # one dropped or one swapped id of the prompt is noticed
    for changed in (prompt[1:], [prompt[1], prompt[0], *prompt[2:]]):
        assert Engine(model).generate([changed], greedy(14))[0][0].tokens != answer


def test_the_pad_id_is_a_token_as_any_other(model, reference):
    prompt = [0, 0, 5, 0, 17, 0]
    assert Engine(model).generate([prompt], greedy(8))[0][0].tokens == expected(reference, prompt, 8)


def test_sampled_first_tokens_have_the_models_probabilities(model, reference):
    prompt, n = some_ids(12), 500
    for fields in (dict(temperature=0.8), dict(top_k=6, top_p=0.9), dict(order="aquila", top_p=0.7, temperature=2.0)):
        params = SamplingParams(max_new_tokens=1, seed=11, n=n, **fields)
        p = probabilities(reference.logits(prompt)[-1], params)
        (sequences,) = Engine(model, slots=64, prefill_chunk=4096).generate([prompt], params)
        counts = np.bincount([s.tokens[0] for s in sequences], minlength=V)
        assert counts[p == 0].sum() == 0
        rare = p * n < 5
        observed, wanted = counts[~rare], p[~rare] * n
        if rare.any() and p[rare].sum() > 0:
            observed, wanted = np.append(observed, counts[rare].sum()), np.append(wanted, p[rare].sum() * n)
        assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


def test_sampled_answers_stay_within_what_the_filters_leave(model, reference):
    params = SamplingParams(max_new_tokens=12, top_k=4, temperature=1.5, repetition_penalty=1.2, seed=5, n=4)
    prompt = some_ids(20)
    for sequence in Engine(model).generate([prompt], params)[0]:
        rows = reference.logits(prompt + sequence.tokens, len(prompt))
        for i, token in enumerate(sequence.tokens):
            row = adjusted(rows[len(prompt) - 1 + i], params, prompt, sequence.tokens[:i])
            assert probabilities(row, params)[token] > 0


def test_logprobs_are_of_the_model_itself_and_not_of_the_filtered_distribution(model, reference):
    prompt = some_ids(20)
    params = SamplingParams(
        max_new_tokens=10, seed=2, top_k=3, temperature=0.2, repetition_penalty=1.5, logit_bias={4: 9.0}, logprobs=5
    )
    (sequence,) = Engine(model).generate([prompt], params)[0]
    rows = log_softmax(reference.logits(prompt + sequence.tokens, len(prompt)))[len(prompt) - 1 : -1]
    assert len(sequence.logprobs) == 10
    for token, found, row in zip(sequence.tokens, sequence.logprobs, rows, strict=True):
        assert found.id == token
        assert found.logprob == pytest.approx(row[token], abs=CLOSE)
        np.testing.assert_allclose([p for _, p in found.top], np.sort(row)[::-1][:5], atol=CLOSE)
        np.testing.assert_allclose([row[i] for i, _ in found.top], np.sort(row)[::-1][:5], atol=CLOSE)


def test_without_logprobs_there_are_none(model):
    (sequence,) = Engine(model).generate([some_ids(5)], greedy(3))[0]
    assert sequence.logprobs == [] and sequence.prompt_logprobs == []


# --------------------------------------------------------------------------------------------- scoring a prompt


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_prompt_logprobs_are_log_softmax_of_full_logits_whatever_the_chunks(model, reference, chunk):
    engine = Engine(model, slots=2, prefill_chunk=chunk)
    for length in (1, 2, 63, 64, 65, 130)[: 3 if chunk == 1 else None]:
        prompt = some_ids(length)
        (sequence,) = engine.generate([prompt], greedy(0, prompt_logprobs=True, logprobs=3))[0]
        assert (sequence.tokens, sequence.finish_reason, sequence.reused) == ([], "length", 0)
        assert sequence.logprobs == []
        first, *scored = sequence.prompt_logprobs
        assert first is None and [p.id for p in scored] == prompt[1:]
        rows = log_softmax(reference.logits(prompt))[:-1]
        np.testing.assert_allclose(
            [p.logprob for p in scored], rows[np.arange(length - 1), prompt[1:]], atol=CLOSE, err_msg=str(length)
        )
        for found, row in zip(scored, rows, strict=True):
            np.testing.assert_allclose([p for _, p in found.top], np.sort(row)[::-1][:3], atol=CLOSE)


def test_echo_scores_the_prompt_and_continues_it_for_each_of_n(model, reference):
    prompt = some_ids(40)
    engine = Engine(model, prefill_chunk=13)
    engine.generate([prompt], greedy(2))  # its cache must not spare what has to be scored
    sequences = engine.generate([prompt], greedy(6, prompt_logprobs=True, n=2))[0]
    for sequence in sequences:
        assert sequence.tokens == expected(reference, prompt, 6)
        found = [p.logprob for p in sequence.prompt_logprobs[1:]]
        np.testing.assert_allclose(found, reference.token_logprobs(prompt[:1], prompt[1:]), atol=CLOSE)
        assert all(p.top == () for p in sequence.prompt_logprobs[1:]) and sequence.reused == 0
    assert [s.index for s in sequences] == [0, 1]


def test_a_score_alone_gives_one_last_event_without_a_token(model):
    engine, ear = Engine(model), Ear()
    engine.add(some_ids(9), greedy(0, prompt_logprobs=True), ear)
    run(engine)
    assert [(e.token, e.logprob, e.finish_reason) for e in ear.events] == [(None, None, "length")]
    assert engine.stats.new_tokens == 0


def test_a_scored_prompt_may_fill_the_whole_length(model, reference):
    engine = Engine(model, max_length=50)
    prompt = some_ids(50)
    (sequence,) = engine.generate([prompt], greedy(0, prompt_logprobs=True))[0]
    assert len(sequence.prompt_logprobs) == 50 and sequence.finish_reason == "length"
    with pytest.raises(PromptTooLong):
        engine.add(some_ids(51), greedy(0, prompt_logprobs=True))
