"""What slots still hold is used again, and only that; the cache grows for a long sequence and shrinks after it."""

import numpy as np
import pytest
from generation_reference import (
    MARGIN,
    Reference,
    expected,
    greedy,
    run,
    some_ids,
    tiny_model,
)

from aquila_pd.generation import Engine
from aquila_pd.generation.kv_slots import SlotKVCache


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def reference(model):
    return Reference(model)


# ----------------------------------------------------------------------------------------------- reused prefixes


def alone(model, prompt: list[int], count: int) -> list[int]:
    return Engine(model, slots=1, prefix_reuse=False, max_length=700).generate([prompt], greedy(count))[0][0].tokens


@pytest.mark.parametrize("end", ["length", "stop", "cancelled"])
def test_the_next_turn_of_a_chat_computes_only_what_is_new(model, reference, end):
    engine, prompt = Engine(model, slots=2), some_ids(50, seed=1)
    tokens = expected(reference, prompt, 8)
    assert tokens[7] not in tokens[:7]
    if end == "cancelled":
        (first,) = engine.add(prompt, greedy(50))
        for _ in range(8):
            engine.step()
        engine.cancel(first)
    else:
        stop = (tokens[7],) if end == "stop" else ()
        (first,) = engine.generate([prompt], greedy(8, stop_ids=stop))[0]
    assert first.tokens == tokens and first.finish_reason == end and first.reused == 0
    following = prompt + tokens + some_ids(20, seed=9)
    before = engine.stats.prompt_tokens
    (second,) = engine.generate([following], greedy(8))[0]
    # the last token of an answer was drawn and never read
    assert second.reused == 50 + 8 - 1
    assert engine.stats.prompt_tokens - before == len(following) - second.reused
    assert second.tokens == expected(reference, following, 8)


def test_the_same_prompt_again_computes_its_last_token_only(model, reference):
    engine, prompt = Engine(model, slots=2), some_ids(60)
    first, second, third = (engine.generate([prompt], greedy(6))[0][0] for _ in range(3))
    assert [s.reused for s in (first, second, third)] == [0, 59, 59]
    assert first.tokens == second.tokens == third.tokens == expected(reference, prompt, 6)
    assert engine.stats.reused_tokens == 118


def test_a_prompt_that_is_a_part_of_what_a_slot_holds_starts_there(model, reference):
    engine, prompt = Engine(model, slots=1), some_ids(80)
    engine.generate([prompt], greedy(6))
    for length in (79, 50, 40):
        (sequence,) = engine.generate([prompt[:length]], greedy(6))[0]
        assert sequence.reused == length - 1 and sequence.tokens == expected(reference, prompt[:length], 6)


def test_without_reuse_everything_is_computed(model, reference):
    engine, prompt = Engine(model, slots=2, prefix_reuse=False), some_ids(60)
    for _ in range(2):
        (sequence,) = engine.generate([prompt], greedy(6))[0]
        assert sequence.reused == 0 and sequence.tokens == expected(reference, prompt, 6)
    assert engine.stats.prompt_tokens == 120 and engine.stats.reused_tokens == 0


def test_a_prefix_is_copied_out_of_a_sequence_that_is_answering(model, reference):
    engine, stem = Engine(model, slots=3), some_ids(40)
    (running,) = engine.add(stem + some_ids(4, seed=1), greedy(30))
    for _ in range(5):
        engine.step()
    (joining,) = engine.add(stem + some_ids(7, seed=2), greedy(8))
    (answered,) = engine.add(running.prompt + running.tokens + [3, 4], greedy(8))
    run(engine)
    assert joining.reused == 40
    # its own prompt and the answer so far, of which the last token was not read when it joined
    assert answered.reused == 44 + 5 - 1
    for sequence, count in ((running, 30), (joining, 8), (answered, 8)):
        assert sequence.tokens == expected(reference, sequence.prompt, count)


@pytest.mark.parametrize(("chunk", "most"), [(512, 60 + 3), (16, 60 + 3 * 16)], ids=["at once", "in chunks"])
def test_n_continuations_read_their_prompt_once(model, reference, chunk, most):
    engine, prompt = Engine(model, slots=4, prefill_chunk=chunk), some_ids(60)
    sequences = engine.generate([prompt], greedy(6, n=4))[0]
    assert all(s.tokens == expected(reference, prompt, 6) for s in sequences)
    assert engine.stats.prompt_tokens <= most  # so little left to share is not waited for


def test_two_chats_in_turn_keep_their_own_slots(model, reference):
    engine = Engine(model, slots=2)
    chats = [some_ids(30, seed=1), some_ids(30, seed=2)]
    for turn in range(4):
        for i, chat in enumerate(chats):
            (sequence,) = engine.generate([chat], greedy(5))[0]
            assert sequence.tokens == expected(reference, chat, 5)
            assert sequence.reused == (len(chat) - 9 if turn else 0)  # 8 new ones, and the last of the answer
            chats[i] = chat + sequence.tokens + some_ids(8, seed=100 + turn)


def test_a_short_branch_does_not_cost_the_long_chat_its_slot(model, reference):
    engine = Engine(model, slots=2)
    long = some_ids(150)
    engine.generate([long], greedy(3))
    (branch,) = engine.generate([[*long[:30], 5, 6, 7]], greedy(3))[0]
    (again,) = engine.generate([long], greedy(3))[0]
    assert branch.reused == 30 and again.reused == 149
    assert branch.tokens == expected(reference, branch.prompt, 3) and again.tokens == expected(reference, long, 3)


def test_a_long_chat_is_cut_back_to_where_another_parts_and_both_stay_right(model, reference):
    """One slot: what is beyond the parting is old keys, which nobody may see."""
    engine, stem = Engine(model, slots=1), some_ids(60)
    for tail in (some_ids(70, seed=1), [4], some_ids(33, seed=2), [4, 5], some_ids(1, seed=3)):
        prompt = stem + tail
        (sequence,) = engine.generate([prompt], greedy(6))[0]
        assert sequence.tokens == expected(reference, prompt, 6)


@pytest.mark.parametrize("running", [False, True], ids=["slot free", "still running"])
def test_control_a_prefix_that_was_not_copied_is_noticed(model, reference, monkeypatch, running):
    monkeypatch.setattr(SlotKVCache, "copy", lambda self, source, target, length: None)
    engine, stem = Engine(model, slots=3), some_ids(100)
    engine.add(stem, greedy(30))
    for _ in range(3 if running else 40):
        engine.step()
    prompt = stem[:40] + some_ids(5, seed=2)
    (sequence,) = engine.generate([prompt], greedy(8))[0]
    assert sequence.reused == 40 and sequence.tokens != expected(reference, prompt, 8)


def test_control_a_slot_whose_keys_were_lost_is_noticed(model, reference):
    engine, prompt = Engine(model, slots=1), some_ids(60)
    engine.generate([prompt], greedy(6))
    engine._cache.clear(0)
    (sequence,) = engine.generate([prompt], greedy(6))[0]
    assert sequence.reused == 59 and sequence.tokens != expected(reference, prompt, 6)


def test_a_prefix_of_other_ids_is_never_taken(model, reference):
    """The same ids elsewhere, or one other id at the very beginning, are another text."""
    engine, stem = Engine(model, slots=1), some_ids(60)
    engine.generate([stem], greedy(3))
    for prompt in (stem[1:], [*stem[:1], *stem], [(stem[0] + 1) % 101, *stem[1:]]):
        (sequence,) = engine.generate([prompt], greedy(6))[0]
        assert sequence.reused == 0 and sequence.tokens == expected(reference, prompt, 6)
        engine.generate([stem], greedy(3))


# ------------------------------------------------------------------------------- reuse where the angles change


@pytest.fixture(scope="module")
def dynamic():
    model = tiny_model("dynamic", max_position_embeddings=40)
    return model, Reference(model)


def test_dynamic_angles_an_answer_that_grows_beyond_the_trained_length(dynamic):
    model, reference = dynamic
    engine = Engine(model, slots=2, max_length=128)
    prompt = some_ids(30)
    (first,) = engine.generate([prompt], greedy(30))[0]
    assert first.tokens == expected(reference, prompt, 30)
    for kept in (30, 38, 40):  # a new prompt within the trained length may use what was made within it
        following = (prompt + first.tokens)[:kept]
        (second,) = engine.generate([following], greedy(15))[0]
        assert second.tokens == expected(reference, following, 15)
    assert engine.stats.reused_tokens > 0


def test_dynamic_angles_a_long_prompt_takes_nothing_of_a_short_one_and_leaves_it_nothing(dynamic):
    model, reference = dynamic
    engine, stem = Engine(model, slots=1, max_length=128), some_ids(60)
    for length in (36, 60, 36, 59, 40, 41, 40):
        (sequence,) = engine.generate([stem[:length]], greedy(8))[0]
        assert sequence.tokens == expected(reference, stem[:length], 8), length


def test_dynamic_angles_nothing_is_taken_from_a_long_prompt_that_is_running(dynamic):
    model, reference = dynamic
    engine, stem = Engine(model, slots=2, max_length=128), some_ids(60)
    (long,) = engine.add(stem, greedy(20))
    for _ in range(3):
        engine.step()
    (short,) = engine.add(stem[:36], greedy(8))
    run(engine)
    assert long.tokens == expected(reference, stem, 20)
    assert short.reused == 0
    assert short.tokens == expected(reference, stem[:36], 8)


# ------------------------------------------------------------------------------------- a cache that grows, shrinks


def test_the_cache_grows_for_a_long_sequence_and_gives_the_memory_back(model, reference):
    engine = Engine(model, slots=3, max_length=700)
    small = engine._cache.capacity
    prompt = some_ids(560)
    (long,) = engine.generate([prompt], greedy(6))[0]
    large = engine._cache.capacity
    assert long.tokens == expected(reference, prompt, 6) and large > 1.5 * small
    short = some_ids(50, seed=1)
    while engine._cache.capacity > small and engine.stats.steps < 3000:
        # again and again in its own slot, so that the long one's is nobody else's; in one of them the cache shrinks
        assert engine.generate([short], greedy(40))[0][0].tokens == expected(reference, short, 40)
    assert engine._cache.capacity == small, "the memory of one long sequence is kept for ever"
    assert 100 < engine.stats.steps < 2000, "neither at once, for the next long one, nor after an age"
    # what is still there is used; what was beyond the end of the buffers is not believed to be
    (again,) = engine.generate([prompt], greedy(6))[0]
    assert again.tokens == long.tokens and 100 < again.reused < 560
    (next_turn,) = engine.generate([prompt + long.tokens + [7]], greedy(6))[0]
    assert next_turn.tokens == expected(reference, next_turn.prompt, 6) and next_turn.reused == 565


def test_the_cache_does_not_shrink_under_a_sequence_that_needs_it(model, reference):
    engine = Engine(model, slots=2, max_length=700)
    engine.generate([some_ids(690)], greedy(2))
    large = engine._cache.capacity
    prompt = some_ids(300)
    for seed in range(3):  # about a hundred and fifty steps each, with a neighbour of 300 tokens
        (neighbour,) = engine.add(prompt, greedy(190))
        (sequence,) = engine.add(some_ids(20, seed), greedy(60))
        run(engine)
        assert sequence.tokens == expected(reference, sequence.prompt, 60)
        assert neighbour.tokens[:20] == expected(reference, prompt, 20)
        assert engine._cache.capacity <= large
    assert neighbour.tokens == alone(model, prompt, 190)


def test_a_sequence_that_crosses_every_capacity_is_right_to_its_end(model, reference):
    """From nothing to the longest there may be, with a neighbour that came and went."""
    engine = Engine(model, slots=2, max_length=600)
    (long,) = engine.add(some_ids(3, seed=5), greedy(1000))
    for seed in range(5):
        engine.add(some_ids(100, seed), greedy(50))
    run(engine)
    assert len(long.tokens) == 597 and long.finish_reason == "length"
    rows = reference.logits(long.prompt + long.tokens, 3)[2:-1]
    top = np.sort(rows)[:, -2:]
    clear = top[:, 1] - top[:, 0] > MARGIN
    assert clear.mean() > 0.99
    assert (rows.argmax(-1) == long.tokens)[clear].all()


def test_asking_again_does_not_cost_an_older_conversation_its_keys(model):
    """The slot of the answer nobody came back to is used again, not that of the long conversation."""
    engine = Engine(model, slots=3)
    chat, question = some_ids(150), some_ids(24, seed=3)
    engine.generate([chat], greedy(2))
    for _ in range(5):
        engine.generate([question], greedy(60))
    (again,) = engine.generate([chat + some_ids(3)], greedy(2))[0]
    assert again.reused == 150
