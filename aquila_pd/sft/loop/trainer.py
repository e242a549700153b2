"""StageTrainer: PaddleNLP's Trainer (loop, accumulation, Fleet wrappers) with our batches, loss and checkpoints.

What is replaced, and why:

- Batches come from packs (batches.py), on resume from exactly the next one; the Trainer would run through the old ones.
- The loss is the mean over all labels of a step; the Trainer's is a mean of means, which depends on how a step is cut.
- Every draw (dropout, NEFTune) is seeded by run, stage, step, micro-batch and rank, so there is no state to restore.
- Gradients are clipped here: the norm is worth knowing, and is the same on any number of ranks.
- Checkpoints are ours (checkpoints.py): atomic, hashed, named by parameter.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import paddle
import paddle.distributed as dist

from ...data.epoch_order import derive_key
from ...formats.dtypes import FLOATS
from ...quantization.nf4 import dtype_name
from ...runtime.base import TRAINER_STATE_NAME, Trainer, TrainerCallback, TrainingArguments
from ...utils.errors import CheckpointError, TrainingError, report
from ..logs.records import EvalRecord, StepRecord
from ..logs.reporter import Reporter
from ..recipe.load import Stage
from ..run.launch import asks
from .batches import FIELDS, DataParallelShard, Packs, Steps
from .checkpoints import Checkpoint, Checkpoints, Ranks, array_of
from .loss import SummedLoss
from .optimizer import adamw, clip_factor, gradients, load_state, squared_norm, state_of, trained, updated_here
from .schedule import learning_rate

NAMED_ROWS = 20  # rows that an error message names


@dataclass
class Best:
    """The lowest evaluation loss so far, and after which step; None before the first."""

    loss: float | None = None
    step: int | None = None


class Stopped(Exception):
    """Stopped by signal `number` (Ctrl-C, SIGTERM); progress is in a checkpoint."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StageTrainer(Trainer):
    """Trains one stage. steps: its batches; held_out: packs to evaluate on, or None. seed: of the run."""

    def __init__(
        self,
        model: SummedLoss,
        arguments: TrainingArguments,
        *,
        stage: Stage,
        steps: Steps,
        held_out: Packs | None,
        seed: int,
        checkpoints: Checkpoints,
        reporter: Reporter,
    ):
        self.stage, self.steps, self.held_out, self.seed = stage, steps, held_out, seed
        self.checkpoints, self.reporter = checkpoints, reporter
        self.best = Best()
        self._resumed_from: Checkpoint | None = None
        self._loss = self._norm = math.nan
        self._parts: list[tuple[range, paddle.Tensor]] = []  # packs and loss of this step's micro-batches here
        self._asked = 0  # the signal by which this rank was asked to stop
        self._stopping = False  # what all ranks agreed on at the last step
        self._seen = -1  # the last step that was logged
        super().__init__(model=model, args=arguments, callbacks=[_BeforeUpdate(self)])
        self.shard = DataParallelShard(max(arguments.dataset_rank, 0), arguments.dataset_world_size, stage.micro_batch)
        self.ranks = Ranks(max(dist.get_rank(), 0), dist.get_world_size(), _wait)
        self._clock = math.nan  # when the step under way began

    # --------------------------------------------------------------------------------------------- the run

    def run(self, checkpoint: Checkpoint | None) -> Best:
        """Train to the end, from a checkpoint on when there is one; returns the best evaluation.

        A stage that begins is evaluated first: what it improves on shows, and that evaluation works before hours go by.

        Raises TrainingError when the loss or the gradient is no number, Stopped on a signal.
        """
        self._resumed_from = checkpoint
        if checkpoint is not None:
            self.best = Best(**checkpoint.facts["best"])
        if checkpoint is None or checkpoint.step < self.steps.steps:
            with self._stop_when_told():
                if checkpoint is None and self.held_out:
                    self.evaluate_held_out(0)
                self.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
                self._stop_at_end()
        else:
            self._load_from_checkpoint(checkpoint)
        return self.best

    def _stop_at_end(self) -> None:
        """Raise Stopped for what was asked since the last step began: another stage may be next."""
        if _sum_over_ranks([float(self._asked > 0)])[0]:
            raise Stopped(self._asked or signal.SIGTERM)

    @contextmanager
    def _stop_when_told(self) -> Iterator[None]:
        """SIGINT, SIGTERM, SIGHUP: the first lets the step end, the second does not wait."""

        def told(number: int, frame: object) -> None:
            if self._asked:
                signal.default_int_handler(number, frame)
            self._asked = number

        before = {number: signal.signal(number, told) for number in asks()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ------------------------------------------------------------------------------------- what goes in

    def get_train_dataloader(self):
        first = self._resumed_from.step if self._resumed_from else 0
        return _Loader(self.steps, self.shard, first)

    def _prepare_inputs(self, inputs: dict) -> dict:
        return {name: paddle.to_tensor(inputs[name]) for name in FIELDS}

    def training_step(self, model, inputs: dict, step_control: int = 0):
        """Forward and backward of a micro-batch; its share of the step's loss, float32 scalar."""
        paddle.seed(derive_key("draws", self.seed, self.stage.name, inputs["step"], inputs["micro"], self.shard.rank))
        model.train()
        total = model(**self._prepare_inputs(inputs))
        # ranks' gradients are averaged, hence the number of ranks
        loss = total * (self.shard.world_size / inputs["labels_in_step"])
        loss.backward()
        self._parts.append((inputs["numbers"], loss.detach()))
        return loss.detach()

    # ------------------------------------------------------------------------------------ half precision

    def _wrap_amp_model(self, args, model) -> None:
        """No autocast: the model is bfloat16 by itself and knows what stays float32, such as angles and norms.

        What is left of the Trainer's mixed precision is the float32 gradients (amp_master_grad).
        """
        self.do_grad_scaling = self.enable_autocast_context_manager = False
        self.amp_dtype = "bfloat16"

    # ------------------------------------------------------------------------- optimizer and schedule

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        optim, steps = self.stage.optim, self.steps.steps
        # Paddle multiplies: with a base of 1 the function's value is the rate itself
        self.lr_scheduler = paddle.optimizer.lr.LambdaDecay(1.0, lambda step: learning_rate(step, optim, steps))
        self.optimizer = adamw(self.model, optim, self.lr_scheduler)

    def _check_loss_valid(self, loss) -> None:
        """The step's loss over all ranks; non-finite values and stop requests reach every rank at once."""
        sums = _sum_over_ranks([float(loss) / self.shard.world_size, float(self._asked > 0)])
        self._loss, self._stopping = sums[0], sums[1] > 0
        if not math.isfinite(self._loss):
            raise self._not_a_number("loss", self._loss, self._suspects())
        self._parts.clear()

    def begin(self) -> None:
        """Everything is loaded: the first step's time begins."""
        self._clock = time.perf_counter()

    def before_update(self) -> None:
        """Measure the gradient, and clip it."""
        parameters = list(updated_here(self.model, self.optimizer).values())
        found = gradients(parameters)
        squares = float(squared_norm(found))
        if len(parameters) < len(trained(self.model)):  # the rest of the gradient is with the other ranks
            squares = _sum_over_ranks([squares])[0]
        self._norm = math.sqrt(squares) if squares >= 0 else math.nan
        if not math.isfinite(self._norm):
            raise self._not_a_number("gradient", self._norm, self.steps.numbers(self.state.global_step))
        factor = clip_factor(self._norm, self.stage.optim.clip)
        if factor != 1.0:
            with paddle.no_grad():
                for gradient in found:
                    gradient.scale_(factor)

    def _suspects(self) -> list[int]:
        """The packs of this step whose micro-batch has a loss that is no number, on any rank; all, if only the sum."""
        step = self.steps.numbers(self.state.global_step)
        here = {number for packs, loss in self._parts if not math.isfinite(float(loss)) for number in packs}
        found = _sum_over_ranks([float(number in here) for number in step])
        return [number for number, count in zip(step, found, strict=True) if count] or list(step)

    def _not_a_number(self, what: str, value: float, packs: Sequence[int]) -> TrainingError:
        step = self.state.global_step
        rows = [row for number in packs for row in self.steps.packs.rows(number)]
        more = [f"and {len(rows) - NAMED_ROWS:,} more"] if len(rows) > NAMED_ROWS else []
        newest = self.checkpoints.steps()[-1:]
        kept = f"The checkpoint of step {newest[0]} is whole" if newest else "No checkpoint was written yet"
        return TrainingError(
            report(
                f"Stage {self.stage.name}, step {step + 1}: the {what} is {value}. The rows it is made of:",
                [*rows[:NAMED_ROWS], *more],
                f"{kept}; weights were not changed by this step. Look at these rows, or lower the learning rate.",
            )
        )

    # ------------------------------------------------------------------------------------ after a step

    def _maybe_log_save_evaluate(self, tr_loss, model, epoch, ignore_keys_for_eval, **kwargs) -> None:
        tr_loss.zero_()
        step = self.state.global_step
        if step == self._seen:  # the Trainer calls once more at the end of its epoch
            return
        self._seen = step
        at_end, stage = step >= self.steps.steps, self.stage
        self._record(step)
        improved = False
        if self.held_out and (at_end or (stage.eval_every and step % stage.eval_every == 0)):
            improved = self.evaluate_held_out(step)
        due = stage.save_every and step % stage.save_every == 0
        if at_end or due or self._stopping or (improved and stage.keep_best):
            self._save(step)
        if self._stopping and not at_end:
            raise Stopped(self._asked or signal.SIGTERM)
        self._clock = time.perf_counter()  # the next step's time begins after evaluation and saving

    def _record(self, step: int) -> None:
        counts = self.steps.counts(step - 1)
        self.reporter.step(
            StepRecord(
                stage=self.stage.name,
                step=step,
                steps=self.steps.steps,
                epoch=self.steps.packs.epoch(self.steps.numbers(step - 1).stop),
                loss=self._loss,
                lr=learning_rate(step - 1, self.stage.optim, self.steps.steps),
                grad_norm=self._norm,
                valid_tokens=counts.labels,
                tokens=counts.tokens,
                positions=counts.places,
                seconds=time.perf_counter() - self._clock,
                devices=self.ranks.count,
            )
        )

    def evaluate_held_out(self, step: int) -> bool:
        """The mean loss over all labels held out, reported; whether it is the lowest so far."""
        begin = time.perf_counter()
        model, packs, shard = self.model, self.held_out, self.shard
        model.eval()
        total, labels = 0.0, 0
        with paddle.no_grad():
            for number in range(shard.rank, len(packs), shard.world_size):
                arrays = packs.arrays(number)
                total += float(model(**{name: paddle.to_tensor(arrays[name][None]) for name in FIELDS}))
                labels += packs.counts(number)[0]
        model.train()
        total, labels = _sum_over_ranks([total, float(labels)])
        loss = total / labels
        if not math.isfinite(loss):
            raise TrainingError(f"Stage {self.stage.name}, step {step}: the evaluation loss is {loss}.")
        improved = step > 0 and (self.best.loss is None or loss < self.best.loss)  # at 0 nothing was trained yet
        self.reporter.evaluated(
            EvalRecord(
                self.stage.name,
                step,
                loss=loss,
                tokens=int(labels),
                seconds=time.perf_counter() - begin,
                best=improved,
            )
        )
        if improved:
            self.best = Best(loss, step)
        return improved

    def _save(self, step: int) -> None:
        folder = self.checkpoints.save(
            step,
            weights=trained(self.model.model),
            optimizer=state_of(self.model, self.optimizer) if self._saves_optimizer() else {},
            ranks=self.ranks,
            facts={"best": vars(self.best)},
            write_more=lambda partial: self.state.save_to_json(str(partial / TRAINER_STATE_NAME)),
            best=self.best.step if self.stage.keep_best else None,
        )
        self.reporter.saved(folder)

    def _saves_optimizer(self) -> bool:
        """Plain data parallel ranks hold the same state: the first one writes it."""
        return self.ranks.first or len(updated_here(self.model, self.optimizer)) < len(trained(self.model))

    # ------------------------------------------------------------------------------------------ resuming

    def _load_from_checkpoint(self, resume_from_checkpoint=None) -> None:
        if self._resumed_from is not None:
            load_trained(self.model.model, self._resumed_from)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if self._resumed_from is not None:
            load_state(self.model, self.optimizer, self._resumed_from.optimizer())
            self.lr_scheduler.step(self._resumed_from.step)

    def _load_rng_state(self, checkpoint) -> None:
        """There is none: draws are seeded by step."""

    def log(self, logs: dict, **kwargs) -> None:
        """Nothing: the reporter logs."""


class _BeforeUpdate(TrainerCallback):
    def __init__(self, trainer: StageTrainer):
        self._begin: Callable[[], None] = trainer.begin
        self._before_update: Callable[[], None] = trainer.before_update

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin()

    def on_optimizer_begin(self, args, state, control, **kwargs):
        self._before_update()


class _Loader:
    """Without a length, so that the Trainer counts steps and not epochs."""

    def __init__(self, steps: Steps, shard: DataParallelShard, first: int):
        self._steps, self._shard, self._first = steps, shard, first

    def __iter__(self) -> Iterator[dict]:
        return self._steps.micro_batches(self._shard, self._first)


def load_trained(model, checkpoint: Checkpoint) -> None:
    """Fill what is trained of a model from a checkpoint. Raises CheckpointError when it holds other tensors."""
    parameters, stored = trained(model), checkpoint.weights()
    findings = [f"missing     {name}" for name in parameters if name not in stored]
    findings += [f"unexpected  {name}" for name in stored if name not in parameters]
    findings += [
        f"shape       {name}: stored {list(stored[name].shape)}, here {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in stored and list(stored[name].shape) != list(parameter.shape)
    ]
    findings += [
        f"dtype       {name}: stored {stored[name].dtype}, here {parameter.dtype}; a stage keeps the dtype it began in"
        for name, parameter in parameters.items()
        if name in stored and FLOATS[stored[name].dtype] != dtype_name(parameter.dtype)
    ]
    if findings:
        headline = f"The checkpoint {checkpoint.folder} holds another model:"
        raise CheckpointError(report(headline, findings, "Was the recipe changed?"))
    for name, parameter in parameters.items():
        parameter.set_value(paddle.to_tensor(array_of(stored[name]), place=parameter.place))


def arguments(stage: Stage, folder: Path, *, steps: int, seed: int, accumulation: int, half: bool) -> TrainingArguments:
    """TrainingArguments of a stage. half: compute in bfloat16 (with float32 master weights and gradients)."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=stage.micro_batch,
        gradient_accumulation_steps=accumulation,
        seed=seed,
        bf16=half,
        fp16_opt_level="O2",
        amp_master_grad=half,
        recompute=stage.recompute,
        sharding="" if stage.sharding == "none" else stage.sharding,
        ignore_data_skip=True,  # the loader begins where it should
        ddp_find_unused_parameters=False,
        evaluation_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to=[],
        skip_profile_timer=True,
    )


def _sum_over_ranks(values: list[float]) -> list[float]:
    if dist.get_world_size() < 2:
        return values
    tensor = paddle.to_tensor(values, dtype="float64")
    dist.all_reduce(tensor)
    return tensor.tolist()


def _wait() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()
