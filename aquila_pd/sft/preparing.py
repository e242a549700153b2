"""The rows of a stage, prepared in the run folder for the model that will be trained on them."""

import sys
from pathlib import Path

from ..chat.loading import check_folder, quiet, stop_ids_of
from ..chat.prompts import ChatPrompts
from ..errors import CheckpointError
from ..tokenizer import AquilaTokenizer
from .data.prepare import Progress, prepare
from .estimate import Model
from .recipe import Recipe, Stage
from .run_folder import RunFolder


def prompts_of(recipe: Recipe, stage: Stage) -> ChatPrompts:
    """How the conversations of a stage are written. Raises CheckpointError, ConfigError, TokenizerError."""
    folder = Path(recipe.model)
    quiet()
    check_folder(folder)
    tokenizer = AquilaTokenizer.from_pretrained(str(folder))
    return ChatPrompts(tokenizer, stage.template, eos_ids=stop_ids_of(tokenizer, folder))


def prepare_stage(recipe: Recipe, stage: Stage, run: RunFolder, *, workers: int | None) -> dict:
    """Prepare the rows of a stage, or find them prepared; what the manifest says of them.

    Raises DataError, OutputError, and what prompts_of() raises; CheckpointError when the rows use tokens that the model
    has no embedding for.
    """
    prompts = prompts_of(recipe, stage)
    show = _Line(stage.name)
    found = prepare(
        stage.data,
        prompts,
        length=stage.length,
        seed=recipe.seed,
        folder=run.data(stage.name),
        workers=workers,
        progress=show,
        note=lambda line: print(f"  {line}", file=sys.stderr),
    )
    show.close()
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
    print(f"{stage.name}: {train['samples']:,} samples of {train['tokens']:,} tokens {what}{more}")
    return {
        "folder": str(found.folder.relative_to(run.root)),
        "inputs": found.manifest["inputs_digest"],
        "train": train,
        "held_out": held_out,
        "counters": found.manifest["counters"],
    }


class _Line:
    """Progress in one line that is written over, on a terminal alone."""

    def __init__(self, stage: str):
        self._stage, self._shown = stage, sys.stderr.isatty()

    def __call__(self, progress: Progress) -> None:
        if self._shown:
            where = f"file {progress.file} of {progress.files}"
            line = f"\r{self._stage}: {progress.rows:,} rows, {progress.tokens:,} tokens, {where}\033[K"
            print(line, end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
