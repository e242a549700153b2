"""A stage of training: how a step is cut does not matter, a resumed run is the same run, and it is torch's run."""

import itertools
import math
import os
import signal
import time

import numpy as np
import paddle
import pytest
from sft_factory import LENGTH, VOCABULARY, Recorder, packs, random_samples, run, stage, tiny_model, trainer_of
from twins import assert_close

from aquila_pd.sft.loop.batches import FIELDS, DataParallelShard, Packs, Steps
from aquila_pd.sft.loop.loss import SummedLoss
from aquila_pd.sft.loop.optimizer import adamw, gradients
from aquila_pd.sft.loop.schedule import learning_rate
from aquila_pd.sft.loop.trainer import Stopped, arguments
from aquila_pd.sft.recipe.load import Optim
from aquila_pd.utils.errors import TrainingError

# float32 sums in another order; losses near 4.6
ROUNDING = 5e-6


# ------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize(("method", "cuts"), [("full", (4, 2, 1)), ("lora", (2,)), ("qlora", (2,))])
def test_the_curve_does_not_depend_on_how_a_step_is_cut(tmp_path, method, cuts):
    """To the end of an epoch, where the last step is smaller than the others."""
    data = packs(random_samples(tmp_path / "samples", count=90), tmp_path / "plans")
    whole = run(tmp_path / "8", stage(method=method, micro_batch=8), data=data).losses
    for micro in cuts:
        cut = run(tmp_path / str(micro), stage(method=method, micro_batch=micro), data=data).losses
        assert_close(np.array(cut), np.array(whole), ROUNDING, f"micro-batches of {micro}")
    assert len(data) % 8 and len(whole) == len(data) // 8 + 1 > 5
    assert method != "full" or whole[-1] < whole[0]  # an adapter moves little in so few steps


def test_control_a_mean_of_means_depends_on_how_a_step_is_cut(tmp_path, monkeypatch):
    """The usual formula: each micro-batch divided by its own labels."""
    right = run(tmp_path / "right", stage(micro_batch=8, max_steps=3)).losses
    micro_batches = Steps.micro_batches

    def own_counts(self, share, first=0):
        for batch in micro_batches(self, share, first):
            batch["labels_in_step"] = 8 * int((batch["labels"] != -100).sum())
            yield batch

    monkeypatch.setattr(Steps, "micro_batches", own_counts)
    wrong = run(tmp_path / "wrong", stage(micro_batch=1, max_steps=3)).losses
    assert np.abs(np.array(wrong) - np.array(right)).max() > 10 * ROUNDING


def test_recompute_does_not_change_the_run(tmp_path):
    plain = run(tmp_path / "plain", stage(max_steps=6))
    again = run(tmp_path / "again", stage(max_steps=6, recompute=True))
    assert_close(np.array(again.losses), np.array(plain.losses), ROUNDING)
    assert_close(*(np.array([r.grad_norm for r in x.steps]) for x in (again, plain)), 1e-5)


def test_gradients_are_given_back_after_a_step():
    model = SummedLoss(tiny_model(stage()))
    optimizer = adamw(model, Optim(), 1e-3)
    model(*(paddle.to_tensor(x) for x in ([[5, 6]], [[6, 7]], [[0, 1]], [[1, 1]]))).backward()
    assert gradients(model.parameters())
    optimizer.step()
    optimizer.clear_grad()
    assert gradients(model.parameters()) == []


def test_every_pack_is_trained_on_once_an_epoch_and_the_last_step_may_be_smaller(tmp_path):
    data = packs(random_samples(tmp_path / "samples"), tmp_path / "plans", epochs=2)
    steps = Steps(data, global_batch=8)
    assert len(data) % 8
    numbers = [number for step in range(steps.steps) for number in steps.numbers(step)]
    assert numbers == list(range(len(data)))
    seen = list(steps.micro_batches(DataParallelShard(0, 1, 4)))
    assert len(seen) == steps.steps * 2
    labels = sum(int((batch["labels"] != -100).sum()) for batch in seen)
    assert labels == sum(steps.counts(step).labels for step in range(steps.steps))


def test_ranks_share_a_step_without_overlap_or_loss(tmp_path):
    data = packs(random_samples(tmp_path / "samples"), tmp_path / "plans", epochs=1)
    steps = Steps(data, global_batch=8)
    alone = [batch["input_ids"] for batch in steps.micro_batches(DataParallelShard(0, 1, 8))]
    ranks = [list(steps.micro_batches(DataParallelShard(rank, 2, 2))) for rank in range(2)]
    for step, expected in enumerate(alone):
        parts = [batch["input_ids"] for pair in zip(*ranks, strict=True) for batch in pair if batch["step"] == step]
        assert (np.concatenate(parts) == expected).all()


def test_epochs_that_nobody_reaches_are_not_planned(tmp_path):
    asked = []
    samples = random_samples(tmp_path / "samples")
    one = packs(samples, tmp_path / "plans", epochs=1)

    def plan_of(epoch: int):
        asked.append(epoch)
        return one._plan_of(0)

    many = Packs(samples, plan_of, epochs=20, length=LENGTH, pad_id=0, most=len(one) + 1)
    assert asked == [0, 1] and len(many) == 2 * len(one)
    assert Steps(many, global_batch=8, max_steps=2).steps == 2


def test_a_fraction_of_an_epoch(tmp_path):
    samples = random_samples(tmp_path / "samples")
    one, half = (packs(samples, tmp_path / "plans", epochs=epochs) for epochs in (1, 1.5))
    assert len(half) == len(one) + round(len(one) / 2)
    assert half.epoch(len(one)) == 1.0 and half.epoch(len(half)) == pytest.approx(1.5, abs=0.02)


# --------------------------------------------------------------------------------------------------- the loss


def loss_of(model, arrays: dict, **settings) -> float:
    return float(SummedLoss(model, **settings)(**{name: paddle.to_tensor(arrays[name][None]) for name in FIELDS}))


def test_the_loss_is_the_sum_over_the_samples_by_themselves(tmp_path):
    samples = random_samples(tmp_path / "samples")
    data = packs(samples, tmp_path / "plans", epochs=1)
    model = tiny_model(stage())
    model.eval()
    found = loss_of(model, data.arrays(0))
    expected = 0.0
    plan, place = data._place(0)
    for member in plan.members(place):
        ids, is_target = samples.sample(int(member))
        row = paddle.to_tensor(ids[None].astype("int64"))
        logits = model(row, return_dict=True).logits.numpy()[0].astype("float64")
        logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected -= sum(logs[t - 1, ids[t]] for t in range(1, len(ids)) if is_target[t])
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_pack_of_padding_costs_nothing_and_gives_no_gradient(tmp_path):
    data = packs(random_samples(tmp_path / "samples"), tmp_path / "plans", epochs=1)
    model = SummedLoss(tiny_model(stage()))
    loss = model(**{name: paddle.to_tensor(data.empty()[name][None]) for name in FIELDS})
    loss.backward()
    assert float(loss) == 0.0
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and float(g.abs().max()) == 0.0 for g in gradients.values())  # there for the other ranks


def test_logits_in_pieces_give_the_same_loss(tmp_path, monkeypatch):
    data = packs(random_samples(tmp_path / "samples"), tmp_path / "plans", epochs=1)
    model = tiny_model(stage())
    whole = loss_of(model, data.arrays(1))
    monkeypatch.setattr("aquila_pd.ops.linear_cross_entropy.BLOCK_BYTES", 5 * 4 * VOCABULARY)
    assert loss_of(model, data.arrays(1)) == pytest.approx(whole, rel=1e-6)


def test_neftune_makes_noise_of_its_size_in_training_alone(tmp_path):
    data = packs(random_samples(tmp_path / "samples"), tmp_path / "plans", epochs=1)
    model = tiny_model(stage())
    plain = loss_of(model, data.arrays(0))
    noisy = SummedLoss(model, neftune=5.0)
    segments = paddle.to_tensor(data.arrays(0)["segment_ids"][None])
    noise = noisy._noise(segments, paddle.zeros([1, LENGTH, 64])).numpy()[0]
    for segment in np.unique(segments.numpy()):
        mine = noise[segments.numpy()[0] == segment]
        bound = 5.0 / math.sqrt(len(mine) * 64)
        assert np.abs(mine).max() <= bound and np.abs(mine).max() > 0.9 * bound and abs(mine.mean()) < 0.2 * bound
    assert loss_of(model, data.arrays(0), neftune=5.0) != plain
    model.eval()
    noisy.eval()
    inputs = {name: paddle.to_tensor(data.arrays(0)[name][None]) for name in FIELDS}
    assert float(noisy(**inputs)) == plain


# ----------------------------------------------------------------------------------------------- the schedule


def test_the_rate_rises_to_lr_and_falls_to_min_lr():
    optim = Optim(lr=1.0, min_lr=0.1, schedule="cosine", warmup_steps=4)
    rates = [learning_rate(step, optim, 12) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[8] == pytest.approx(0.55) and rates[12] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    linear = Optim(lr=1.0, min_lr=0.0, schedule="linear", warmup_ratio=0.25)
    falling = [k / 6 for k in range(5, -1, -1)]
    assert [learning_rate(step, linear, 8) for step in range(9)] == pytest.approx([0.5, 1, 1, *falling])
    assert {learning_rate(step, Optim(lr=2.0, schedule="constant"), 5) for step in range(6)} == {2.0}


def test_the_run_uses_the_rates_it_reports(tmp_path):
    """One step of a huge rate after steps of none shows which rate the optimizer had."""
    trainer, reporter = trainer_of(tmp_path / "run", stage(lr=1e-3, warmup_steps=3, max_steps=4))
    used = []
    before = trainer.before_update
    trainer.before_update = lambda: (used.append(trainer.optimizer.get_lr()), before())
    trainer.callback_handler.callbacks[1]._before_update = trainer.before_update
    trainer.run(None)
    assert used == pytest.approx([record.lr for record in reporter.steps])


# -------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("last", "settings"),
    [
        (4, dict(method="full")),
        (6, dict(method="full")),
        (4, dict(method="lora", dropout=0.1)),
        (6, dict(method="qlora", dropout=0.1)),
        (4, dict(neftune=5.0)),
    ],
    ids=str,
)
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one_to_the_last_digit(tmp_path, settings, last):
    of = stage(micro_batch=4, max_steps=8, **settings)
    whole = run(tmp_path / "whole", of)
    broken = run(tmp_path / "broken", of, fail_after=last)
    rest = run(tmp_path / "broken", of, resume=True)
    assert broken.losses == whole.losses[:last]
    assert rest.steps[0].step == 4  # the checkpoint of step 6 comes after its record, with which the run ends
    assert rest.losses == whole.losses[rest.steps[0].step - 1 :]
    assert [r.grad_norm for r in rest.steps] == [r.grad_norm for r in whole.steps[rest.steps[0].step - 1 :]]


def test_a_run_that_is_done_is_not_trained_again(tmp_path):
    of = stage(max_steps=4)
    run(tmp_path / "run", of)
    assert run(tmp_path / "run", of, resume=True).losses == []


def test_the_best_evaluation_is_remembered_over_a_resume(tmp_path):
    of = stage(max_steps=8, eval_every=2, keep_best=True, lr=3e-2)
    held_out = packs(random_samples(tmp_path / "held", count=20, seed=9), tmp_path / "held-plans", epochs=1)
    whole = run(tmp_path / "whole", of, held_out=held_out)
    run(tmp_path / "broken", of, held_out=held_out, fail_after=7)
    with_resume = run(tmp_path / "broken", of, held_out=held_out, resume=True)
    again, once = ([r.loss for r in run.evaluations] for run in (with_resume, whole))
    assert again == once[-len(again) :]
    assert whole.evaluations[0].step == 0 and not whole.evaluations[0].best
    best = min(whole.evaluations[1:], key=lambda record: record.loss)
    assert (tmp_path / "broken" / "checkpoints" / f"step-{best.step:08d}").is_dir()


def test_told_to_stop_it_ends_the_step_and_saves(tmp_path):
    of = stage(max_steps=7)
    whole = run(tmp_path / "whole", of).losses
    trainer, reporter = trainer_of(tmp_path / "run", of)
    step = reporter.step
    tell = lambda record: os.kill(os.getpid(), signal.SIGTERM) if record.step == 4 else None  # noqa: E731
    reporter.step = lambda record: (step(record), tell(record))
    with pytest.raises(Stopped, match="SIGTERM"):
        trainer.run(None)
    assert trainer.checkpoints.steps()[-1] == 5
    assert run(tmp_path / "run", of, resume=True).losses == whole[5:]


@pytest.mark.parametrize("when", ["step", "saved"])
def test_told_to_stop_at_the_last_step_no_other_stage_begins(tmp_path, when):
    of = stage(max_steps=4)
    trainer, reporter = trainer_of(tmp_path / "run", of)
    does = getattr(reporter, when)

    def tell(what) -> None:
        does(what)
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    setattr(reporter, when, tell)
    with pytest.raises(Stopped, match="SIGTERM"):
        trainer.run(None)
    assert len(reporter.steps) == 4 and trainer.checkpoints.steps()[-1] == 4
    assert run(tmp_path / "run", of, resume=True).losses == []  # nothing is left but the result


def test_a_closed_terminal_asks_to_stop_unless_that_is_ignored(tmp_path):
    def hang_up(folder) -> Recorder:
        trainer, reporter = trainer_of(folder, stage(max_steps=4))
        step = reporter.step
        tell = lambda record: os.kill(os.getpid(), signal.SIGHUP) if record.step == 2 else None  # noqa: E731
        reporter.step = lambda record: (step(record), tell(record))
        trainer.run(None)
        return reporter

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert len(hang_up(tmp_path / "nohup").steps) == 4
        signal.signal(signal.SIGHUP, lambda number, frame: None)
        with pytest.raises(Stopped, match="SIGHUP"):
            hang_up(tmp_path / "plain")
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_process_has_all_parts_of_a_sharded_optimizer(tmp_path):
    """A run of several cards goes on with one."""
    cut, whole = (run(tmp_path / how, stage(max_steps=2, sharding=how)).losses for how in ("stage1", "none"))
    assert cut == whole


def test_the_first_step_takes_no_longer_for_what_is_loaded_before(tmp_path, monkeypatch):
    trainer, reporter = trainer_of(tmp_path / "run", stage(max_steps=2))
    late = [0.0]
    clock = time.perf_counter
    monkeypatch.setattr("aquila_pd.sft.loop.trainer.time.perf_counter", lambda: clock() + late[0])
    monkeypatch.setattr(trainer, "_load_optimizer_and_scheduler", lambda checkpoint: late.__setitem__(0, 1000.0))
    trainer.run(None)
    assert all(record.seconds < 500 for record in reporter.steps)


# ------------------------------------------------------------------------------------------- not a number


def test_a_loss_that_is_no_number_names_the_rows_and_leaves_the_weights(tmp_path):
    of = stage(max_steps=6, micro_batch=4)
    trainer, reporter = trainer_of(tmp_path / "run", of)
    step = reporter.step
    weight = trainer.model.model.lm_head.weight

    def spoil(record) -> None:
        step(record)
        if record.step == 4:
            with paddle.no_grad():
                weight[0, 0] = float("nan")

    reporter.step = spoil
    with pytest.raises(TrainingError) as error:
        trainer.run(None)
    message = str(error.value)
    assert "Stage one, step 5: the loss is nan" in message and "rows.jsonl:" in message
    assert "The checkpoint of step 3 is whole" in message
    for row in trainer.steps.packs.rows(32)[:5]:
        assert row in message
    assert trainer.checkpoints.steps() == [3]


def test_of_a_loss_that_is_no_number_the_rows_of_its_micro_batch_alone_are_named(tmp_path, monkeypatch):
    trainer, _ = trainer_of(tmp_path / "run", stage(max_steps=2, micro_batch=2))
    packs_of_step = trainer.steps.packs
    bad = packs_of_step.arrays(5)["input_ids"]
    forward = SummedLoss.forward

    def spoilt(self, input_ids, **more):
        loss = forward(self, input_ids, **more)
        return loss * math.nan if (input_ids.numpy() == bad).all(axis=1).any() else loss

    monkeypatch.setattr(SummedLoss, "forward", spoilt)
    monkeypatch.setattr("aquila_pd.sft.loop.trainer.NAMED_ROWS", 1000)
    with pytest.raises(TrainingError) as error:
        trainer.run(None)
    named = {line.strip() for line in str(error.value).splitlines() if "rows.jsonl:" in line}
    assert named == {*packs_of_step.rows(4), *packs_of_step.rows(5)}  # micro-batches of two


def test_a_gradient_that_is_no_number_stops_before_the_update(tmp_path, monkeypatch):
    trainer, reporter = trainer_of(tmp_path / "run", stage(max_steps=3))
    monkeypatch.setattr("aquila_pd.sft.loop.trainer.squared_norm", lambda tensors: paddle.to_tensor(float("nan")))
    before = trainer.model.model.lm_head.weight.numpy().copy()
    with pytest.raises(TrainingError, match="the gradient is nan"):
        trainer.run(None)
    assert (trainer.model.model.lm_head.weight.numpy() == before).all() and reporter.steps == []


def test_records_say_what_was_trained_on(tmp_path):
    reporter: Recorder = run(tmp_path / "run", stage(max_steps=2))
    data = packs(random_samples(tmp_path / "samples"), tmp_path / "plans", epochs=2)
    counts = Steps(data, global_batch=8).counts(1)
    record = reporter.steps[1]
    assert (record.valid_tokens, record.tokens, record.positions) == (counts.labels, counts.tokens, 8 * LENGTH)
    assert record.step == 2 and record.steps == 2 and record.epoch == pytest.approx(16 / (len(data) / 2), rel=0.05)


# ----------------------------------------------------------------------------------- half precision, as far as it goes


@pytest.mark.parametrize("method", ["full", "lora"])
def test_float32_gradients_beside_half_precision_weights_give_the_same_run(tmp_path, monkeypatch, method):
    """What a GPU does with bfloat16 weights, here with float32 ones: gradients are summed up in main_grad."""
    plain = run(tmp_path / "plain", stage(method=method, micro_batch=2, max_steps=5))
    seen = []

    def with_master_gradients(*args, half: bool, **more):
        return arguments(*args, half=True, **more)

    def gradients_of(parameters):
        seen.extend(getattr(p, "main_grad", None) is not None and p.grad is None for p in parameters)
        return gradients(parameters)

    monkeypatch.setattr("sft_factory.arguments", with_master_gradients)
    monkeypatch.setattr("aquila_pd.sft.loop.trainer.gradients", gradients_of)
    half = run(tmp_path / "half", stage(method=method, micro_batch=2, max_steps=5))
    assert seen and all(seen)
    assert_close(np.array(half.losses), np.array(plain.losses), ROUNDING)
    assert_close(*(np.array([r.grad_norm for r in x.steps]) for x in (half, plain)), 1e-5)
