"""Validation errors of a recipe as findings: path, violation, line of the file, nearest right key."""

import difflib
import re
from collections.abc import Iterator, Mapping

from pydantic import ValidationError

from ...utils.errors import shown_value
from ...utils.validation import dotted, sentence
from .schema import RecipeKeys, Stage, settings_in
from .yaml_nodes import Node

CLOSE = 0.6  # of difflib's ratio, from which on a key is taken for another one mistyped
# How other programs call what is a key here.
ELSEWHERE = {
    "learning_rate": "lr",
    "min_learning_rate": "min_lr",
    "lr_scheduler_type": "schedule",
    "scheduler": "schedule",
    "warmup": "warmup_steps",
    "max_grad_norm": "clip",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "batch_size": "global_batch",
    "global_batch_size": "global_batch",
    "micro_batch_size": "micro_batch",
    "per_device_train_batch_size": "micro_batch",
    "gradient_accumulation_steps": "global_batch",
    "max_length": "length",
    "max_seq_length": "length",
    "max_seq_len": "length",
    "cutoff_len": "length",
    "neftune_noise_alpha": "neftune",
    "gradient_checkpointing": "recompute",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "logging_steps": "log_every",
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "use_dora": "dora",
    "use_rslora": "rslora",
    "model_name_or_path": "model",
    "output_dir": "output",
    "datasets": "data",
    "dataset": "data",
    "val_size": "held_out",
}


def findings_of(error: ValidationError, root: Node) -> list[str]:
    """One line for each violation; those of a key that stages inherit once."""
    return list(dict.fromkeys(_line(item, root) for item in error.errors(include_url=False)))


def _line(item: Mapping, root: Node) -> str:
    node, missing = root.find(item["loc"])
    path = ".".join(filter(None, [node.path, dotted(missing)]))
    return f"{path}: {sentence(item, _shown(item, node))} {node.place}{_hint(item, node)}"


def _shown(item: Mapping, node: Node) -> str:
    """The value as the file has it."""
    if isinstance(node.content, str):
        number = isinstance(item["input"], int | float)
        return node.content if number else shown_value(node.content)
    return {dict: "a mapping", list: "a list"}.get(type(node.content), "empty")


def _hint(item: Mapping, node: Node) -> str:
    kind, near = item["type"], None
    if kind == "unexpected_keyword_argument":
        near = _nearest_key(item["loc"])
    elif kind == "literal_error" and isinstance(node.content, str):
        near = _nearest(node.content.lower(), re.findall(r"'(\w+)'", item["ctx"]["expected"]))
    elif node.content is None:
        return "; leave the key out for its default"
    elif kind in ("int_type", "float_type", "bool_type") and node.quoted:
        return "; without quotes it may be one"
    return f"; did you mean {near}?" if near else ""


def _nearest_key(place: tuple) -> str | None:
    """The known key that an unknown one stands for: the same name in another place, another program's name for it, or a
    name that is nearly the same. With its path, when it is not beside."""
    cls = RecipeKeys
    for part in place[:-1]:
        cls = cls if isinstance(part, int) else settings_in(cls.__pydantic_fields__[part].annotation)
    beside = list(_keys(cls))
    outside = [*(f"defaults.{key}" for key in _keys(Stage)), *_keys(RecipeKeys)]
    known = {
        key: key.rpartition(".")[2] for key in [*beside, *sorted(outside, key=lambda key: key.count(".")), "defaults"]
    }
    key = place[-1]
    for asked in (ELSEWHERE.get(key), key):
        for path, name in known.items():
            if asked in (path, name):
                return path
    near = _nearest(key.lower(), list(dict.fromkeys(known.values())))
    parts = set(re.split(r"[_\-.]", key.lower()))
    return next((path for path, name in known.items() if name == near or (not near and name in parts)), None)


def _keys(cls: type) -> Iterator[str]:
    """Every key of a settings class, then those of the settings in it: optim.lr. Lists of settings are not entered."""
    fields = {name: one.annotation for name, one in cls.__pydantic_fields__.items()}
    yield from fields
    for name, kind in fields.items():
        if kind is settings_in(kind):
            yield from (f"{name}.{key}" for key in _keys(kind))


def _nearest(word: str, known: list[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, 1, CLOSE)), None)
