"""The manifest of a run: what it keeps, and which changed recipe may go on with it."""

import json
import os

import pytest

from aquila_pd.sft.recipe.load import load_recipe
from aquila_pd.sft.run.manifest import DONE, RUNNING, Manifest, describe_model, environment, versions
from aquila_pd.utils.errors import CheckpointError, RecipeError, TrainingError

TEXT = """
model: base
output: run
seed: 3
defaults:
  optim: {lr: 1e-4, warmup_steps: 2}
stages:
  - name: one
    data: {train: {files: rows.jsonl}, held_out: 0.1}
  - name: two
    data: {train: {files: more.jsonl}}
"""
HERE = environment(devices=2, device="CPU")


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def recipe(tmp_path):
    """recipe(*overrides) -> Recipe of TEXT."""
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return lambda *overrides: load_recipe(path, overrides)


@pytest.fixture
def begun(tmp_path, recipe, model):
    """A run of which stage one is done and stage two has not begun."""
    manifest = Manifest.start(tmp_path / "run", recipe(), model=describe_model(model), environment=HERE)
    manifest.update("one", state=RUNNING, data={"digest": "d", "samples": 5})
    manifest.update("one", state=DONE, steps=10, last_loss=0.1 + 0.2, result="stages/one/result")
    return manifest


def resumed(begun, recipe, model, here=HERE):
    return Manifest.open(begun.path.parent).resume(recipe, model=describe_model(model), environment=here)


def test_what_was_written_is_what_is_read(begun, recipe, tmp_path):
    again = Manifest.open(tmp_path / "run")
    assert again.content == begun.content
    assert again.stage("one") == {
        "state": "done",
        "data": {"digest": "d", "samples": 5},
        "steps": 10,
        "last_loss": 0.1 + 0.2,
        "result": "stages/one/result",
    }
    assert again.stage("two") == {"state": "waiting"}
    assert again.recipe == recipe() and again.recipe.digest == recipe().digest and again.recipe.text == TEXT
    assert again.content["environment"]["versions"] == versions() and versions()["numpy"].startswith("1.26")


def test_the_same_recipe_goes_on_and_nothing_is_said(begun, recipe, model):
    assert resumed(begun, recipe(), model) == []
    assert Manifest.open(begun.path.parent).content["resumed"] == [HERE]


def test_what_changes_nothing_about_learning_may_change_and_is_said(begun, recipe, model):
    assert resumed(begun, recipe("stages.0.log_every=10", "stages.*.keep=5", "stages.0.visualdl=true"), model) == [
        "one.keep: was 2, is 5",
        "one.log_every: was 1, is 10",
        "one.visualdl: was False, is True",
        "two.keep: was 2, is 5",
    ]


def test_how_it_is_computed_may_change_with_a_warning(begun, recipe, model):
    assert resumed(begun, recipe("stages.0.micro_batch=2"), model) == [
        "one.micro_batch: was 1, is 2; losses may differ in their last digits from here on"
    ]
    other = environment(devices=4, device="CPU")
    (line,) = resumed(begun, recipe("stages.0.micro_batch=2"), model, other)
    assert line == "devices: was 2, is 4; losses may differ in their last digits"


def test_everything_that_would_make_another_run_is_refused_in_one_message(begun, recipe, model):
    changed = recipe("seed=4", "stages.0.optim.lr=2e-4", "stages.0.length=512", "stages.0.data.held_out=0.2")
    (model / "model.safetensors").write_bytes(b"WEIGHTS")
    before = begun.path.read_bytes()
    with pytest.raises(RecipeError) as caught:
        resumed(begun, changed, model)
    assert [line.strip() for line in str(caught.value).split("\n")[1:-1]] == [
        "seed: was 3, is 4",
        "one.data.held_out: was 0.1, is 0.2",
        "one.length: was 2048, is 512",
        "one.optim.lr: was 0.0001, is 0.0002",
        f"model: {model}/model.safetensors is not what the run began with",
    ]
    assert begun.path.read_bytes() == before, "a refused recipe leaves the manifest alone"


def test_a_stage_that_has_not_begun_may_change_but_not_under_its_prepared_rows(begun, recipe, model):
    change = recipe("stages.1.optim.lr=1e-5", "stages.1.data.held_out=0.5")
    begun.update("two", data={"digest": "prepared"})
    with pytest.raises(RecipeError, match=r"two\.data\.held_out: was 0\.0, is 0\.5"):
        resumed(begun, change, model)
    begun.update("two", data=None)
    assert resumed(begun, change, model) == [
        "two.data.held_out: was 0.0, is 0.5",
        "two.optim.lr: was 0.0001, is 1e-05",
    ]


def test_stages_may_be_added_behind_but_none_that_began_may_go(begun, recipe, model, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT + "  - {name: three, data: {train: {files: c.jsonl}}}\n")
    assert resumed(begun, load_recipe(path), model) == ["stages: there were one, two, now there are one, two, three"]
    assert Manifest.open(begun.path.parent).stage("three") == {"state": "waiting"}
    path.write_text(TEXT.replace("name: one", "name: uno"))
    with pytest.raises(RecipeError, match="stages: one have begun, now there are uno, two"):
        resumed(begun, load_recipe(path), model)


def test_evaluation_may_not_change_where_the_best_is_kept(begun, recipe, model, tmp_path):
    keeping = TEXT.replace("held_out: 0.1}", "held_out: 0.1}\n    keep_best: true\n    eval_every: 5")
    (tmp_path / "recipe.yaml").write_text(keeping)
    Manifest.start(tmp_path / "run", recipe(), model=describe_model(model), environment=HERE).update(
        "one", state=RUNNING
    )
    with pytest.raises(RecipeError, match=r"one\.eval_every: was 5, is 6"):
        resumed(begun, recipe("stages.0.eval_every=6"), model)


def test_a_run_that_moved_with_its_recipe_and_model_goes_on(begun, model, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("base", "run", "recipe.yaml"):
        os.rename(tmp_path / name, moved / name)
    manifest = Manifest.open(moved / "run")
    assert manifest.resume(
        load_recipe(moved / "recipe.yaml"), model=describe_model(moved / "base"), environment=HERE
    ) == []  # fmt: skip


def test_model_files_are_hashed_once_and_again_when_they_change(model, monkeypatch):
    hashed = []

    def hash_file(path):
        hashed.append(path.name)
        return real(path)

    real = describe_model.__globals__["hash_file"]
    monkeypatch.setitem(describe_model.__globals__, "hash_file", hash_file)
    first = describe_model(model)
    assert sorted(hashed) == ["config.json", "model.safetensors"]
    hashed.clear()
    assert describe_model(model, first) == first and hashed == []
    (model / "model.safetensors").write_bytes(b"WEIGHTS")  # as long as before
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert describe_model(model, first)["digest"] != first["digest"] and hashed == ["model.safetensors"]


def test_no_model_no_manifest_and_another_versions_are_said(tmp_path, begun):
    with pytest.raises(CheckpointError, match="no model folder"):
        describe_model(tmp_path)
    with pytest.raises(TrainingError, match="it is no run folder"):
        Manifest.open(tmp_path / "base")
    begun.path.write_text(json.dumps({**begun.content, "version": 99}))
    with pytest.raises(TrainingError, match=r"format 99, here 1"):
        Manifest.open(begun.path.parent)
