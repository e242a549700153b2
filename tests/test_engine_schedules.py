"""One sequence's answer does not depend on who else is there: random schedules, reused prefixes, a cache that grows."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from generation_reference import (
    CLOSE,
    KINDS,
    MARGIN,
    Ear,
    Reference,
    expected,
    greedy,
    log_softmax,
    run,
    some_ids,
    tiny_model,
)

from aquila_pd.generation import Engine, SamplingParams, Sequence
from aquila_pd.generation.slots import Slots

LONGEST_ANSWER = 12


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def reference(model):
    return Reference(model)


# --------------------------------------------------------------------------------------------- random schedules


@dataclass
class World:
    """A model, its prompts and what each is answered when it is alone."""

    model: object
    reference: Reference
    prompts: list[list[int]] = field(default_factory=list)
    alone: dict = field(default_factory=dict)

    @classmethod
    def of(cls, kind: str, *, fused: bool = False) -> "World":
        model = tiny_model(kind)
        world = cls(model, Reference(model))
        if fused:
            model.fuse_projections()
        world._find_prompts()
        return world

    def _find_prompts(self) -> None:
        """Lengths 1 to 200, many with the beginning of another; only such whose greedy answers are decided clearly."""
        rng, stems = np.random.default_rng(17), [some_ids(200, seed) for seed in range(3)]
        while len(self.prompts) < 24:
            stem, tail = stems[rng.integers(3)], rng.integers(0, 101, rng.integers(0, 30)).tolist()
            kept = int(rng.choice([0, 0, 15, 16, 17, 40, 64, 128, 170]))
            prompt = (stem[:kept] + tail)[:200] or [int(rng.integers(101))]
            if self._decided(prompt):
                self.prompts.append(prompt)
        lengths = {len(prompt) for prompt in self.prompts}
        assert min(lengths) < 10 and max(lengths) > 150

    def _decided(self, prompt: list[int]) -> bool:
        """Whether each token of the greedy answer is the likeliest by a margin, seen from all before it at once."""
        tokens = self._alone(prompt, greedy(LONGEST_ANSWER))[0]
        rows = self.reference.logits(prompt + tokens, len(prompt))[len(prompt) - 1 : -1]
        second, first = np.sort(rows)[:, -2:].T
        if (first - second).min() < MARGIN:
            return False
        assert rows.argmax(-1).tolist() == tokens, prompt
        return True

    def _alone(self, prompt: list[int], params: SamplingParams) -> list[list[int]]:
        key = (*prompt, repr(params))
        if key not in self.alone:
            engine = Engine(self.model, slots=1, max_length=256, prefill_chunk=256, prefix_reuse=False)
            self.alone[key] = [s.tokens for s in engine.generate([prompt], params)[0]]
        return self.alone[key]

    def answer(self, sequence: Sequence) -> tuple[list[int], np.ndarray]:
        """Tokens and log-probabilities of a sequence if it were alone."""
        prompt, params = sequence.prompt, sequence.params
        if params.temperature == 0:
            tokens = self._alone(prompt, greedy(LONGEST_ANSWER))[0][: params.max_new_tokens]
        else:
            tokens = self._alone(prompt, params)[sequence.index]
        key = (*prompt, *tokens, "logprobs", len(prompt))
        if key not in self.alone:
            self.alone[key] = self.reference.token_logprobs(prompt, tokens)
        return tokens, self.alone[key]

    def score(self, prompt: list[int]) -> np.ndarray:
        """Log-probabilities of a prompt's tokens but the first."""
        if (*prompt, "score") not in self.alone:
            rows = log_softmax(self.reference.logits(prompt))[:-1]
            self.alone[(*prompt, "score")] = rows[np.arange(len(prompt) - 1), prompt[1:]]
        return self.alone[(*prompt, "score")]


SAMPLED = (
    dict(temperature=0.9),
    dict(temperature=1.3, top_p=0.8),
    dict(top_k=5, repetition_penalty=1.2),
    dict(order="aquila", top_p=0.9, top_k=15),
    dict(min_p=0.05, frequency_penalty=0.5),
)


def some_params(rng: np.random.Generator) -> SamplingParams:
    fields = dict(max_new_tokens=int(rng.integers(1, LONGEST_ANSWER + 1)), logprobs=0, n=int(rng.choice([1, 1, 1, 3])))
    if rng.random() < 0.2:
        fields["prompt_logprobs"] = True
    if rng.random() < 0.6:
        return SamplingParams(temperature=0, **fields)
    # few different ones, for what each gives alone has to be computed as well
    return SamplingParams(seed=int(rng.integers(3)), **{**fields, "n": 2, "max_new_tokens": 8}, **rng.choice(SAMPLED))


@dataclass
class Schedule:
    """Requests that come at random steps and are cancelled at random steps; what is heard is written down."""

    world: World
    rng: np.random.Generator
    requests: int
    ears: list[tuple[Ear, Sequence]] = field(default_factory=list)

    def play(self) -> Engine:
        rng = self.rng
        engine = Engine(
            self.world.model,
            slots=int(rng.integers(1, 7)),
            max_length=256,
            prefill_chunk=int(rng.integers(1, 65)),
            prefix_reuse=bool(rng.random() < 0.75),
        )
        busy, left = rng.choice([0.1, 0.4, 0.9]), self.requests
        while engine.step() or left:
            while left and rng.random() < busy:
                self._arrive(engine)
                left -= 1
            if rng.random() < 0.08:
                self._cancel_one(engine)
        return engine

    def _arrive(self, engine: Engine) -> None:
        prompt = self.world.prompts[self.rng.integers(len(self.world.prompts))]
        ear = Ear()
        for sequence in engine.add(prompt, some_params(self.rng), ear):
            self.ears.append((ear, sequence))

    def _cancel_one(self, engine: Engine) -> None:
        alive = [s for _, s in self.ears if s.finish_reason is None]
        if alive:
            engine.cancel(alive[self.rng.integers(len(alive))])

    def check(self, engine: Engine) -> None:
        for ear, sequence in self.ears:
            self._check_answer(sequence)
            heard = [e for e in ear.events if e.sequence is sequence]
            assert [e.token for e in heard if e.token is not None] == sequence.tokens
            assert [e.finish_reason for e in heard[:-1]] == [None] * (len(heard) - 1)
            assert heard[-1].finish_reason == sequence.finish_reason
        self._check_counters(engine)

    def _check_answer(self, sequence: Sequence) -> None:
        tokens, logprobs = self.world.answer(sequence)
        made = len(sequence.tokens)
        assert sequence.error is None
        assert sequence.finish_reason == ("length" if made == len(tokens) else "cancelled"), sequence
        assert sequence.tokens == tokens[:made], sequence
        np.testing.assert_allclose([p.logprob for p in sequence.logprobs], logprobs[:made], atol=CLOSE)
        if sequence.params.prompt_logprobs and made:
            found = [p.logprob for p in sequence.prompt_logprobs[1:]]
            np.testing.assert_allclose(found, self.world.score(sequence.prompt), atol=CLOSE)

    def _check_counters(self, engine: Engine) -> None:
        stats, sequences = engine.stats, [s for _, s in self.ears]
        assert (stats.running, stats.waiting, stats.nonfinite) == (0, 0, 0)
        assert stats.new_tokens == sum(len(s.tokens) for s in sequences)
        assert stats.reused_tokens == sum(s.reused for s in sequences)
        assert sum(stats.finished.values()) == len(sequences)
        assert set(stats.finished) <= {"length", "cancelled"}
        whole = sum(len(s.prompt) for s in sequences if s.tokens)
        given_up = sum(len(s.prompt) for s in sequences if not s.tokens)
        assert whole <= stats.prompt_tokens + stats.reused_tokens <= whole + given_up
        assert engine.prefix_reuse or stats.reused_tokens == 0


def play_many(world: World, count: int, requests: int, seed: int) -> dict[str, int]:
    """Play and check; returns what happened in all of them, for the test to ask whether it was enough."""
    seen = dict(reused=0, cancelled=0, length=0, sampled=0)
    for number in range(count):
        schedule = Schedule(world, np.random.default_rng([seed, number]), requests)
        engine = schedule.play()
        schedule.check(engine)
        seen["reused"] += sum(s.reused > 0 for _, s in schedule.ears)
        seen["sampled"] += sum(s.params.temperature > 0 for _, s in schedule.ears)
        for reason, times in engine.stats.finished.items():
            seen[reason] += times
    return seen


@pytest.mark.parametrize(
    ("kind", "fused"),
    [("grouped heads", True), *((kind, False) for kind in KINDS)],
)
def test_answers_in_any_mix_are_the_answers_alone(kind, fused):
    seen = play_many(World.of(kind, fused=fused), count=5, requests=10, seed=1)
    assert min(seen.values()) > 2, f"these schedules try too little: {seen}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"),
    [("grouped heads", 120), ("linear", 50), ("dynamic", 50), ("tied", 50)],
)
def test_answers_in_hundreds_of_mixes_are_the_answers_alone(kind, count):
    seen = play_many(World.of(kind), count=count, requests=15, seed=2)
    assert min(seen.values()) > count // 4, f"these schedules try too little: {seen}"


def test_control_a_prefix_copied_one_token_short_is_noticed(monkeypatch):
    """A prefix copied one token short: the kind of mistake schedules are for."""
    world = World.of("grouped heads")
    copy = Slots.copy
    monkeypatch.setattr(Slots, "copy", lambda self, source, target, length: copy(self, source, target, length - 1))
    with pytest.raises(AssertionError):
        play_many(world, count=8, requests=10, seed=1)


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
    monkeypatch.setattr(Slots, "copy", lambda self, source, target, length: None)
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
    small = engine._cache.nbytes
    prompt = some_ids(560)
    (long,) = engine.generate([prompt], greedy(6))[0]
    large = engine._cache.nbytes
    assert long.tokens == expected(reference, prompt, 6) and large > 1.5 * small
    prompts = [p for p in (some_ids(20, seed) for seed in range(8)) if reference.greedy(p, 40).margin > MARGIN]
    assert len(prompts) > 3
    while engine._cache.nbytes > small and engine.stats.steps < 3000:
        for short in prompts:  # in one of them it shrinks
            assert engine.generate([short], greedy(40))[0][0].tokens == reference.greedy(short, 40).tokens
    assert engine._cache.nbytes == small, "the memory of one long sequence is kept for ever"
    assert 100 < engine.stats.steps < 2000, "neither at once, for the next long one, nor after an age"
    # whatever of the long one may be left beyond the end of the buffers is not believed
    (again,) = engine.generate([prompt], greedy(6))[0]
    assert again.tokens == long.tokens and again.reused < 560
    (next_turn,) = engine.generate([prompt + long.tokens + [7]], greedy(6))[0]
    assert next_turn.tokens == expected(reference, next_turn.prompt, 6) and next_turn.reused == 565


def test_the_cache_does_not_shrink_under_a_sequence_that_needs_it(model, reference):
    engine = Engine(model, slots=2, max_length=700)
    engine.generate([some_ids(690)], greedy(2))
    large = engine._cache.nbytes
    prompt = some_ids(300)
    for seed in range(3):  # about a hundred and fifty steps each, with a neighbour of 300 tokens
        (neighbour,) = engine.add(prompt, greedy(190))
        (sequence,) = engine.add(some_ids(20, seed), greedy(60))
        run(engine)
        assert sequence.tokens == expected(reference, sequence.prompt, 60)
        assert neighbour.tokens[:20] == expected(reference, prompt, 20)
        assert engine._cache.nbytes <= large
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
