"""A first start of `aquila-pd sft` that goes wrong: said early, and mended without starting elsewhere."""

import json

import pytest
from chat_factory import tiny_chat_folder

from aquila_pd.cli import main
from aquila_pd.sft.run.manifest import Manifest

TURNS = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It is said."}]


@pytest.fixture
def recipe(tmp_path):
    """A recipe over a tiny model without chat template, and 20 rows, one of them twice and one without an answer."""
    tiny_chat_folder(tmp_path / "model", None)
    rows = [{"id": i, "conversations": [{"from": "human", "value": f"{i}"}, TURNS[1]]} for i in range(18)]
    rows += [rows[0], {"id": 99, "conversations": TURNS[:1]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        "model: model\noutput: run\nstages:\n"
        "  - {name: one, template: aquila-v1, length: 64, global_batch: 4, data: {train: {files: rows.jsonl}}}\n"
    )
    return tmp_path / "recipe.yaml"


def sft(recipe, *arguments: str) -> int:
    return main(["sft", str(recipe), *arguments])


def test_a_batch_that_does_not_divide_is_said_before_anything_is_made(recipe, capsys):
    assert sft(recipe, "--processes", "3") == 1
    assert "global_batch 4 does not divide" in capsys.readouterr().err
    assert not (recipe.parent / "run").exists()


def test_a_missing_chat_template_names_the_key_of_the_recipe(recipe, capsys):
    assert sft(recipe, "stages.0.template=null") == 1
    said = capsys.readouterr().err
    assert "Stage one names no chat template" in said and "`template: aquila-legacy`" in said


def test_what_became_of_the_rows_is_said(recipe, capsys):
    assert sft(recipe, "--prepare") == 0
    said = capsys.readouterr().out
    assert "one: 18 samples" in said and "packs planned" in said
    lines = {line.split()[1]: line.split()[0] for line in said.splitlines() if "dropped:" in line or "changed:" in line}
    assert lines["duplicate_exact"] == "1" and lines["nothing_left"] == "1"


def test_a_share_held_out_that_holds_nothing_is_an_error(recipe, capsys):
    assert sft(recipe, "stages.0.data.held_out=0.0001") == 1
    assert "not one row was left for that" in capsys.readouterr().err


def test_a_stage_that_failed_before_it_learned_anything_may_be_changed(recipe, capsys):
    assert sft(recipe, "--prepare") == 0
    manifest = Manifest.open(recipe.parent / "run")
    manifest.update("one", state="running")  # as a run leaves it that is killed before its first checkpoint
    assert sft(recipe, "stages.0.optim.lr=1e-3", "stages.0.max_steps=1") == 0
    assert "one.optim.lr: was 1e-05, is 0.001" in capsys.readouterr().out
    assert sft(recipe, "stages.0.optim.lr=1e-2", "stages.0.max_steps=1") == 1
    assert "one.optim.lr: was 0.001, is 0.01" in capsys.readouterr().err


def test_lora_in_the_defaults_is_idle_when_the_command_line_asks_for_full(recipe):
    text = recipe.read_text().replace("stages:", "defaults: {method: lora, lora: {r: 2}}\nstages:")
    recipe.write_text(text)
    assert sft(recipe, "stages.*.method=full", "--dry-run") == 0
