"""Forward passes in several threads: the same tokens as without, whoever is slow; an error ends all of them."""

import threading
import time

import numpy as np
import paddle
import pytest
from generation_reference import KINDS, Reference, greedy, some_ids, tiny_model

from aquila_pd.generation import Engine, parallel_prefill
from aquila_pd.ops import cpu, threads


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    monkeypatch.setattr(parallel_prefill, "LEAST", 2)  # tokens: the prompts of tests are short
    threads.use(3)
    yield
    threads.use(1)


@pytest.mark.parametrize(
    ("tokens", "decoding", "count", "expected"),
    [
        (9, 0, 3, [(0, 3), (3, 6), (6, 9)]),
        (7, 0, 2, [(0, 3), (3, 7)]),
        (3, 0, 2, [(0, 3)]),  # a part has two tokens or more
        (5, 5, 3, [(0, 5)]),  # decoding alone is never cut
        (12, 5, 3, [(0, 6), (6, 12)]),  # the first part has all that decode
        (100, 0, 1, [(0, 100)]),
    ],
)
def test_a_row_is_cut_in_about_equal_parts(tokens, decoding, count, expected):
    assert parallel_prefill.parts(np.ones(tokens), decoding, count) == expected


def test_parts_take_about_as_long_where_later_tokens_look_at_more_keys():
    costs = 100 + np.arange(1000)
    (first, second) = parallel_prefill.parts(costs, 0, 2)
    assert first[1] == second[0] > 600
    assert abs(costs[: first[1]].sum() - costs[first[1] :].sum()) <= costs.max()


def test_a_part_has_a_token_and_the_first_has_all_that_decode():
    costs = np.array([9.0, 9.0, 9.0, 1, 1, 1, 1, 1, 1, 1])
    assert parallel_prefill.parts(costs, 3, 3) == [(0, 3), (3, 10)]
    assert parallel_prefill.parts(np.array([1.0, 1, 1, 1, 1, 99]), 0, 3) == [(0, 5), (5, 6)]


def test_spans_are_cut_where_the_row_is():
    spans = [(0, 4, 9), (7, 5, 12)]
    assert list(parallel_prefill.cuts(spans, 0, 6)) == [(0, 4, 9), (7, 2, 12)]
    assert list(parallel_prefill.cuts(spans, 6, 9)) == [(9, 3, 12)]


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_full_recomputation(kind, fused):
    model = tiny_model(kind)
    reference = Reference(model)
    if fused:
        model.fuse_projections()
    engine = Engine(model, slots=3, prefill_chunk=24, max_length=256)
    prompts = [some_ids(length, seed=length) for length in (1, 9, 40, 70, 25)]  # some decode while others are read
    for prompt, (sequence,) in zip(prompts, engine.generate(prompts, greedy(10)), strict=True):
        answer = reference.greedy(prompt, 10)
        assert answer.margin > 5e-6
        assert sequence.tokens == answer.tokens, len(prompt)


def hidden_of(model, prompt):
    engine = Engine(model, slots=1, prefill_chunk=64, prefix_reuse=False)
    found = []
    through = engine._runner.hidden
    engine._runner.hidden = lambda *given: found.append(through(*given)) or found[-1]
    engine.generate([prompt], greedy(1))
    return found[0].numpy()


def slow_first_part(monkeypatch):
    """The first part stands still before it writes its keys of layer 1, as a busy machine would have it."""
    write = parallel_prefill.Wavefront.gate

    def gate(self, part):
        keys_written = write(self, part)

        def slowly(layer):
            if part == 0 and layer == 0:
                keys_written(layer)
                time.sleep(0.3)
            else:
                keys_written(layer)

        return slowly

    monkeypatch.setattr(parallel_prefill.Wavefront, "gate", gate)


def test_a_part_waits_for_those_before_it(monkeypatch):
    model, prompt = tiny_model(), some_ids(40)
    threads.use(1)
    expected = hidden_of(model, prompt)
    threads.use(3)
    slow_first_part(monkeypatch)
    assert abs(hidden_of(model, prompt) - expected).max() < 1e-5


def test_control_without_waiting_the_numbers_are_others(monkeypatch):
    model, prompt = tiny_model(), some_ids(40)
    threads.use(1)
    expected = hidden_of(model, prompt)
    threads.use(3)

    run, others = parallel_prefill.run, [threading.Event() for _ in range(2)]

    def run_others_first(works):
        def noted(work, done):
            return lambda wavefront: (work(wavefront), done.set())[0]

        return run([works[0], *(noted(work, done) for work, done in zip(works[1:], others, strict=True))])

    def gate(self, part):
        def keys_written(layer):
            if part == 0 and layer == 0:
                assert all(done.wait(60) for done in others)  # they have attended without waiting for this part

        return keys_written

    monkeypatch.setattr(parallel_prefill, "run", run_others_first)
    monkeypatch.setattr(parallel_prefill.Wavefront, "gate", gate)
    assert not abs(hidden_of(model, prompt) - expected).max() < 1e-3


def test_an_error_of_one_part_ends_all_and_is_the_one_that_is_raised():
    def waits(wavefront):
        wavefront.gate(2)(0)  # for parts 0 and 1, which never write

    def fails(wavefront):
        time.sleep(0.05)
        raise MemoryError("part 1")

    before = threading.active_count()
    with pytest.raises(MemoryError, match="part 1"):
        parallel_prefill.run([lambda wavefront: wavefront.gate(0)(0), fails, waits])
    assert threading.active_count() <= before + 2, "the pool's threads stay, and no others"
    assert parallel_prefill.run([lambda _: 1, lambda _: 2, lambda _: 3]) == [1, 2, 3], "and work again"


def test_small_norms_inside_do_not_give_the_parts_more_threads(monkeypatch):
    """They ask for one thread and end: the others' products would get all of them again."""
    said = []
    monkeypatch.setattr(threads.paddle.base.core, "set_num_threads", said.append)

    def norm(wavefront):
        return cpu.rms_norm(paddle.ones([4, 8]), paddle.ones([8]), 1e-5)

    parallel_prefill.run([norm] * 3)
    assert [count for count in said if count != 1] == [3], "at the end"


def test_parts_make_no_graph_and_leave_the_number_of_threads(monkeypatch):
    said = []
    monkeypatch.setattr(threads.paddle.base.core, "set_num_threads", said.append)
    assert parallel_prefill.run([lambda wavefront: paddle.is_grad_enabled()] * 3) == [False] * 3
    assert paddle.is_grad_enabled()
    assert said[0] == 1 and said[-1] == 3
