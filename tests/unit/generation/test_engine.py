"""The engine's promises one by one: limits, ends, several in one batch, counters, listeners, streams."""

from collections import Counter

import numpy as np
import pytest
from generation_reference import (
    Ear,
    Reference,
    expected,
    greedy,
    run,
    some_ids,
    tiny_model,
)

from aquila_pd.generation import Engine, PromptTooLong, SamplingParams
from aquila_pd.utils.errors import GenerationError

V = 101


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def reference(model):
    return Reference(model)


# ------------------------------------------------------------------------------------------------- limits, ends


def test_a_prompt_without_room_for_an_answer_is_refused_with_both_numbers(model):
    engine = Engine(model, max_length=32)
    assert engine.max_length == 32
    with pytest.raises(PromptTooLong, match=r"40\b.*\b32\b"):
        engine.add(some_ids(40), greedy(5))
    with pytest.raises(PromptTooLong):
        engine.add(some_ids(32), greedy(1))
    assert issubclass(PromptTooLong, GenerationError)
    assert engine.stats.waiting == 0 and not engine.step()


def test_an_answer_ends_where_the_length_does(model, reference):
    engine = Engine(model, max_length=32)
    for length, room in ((31, 1), (30, 2), (20, 12)):
        prompt = some_ids(length)
        (sequence,) = engine.generate([prompt], greedy(100))[0]
        assert sequence.finish_reason == "length" and sequence.error is None and sequence.stop_id is None
        assert sequence.tokens == expected(reference, prompt, room)


@pytest.mark.parametrize(("kind", "length"), [("grouped heads", 256), ("linear", 96), ("dynamic", 48)])
def test_the_default_length_is_the_models_context(kind, length):
    engine = Engine(tiny_model(kind))
    assert engine.max_length == length and engine.vocab_size == V


def test_a_stop_id_ends_the_answer_and_is_its_last_token(model, reference):
    prompt = some_ids(30)
    tokens = expected(reference, prompt, 12)
    stop = tokens[5]
    first = tokens.index(stop)
    ear, engine = Ear(), Engine(model)
    (sequence,) = engine.add(prompt, greedy(12, stop_ids=(stop, 100)), ear)
    run(engine)
    assert sequence.tokens == tokens[: first + 1]
    assert (sequence.finish_reason, sequence.stop_id, sequence.error) == ("stop", stop, None)
    assert [(e.token, e.finish_reason) for e in ear.events] == [
        *((token, None) for token in tokens[:first]),
        (stop, "stop"),
    ]


def test_a_stop_id_as_the_last_possible_token_is_a_stop(model, reference):
    prompt = some_ids(30)
    tokens = expected(reference, prompt, 3)
    assert tokens[2] not in tokens[:2]
    for engine in (Engine(model), Engine(model, max_length=33)):
        (sequence,) = engine.generate([prompt], greedy(3, stop_ids=(tokens[2],)))[0]
        assert (sequence.tokens, sequence.finish_reason, sequence.stop_id) == (tokens, "stop", tokens[2])


def test_a_stop_id_in_the_prompt_is_nothing_special(model, reference):
    prompt = [100, *some_ids(9), 100]
    tokens = expected(reference, prompt, 4)
    assert 100 not in tokens
    assert Engine(model).generate([prompt], greedy(4, stop_ids=(100,)))[0][0].tokens == tokens


def test_min_new_tokens_passes_the_stop_id_over_and_takes_the_next_likeliest(model, reference):
    prompt = some_ids(30)
    stop = expected(reference, prompt, 1)[0]
    (sequence,) = Engine(model).generate([prompt], greedy(6, stop_ids=(stop,), min_new_tokens=4))[0]
    tokens = []
    while len(tokens) < 6 and (len(tokens) <= 4 or tokens[-1] != stop):
        row = reference.logits(prompt + tokens, len(prompt))[-1]
        if len(tokens) < 4:
            row[stop] = -np.inf
        tokens.append(int(row.argmax()))
        if tokens[-1] == stop:
            break
    assert sequence.tokens == tokens and stop not in tokens[:4]


@pytest.mark.parametrize(
    ("prompt", "fields", "named"),
    [
        ([3, V], {}, "101"),
        ([3, -1], {}, "-1"),
        ([10**30], {}, "1000"),
        ([3], dict(stop_ids=(V,)), "101"),
        ([3], dict(logit_bias={7777: 1.0}), "7777"),
    ],
)
def test_ids_outside_the_vocabulary_are_named_and_nothing_is_queued(model, prompt, fields, named):
    engine = Engine(model)
    with pytest.raises(GenerationError, match=named) as caught:
        engine.add(prompt, greedy(3, **fields))
    assert "100" in str(caught.value)  # the last id there is
    assert engine.stats.waiting == 0 and not engine.step()


@pytest.mark.parametrize("empty", [[], (), np.array([], dtype=np.int64)], ids=["list", "tuple", "array"])
def test_an_empty_prompt_is_refused(model, empty):
    with pytest.raises(GenerationError, match="empty"):
        Engine(model).add(empty, greedy(3))


@pytest.mark.parametrize("prompt", [[1.5, 2], "12", [True, False]], ids=repr)
def test_what_is_no_id_is_refused_and_not_rounded_into_one(model, prompt):
    with pytest.raises(GenerationError):
        Engine(model).add(prompt, greedy(3))


def test_prompts_may_be_any_collection_and_are_copied(model, reference):
    prompt = some_ids(10)
    tokens = expected(reference, prompt, 4)
    engine = Engine(model)
    given = list(prompt)
    sequences = [engine.add(p, greedy(4))[0] for p in (given, tuple(prompt), np.array(prompt), iter(prompt))]
    given[3] = 99
    run(engine)
    assert all(s.tokens == tokens and s.prompt == prompt for s in sequences)


@pytest.mark.parametrize("name", ["slots", "max_length", "prefill_chunk"])
@pytest.mark.parametrize("value", [-1, 1.5, "8"], ids=repr)
def test_an_engine_of_impossible_sizes_is_refused_by_name(model, name, value):
    with pytest.raises(GenerationError, match=name):
        Engine(model, **{name: value})


@pytest.mark.parametrize("name", ["slots", "prefill_chunk"])
def test_an_engine_of_nothing_is_refused_by_name(model, name):
    with pytest.raises(GenerationError, match=name):
        Engine(model, **{name: 0})


def test_a_length_of_nothing_is_refused_by_name(model):
    with pytest.raises(GenerationError, match="max_length"):
        Engine(model, max_length=0)


@pytest.mark.parametrize("name", ["slots", "max_length", "prefill_chunk"])
def test_true_is_no_size(model, name):
    with pytest.raises(GenerationError, match=name):
        Engine(model, **{name: True})


# ------------------------------------------------------------------------------------------ several in one batch


def test_more_than_slots_wait_in_order_and_the_gauges_say_so(model, reference):
    engine = Engine(model, slots=2, prefix_reuse=False)
    prompts = [some_ids(length, seed=8) for length in (5, 9, 3, 7, 4)]
    sequences = [engine.add(p, greedy(4))[0] for p in prompts]
    assert (engine.stats.running, engine.stats.waiting) == (0, 5)
    engine.step()
    assert (engine.stats.running, engine.stats.waiting) == (2, 3)
    assert [len(s.tokens) for s in sequences] == [1, 1, 0, 0, 0]
    run(engine)
    assert (engine.stats.running, engine.stats.waiting) == (0, 0)
    assert [s.tokens for s in sequences] == [expected(reference, p, 4) for p in prompts]
    assert not engine.step()


def test_a_long_prompt_is_read_in_chunks_beside_an_answer_that_goes_on(model, reference):
    engine = Engine(model, prefill_chunk=10)
    (answering,) = engine.add(some_ids(6), greedy(40))
    engine.step()
    (reading,) = engine.add(some_ids(95), greedy(4))
    for step in range(1, 11):
        assert reading.tokens == []
        engine.step()
        assert len(answering.tokens) == 1 + step
    assert len(reading.tokens) == 1  # 95 tokens in 10 steps, and the first token with the last of them
    run(engine)
    assert answering.tokens == expected(reference, answering.prompt, 40)
    assert reading.tokens == expected(reference, reading.prompt, 4)


def test_n_sampled_continuations_differ_and_do_not_depend_on_n(model):
    prompt, engine = some_ids(20), Engine(model, slots=3)
    fields = dict(max_new_tokens=10, seed=4)
    five = engine.generate([prompt], SamplingParams(n=5, **fields))[0]
    two = engine.generate([prompt], SamplingParams(n=2, **fields))[0]
    assert [s.index for s in five] == [0, 1, 2, 3, 4]
    assert len({tuple(s.tokens) for s in five}) == 5
    assert [s.tokens for s in two] == [s.tokens for s in five[:2]]


def test_without_a_seed_answers_differ_from_run_to_run(model):
    engine = Engine(model)
    made = {tuple(engine.generate([some_ids(20)], SamplingParams(max_new_tokens=10))[0][0].tokens) for _ in range(3)}
    assert len(made) == 3


def test_generate_takes_one_set_of_params_or_one_for_each_prompt(model, reference):
    engine = Engine(model, slots=2)
    prompts = [some_ids(length) for length in (4, 11, 7)]
    each = [greedy(2), greedy(5, n=2), greedy(3)]
    results = engine.generate(prompts, each)
    assert [[s.tokens for s in sequences] for sequences in results] == [
        [expected(reference, p, params.max_new_tokens)] * params.n for p, params in zip(prompts, each, strict=True)
    ]
    assert [len(s) for s in engine.generate(prompts, greedy(2))] == [1, 1, 1]
    assert engine.generate([], greedy(2)) == []
    (once,) = engine.generate((iter(p) for p in prompts[:1]), greedy(2))  # what can be read only once is read once
    assert once[0].tokens == results[0][0].tokens


@pytest.mark.parametrize("wrong", ["empty prompt", "one set of params too few"])
def test_generate_that_is_refused_leaves_nothing_behind(model, wrong):
    engine = Engine(model)
    prompts = [some_ids(5), some_ids(5), []]
    with pytest.raises((GenerationError, ValueError)):
        engine.generate(prompts, greedy(3)) if wrong == "empty prompt" else engine.generate(prompts[:2], [greedy(3)])
    assert (engine.stats.running, engine.stats.waiting) == (0, 0) and not engine.step()


def test_counters_add_up(model):
    engine, rng = Engine(model, slots=3, prefill_chunk=16), np.random.default_rng(1)
    prompts = [some_ids(int(length)) for length in rng.integers(1, 60, 12)]
    prompts += [prompts[3] + some_ids(5), prompts[7], prompts[7]]
    steps = 0
    made = [s for p in prompts for s in engine.add(p, SamplingParams(max_new_tokens=int(rng.integers(1, 9)), n=2))]
    while engine.step():
        steps += 1
    stats = engine.stats
    assert stats.steps == steps
    assert stats.new_tokens == sum(len(s.tokens) for s in made)
    assert stats.reused_tokens == sum(s.reused for s in made) > 0
    assert stats.prompt_tokens + stats.reused_tokens == sum(len(s.prompt) for s in made)
    assert stats.finished == Counter(s.finish_reason for s in made) and stats.nonfinite == 0
    assert 0 < stats.forward_seconds < stats.step_seconds


# ----------------------------------------------------------------------------------------- listeners and stream


def test_a_listener_hears_every_token_once_with_its_logprob_and_one_end(model, reference):
    engine, ear = Engine(model), Ear()
    (sequence,) = engine.add(some_ids(12), greedy(6, logprobs=2), ear)
    run(engine)
    assert ear.tokens == sequence.tokens == expected(reference, sequence.prompt, 6)
    assert [e.logprob for e in ear.events] == sequence.logprobs
    assert [e.finish_reason for e in ear.events] == [None] * 5 + ["length"]
    assert all(e.sequence is sequence for e in ear.events)


def test_what_a_listener_sees_in_the_sequence_is_already_true(model):
    seen = []
    ear = Ear(lambda e: seen.append((len(e.sequence.tokens), e.sequence.tokens[-1], e.sequence.finish_reason)))
    engine = Engine(model)
    (sequence,) = engine.add(some_ids(12), greedy(3), ear)
    run(engine)
    a, b, c = sequence.tokens
    assert seen == [(1, a, None), (2, b, None), (3, c, "length")]


def test_a_listener_that_has_enough_ends_its_sequence_as_a_stop(model, reference):
    engine, ear = Engine(model), Ear(lambda event: len(event.sequence.tokens) == 3)
    stopped, other = engine.add(some_ids(12), greedy(8), ear)[0], engine.add(some_ids(13), greedy(8))[0]
    run(engine)
    assert stopped.tokens == expected(reference, stopped.prompt, 3) == ear.tokens
    assert (stopped.finish_reason, stopped.stop_id, stopped.error) == ("stop", None, None)
    assert other.tokens == expected(reference, other.prompt, 8)
    assert engine.stats.finished == {"stop": 1, "length": 1}


def test_a_listener_that_raises_ends_its_own_sequence_with_that_error(model, reference):
    trouble = RuntimeError("the pipe is broken")

    def act(event):
        if len(event.sequence.tokens) == 2 and event.sequence.index == 1:
            raise trouble

    engine, ear = Engine(model, slots=4), Ear(act)
    sequences = engine.add(some_ids(12), greedy(6, n=3), ear)
    (other,) = engine.add(some_ids(13), greedy(6))
    run(engine)
    assert sequences[1].finish_reason == "error" and sequences[1].error is trouble and len(sequences[1].tokens) == 2
    for sequence in (sequences[0], sequences[2], other):
        assert sequence.tokens == expected(reference, sequence.prompt, 6) and sequence.error is None
    assert engine.stats.finished == {"error": 1, "length": 3} and engine.stats.nonfinite == 0
    assert engine.generate([some_ids(12)], greedy(6))[0][0].tokens == sequences[0].tokens


def test_a_listener_that_raises_at_the_very_end_is_counted_as_it_is_reported(model):
    def act(event):
        if event.finish_reason:
            raise RuntimeError("late")

    engine = Engine(model)
    sequences = engine.add(some_ids(12), greedy(3, n=2), Ear(act))
    run(engine)
    assert [s.finish_reason for s in sequences] == ["error", "error"]
    assert engine.stats.finished == Counter(s.finish_reason for s in sequences)


def test_a_listener_may_add_a_request(model, reference):
    engine, added = Engine(model, slots=1), []

    def act(event):
        if event.finish_reason and not added:
            added.extend(engine.add(some_ids(21), greedy(5)))

    (first,) = engine.add(some_ids(12), greedy(3), Ear(act))
    run(engine)
    assert first.tokens == expected(reference, first.prompt, 3)
    assert added[0].tokens == expected(reference, added[0].prompt, 5)


def test_a_stream_gives_the_events_and_leaves_nothing(model, reference):
    engine = Engine(model)
    events = list(engine.stream(some_ids(12), greedy(5)))
    assert [e.token for e in events] == expected(reference, some_ids(12), 5)
    assert [e.finish_reason for e in events] == [None] * 4 + ["length"]
    several = list(engine.stream(some_ids(12), greedy(5, n=3)))
    assert Counter(e.sequence.index for e in several) == {0: 5, 1: 5, 2: 5}


def test_a_stream_is_as_fresh_as_it_is_read_and_closing_it_cancels(model, reference):
    engine = Engine(model, slots=2)
    (other,) = engine.add(some_ids(13), greedy(9))
    stream = engine.stream(some_ids(12), greedy(200, n=2))
    taken = [next(stream) for _ in range(3)]
    steps = engine.stats.steps
    assert steps <= 3, "nothing is computed ahead of its reader"
    stream.close()
    assert {e.sequence.finish_reason for e in taken} <= {"cancelled"}
    assert engine.stats.finished["cancelled"] == 2
    run(engine)
    assert other.tokens == expected(reference, other.prompt, 9)
    assert engine.stats.new_tokens < 20


def test_a_loop_that_breaks_off_a_stream_cancels_it(model):
    engine = Engine(model)
    for event in engine.stream(some_ids(12), greedy(200)):
        if len(event.sequence.tokens) == 2:
            break
    assert engine.stats.finished == {"cancelled": 1} and not engine.step()
