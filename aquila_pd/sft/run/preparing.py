"""Data preparation of a stage: tokenized samples in the run folder, for the model that trains on them."""

import sys
from contextlib import closing
from pathlib import Path

from ...data.counters import Counters
from ...data.packing import Plan, plan_epoch
from ...data.prepare import HELD_OUT, TRAIN, Progress, prepare
from ...data.samples import Samples
from ...runtime import base
from ...text.loading import check_folder, stop_ids_of
from ...text.prompts import ChatPrompts
from ...tokenizer import AquilaTokenizer
from ...utils.errors import CheckpointError, ConfigError, DataError
from ...utils.progress import Bar
from ..estimate.stage import Model
from ..loop.batches import Packs
from ..recipe.load import Recipe, Stage
from .folder import RunFolder


def prompts_of(recipe: Recipe, stage: Stage) -> ChatPrompts:
    """How the conversations of a stage are written. Raises CheckpointError, ConfigError, TokenizerError."""
    folder = Path(recipe.model)
    base.log_warnings_only()
    check_folder(folder)
    tokenizer = AquilaTokenizer.from_pretrained(str(folder))
    if stage.template is None and tokenizer.chat_template is None:
        raise ConfigError(
            f"Stage {stage.name} names no chat template, and {folder} records none: a base model, or converted without "
            "one.\nName one in the recipe, such as `template: aquila-legacy`."
        )
    return ChatPrompts(tokenizer, stage.template, eos_ids=stop_ids_of(tokenizer, folder))


def prepare_stage(recipe: Recipe, stage: Stage, run: RunFolder, *, workers: int | None) -> dict:
    """Prepare the rows of a stage, or find them prepared; what the manifest says of them.

    Raises DataError, OutputError, and what prompts_of() raises; CheckpointError when the rows use tokens that the model
    has no embedding for.
    """
    prompts = prompts_of(recipe, stage)
    with closing(Bar(f"{stage.name}:")) as bar:
        found = prepare(
            stage.data,
            prompts,
            length=stage.length,
            seed=recipe.seed,
            folder=run.data(stage.name),
            workers=workers,
            progress=lambda done: bar.update(_words(done)),
            note=lambda line: print(f"  {line}", file=sys.stderr),
        )
    if stage.evaluates and found.held_out is None:
        raise DataError(
            f"Stage {stage.name} shall be evaluated, and not one row was left for that.\n"
            "Hold out a larger share (data.held_out), name files (data.evaluate), or leave both out."
        )
    rows = Model.read(Path(recipe.model)).dims.vocab
    largest = found.manifest["train"].get("largest_id", 0)
    if largest >= rows:
        raise CheckpointError(
            f"The tokenizer of {recipe.model} makes the id {largest:,}, and the model has {rows:,} rows of embeddings: "
            "they belong to different models.\nFetch the tokenizer's files from where the weights came from."
        )
    train, held_out = found.train, found.held_out
    what = "found prepared" if found.is_reused else "prepared"
    more = f", {held_out['samples']:,} to evaluate on" if held_out else ""
    packs, _ = packs_of(recipe, stage, run)  # the plans are made here, by one process, and found by all ranks
    place = f"{len(packs):,} packs planned"
    print(f"{stage.name}: {train['samples']:,} samples of {train['tokens']:,} tokens {what}{more}; {place}")
    for line in dropped_or_changed(found.counters):
        print(f"  {line}")
    return {
        "folder": str(found.folder.relative_to(run.root)),
        "inputs": found.manifest["inputs_digest"],
        "train": train,
        "held_out": held_out,
        "counters": found.manifest["counters"],
    }


def dropped_or_changed(counters: Counters) -> list[str]:
    """A line for each rule that dropped or changed rows."""
    shown = Counters()
    for rule, rows in counters:
        if rows and rule.effect != "counted":
            shown.count(rule, rows)
    return shown.lines()


def packs_of(recipe: Recipe, stage: Stage, run: RunFolder) -> tuple[Packs, Packs | None]:
    """The packs a stage trains on, and those it is evaluated on, if there are any."""

    def packs(part: str, epochs: float, most: int | None = None) -> Packs:
        samples = Samples.open(run.data(stage.name) / part)

        def plan_of(epoch: int) -> Plan:
            folder = run.plans(stage.name, part)
            return plan_epoch(samples, length=stage.length, seed=recipe.seed, epoch=epoch, folder=folder)

        return Packs(samples, plan_of, epochs=epochs, length=stage.length, pad_id=0, most=most)

    has_held_out = (run.data(stage.name) / HELD_OUT).is_dir()
    most = None if stage.max_steps is None else stage.max_steps * stage.global_batch
    return packs(TRAIN, stage.epochs, most), packs(HELD_OUT, 1) if has_held_out else None


def _words(done: Progress) -> str:
    return f"{done.rows:,} rows, {done.tokens:,} tokens, file {done.file} of {done.files}"
