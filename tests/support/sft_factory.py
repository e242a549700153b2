"""Small things to train on: a folder of random samples, a tiny model, a stage, and a run that keeps what it says."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist

from aquila_pd.adapters.lora import attach
from aquila_pd.configuration import AquilaConfig
from aquila_pd.data.packing import plan_epoch
from aquila_pd.data.samples import Samples, SamplesWriter
from aquila_pd.data.settings import DataSpec, Source
from aquila_pd.modeling import AquilaForCausalLM
from aquila_pd.quantization.nf4 import quantize_model
from aquila_pd.sft.loop.batches import Packs, Steps
from aquila_pd.sft.loop.checkpoints import Checkpoints
from aquila_pd.sft.loop.loss import SummedLoss
from aquila_pd.sft.loop.trainer import StageTrainer, arguments
from aquila_pd.sft.recipe.load import LoraSpec, Optim, Stage

VOCABULARY = 96
LENGTH = 64
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


def random_samples(folder: Path, *, count: int = 200, seed: int = 0, longest: int = 40) -> Samples:
    """Samples of random ids, the later half of each a target; made once."""
    if not folder.exists():
        folder.mkdir(parents=True)
        rng = np.random.default_rng(seed)
        with SamplesWriter(folder) as writer:
            for row in range(count):
                ids = rng.integers(1, VOCABULARY, int(rng.integers(4, longest)))
                is_target = np.arange(len(ids)) >= len(ids) // 2
                writer.add(ids, is_target, file=0, row=row + 1)
            writer.finish(["rows.jsonl"])
    return Samples.open(folder)


def stage(**changes) -> Stage:
    """A stage of 8 packs a step; keywords of Stage, LoraSpec and Optim in one."""
    optim = {name: changes.pop(name) for name in list(changes) if name in Optim.__dataclass_fields__}
    lora = {name: changes.pop(name) for name in list(changes) if name in LoraSpec.__dataclass_fields__}
    made = Stage(
        name="one",
        data=DataSpec(train=(Source(("rows.jsonl",)),), held_out=0.1 if changes.get("eval_every") else 0.0),
        length=LENGTH,
        epochs=2.0,
        global_batch=8,
        micro_batch=8,
        save_every=3,
        optim=Optim(**{"lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.1, **optim}),
        lora=LoraSpec(**{"r": 4, "dropout": 0.0, **lora}),
    )
    return replace(made, **changes)


def packs(samples: Samples, folder: Path, *, epochs: float = 2.0, length: int = LENGTH) -> Packs:
    """The packs of some epochs; plans go into the folder."""

    def plan_of(epoch: int):
        return plan_epoch(samples, length=length, seed=1, epoch=epoch, folder=folder)

    return Packs(samples, plan_of, epochs=epochs, length=length, pad_id=0)


def tiny_model(of: Stage, *, seed: int = 0, **sizes) -> AquilaForCausalLM:
    """A random model, quantized and with adapters as the stage's method says."""
    paddle.seed(seed)
    model = AquilaForCausalLM(AquilaConfig(**{**SIZES, **sizes}))
    if of.method == "qlora":
        quantize_model(model)
    if of.method != "full":
        attach(model, of.lora)
    return model


class Recorder:
    """A reporter that keeps everything, and may raise after a step."""

    def __init__(self, *, fail_after: int | None = None):
        self.steps, self.evaluations, self.saves, self.texts = [], [], [], []
        self._fail_after = fail_after

    def step(self, record) -> None:
        self.steps.append(record)
        if record.step == self._fail_after:
            raise Interrupted

    def evaluated(self, record) -> None:
        self.evaluations.append(record)

    def saved(self, path) -> None:
        self.saves.append(path)

    def said(self, text: str) -> None:
        self.texts.append(text)

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.steps]


class Interrupted(Exception):
    """What a Recorder raises."""


@contextmanager
def counted_anew() -> Iterator[None]:
    """Parameters are named as in a new process."""
    with paddle.utils.unique_name.guard():
        yield


def trainer_of(
    folder: Path, of: Stage, *, model: AquilaForCausalLM | None = None, data: Packs | None = None, held_out=None, **more
) -> tuple[StageTrainer, Recorder]:
    """A trainer in a folder, and its reporter. more: keywords of Recorder."""
    data = data or packs(random_samples(folder.parent / "samples"), folder.parent / "plans", epochs=of.epochs)
    steps = Steps(data, global_batch=of.global_batch, max_steps=of.max_steps)
    reporter = Recorder(**more)
    settings = arguments(
        of, folder, steps=steps.steps, seed=1, accumulation=of.accumulation(dist.get_world_size()), half=False
    )
    trainer = StageTrainer(
        SummedLoss(model or tiny_model(of), neftune=of.neftune),
        settings,
        stage=of,
        steps=steps,
        held_out=held_out,
        seed=1,
        checkpoints=Checkpoints(folder / "checkpoints", keep=of.keep),
        reporter=reporter,
    )
    return trainer, reporter


def run(folder: Path, of: Stage, *, resume: bool = False, **more) -> Recorder:
    """Train a stage in a folder; resume: from its newest checkpoint."""
    with counted_anew():
        trainer, reporter = trainer_of(folder, of, **more)
        checkpoint = trainer.checkpoints.newest(reporter.said) if resume else None
        with suppress(Interrupted):
            trainer.run(checkpoint)
    return reporter
