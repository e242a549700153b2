"""The recipes of the project in a measure that a tiny model trains in seconds, for tests of what documents show."""

import shutil
from pathlib import Path

from paths import ROOT

SMALLER = {
    "length: 4096": "length: 256",
    "global_batch: 64": "global_batch: 8",
    "epochs: 5": "epochs: 1",
    "held_out: 0.02": "held_out: 0.1",
}


def small_recipes(folder: Path) -> Path:
    """A copy of recipes/ of which aquila2_34b_qlora.yaml is small; raises where it does not say what is changed."""
    shutil.copytree(ROOT / "recipes", folder)
    recipe = folder / "aquila2_34b_qlora.yaml"
    text = recipe.read_text(encoding="utf-8")
    for long, short in SMALLER.items():
        if long not in text:
            raise ValueError(f"{recipe.name} does not say {long!r}")
        text = text.replace(long, short)
    recipe.write_text(text, encoding="utf-8")
    return folder


def example_rows(file: Path) -> Path:
    """The rows of the example, under another name."""
    file.parent.mkdir(exist_ok=True)
    shutil.copyfile(ROOT / "examples" / "walk_rows.jsonl", file)
    return file
