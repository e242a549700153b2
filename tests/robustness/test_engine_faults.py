"""What is cancelled, damaged or broken ends alone, and whoever comes next never knows."""

import numpy as np
import paddle
import pytest
from generation_reference import CLOSE, Ear, Reference, expected, greedy, run, set_embedding, some_ids, tiny_model

from aquila_pd.generation import Engine, NonFiniteLogits, TokenEvent
from aquila_pd.utils.errors import GenerationError


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def reference(model):
    return Reference(model)


# ---------------------------------------------------------------------------------------------------- cancelling


def test_a_cancelled_sequence_frees_its_slot_for_the_next_step(model, reference):
    engine, ear = Engine(model, slots=1), Ear()
    (first,) = engine.add(some_ids(12), greedy(50), ear)
    (second,) = engine.add(some_ids(17), greedy(4))
    for _ in range(3):
        engine.step()
    assert second.tokens == []
    engine.cancel(first)
    assert (engine.stats.running, engine.stats.waiting) == (0, 1)
    assert (first.finish_reason, first.error) == ("cancelled", None)
    assert first.tokens == expected(reference, first.prompt, 3)
    engine.step()
    assert len(second.tokens) == 1
    run(engine)
    assert second.tokens == expected(reference, second.prompt, 4)
    assert ear.lasts == ["cancelled"] and ear.events[-1] == TokenEvent(first, None, None, "cancelled")
    assert len(ear.events) == 4


@pytest.mark.parametrize("steps", [0, 1, 4], ids=["waiting", "reading its prompt", "answering"])
def test_cancelling_twice_is_once(model, steps):
    engine, ear = Engine(model, prefill_chunk=10), Ear()
    (sequence,) = engine.add(some_ids(25), greedy(50), ear)
    for _ in range(steps):
        engine.step()
    engine.cancel(sequence)
    engine.cancel(sequence)
    assert ear.lasts == ["cancelled"] and not engine.step()
    assert engine.stats.finished == {"cancelled": 1}
    assert (engine.stats.running, engine.stats.waiting) == (0, 0)


def test_cancelling_what_has_ended_changes_nothing(model):
    engine, ear = Engine(model), Ear()
    (sequence,) = engine.add(some_ids(5), greedy(2), ear)
    run(engine)
    engine.cancel(sequence)
    assert sequence.finish_reason == "length" and ear.lasts == ["length"] and engine.stats.finished == {"length": 1}


def test_a_listener_may_cancel_its_own_sequence(model, reference):
    engine = Engine(model, slots=1)
    ear = Ear(lambda e: engine.cancel(e.sequence) if len(e.sequence.tokens) == 2 else None)
    (first,) = engine.add(some_ids(12), greedy(50), ear)
    (second,) = engine.add(some_ids(17), greedy(4))
    run(engine)
    assert first.finish_reason == "cancelled" and len(first.tokens) == 2 and ear.lasts == ["cancelled"]
    assert second.tokens == expected(reference, second.prompt, 4)


def test_cancelling_in_the_last_event_comes_too_late(model):
    engine = Engine(model)
    ear = Ear(lambda e: engine.cancel(e.sequence) if e.finish_reason else None)
    (sequence,) = engine.add(some_ids(12), greedy(3), ear)
    run(engine)
    assert sequence.finish_reason == "length" and ear.lasts == ["length"] and engine.stats.finished == {"length": 1}


@pytest.mark.parametrize("victim", [0, 2, 4], ids=["served before it", "served after it", "still waiting"])
def test_a_listener_may_cancel_any_other_sequence(model, reference, victim):
    engine, ears = Engine(model, slots=4), {}
    sequences = []

    def act(event):
        if event.sequence is sequences[1] and len(event.sequence.tokens) == 3:
            engine.cancel(sequences[victim])

    for i in range(5):
        ears[i] = Ear(act)
        sequences += engine.add(some_ids(10 + i), greedy(6), ears[i])
    run(engine)
    for i, sequence in enumerate(sequences):
        wanted = expected(reference, sequence.prompt, 6)
        assert ears[i].tokens == sequence.tokens and len(ears[i].lasts) == 1
        if i == victim:
            assert sequence.finish_reason == "cancelled" and sequence.tokens == wanted[: len(sequence.tokens)]
        else:
            assert sequence.tokens == wanted


# ------------------------------------------------------------------------------------------ NaN and infinite

BAD = 7  # the token whose row of the embedding is damaged


@pytest.fixture(scope="module", params=[np.nan, np.inf, -np.inf], ids=["nan", "+inf", "-inf"])
def damaged(request):
    model = tiny_model()
    set_embedding(model, BAD, request.param)
    return model


def clean_answer(reference: Reference, prompt: list[int], count: int) -> list[int]:
    tokens = expected(reference, prompt, count)
    assert BAD not in prompt and BAD not in tokens[:-1], "this answer would meet the damaged row itself"
    return tokens


def clean_ids(length: int, seed: int = 0) -> list[int]:
    return some_ids(length, seed, but=(BAD,))


def test_only_prompts_with_the_damaged_token_end_with_a_named_error(damaged, reference):
    engine, ears = Engine(damaged, slots=3, prefill_chunk=20), []
    prompts = [clean_ids(12), [*clean_ids(9), BAD, *clean_ids(4)], clean_ids(33), [BAD], [*clean_ids(40), BAD]]
    sequences = []
    for prompt in [*prompts, *prompts]:
        ears.append(Ear())
        sequences += engine.add(prompt, greedy(8), ears[-1])
    run(engine)
    for sequence, ear in zip(sequences, ears, strict=True):
        if BAD in sequence.prompt:
            assert sequence.finish_reason == "error" and isinstance(sequence.error, NonFiniteLogits)
            assert sequence.tokens == [] and ear.events == [TokenEvent(sequence, None, None, "error")]
            assert "NaN" in str(sequence.error)
        else:
            assert sequence.tokens == clean_answer(reference, sequence.prompt, 8) and sequence.error is None
    assert engine.stats.nonfinite == engine.stats.finished["error"] == 6


def test_the_next_user_of_the_slot_is_untouched(damaged, reference):
    engine = Engine(damaged, slots=1, prefill_chunk=16)
    for length in (50, 3, 20):
        (bad,) = engine.generate([[*clean_ids(length), BAD, *clean_ids(30)]], greedy(4))[0]
        assert bad.finish_reason == "error"
        for short in (1, 5, length):
            prompt = clean_ids(short, seed=2)
            assert engine.generate([prompt], greedy(6))[0][0].tokens == clean_answer(reference, prompt, 6)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("end", ["between steps", "by a neighbour's listener"])
def test_the_next_user_of_a_slot_is_untouched_by_a_damaged_prompt_that_was_cancelled(damaged, reference, end, steps):
    """Before, with and after the chunk that holds the damaged token; nobody has asked for a token yet."""
    engine, between = Engine(damaged, slots=2, prefill_chunk=16), end == "between steps"
    prompt = [*clean_ids(20), BAD, *clean_ids(40)]

    def give_up(event):
        if not between and len(event.sequence.tokens) == steps:
            engine.cancel(bad)

    engine.add(clean_ids(3), greedy(4), give_up)  # came first, is read first: a token in each step
    (bad,) = engine.add(prompt, greedy(4))
    for _ in range(steps):
        engine.step()
    engine.cancel(bad)
    run(engine)
    assert bad.finish_reason in ("cancelled", "error") and bad.tokens == []
    for again in (clean_ids(4, seed=2), clean_ids(5, seed=2), prompt[:20] + clean_ids(3, seed=5)):
        (sequence,) = engine.generate([again], greedy(6))[0]
        assert sequence.error is None, sequence.error
        assert sequence.tokens == clean_answer(reference, again, 6)


def test_a_damaged_token_that_is_drawn_ends_the_answer_after_it(reference):
    prompt = some_ids(30)
    tokens = expected(reference, prompt, 12)
    bad = tokens[4]
    first = tokens.index(bad)
    assert bad not in prompt and first > 0
    model, ear = tiny_model(), Ear()
    set_embedding(model, bad, np.nan)
    engine = Engine(model, slots=2)
    (sequence,) = engine.add(prompt, greedy(12, logprobs=0), ear)
    (other,) = engine.add([1, 2, 3], greedy(12))
    run(engine)
    assert sequence.tokens == tokens[: first + 1] == ear.tokens and len(sequence.logprobs) == first + 1
    assert sequence.finish_reason == "error" and isinstance(sequence.error, NonFiniteLogits)
    assert ear.lasts == ["error"] and ear.events[-1].token is None
    assert bad not in expected(reference, [1, 2, 3], 12) and other.tokens == expected(reference, [1, 2, 3], 12)


def test_the_next_user_of_a_slot_is_untouched_by_an_answer_given_up_in_the_step_that_damaged_it(reference):
    prompt, other = some_ids(30), some_ids(9, seed=4)
    tokens = expected(reference, prompt, 12)
    bad = tokens[4]
    first = tokens.index(bad)
    model = tiny_model()
    set_embedding(model, bad, np.nan)
    engine = Engine(model, slots=2)
    # served first, it gives its neighbour up in the step that brings NaN logits: that one has ended by then
    engine.add(other, greedy(12), lambda e: engine.cancel(victim) if len(e.sequence.tokens) == first + 2 else None)
    (victim,) = engine.add(prompt, greedy(12))
    run(engine)
    assert victim.finish_reason == "error" and victim.tokens[-1] == bad
    nexts = [some_ids(5, seed, but=(bad,)) for seed in range(6, 26)]
    nexts = [again for again in nexts if bad not in expected(reference, again, 4)[:-1]]
    for again in nexts[:3]:
        wanted = expected(reference, again, 4)
        (sequence,) = engine.generate([again], greedy(4))[0]
        assert sequence.error is None and sequence.tokens == wanted


@pytest.mark.parametrize("scored", [False, True], ids=["asked", "scored"])
def test_damaged_siblings_of_one_pass_end_once_each_though_one_gives_up_the_others(damaged, reference, scored):
    engine, sequences = Engine(damaged, slots=3), []

    def give_up(event):
        if event.finish_reason == "error":
            for sequence in sequences:
                engine.cancel(sequence)

    ears = [Ear(give_up) for _ in range(3)]
    for i, ear in enumerate(ears):
        prompt = [*clean_ids(4 + i), BAD, *clean_ids(3)]
        sequences += engine.add(prompt, greedy(3, prompt_logprobs=scored), ear)
    run(engine)
    assert sorted(s.finish_reason for s in sequences) == ["cancelled", "cancelled", "error"]
    assert [ear.lasts for ear in ears] == [[s.finish_reason] for s in sequences]
    assert engine.stats.finished == {"error": 1, "cancelled": 2} and engine.stats.nonfinite == 1
    later = engine.generate([clean_ids(2, seed) for seed in range(3)], greedy(4))
    for (sequence,) in later:
        assert sequence.error is None and sequence.tokens == clean_answer(reference, sequence.prompt, 4)


def test_a_score_that_meets_the_damaged_token_ends_there(damaged, reference):
    engine, ear = Engine(damaged, slots=2, prefill_chunk=16), Ear()
    prompt = [*clean_ids(30), BAD, *clean_ids(30)]
    (sequence,) = engine.add(prompt, greedy(0, prompt_logprobs=True), ear)
    (other,) = engine.add(clean_ids(12), greedy(8, prompt_logprobs=True))
    run(engine)
    assert sequence.finish_reason == "error" and isinstance(sequence.error, NonFiniteLogits)
    assert ear.lasts == ["error"] and engine.stats.nonfinite == 1
    values = [p.logprob for p in sequence.prompt_logprobs[1:]]
    assert np.isfinite(values).all() and len(values) <= 30
    assert other.tokens == clean_answer(reference, other.prompt, 8)
    np.testing.assert_allclose(
        [p.logprob for p in other.prompt_logprobs[1:]],
        reference.token_logprobs(other.prompt[:1], other.prompt[1:]),
        atol=CLOSE,
    )


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_a_prompt_that_begins_like_a_damaged_one_is_untouched(damaged, reference, steps):
    """Whenever it comes: what was read in one chunk with the damaged token is NaN before it too."""
    base = clean_ids(30)
    engine = Engine(damaged, slots=3, prefill_chunk=16)
    (bad,) = engine.add([*base, BAD, *clean_ids(40)], greedy(4))
    for _ in range(steps):
        engine.step()
    good = [engine.add(base + clean_ids(6, seed), greedy(6))[0] for seed in (4, 5)]
    run(engine)
    for sequence in good:
        assert sequence.error is None and sequence.tokens == clean_answer(reference, sequence.prompt, 6)
    assert bad.finish_reason == "error" and engine.stats.nonfinite == 1


# ----------------------------------------------------------------------------------------------------- reset


def broken(model, monkeypatch, after: int, trouble: BaseException) -> None:
    """Make the second layer of the model raise in its `after`th call."""
    calls, layer = [], model.aquila.layers[1]
    forward = layer.forward

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise trouble
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", failing)


def test_after_a_failed_step_reset_ends_everything_and_the_engine_works(reference, monkeypatch):
    model = tiny_model()
    engine, ears = Engine(model, slots=2, prefill_chunk=16), [Ear() for _ in range(4)]
    trouble = RuntimeError("out of memory")
    broken(model, monkeypatch, 4, trouble)
    sequences = [engine.add(some_ids(20 + i), greedy(9), ear)[0] for i, ear in enumerate(ears)]
    with pytest.raises(RuntimeError, match="out of memory"):
        run(engine)
    engine.reset(trouble)
    assert all(s.finish_reason == "error" and s.error is trouble for s in sequences)
    assert [ear.lasts for ear in ears] == [["error"]] * 4 and all(ear.events[-1].token is None for ear in ears)
    assert (engine.stats.running, engine.stats.waiting) == (0, 0) and not engine.step()
    assert engine.stats.finished == {"error": 4}
    for sequence in sequences:
        (again,) = engine.generate([sequence.prompt], greedy(9))[0]
        assert again.tokens == expected(reference, sequence.prompt, 9) and again.error is None
    assert [s.finish_reason for s in sequences] == ["error"] * 4


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 5])
def test_after_memory_ran_out_while_the_cache_grew_the_engine_works(model, reference, monkeypatch, fails_at):
    """Growing takes a new buffer for the keys and the values of each of two layers."""
    engine, calls, zeros = Engine(model, slots=2, max_length=700), [], paddle.zeros

    def scarce(*args, **kwargs):
        calls.append(1)
        if len(calls) == fails_at:
            raise MemoryError("no room")
        return zeros(*args, **kwargs)

    (small,) = engine.add(some_ids(20), greedy(9))
    engine.step()
    (large,) = engine.add(some_ids(400), greedy(3))
    with monkeypatch.context() as patched:
        patched.setattr(paddle, "zeros", scarce)
        try:
            run(engine)
        except MemoryError as error:
            engine.reset(error)
    assert (small.error is None) == (large.error is None) == (len(calls) < fails_at)
    for prompt in (some_ids(20), some_ids(400), some_ids(600)):
        (again,) = engine.generate([prompt], greedy(3))[0]
        assert again.tokens == expected(reference, prompt, 3)


@pytest.mark.parametrize("after", range(1, 10))
def test_an_interrupt_anywhere_in_a_stream_leaves_an_engine_that_answers_right(reference, monkeypatch, after):
    """Ctrl-C stops the answer and not the program: the stream closes, the next turn begins like this one."""
    model = tiny_model()
    engine, prompt = Engine(model, slots=2, prefill_chunk=20), some_ids(50)
    with monkeypatch.context() as patched:
        broken(model, patched, after, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            list(engine.stream(prompt, greedy(30)))
    assert engine.stats.finished == {"cancelled": 1} and not engine.step()
    following = prompt + expected(reference, prompt, after)[: after // 2] + some_ids(7)
    (sequence,) = engine.generate([following], greedy(6))[0]
    assert sequence.tokens == expected(reference, following, 6)


def test_a_generate_that_is_interrupted_leaves_nothing_running(reference, monkeypatch):
    """As a stream that is interrupted does."""
    model = tiny_model()
    engine, prompts = Engine(model, slots=2), [some_ids(9), some_ids(10), some_ids(11)]
    with monkeypatch.context() as patched:
        broken(model, patched, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompts, greedy(30))
    assert (engine.stats.running, engine.stats.waiting) == (0, 0) and not engine.step()
    assert engine.stats.finished == {"cancelled": 3}


def test_reset_without_a_reason_gives_a_named_one_and_forgets_what_slots_held(model):
    engine = Engine(model)
    (done,) = engine.generate([some_ids(40)], greedy(2))[0]
    (sequence,) = engine.add(some_ids(40), greedy(2))
    engine.reset()
    assert isinstance(sequence.error, GenerationError) and done.finish_reason == "length"
    (again,) = engine.generate([some_ids(40)], greedy(2))[0]
    assert again.reused == 0 and again.tokens == done.tokens


def test_reset_of_an_idle_engine_is_nothing(model):
    engine = Engine(model)
    engine.reset()
    assert engine.stats.finished == {} and not engine.step()


def test_reset_tells_each_listener_once_though_one_cancels_its_siblings(model):
    """What a server does that gives up a whole request when one of its n sequences fails."""
    engine, sequences = Engine(model, slots=2), []

    def give_up(event):
        if event.finish_reason == "error":
            for sequence in sequences:
                engine.cancel(sequence)

    ears = [Ear(give_up) for _ in range(4)]
    for ear in ears:
        sequences += engine.add(some_ids(12), greedy(9), ear)
    engine.step()
    engine.reset()
    assert [len(ear.lasts) for ear in ears] == [1] * 4
    assert sum(engine.stats.finished.values()) == 4
    assert (engine.stats.running, engine.stats.waiting) == (0, 0) and not engine.step()


def test_reset_goes_on_though_a_listener_raises(model):
    def act(event):
        raise RuntimeError("the client is gone")

    engine = Engine(model, slots=1)
    sequences = [s for ear in (Ear(act), Ear(act), Ear()) for s in engine.add(some_ids(12), greedy(9), ear)]
    engine.reset()
    assert all(s.finish_reason == "error" for s in sequences) and not engine.step()


def test_a_step_left_half_done_is_not_followed_by_another(monkeypatch):
    model = tiny_model()
    engine = Engine(model, slots=2)
    engine.add(some_ids(9), greedy(9))
    with monkeypatch.context() as patched:
        broken(model, patched, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(engine)
    with pytest.raises(GenerationError, match=r"reset\(\)"):
        engine.step()
    engine.reset()
    assert not engine.step()
