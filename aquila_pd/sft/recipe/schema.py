"""Recipe schema: types, limits, defaults, cross-field checks, and the descriptions for docs and editors.

How a file becomes these is recipe/load.py; the keys of `data` are in data/settings.py, those of `lora` in
adapters/spec.py. A check of two keys is a validator of the later one and reads the earlier, where it is valid itself.
"""

import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator

from ...adapters.spec import LoraSpec
from ...data.settings import DataSpec
from ...tokenization.chat_templates import find_template
from ...utils.errors import AquilaError, RecipeError, shown_value
from ...utils.validation import choice, contradiction, flag, number, section, settings, several, text, whole, wrong

METHODS = ("full", "lora", "qlora")
SCHEDULES = ("cosine", "linear", "constant")
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_settings = settings(RecipeError, "These settings of a recipe cannot be used:", "Correct them.")


@_settings
class Optim:
    """AdamW and its learning-rate schedule."""

    lr: number("reached at the last step of the warmup", gt=0) = 1e-5
    min_lr: number("where it falls to", ge=0) = 0.0
    schedule: choice(SCHEDULES, "`constant` stays at lr") = "cosine"
    warmup_steps: whole("steps, or", ge=0) | None = None
    warmup_ratio: number("of the stage's steps; neither: no warmup", ge=0, lt=1) | None = None
    weight_decay: number("on matrices", ge=0) = 0.0
    betas: tuple[number(ge=0, lt=1), number(ge=0, lt=1)] = (0.9, 0.95)
    eps: number(gt=0) = 1e-8
    clip: number("largest global norm of the gradient; 0: none", ge=0) = 1.0

    @contradiction("min_lr")
    def _below_lr(value, others):
        if value > others.get("lr", value):
            raise wrong(f"it is {value:g}, above lr {others['lr']:g}")

    @contradiction("schedule")
    def _falls_to_min_lr(value, others):
        if value == "constant" and others.get("min_lr"):
            raise wrong(f"constant never falls to min_lr, which is {others['min_lr']:g}")

    @contradiction("warmup_ratio")
    def _one_warmup(value, others):
        if value is not None and others.get("warmup_steps") is not None:
            raise wrong("warmup_steps is there too; keep one of them")


def _folder_name(name: str) -> str:
    if not FOLDER_NAME.fullmatch(name) or name.endswith("."):
        raise wrong(
            f"{shown_value(name)} cannot name a folder everywhere; use at most 64 letters, digits, ., _ and -, "
            "the first a letter or digit"
        )
    return name


def _known_template(name: str) -> str:
    try:
        find_template(name)
    except AquilaError as error:
        raise wrong(str(error)) from error
    return name


def _multiples(number: int, of: int) -> str:
    below = number // of * of
    return f"{below} and {below + of}" if below else str(of)


@_settings
class Stage:
    """One stage of training; it starts from the weights the stage before it ended with."""

    name: Annotated[text("also of its folder"), AfterValidator(_folder_name)]
    data: section(DataSpec, "see below")
    template: (
        Annotated[
            text("a chat template by name; null: the one the model's folder records"), AfterValidator(_known_template)
        ]
        | None
    ) = None
    length: whole("tokens of a pack", ge=2, le=1 << 20) = 2048
    method: choice(METHODS, "all weights, or an adapter on frozen ones, which `qlora` packs in NF4") = "full"
    lora: section(LoraSpec, "see below") = field(default_factory=LoraSpec)
    optim: section(Optim, "see below") = field(default_factory=Optim)
    epochs: number("may be a fraction", gt=0) = 1.0
    max_steps: whole("an end before that", ge=1) | None = None
    global_batch: whole("packs in a step, over all devices; a multiple of devices x `micro_batch`", ge=1) = 32
    micro_batch: whole("packs a device computes at a time", ge=1) = 1
    neftune: number("alpha of NEFTune's noise on the embeddings, 5 to 15 in the paper; 0: none", ge=0) = 0.0
    recompute: flag("activations are computed again in the backward pass: less memory, one forward pass more") = False
    dtype: choice(("auto", "float32", "bfloat16"), "`auto` is bfloat16 where the device has it") = "auto"
    eval_every: whole(
        "steps; rows held out are evaluated before the first step and after the last in any case", ge=0
    ) = 0
    save_every: whole("steps; 0: only at the end", ge=0) = 500
    keep: whole("newest checkpoints that stay", ge=1) = 2
    keep_best: flag("and the one with the lowest evaluation loss, which is then the stage's result") = False
    log_every: whole("steps from line to line on the terminal; `log.jsonl` has every step", ge=1) = 1
    visualdl: flag("also for `visualdl --logdir RUN/visualdl`") = False
    sharding: choice(("none", "stage1"), "`stage1`: the optimizer's state cut over the devices") = "none"

    @contradiction("max_steps")
    def _after_the_warmup(value, others):
        warmup = others["optim"].warmup_steps or 0 if "optim" in others else 0
        if value is not None and warmup > value:
            raise wrong(f"it is {value}, and the warmup alone takes {warmup} steps")

    @contradiction("micro_batch")
    def _divides(value, others):
        if others.get("global_batch", 0) % value:
            raise wrong(f"{value} does not divide global_batch {others['global_batch']}")

    @contradiction("eval_every")
    def _has_rows(value, others):
        data = others.get("data")
        if value and data and not (data.held_out or data.evaluate):
            raise wrong(
                "there is nothing to evaluate on; give data.held_out (a share of the rows) or data.evaluate (files)"
            )

    @contradiction("keep_best")
    def _of_several(value, others):
        if value and others.get("eval_every") == 0:
            raise wrong("eval_every is 0, so that nothing is evaluated before the end")

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.data.held_out or self.data.evaluate)

    def accumulation(self, devices: int) -> int:
        """Micro-batches a device sums up to one step. Raises RecipeError when the batch does not divide among them."""
        steps, left = divmod(self.global_batch, devices * self.micro_batch)
        if left or not steps:
            raise RecipeError(
                f"Stage {self.name}: global_batch {self.global_batch} does not divide into micro_batch "
                f"{self.micro_batch} on each of {devices} devices. "
                f"Nearest that do: {_multiples(self.global_batch, devices * self.micro_batch)}."
            )
        return steps


@_settings
class RecipeKeys:
    """All stages of a run."""

    model: text("a converted folder")
    output: text("the run folder")
    stages: several(section(Stage), "one after the other", least=1)
    name: text("of the run; none: the file's") = ""
    seed: whole("of every draw", ge=0, le=2**32 - 1) = 0
    export: choice(("none", "merged"), "`merged`: the last stage's result as a plain model in `RUN/model`") = "merged"

    @contradiction("output")
    def _elsewhere(value, others):
        model, output = (os.path.abspath(os.path.expanduser(path)) for path in (others.get("model", value), value))
        if "model" in others and os.path.commonpath([model, output]) == model:
            raise wrong("it is the folder of the model, or lies in it, and would change the model")

    def values(self) -> dict:
        """All keys, defaults written out, as JSON holds them; load_values reads them. No lora where nothing uses it."""
        found = dataclasses.asdict(self)
        for stage in found["stages"]:
            if stage["method"] == "full":
                del stage["lora"]
        return json.loads(json.dumps({one.name: found[one.name] for one in dataclasses.fields(RecipeKeys)}))


@dataclass(frozen=True)
class Recipe(RecipeKeys):
    """A recipe and what is known of its file, which is not compared.

    text: the file as it was. overrides: what was changed on the command line. written: all keys with paths as they were
    written there; digest: of that, so that comments and another folder do not change it.
    """

    text: str = field(default="", compare=False)
    overrides: tuple[str, ...] = field(default=(), compare=False)
    written: dict | None = field(default=None, compare=False)
    digest: str = field(default="", compare=False)


def settings_in(annotation: Any) -> type | None:
    """The settings class in the type of a field: DataSpec's for `tuple[Source, ...]` is Source."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    return next(filter(None, map(settings_in, getattr(annotation, "__args__", ()))), None)
