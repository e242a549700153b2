"""`--dry-run`: the plan of a run, its estimates, and everything that stands in its way; nothing is started."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ...utils.errors import AquilaError
from ...utils.units import counted, duration
from ..loop.schedule import warmup_steps
from ..recipe.load import Recipe, Stage
from .flops import parameters, trained_parameters
from .memory import Memory
from .rows import Amount, amount, unknown
from .stage import GIB, UTILIZATION, Estimate, Machine, Model, estimate, large, memory_of

TIGHT = 0.93  # of a device's memory; what is left over is lost between pieces of other sizes


@dataclass
class DryRun:
    """What would be done, in lines; what stands in its way (`findings`), and what is worth a look (`notes`)."""

    lines: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float | None = 0.0

    @property
    def text(self) -> str:
        listed = _listed("Worth a look:", self.notes) + _listed("What stands in the way:", self.findings)
        verdict = "Nothing was started." if self.findings else "Nothing was started; nothing known stands in the way."
        return "\n".join([*self.lines, "", *listed, verdict])


def dry_run(
    recipe: Recipe,
    machine: Machine,
    *,
    prepared: Callable[[str], Path | None] = lambda stage: None,
    tokens_per_s: float | None = None,
    utilization: float = UTILIZATION,
) -> DryRun:
    """Look at everything a recipe asks for on a machine; nothing is written.

    prepared: the folder of a stage's prepared samples to train on, None where there is none yet.
    tokens_per_s, utilization: see estimate().
    """
    found = DryRun([f"{recipe.name}: {counted(len(recipe.stages), 'stage')} on {machine.devices} x {machine.name}"])
    model = _model(recipe, found)
    found.lines += [f"  output    {recipe.output}", f"  recipe    {recipe.digest[:12]}, seed {recipe.seed}"]
    for number, stage in enumerate(recipe.stages, 1):
        found.lines += ["", f"Stage {stage.name} ({number} of {len(recipe.stages)})"]
        _check(stage, machine, found)
        rows = _rows(stage, recipe.seed, prepared, found)
        if model is None:
            found.seconds = None
            continue
        if stage.length > model.positions:
            found.notes.append(f"{stage.name}: length {stage.length:,} is more than the model's {model.positions:,}")
        if rows is None:
            found.seconds, needed = None, memory_of(stage, model, machine, unknown(stage))
            found.lines += [trains(stage, model, machine), *memory_lines(needed, machine)]
        else:
            one = estimate(stage, model, machine, rows, tokens_per_s=tokens_per_s, utilization=utilization)
            found.lines += stage_lines(one, model, machine)
            found.notes += _odd(one)
            found.seconds = None if None in (found.seconds, one.seconds) else found.seconds + one.seconds
            needed = one.memory
        _compare(stage, needed, machine, found)
    if found.seconds and len(recipe.stages) > 1:
        found.lines += ["", f"All stages: about {duration(found.seconds)}, without evaluation and saving."]
    return found


def _model(recipe: Recipe, found: DryRun) -> Model | None:
    try:
        model = Model.read(Path(recipe.model))
    except AquilaError as error:
        found.findings.append(f"model: {error}")
        found.lines.append(f"  model     {recipe.model}, which cannot be read")
        return None
    sizes = f"{large(parameters(model.dims))} weights, context {model.positions:,}, vocabulary {model.dims.vocab:,}"
    found.lines.append(f"  model     {recipe.model}: {sizes}")
    return model


def _rows(stage: Stage, seed: int, prepared: Callable[[str], Path | None], found: DryRun) -> Amount | None:
    try:
        return amount(stage, seed=seed, prepared=prepared(stage.name))
    except AquilaError as error:
        found.findings.append(f"{stage.name}: {error}")
        found.lines.append("  rows      none that can be read")
        return None


def _check(stage: Stage, machine: Machine, found: DryRun) -> None:
    """What the stage asks of the machine and it does not have."""
    try:
        stage.accumulation(machine.devices)
    except AquilaError as error:
        found.findings.append(str(error))
    if stage.dtype == "bfloat16" and not machine.gpu:
        found.findings.append(f"{stage.name}: Paddle computes in bfloat16 on no processor; leave dtype at auto")


def _odd(one: Estimate) -> list[str]:
    """What can be meant and seldom is."""
    warmup = warmup_steps(one.stage.optim, one.steps)
    if warmup < max(one.steps, 2):  # one step may be all there is
        return []
    return [f"{one.stage.name}: the warmup, {counted(warmup, 'step')}, is all of {counted(one.steps, 'step')}"]


# ------------------------------------------------------------------------------------------------------ in words


def stage_lines(one: Estimate, model: Model, machine: Machine) -> list[str]:
    """One stage in words."""
    stage, rows, optim = one.stage, one.amount, one.stage.optim
    about = "" if rows.exact else "about "
    packs = ", ".join(f"{count:,}" for count in dict.fromkeys(rows.packs))
    end = f", ended by max_steps {stage.max_steps:,}" if stage.max_steps == one.steps else ""
    warmup = counted(warmup_steps(optim, one.steps), "step")
    floor = "" if optim.schedule == "constant" else f" to {optim.min_lr:g}"
    return [
        f"  rows      {rows.samples:,} samples an epoch: {large(rows.tokens)} tokens, {large(rows.labels)} trained on",
        f"            ({rows.source})",
        f"  packs     {about}{packs} an epoch, of {stage.length:,} places",
        f"  steps     {about}{one.steps:,}: epochs {stage.epochs:g}, {stage.global_batch:,} packs a step{end}",
        f"  a step    {one.step_places:,} places: {_batches(stage, machine)}",
        f"  tokens    {large(one.tokens)} in all, {large(one.labels)} of them trained on",
        f"  schedule  {optim.schedule}, lr {optim.lr:g}{floor}, warmup {warmup}",
        trains(stage, model, machine),
        *memory_lines(one.memory, machine),
        f"  time      {_time(one)}",
    ]


def trains(stage: Stage, model: Model, machine: Machine) -> str:
    what = "all" if stage.method == "full" else f"{stage.method} of rank {stage.lora.r}:"
    trained, weights = trained_parameters(model.dims, stage), parameters(model.dims)
    return f"  trains    {what} {large(trained)} of {large(weights)} weights, in {machine.computes_in(stage)}"


def _batches(stage: Stage, machine: Machine) -> str:
    try:
        count = stage.accumulation(machine.devices)
    except AquilaError:
        return "they do not divide among the devices"
    each = f"{count:,} times {counted(stage.micro_batch, 'pack')}"
    return each + (f" on each of {machine.devices:,} devices" if machine.devices > 1 else "")


def memory_lines(needed: Memory, machine: Machine) -> list[str]:
    """The estimate of one device's memory, part by part."""
    unit, name = (GIB, "GiB") if needed.total >= GIB else (GIB / 1024, "MiB")
    has = f" of the {machine.memory / unit:,.1f}" if machine.memory else ""
    width = max(map(len, needed.parts))
    parts = [f"            {part.ljust(width)}  {size / unit:8.2f}" for part, size in needed.parts.items()]
    return [f"  memory    about {needed.total / unit:,.1f} {name}{has} on each device:", *parts]


def _time(one: Estimate) -> str:
    if one.seconds is None:
        return f"unknown: {one.speed}"
    return f"about {duration(one.seconds)}, {one.speed}; without evaluation and saving"


def _compare(stage: Stage, needed: Memory, machine: Machine, found: DryRun) -> None:
    """Say where a device has less memory than is needed, or hardly more, and what would need less."""
    if machine.memory is None or needed.total <= TIGHT * machine.memory:
        return
    ways = [] if stage.recompute else ["recompute: true"]
    ways += [f"micro_batch: {stage.micro_batch // 2}"] if stage.micro_batch > 1 else []
    ways += ["sharding: stage1"] if machine.devices > 1 and stage.sharding == "none" else []
    ways += {"full": ["method: lora or qlora"], "lora": ["method: qlora"], "qlora": []}[stage.method]
    ways += ["more devices"] if stage.sharding != "none" else []
    least = f"; less is needed with {', or '.join(ways)}" if ways else ""
    sizes = f"about {needed.total / GIB:.1f} GiB on a device that has {machine.memory / GIB:.1f}"
    (found.findings if needed.total > machine.memory else found.notes).append(f"{stage.name}: {sizes}{least}")


def _listed(headline: str, lines: list[str]) -> list[str]:
    return [headline, *("  " + line.replace("\n", "\n    ") for line in lines), ""] if lines else []
