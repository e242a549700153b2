"""The scheduler without a model: admission order, chunked prefill, and which slot a prompt's prefix comes from."""

import pytest

from aquila_pd.generation import SamplingParams, Sequence
from aquila_pd.generation.scheduler import MIN_SHARED, PrefixCopy, Scheduler, StepPlan, common_length


def scheduler(slots: int = 2, *, prefill_chunk: int = 1000, **options) -> Scheduler:
    return Scheduler(slots, prefill_chunk=prefill_chunk, **options)


def sequence(prompt: list[int], **params) -> Sequence:
    return Sequence(0, prompt, SamplingParams(**params))


def ids(count: int, *, first: int = 0) -> list[int]:
    return list(range(first, first + count))


def compute(plan: StepPlan, token: int = 7) -> StepPlan:
    """Advance the sequences of a plan as the engine does after its forward pass."""
    for chunk in plan.chunks:
        chunk.sequence.computed += chunk.count
    for decoding in plan.decoding:
        decoding.computed += 1
    for sampled, _ in plan.sampled:
        sampled.tokens.append(token)
    return plan


def run(made: Scheduler, prompt: list[int], **params) -> Sequence:
    """A sequence that was prefilled, has one new token, and has left its slot."""
    (added,) = add(made, prompt, **params)
    while added.prefilling:
        compute(made.schedule())
    made.release(added)
    return added


def add(made: Scheduler, *prompts: list[int], **params) -> list[Sequence]:
    added = [sequence(prompt, **params) for prompt in prompts]
    made.add(added)
    return added


# ---------------------------------------------------------------------------------------------------- admission


def test_sequences_are_admitted_in_order_of_arrival_while_slots_are_free():
    made = scheduler(2)
    a, b, c, d = add(made, *(ids(5, first=100 * i) for i in range(4)))
    assert made.schedule().admitted == [a, b] == made.running and made.waiting == [c, d]
    assert made.counts == (2, 2)
    assert (a.slot, b.slot, c.slot) == (0, 1, None)
    assert made.schedule().admitted == []
    made.release(a)
    assert made.schedule().admitted == [c] and c.slot == 0 and made.waiting == [d]


def test_a_released_sequence_that_had_no_slot_leaves_the_queue():
    made = scheduler(1)
    a, b, c = add(made, *(ids(5, first=100 * i) for i in range(3)))
    made.schedule()
    made.release(b)
    assert made.running == [a] and made.waiting == [c]


def test_a_plan_without_work_is_false():
    made = scheduler()
    assert not made.schedule()
    (a,) = add(made, ids(3))
    assert made.schedule()
    made.release(a)
    assert not made.schedule() and made.schedule().length == 0


# ------------------------------------------------------------------------------------------------ chunked prefill


def test_chunks_share_the_budget_of_a_step_in_order_of_arrival():
    made = scheduler(4, prefill_chunk=10)
    a, b, c = add(made, ids(6), ids(13, first=100), ids(3, first=200))
    counts = []
    while any(s.prefilling for s in (a, b, c)):
        counts.append({chunk.sequence: (chunk.start, chunk.count) for chunk in compute(made.schedule()).chunks})
    assert counts == [{a: (0, 6), b: (0, 4)}, {b: (4, 9), c: (0, 1)}, {c: (1, 2)}]


def test_a_sequence_that_came_first_is_first_whatever_its_slot():
    made = scheduler(2, prefill_chunk=10)
    a, b = add(made, ids(4), ids(30, first=100))
    compute(made.schedule())
    made.release(a)
    (c,) = add(made, ids(30, first=200))
    (chunk,) = made.schedule().chunks
    assert (c.slot, b.slot) == (0, 1) and chunk.sequence is b


def test_rows_of_a_plan_are_decode_tokens_then_chunks():
    made = scheduler(3, prefill_chunk=8)
    a, b = add(made, ids(3), ids(4, first=50))
    compute(made.schedule())
    (c,) = add(made, ids(10, first=100))
    plan = compute(made.schedule())
    assert plan.decoding == [a, b] and [chunk.rows for chunk in plan.chunks] == [slice(2, 10)]
    assert plan.sampled == [(a, 0), (b, 1)], "the prompt of c is not complete"
    assert plan.length == 8
    plan = compute(made.schedule())
    assert [chunk.rows for chunk in plan.chunks] == [slice(2, 4)] and plan.sampled == [(a, 0), (b, 1), (c, 3)]
    assert plan.length == 10 and not made.schedule().chunks


def test_rows_of_several_chunks_follow_each_other():
    made = scheduler(3, prefill_chunk=12)
    a, b, _ = add(made, ids(3), ids(4, first=50), ids(9, first=100))
    plan = made.schedule()
    assert [chunk.rows for chunk in plan.chunks] == [slice(0, 3), slice(3, 7), slice(7, 12)]
    assert plan.sampled == [(a, 2), (b, 6)]


def test_the_length_of_a_plan_covers_sequences_that_are_not_in_it():
    made = scheduler(2, prefill_chunk=40)
    run(made, ids(50))
    made.prefill_chunk = 10
    a, b = add(made, ids(30, first=500), ids(60))
    plan = made.schedule()
    assert [chunk.sequence for chunk in plan.chunks] == [a] and b.computed == 50
    assert plan.length == 50, "the cache may not shrink below what b holds"


# -------------------------------------------------------------------------------------------------- prefix caching


@pytest.mark.parametrize(("shared", "reused"), [(MIN_SHARED - 1, 0), (MIN_SHARED, MIN_SHARED), (30, 30)])
def test_a_prompt_starts_where_it_parts_from_what_a_slot_holds(shared, reused):
    made = scheduler(1)
    run(made, ids(40))
    (a,) = add(made, ids(shared) + ids(20, first=500))
    (chunk,) = made.schedule().chunks
    assert (a.reused, a.computed, chunk.start, chunk.count) == (reused, reused, reused, shared + 20 - reused)


def test_the_last_token_of_a_prompt_is_always_computed():
    made = scheduler(1)
    run(made, ids(40))
    (a,) = add(made, ids(40))
    (chunk,) = made.schedule().chunks
    assert a.reused == 39 and (chunk.start, chunk.count) == (39, 1)


def test_new_tokens_of_an_answer_are_reusable_once_they_are_computed():
    made = scheduler(1)
    (a,) = add(made, ids(20))
    for token in (901, 902, 903):
        compute(made.schedule(), token)
    made.release(a)
    (b,) = add(made, [*ids(20), 901, 902, 903, 904])
    made.schedule()
    assert b.reused == 22, "the key of 903, drawn last, was never computed"


def test_the_donor_is_the_slot_that_holds_most_of_the_prompt():
    made = scheduler(3)
    prompts = [ids(20) + ids(30, first=500), ids(40) + ids(30, first=600), ids(30) + ids(30, first=700)]
    for prompt in prompts:
        add(made, prompt)
    made.schedule()
    # three at once: the first prefills, the others wait for what they share with it, then with each other
    while made.waiting or any(s.prefilling for s in made.running):
        compute(made.schedule())
    slots = {tuple(s.prompt): s.slot for s in made.running}
    made.release(made.running[slots[tuple(prompts[0])]])
    (a,) = add(made, ids(60))
    plan = made.schedule()
    assert plan.copies == [PrefixCopy(slots[tuple(prompts[1])], slots[tuple(prompts[0])], 40)] and a.reused == 40


def test_a_running_donor_is_copied_and_keeps_its_slot():
    made = scheduler(2)
    (a,) = add(made, ids(40))
    compute(made.schedule())
    (b,) = add(made, ids(30) + ids(5, first=500))
    plan = made.schedule()
    assert plan.copies == [PrefixCopy(a.slot, b.slot, 30)] and a.slot != b.slot and made.running == [a, b]


def test_a_free_donor_is_continued_in_place_without_a_copy():
    made = scheduler(2)
    run(made, ids(40))
    (b,) = add(made, ids(45))
    plan = made.schedule()
    assert plan.copies == [] and (b.slot, b.reused) == (0, 40)
    assert made.schedule().copies == []


def test_a_short_branch_is_copied_when_taking_over_would_lose_more():
    made = scheduler(2)
    run(made, ids(150))
    (branch,) = add(made, ids(30) + ids(3, first=500))
    assert made.schedule().copies == [PrefixCopy(0, 1, 30)] and branch.slot == 1
    # control: with no emptier slot, the branch takes over the donor's
    made = scheduler(1)
    run(made, ids(150))
    (branch,) = add(made, ids(30) + ids(3, first=500))
    assert made.schedule().copies == [] and (branch.slot, branch.reused) == (0, 30)


def test_empty_slots_are_taken_first_then_the_least_recently_used_is_evicted():
    made = scheduler(3)
    prompts = [ids(30, first=1000 * i) for i in range(3)]
    sequences = add(made, *prompts)
    compute(made.schedule())
    for i in (1, 0):  # slot 2 runs on
        made.release(sequences[i])
    (a,) = add(made, ids(30, first=5000))
    compute(made.schedule())
    assert a.slot == 1, "freed before slot 0"
    (b,) = add(made, [*prompts[0], 1, 2])
    made.schedule()
    assert (b.slot, b.reused) == (0, 30), "what was not evicted is still there"
    made = scheduler(2)
    run(made, prompts[0])
    (c,) = add(made, prompts[1])
    made.schedule()
    assert c.slot == 1, "an empty slot loses nothing"
    made.release(c, reusable=False)
    (d,) = add(made, prompts[2])
    made.schedule()
    assert d.slot == 1, "nor does one whose keys are lost, though it was freed last"


def test_an_evicted_prefix_is_not_reused():
    made = scheduler(1)
    run(made, ids(40))
    run(made, ids(40, first=500))
    (a,) = add(made, ids(40))
    made.schedule()
    assert a.reused == 0


def test_keys_of_a_failed_sequence_are_not_reused():
    made = scheduler(1)
    for reusable, reused in ((False, 0), (True, 39)):
        (a,) = add(made, ids(40))
        compute(made.schedule())
        made.release(a, reusable=reusable)
        (b,) = add(made, ids(40))
        made.schedule()
        assert b.reused == reused
        made.release(b, reusable=False)


@pytest.mark.parametrize(("clear", "reused"), [(Scheduler.clear_cache, 0), (lambda s: s.truncate_cache(25), 25)])
def test_what_the_cache_lost_is_not_reused(clear, reused):
    made = scheduler(1)
    run(made, ids(40))
    clear(made)
    (a,) = add(made, ids(40))
    made.schedule()
    assert a.reused == reused


def test_without_prefix_caching_nothing_is_reused_or_waited_for():
    made = scheduler(3, prefix_caching=False)
    run(made, ids(40))
    a, b = add(made, ids(40), ids(40))
    plan = made.schedule()
    assert plan.admitted == [a, b] and plan.copies == [] and [c.count for c in plan.chunks] == [40, 40]


def test_prompt_logprobs_are_never_computed_from_cached_keys_alone():
    made = scheduler(2)
    run(made, ids(40))
    a, b = add(made, ids(40), ids(40), prompt_logprobs=True)
    plan = made.schedule()
    assert plan.admitted == [a, b] and (a.reused, b.reused) == (0, 0), "every hidden state of the prompt is needed"
    for scored in (a, b):
        made.release(scored)
    made = scheduler(1)
    run(made, ids(40), prompt_logprobs=True)
    (c,) = add(made, ids(40))
    made.schedule()
    assert c.reused == 39, "its keys are as good as any"


def test_keys_of_prompts_beyond_the_trained_length_are_neither_given_nor_taken():
    made = scheduler(2, max_reusable=50)
    (long,) = add(made, ids(60))
    compute(made.schedule())
    (short,) = add(made, ids(40))
    assert compute(made.schedule()).copies == [] and short.reused == 0, "the donor runs, with stretched RoPE angles"
    for each in (long, short):
        made.release(each)
    assert run(made, ids(60)).reused == 0, "not from the short one either"
    made = scheduler(1, max_reusable=50)
    assert run(made, ids(60)).reused == 0 and run(made, ids(40)).reused == 0
    made = scheduler(1, max_reusable=60)  # control
    assert run(made, ids(60)).reused == 0 and run(made, ids(40)).reused == 39


# --------------------------------------------------------------------------------- waiting for a shared prefix


def test_a_sequence_waits_for_the_prefix_that_another_one_is_prefilling():
    made = scheduler(3, prefill_chunk=16)
    a, b = add(made, ids(40), ids(40))
    (other,) = add(made, ids(5, first=500))
    plan = compute(made.schedule())
    assert plan.admitted == [a, other] and made.waiting == [b], "who waits does not hold up those behind"
    compute(made.schedule())
    assert made.waiting == [b] and a.computed == 32
    plan = compute(made.schedule())
    assert plan.admitted == [b] and b.reused == 32, "fewer than MIN_SHARED tokens are left to share"


def test_a_sequence_with_another_beginning_does_not_wait():
    made = scheduler(2, prefill_chunk=16)
    a, b = add(made, ids(40), ids(MIN_SHARED - 1) + ids(40, first=500))
    assert made.schedule().admitted == [a, b]


def test_n_continuations_prefill_their_prompt_once():
    made = scheduler(4)
    sequences = add(made, *[ids(60)] * 4)
    computed = []
    while any(s.slot is None or s.prefilling for s in sequences):
        computed += [(c.sequence, c.count) for c in compute(made.schedule()).chunks]
    assert computed == [(sequences[0], 60), *((s, 1) for s in sequences[1:])]


@pytest.mark.parametrize(
    ("a", "b", "length"),
    [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1, 9, 3], [1, 2, 3], 1), ([4], [5], 0)],
)
def test_common_length_of_two_lists(a, b, length):
    assert common_length(a, b) == length == common_length(b, a)


def test_common_length_agrees_with_a_plain_loop():
    for parting in range(70):
        a, b = ids(70), [*ids(parting), -1, *ids(69 - parting)]
        assert common_length(a, b) == parting
