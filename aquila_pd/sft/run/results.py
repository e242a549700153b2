"""Stage results: a model folder that loads like a converted one, or an adapter."""

import json
import shutil
from pathlib import Path

from ...checkpoint.bundle import CODE
from ...checkpoint.io.manifest import MANIFEST
from ...modeling import AquilaForCausalLM
from ...tokenization.chat_templates import find_template
from ...tokenization.config import CONFIG_JSON
from ...utils.errors import CheckpointError
from ...utils.files import read_object, write_text

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.pdparams", MANIFEST)


def write_model(model: AquilaForCausalLM, base: Path, folder: Path, *, template: str | None) -> None:
    """Write a trained model into a folder that is there: its weights, and what else its base's folder holds.

    template: the chat template it was tuned with, recorded in place of the base's.
    """
    copy_companions(base, folder)
    if template is not None:
        record_template(folder, template)
    model.save_pretrained(folder)


def copy_companions(base: Path, folder: Path) -> None:
    """Copy the files of a model folder that are no weights: tokenizer, configuration, code."""
    weights = {path.name for pattern in WEIGHTS for path in base.glob(pattern)}
    for path in sorted(base.iterdir()):
        if path.is_file() and path.name not in weights:
            shutil.copyfile(path, folder / path.name)
    if (base / CODE).is_dir():
        shutil.copytree(base / CODE, folder / CODE, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def link_model(source: Path, folder: Path) -> None:
    """Put a model into a folder that is there, its weights taking no room twice where the disk can do that."""
    copy_companions(source, folder)
    for path in source.iterdir():
        if path.is_file() and not (folder / path.name).exists():
            try:
                (folder / path.name).hardlink_to(path)
            except OSError:  # no other names for a file: network shares, some cards
                shutil.copyfile(path, folder / path.name)


def record_template(folder: Path, template: str) -> None:
    """Name the chat template in a model folder's tokenizer_config.json."""
    file = folder / CONFIG_JSON
    settings = read_object(file, CheckpointError) if file.is_file() else {}
    settings["chat_template"] = find_template(template).jinja()
    write_text(file, json.dumps(settings, ensure_ascii=False, indent=2) + "\n")
