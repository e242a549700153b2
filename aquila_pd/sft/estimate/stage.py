"""Estimate of a stage: steps, tokens, device memory, time; each states its basis."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from ...architecture.families import find_family
from ...architecture.families.base import dims as dims_of
from ...architecture.weight_map import Dims
from ...checkpoint.layout import read_config
from ...data.samples import Samples
from ..logs.peaks import peak_flops
from ..logs.records import StageInfo
from ..recipe.load import Stage
from .flops import Work, parameters, trained_parameters, work
from .memory import Memory, Rows, memory
from .rows import Amount, rows_of

GIB = 1 << 30
UTILIZATION = 0.45  # of a device's peak, recompute counted as work; published runs on one A100 reached 0.56
HALF_PRECISION, FULL_PRECISION = "bfloat16", "float32"


@dataclass(frozen=True)
class Model:
    """What estimates need of a model folder. positions: tokens of its context."""

    dims: Dims
    heads: int
    positions: int

    @classmethod
    def read(cls, folder: Path) -> "Model":
        """From config.json alone. Raises CheckpointError, ConfigError."""
        config = read_config(Path(folder))
        fields = find_family(config).fields(config)
        return cls(dims_of(fields), fields["num_attention_heads"], fields["max_position_embeddings"])


@dataclass(frozen=True)
class Machine:
    """Devices to train on. name: as the driver has it; memory: bytes of one, None if unknown."""

    devices: int
    name: str
    gpu: bool
    memory: float | None = None

    @classmethod
    def here(cls, devices: int) -> "Machine":
        """The devices of this computer."""
        import paddle
        from paddle.device import cuda

        if not paddle.get_device().startswith("gpu"):
            return cls(devices, "CPU", False)
        facts = cuda.get_device_properties(0)
        return cls(devices, facts.name, True, float(facts.total_memory))

    @classmethod
    def named(cls, devices: int, name: str) -> "Machine":
        """Cards that are not here, "A100-80GB": the memory is read out of the name where it is in it."""
        size = re.search(r"(\d+)\s*GB?\b", name, re.IGNORECASE)
        return cls(devices, name, True, int(size[1]) * GIB if size else None)

    def computes_in(self, stage: Stage) -> str:
        """The dtype a stage has here; `auto` is bfloat16 on a GPU."""
        if stage.dtype == "auto":
            return HALF_PRECISION if self.gpu else FULL_PRECISION
        return stage.dtype


@dataclass(frozen=True)
class Estimate:
    """One stage on one machine.

    packs: trained on in all, each epoch counted; tokens, labels: in them, without padding; step_places: of a step, with
    padding.
    seconds: of training, without evaluation and saving; None where nothing is known of the speed, which `speed` says.
    """

    stage: Stage
    amount: Amount
    dtype: str
    packs: int
    steps: int
    tokens: float
    labels: float
    memory: Memory
    work: Work
    seconds: float | None
    speed: str

    @property
    def step_places(self) -> int:
        return self.stage.global_batch * self.stage.length


def estimate(
    stage: Stage,
    model: Model,
    machine: Machine,
    found: Amount,
    *,
    tokens_per_s: float | None = None,
    utilization: float = UTILIZATION,
) -> Estimate:
    """What a stage will take.

    tokens_per_s: trained-on tokens a device does in a second, as a log shows it; without it the time follows from the
    device's peak and the utilization.
    """
    packs = found.packs_in(stage.epochs)
    steps = math.ceil(packs / stage.global_batch)
    if stage.max_steps is not None and stage.max_steps < steps:
        steps = stage.max_steps
        packs = steps * stage.global_batch
    each = sum(found.packs) / len(found.packs)  # packs of an epoch
    tokens = packs / each * found.tokens
    dtype = machine.computes_in(stage)
    a_token = work(model.dims, stage, keys=found.rows.keys, labels=found.rows.labels)
    seconds, speed = _time(machine, dtype, a_token, tokens, found.rows.labels, tokens_per_s, utilization)
    return Estimate(
        stage=stage,
        amount=found,
        dtype=dtype,
        packs=packs,
        steps=steps,
        tokens=tokens,
        labels=found.rows.labels * tokens,
        memory=memory_of(stage, model, machine, found.rows),
        work=a_token,
        seconds=seconds,
        speed=speed,
    )


def memory_of(stage: Stage, model: Model, machine: Machine, rows: Rows) -> Memory:
    """What one device of the machine holds at the peak of a step."""
    half = machine.computes_in(stage) == HALF_PRECISION
    return memory(stage, model.dims, rows, heads=model.heads, devices=machine.devices, half=half, gpu=machine.gpu)


def _time(
    machine: Machine, dtype: str, a_token: Work, tokens: float, share: float, measured: float | None, utilization: float
) -> tuple[float | None, str]:
    """Seconds, and what they stand on in words."""
    if measured is not None:
        return share * tokens / (measured * machine.devices), f"at the given {measured:,.0f} tok/s of a device"
    peak = peak_flops(machine.name, dtype)
    if peak is None:
        return None, f"nothing is known of the speed of {machine.name}; give tokens per second out of a log"
    assumed = f"assuming {utilization:.0%} of the {peak / 1e12:,.0f} TFLOP/s of {machine.name} in {dtype}"
    return a_token.done * tokens / (peak * machine.devices * utilization), assumed


# ------------------------------------------------------------------------------------------------ for the log


def stage_info(
    stage: Stage, model: Model, samples: Samples, machine: Machine, *, dtype: str, steps: int, step: int = 0
) -> StageInfo:
    """A stage as its log begins with it: what MFU is measured by, and facts for people."""
    rows = rows_of(samples)
    trained, weights = trained_parameters(model.dims, stage), parameters(model.dims)
    facts = {
        "trains": f"{stage.method}: {large(trained)} of {large(weights)} weights, in {dtype}",
        "rows": f"{len(samples):,} samples, {large(samples.manifest['tokens'])} tokens, {rows.labels:.0%} trained on",
        "a step": f"{stage.global_batch:,} packs of {stage.length:,} places, {stage.micro_batch} at a time on a rank",
        "devices": f"{machine.devices} x {machine.name}",
    }
    return StageInfo(
        stage=stage.name,
        steps=steps,
        step=step,
        log_every=stage.log_every,
        visualdl=stage.visualdl,
        flops_per_token=work(model.dims, stage, keys=rows.keys, labels=rows.labels).needed,
        peak_flops=peak_flops(machine.name, dtype),
        facts=facts,
    )


def large(number: float) -> str:
    """A count for people: 1,234 or 12.3 million or 3.13 billion."""
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:,.0f}"
