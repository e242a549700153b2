"""The keys of a recipe, with their types, limits and defaults: frozen dataclasses and nothing else.

How a file becomes these is recipe/load.py; what they must not say together, recipe/checks.py; the keys of `data` are in
data/settings.py.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

from ...data.settings import DataSpec
from ...utils.errors import RecipeError
from .reader import ABOUT_FILE, keys, limits

Method = Literal["full", "lora", "qlora"]
Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters. r: rank; alpha: the update is scaled by alpha / r, with rslora by alpha / sqrt(r); dropout: of
    the adapter's input; targets: names of linear layers; dora: a learned magnitude for each column beside it."""

    r: int = limits(8, least=1)
    alpha: float = limits(16.0, above=0)
    dropout: float = limits(0.05, least=0, below=1)
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rslora: bool = False
    dora: bool = False


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule. lr is reached at the end of the warmup, then falls towards min_lr (constant: stays).

    warmup_steps or warmup_ratio (of all steps of the stage), not both; neither is no warmup. weight_decay: on matrices.
    clip: the largest global norm of the gradient; 0 = no clipping.
    """

    lr: float = limits(1e-5, above=0)
    min_lr: float = limits(0.0, least=0)
    schedule: Schedule = "cosine"
    warmup_steps: int | None = limits(None, least=0)
    warmup_ratio: float | None = limits(None, least=0, below=1)
    weight_decay: float = limits(0.0, least=0)
    betas: tuple[float, float] = limits((0.9, 0.95), least=0, below=1)
    eps: float = limits(1e-8, above=0)
    clip: float = limits(1.0, least=0)


def _multiples(number: int, of: int) -> str:
    below = number // of * of
    return f"{below} and {below + of}" if below else str(of)


@dataclass(frozen=True)
class Stage:
    """One stage of training; it starts from the weights the stage before it ended with.

    name: also that of its folder. template: the chat template; None is the model's own. length: tokens of a pack.
    epochs: may be a fraction; max_steps: an end before that. global_batch: packs in one step over all devices;
    micro_batch: packs a device computes at a time. neftune: alpha of the noise on embeddings, 0 = none. recompute:
    activations of the layers are computed again in the backward pass. dtype: of weights and activations, "auto" is
    bfloat16 where the device has it. eval_every, save_every: in steps, 0 = at the end alone. keep: newest checkpoints
    that stay; keep_best: and the one with the lowest evaluation loss, from which the next stage starts. log_every: in
    steps. sharding: stage1 cuts the optimizer over the devices, which otherwise hold the same.
    """

    name: str
    data: DataSpec
    template: str | None = None
    length: int = limits(2048, least=2, most=1 << 20)
    method: Method = "full"
    lora: LoraSpec = field(default_factory=LoraSpec)
    optim: Optim = field(default_factory=Optim)
    epochs: float = limits(1.0, above=0)
    max_steps: int | None = limits(None, least=1)
    global_batch: int = limits(32, least=1)
    micro_batch: int = limits(1, least=1)
    neftune: float = limits(0.0, least=0)
    recompute: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    eval_every: int = limits(0, least=0)
    save_every: int = limits(500, least=0)
    keep: int = limits(2, least=1)
    keep_best: bool = False
    log_every: int = limits(1, least=1)
    visualdl: bool = False
    sharding: Literal["none", "stage1"] = "none"

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


@dataclass(frozen=True)
class Recipe:
    """All stages of a run. seed: of every draw in it. export: "merged" writes the last stage's result as a plain model.

    text: the file as it was. overrides: what was changed on the command line. written: all keys with paths as they were
    written there; digest: of that, so that comments and another folder do not change it.
    """

    model: str
    output: str
    stages: tuple[Stage, ...]
    name: str = ""
    seed: int = limits(0, least=0, most=2**32 - 1)
    export: Literal["none", "merged"] = "merged"
    text: str = field(default="", **ABOUT_FILE)
    overrides: tuple[str, ...] = field(default=(), **ABOUT_FILE)
    written: dict | None = field(default=None, **ABOUT_FILE)
    digest: str = field(default="", **ABOUT_FILE)

    def values(self) -> dict:
        """All keys, defaults written out, as JSON holds them; load_values reads them. No lora where nothing uses it."""
        found = dataclasses.asdict(self)
        for stage in found["stages"]:
            if stage["method"] == "full":
                del stage["lora"]
        return json.loads(json.dumps({one.name: found[one.name] for one in keys(Recipe)}))
