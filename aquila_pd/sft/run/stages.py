"""Stage sequence of a run: each stage starts from the weights the one before ended with.

A stage is done when its result is there. So the same call starts a run and goes on with it: stages that are done are
left alone, the first that is not goes on from its newest checkpoint.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import paddle
import paddle.distributed as dist
from paddle.distributed import fleet

from ...adapters import peft_files
from ...adapters.export import merge_folder
from ...adapters.lora import attach
from ...checkpoint.io.journal import JOURNAL, LOCK
from ...data.samples import Samples
from ...fusion_ops import choices
from ...modeling import AquilaForCausalLM
from ...quantization.loading import load_quantized
from ...utils.atomic import new_folder
from ...utils.errors import CheckpointError, ConfigError, TrainingError, report
from ..estimate.stage import Machine, Model, stage_info
from ..logs.curve import NAME as CURVE
from ..logs.curve import draw_curve
from ..logs.jsonl import NAME as LOG
from ..logs.reporter import Reporter, Silent, open_reporter
from ..loop.batches import Packs, Steps
from ..loop.checkpoints import Checkpoint, Checkpoints
from ..loop.loss import SummedLoss
from ..loop.trainer import Best, StageTrainer, arguments, load_trained
from ..recipe.load import Recipe, Stage
from .folder import RunFolder
from .launch import rank, ranks
from .manifest import DONE, RUNNING, Manifest
from .preparing import packs_of
from .results import link_model, write_model

POLL = 1.0  # seconds between two looks for what rank 0 makes


@dataclass(frozen=True)
class Carried:
    """The weights a stage starts from.

    base: a model folder; adapter: what was trained on top of it, and by which stage; None where base is all.
    """

    base: Path
    adapter: Path | None = None
    by: Stage | None = None


def train(recipe: Recipe, run: RunFolder, manifest: Manifest) -> None:
    """Train what is left of a recipe whose data is prepared; every rank calls this, and rank 0 writes.

    Raises TrainingError, DataError, CheckpointError; trainer.Stopped on a signal.
    """
    _init_distributed(recipe)
    carried = Carried(Path(recipe.model))
    done = _done(recipe, run)
    for stage in done:
        carried = _after(stage, _ready(carried, stage, run), run)
        if rank() == 0 and manifest.stage(stage.name)["state"] != DONE:  # killed between its result and this line
            manifest.update(stage.name, state=DONE, **_where(run, stage))
    waiting = recipe.stages[len(done) :]
    if waiting:
        notes: list[str] = []
        checkpoint = _agreed(waiting[0], run, notes.append)
        with _reporter(recipe, run, waiting[0], checkpoint) as reporter:
            for note in notes:
                reporter.said(note)
            for stage in waiting:
                carried = _ready(carried, stage, run)
                with paddle.utils.unique_name.guard():  # parameters of a new model are counted from 0 again
                    _Training(recipe, stage, run, manifest, reporter).run(carried, checkpoint)
                carried, checkpoint = _after(stage, carried, run), None
                gc.collect()
            reporter.finish()
    elif rank() == 0 and (run.root / LOG).exists() and not (run.root / CURVE).exists():  # killed after the last result
        draw_curve(run.root / LOG, run.root / CURVE, stages=[stage.name for stage in recipe.stages])
    if recipe.export == "merged" and rank() == 0:
        _export(carried, run)


def _init_distributed(recipe: Recipe) -> None:
    """Initialize the process group, and Fleet's groups if any stage shards its optimizer: once for all stages."""
    if ranks() == 1:
        return
    if all(stage.sharding == "none" for stage in recipe.stages):
        dist.init_parallel_env()
        return
    strategy = fleet.DistributedStrategy()
    strategy.hybrid_configs = {"dp_degree": 1, "mp_degree": 1, "pp_degree": 1, "sharding_degree": ranks()}
    fleet.init(is_collective=True, strategy=strategy)


def _done(recipe: Recipe, run: RunFolder) -> tuple[Stage, ...]:
    """The stages whose result is there. Raises TrainingError where a later one has begun before an earlier is done."""
    missing = [stage for stage in recipe.stages if not run.result(stage.name).is_dir()]
    done = recipe.stages[: recipe.stages.index(missing[0])] if missing else recipe.stages
    later = [
        str(folder)
        for stage in recipe.stages[len(done) + 1 :]
        for folder in (run.result(stage.name), run.checkpoints(stage.name))
        if folder.is_dir()
    ]
    if later:
        gone = run.result(missing[0].name)
        advice = f"Put {gone} back; or, to train from that stage on anew, move these away."
        raise TrainingError(report(f"{gone} is not there, and what was trained after it is:", later, advice))
    return done


def _where(run: RunFolder, stage: Stage) -> dict:
    """What the manifest says of a stage's result."""
    return {"result": str(run.result(stage.name).relative_to(run.root))}


def _reporter(recipe: Recipe, run: RunFolder, first: Stage, checkpoint: Checkpoint | None) -> Reporter | Silent:
    names = [stage.name for stage in recipe.stages]
    since = (first.name, checkpoint.step if checkpoint else 0)
    return open_reporter(run.root, rank=rank(), stages=names, resume=since, device=paddle.device.get_device())


def _agreed(stage: Stage, run: RunFolder, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from, looked at by rank 0, the same for all."""
    checkpoints = Checkpoints(run.checkpoints(stage.name), keep=stage.keep)
    return _from_first_rank(lambda: checkpoints.newest(say))


def _from_first_rank(look: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """What rank 0 finds, on every rank."""
    found = [look() if rank() == 0 else None]
    if ranks() > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


# ------------------------------------------------------------------------------------------------ one stage


class _Training:
    """One stage of a run."""

    def __init__(self, recipe: Recipe, stage: Stage, run: RunFolder, manifest: Manifest, reporter: Reporter | Silent):
        self.recipe, self.stage, self.folder = recipe, stage, run
        self.manifest, self.reporter = manifest, reporter
        self.checkpoints = Checkpoints(run.checkpoints(stage.name), keep=stage.keep)
        self.half = computes_in_half(stage)
        self.dtype = "bfloat16" if self.half else "float32"

    def run(self, carried: Carried, checkpoint: Checkpoint | None) -> None:
        """Train to the end and leave the result."""
        train_on, evaluate_on = packs_of(self.recipe, self.stage, self.folder)
        steps = Steps(train_on, global_batch=self.stage.global_batch, max_steps=self.stage.max_steps)
        self._begin(steps, train_on.samples, checkpoint)
        model = build(self.stage, carried, seed=self.recipe.seed, dtype=self.dtype)
        trainer = self._trainer(model, steps, evaluate_on)
        best = trainer.run(checkpoint)
        if self.stage.keep_best:
            self._take_best(model, best, last=steps.steps)
        self._end(model, carried, steps, best)

    def _begin(self, steps: Steps, samples: Samples, checkpoint: Checkpoint | None) -> None:
        step = checkpoint.step if checkpoint else 0
        sizes, machine = Model.read(Path(self.recipe.model)), Machine.here(ranks())
        info = stage_info(self.stage, sizes, samples, machine, dtype=self.dtype, steps=steps.steps, step=step)
        self.reporter.start(replace(info, facts={**info.facts, **_kernels(machine)}))
        if rank() == 0:
            self.manifest.update(self.stage.name, state=RUNNING, steps=steps.steps)

    def _trainer(self, model: AquilaForCausalLM, steps: Steps, held_out: Packs | None) -> StageTrainer:
        settings = arguments(
            self.stage,
            self.checkpoints.folder.parent,
            steps=steps.steps,
            seed=self.recipe.seed,
            accumulation=self.stage.accumulation(ranks()),
            half=self.half,
        )
        return StageTrainer(
            SummedLoss(model, neftune=self.stage.neftune),
            settings,
            stage=self.stage,
            steps=steps,
            held_out=held_out,
            seed=self.recipe.seed,
            checkpoints=self.checkpoints,
            reporter=self.reporter,
        )

    def _take_best(self, model: AquilaForCausalLM, best: Best, *, last: int) -> None:
        """Go back to the weights with the lowest evaluation loss, where these are not the last."""
        if best.step not in (None, last):
            found = _from_first_rank(lambda: self._best_checkpoint(best.step))
            if found is not None:
                load_trained(model, found)
                why = f"whose evaluation loss of {best.loss:.4f} is the lowest"
                self.reporter.said(f"The weights of step {best.step} are taken, {why}.")

    def _best_checkpoint(self, step: int) -> Checkpoint | None:
        try:
            return self.checkpoints.with_weights(step)
        except CheckpointError as error:
            self.reporter.said(f"{error}\nThe weights of the last step are taken, not those of step {step}, the best.")
            return None

    def _end(self, model: AquilaForCausalLM, carried: Carried, steps: Steps, best: Best) -> None:
        result = self.folder.result(self.stage.name)
        if rank() == 0:
            # known before the result is there: a resume after a kill between the two needs it
            facts = {"evaluation_loss": best.loss, "best_step": best.step} if best.step else {}
            self.manifest.update(self.stage.name, steps=steps.steps, **facts)
            with new_folder(result) as folder:
                _write_result(model, self.stage, carried, folder)
            self.reporter.saved(result)
            self.manifest.update(self.stage.name, state=DONE, **_where(self.folder, self.stage))
        _wait_for(result)


def _kernels(machine: Machine) -> dict[str, str]:
    """Which operations run in fused kernels on a GPU: plain attention takes much more memory there."""
    if not machine.gpu:
        return {}
    fused = [choice.name for choice in choices() if choice.chosen == "fused"]
    plain = [f"{choice.name} ({choice.reason})" for choice in choices() if choice.chosen != "fused"]
    return {"fused": ", ".join(fused) or "nothing", "not fused": "; ".join(plain) or "nothing"}


def build(stage: Stage, carried: Carried, *, seed: int, dtype: str) -> AquilaForCausalLM:
    """The model a stage begins with: loaded, quantized and with adapters as its method says.

    An adapter of the stage before goes on being trained; _ready() has merged what cannot.
    """
    if stage.method == "qlora":
        model = load_quantized(carried.base, dtype=dtype)
    else:
        model = AquilaForCausalLM.from_pretrained(str(carried.base), dtype=dtype)
    if stage.method != "full":
        paddle.seed(seed)
        attach(model, stage.lora)
        if carried.adapter is not None:
            peft_files.load(model, carried.adapter)
    return model


def computes_in_half(stage: Stage) -> bool:
    """Whether a stage computes in bfloat16 here. Raises ConfigError where it shall and cannot."""
    on_cpu = paddle.device.get_device() == "cpu"
    if stage.dtype == "bfloat16" and on_cpu:
        raise ConfigError(
            f"Stage {stage.name} asks for dtype bfloat16, and Paddle has no CPU kernels to compute in it.\n"
            "Leave dtype at auto, which is float32 on a CPU."
        )
    return stage.dtype == "bfloat16" or (stage.dtype == "auto" and not on_cpu and paddle.amp.is_bfloat16_supported())


def _write_result(model: AquilaForCausalLM, stage: Stage, carried: Carried, folder: Path) -> None:
    if stage.method == "full":
        write_model(model, carried.base, folder, template=stage.template)
    else:
        peft_files.save(folder, model, stage.lora, base=str(carried.base.resolve()))


# ------------------------------------------------------------------------------------- from stage to stage


def _after(stage: Stage, carried: Carried, run: RunFolder) -> Carried:
    result = run.result(stage.name)
    return Carried(result, by=stage) if stage.method == "full" else Carried(carried.base, result, stage)


def _ready(carried: Carried, stage: Stage, run: RunFolder) -> Carried:
    """What a stage can start from: an adapter that it does not go on with is merged into its base."""
    if carried.adapter is None or _goes_on(carried.by, stage):
        return carried
    merged = run.merged(carried.by.name)
    if rank() == 0:
        _merge(carried, merged)
    _wait_for(merged)
    return Carried(merged)


def _goes_on(earlier: Stage, later: Stage) -> bool:
    """Whether a later stage trains the adapter of an earlier one: the same method and shape."""
    same = replace(earlier.lora, dropout=later.lora.dropout) == later.lora
    return earlier.method == later.method and same


def _export(carried: Carried, run: RunFolder) -> None:
    if carried.adapter is not None:
        _merge(carried, run.model)
    elif not run.model.exists():
        with new_folder(run.model) as folder:
            link_model(carried.base, folder)


def _merge(carried: Carried, output: Path) -> None:
    """Merge what is carried, or end the merging of a run that was killed in its last moment."""
    if not _is_there(output):
        merge_folder(carried.base, carried.adapter, output, template=carried.by.template, fsync=True)
    (output / LOCK).unlink(missing_ok=True)  # not held: the run folder's lock is


def _is_there(folder: Path) -> bool:
    """Whether a folder that rank 0 makes is whole; of a merge the journal goes last."""
    return folder.exists() and not (folder / JOURNAL).exists()


def _wait_for(path: Path) -> None:
    """Rank 0 makes it; hours may go by, and a barrier's patience ends sooner."""
    while not _is_there(path):
        time.sleep(POLL)
