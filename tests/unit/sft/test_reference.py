"""What follows from the schema of a recipe: tables of the guide, and the JSON schema that editors complete keys by."""

import json
import re
import shutil

import pytest
import yaml
from json_schema import violations
from paths import ROOT

from aquila_pd.sft.recipe import reference

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SCHEMA = json.loads((ROOT / reference.JSON_SCHEMA).read_text(encoding="utf-8"))
SMALL = {"model": "base", "output": "run", "stages": {"name": "one", "data": {"train": {"files": "a"}}}}


class Editor(yaml.SafeLoader):
    """YAML 1.2, as editors read it: 1e-5 is a number."""


Editor.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d+)?[eE][-+]?\d+"), list("+-0123456789")
)


def test_the_guide_and_the_json_schema_are_those_of_the_code():
    assert reference.stale() == [], "python -m aquila_pd.sft.recipe.reference --write"


@pytest.mark.parametrize("path", [reference.GUIDE, reference.JSON_SCHEMA], ids=str)
def test_control_a_stale_file_is_named(tmp_path, path):
    for one in (reference.GUIDE, reference.JSON_SCHEMA):
        (tmp_path / one).parent.mkdir()
        shutil.copy(ROOT / one, tmp_path / one)
    assert reference.stale(tmp_path) == []
    text = (tmp_path / path).read_text(encoding="utf-8")
    assert text.count("NEFTune's noise") == 1
    (tmp_path / path).write_text(text.replace("NEFTune's noise", "noise"), encoding="utf-8")
    assert reference.stale(tmp_path) == [path]


def test_a_row_has_type_limits_default_and_words():
    rows = reference.tables().splitlines()
    assert "| `length` | whole number from 2 to 1,048,576 | `2048` | tokens of a pack |" in rows
    assert "| `betas` | list of 2: number from 0 below 1 | `[0.9, 0.95]` | |" in rows
    assert "| `train` | keys; or a list | required | `{files, format, weight}`, or a list of them |" in rows


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_names_the_schema_and_is_valid_by_it(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert violations(SCHEMA, yaml.load(text, Editor)) == []


@pytest.mark.parametrize(
    ("change", "violation"),
    [
        ({"epochs": 1}, ".epochs: unknown"),
        ({"model": 3}, ".model: type"),
        ({"seed": -1}, ".seed: minimum"),
        ({"export": "all"}, ".export: enum"),
        ({"defaults": {"optim": {"lr": 0}}}, ".defaults.optim.lr: exclusiveMinimum"),
        ({"defaults": {"optim": {"betas": [0.9]}}}, ".defaults.optim.betas: minItems"),
        ({"stages": []}, ".stages: anyOf"),
        ({"stages": [{"lenght": 3}]}, ".stages: anyOf"),
    ],
)
def test_control_what_a_recipe_may_not_say_the_schema_refuses(change, violation):
    assert violations(SCHEMA, SMALL) == []
    assert violations(SCHEMA, {**SMALL, **change}) == [violation]


def test_control_a_recipe_without_a_model_is_refused():
    assert violations(SCHEMA, {key: value for key, value in SMALL.items() if key != "model"}) == [": required"]
