"""What the keys of a recipe must not say together, and texts that must name something that exists."""

import os
import re
from collections.abc import Mapping

from ...architecture import weight_map
from ...tokenization.chat_templates import find_template
from ...utils.errors import AquilaError, shown_value
from .reader import Check
from .schema import LoraSpec, Optim, Recipe, Stage

# Linear layers of a decoder layer by the last name of their path: what LoRA may be put on.
LINEARS = tuple(row.hf.split(".")[-2] for row in weight_map.LAYER if row.transpose)
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


# Of LoraSpec.


def _targets(v: Mapping) -> str | None:
    unknown = [name for name in v["targets"] if name not in LINEARS]
    if unknown:
        return f"no linear layer is named {', '.join(map(shown_value, unknown))}; there are {', '.join(LINEARS)}"
    if not v["targets"]:
        return f"it names no linear layer; there are {', '.join(LINEARS)}"
    return "a name is there twice" if len(set(v["targets"])) < len(v["targets"]) else None


# Of Optim.


def _floor_above_lr(v: Mapping) -> str | None:
    return f"it is {v['min_lr']:g}, above lr {v['lr']:g}" if v["min_lr"] > v["lr"] else None


def _floor_without_fall(v: Mapping) -> str | None:
    falls = v["schedule"] != "constant" or not v["min_lr"]
    return None if falls else f"it is {v['min_lr']:g}, and schedule constant never falls to it"


def _two_warmups(v: Mapping) -> str | None:
    both = v["warmup_steps"] is not None and v["warmup_ratio"] is not None
    return "warmup_steps is there too; keep one of them" if both else None


# Of Stage.


def _name(v: Mapping) -> str | None:
    if FOLDER_NAME.fullmatch(v["name"]) and not v["name"].endswith("."):
        return None
    return (
        f"{shown_value(v['name'])} cannot name a folder everywhere; use at most 64 letters, digits, ., _ and -, "
        "the first a letter or digit"
    )


def _template(v: Mapping) -> str | None:
    if v["template"] is None:
        return None
    try:
        find_template(v["template"])
    except AquilaError as error:
        return str(error)
    return None


def _batch(v: Mapping) -> str | None:
    divides = v["global_batch"] % v["micro_batch"] == 0
    return None if divides else f"{v['micro_batch']} does not divide global_batch {v['global_batch']}"


def _eval_rows(v: Mapping) -> str | None:
    if not v["eval_every"] or v["data"].held_out or v["data"].evaluate:
        return None
    return "there is nothing to evaluate on; give data.held_out (a share of the rows) or data.evaluate (files)"


def _best_of_several(v: Mapping) -> str | None:
    alone = v["keep_best"] and not v["eval_every"]
    return "eval_every is 0, so that nothing is evaluated before the end" if alone else None


def _warmup_fits(v: Mapping) -> str | None:
    warmup = v["optim"].warmup_steps or 0
    if v["max_steps"] is None or warmup <= v["max_steps"]:
        return None
    return f"it is {v['max_steps']}, and the warmup alone takes {warmup} steps"


# Of Recipe.


def _some_stage(v: Mapping) -> str | None:
    return None if v["stages"] else "there is no stage in it"


def _output_elsewhere(v: Mapping) -> str | None:
    model, output = (os.path.abspath(os.path.expanduser(v[key])) for key in ("model", "output"))
    inside = os.path.commonpath([model, output]) == model
    return "it is the folder of the model, or lies in it, and would change the model" if inside else None


CHECKS = {
    LoraSpec: (Check("targets", ("targets",), _targets),),
    Optim: (
        Check("min_lr", ("lr", "min_lr"), _floor_above_lr),
        Check("min_lr", ("schedule", "min_lr"), _floor_without_fall),
        Check("warmup_ratio", ("warmup_steps", "warmup_ratio"), _two_warmups),
    ),
    Stage: (
        Check("name", ("name",), _name),
        Check("template", ("template",), _template),
        Check("micro_batch", ("micro_batch", "global_batch"), _batch),
        Check("eval_every", ("eval_every", "data"), _eval_rows),
        Check("keep_best", ("keep_best", "eval_every"), _best_of_several),
        Check("max_steps", ("max_steps", "optim"), _warmup_fits),
    ),
    Recipe: (
        Check("stages", ("stages",), _some_stage),
        Check("output", ("model", "output"), _output_elsewhere),
    ),
}
