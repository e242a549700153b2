"""From stage to stage: what a run goes on from when it was killed between two of its files. Nothing is trained here."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from sft_factory import stage

from aquila_pd.sft.run import stages
from aquila_pd.sft.run.folder import RunFolder
from aquila_pd.sft.run.manifest import DONE, RUNNING
from aquila_pd.sft.run.stages import train
from aquila_pd.utils.errors import TrainingError


class Kept:
    """A manifest in memory. states: of the stages, by name."""

    def __init__(self, **states: str):
        self.known = {name: {"state": state} for name, state in states.items()}

    def stage(self, name: str) -> dict:
        return self.known[name]

    def update(self, name: str, **facts: object) -> None:
        self.known[name] |= facts


def recipe_of(*of, export: str = "none") -> SimpleNamespace:
    return SimpleNamespace(stages=of, model="base", export=export)


def finished(root: Path, *names: str) -> RunFolder:
    """A run whose stages of these names have a result."""
    run = RunFolder(root)
    for name in names:
        run.result(name).mkdir(parents=True)
    return run


def test_a_stage_that_is_done_stands_on_what_it_was_trained_on(tmp_path, monkeypatch):
    """An adapter of another shape was put on the merged model of the stage before, not on the first base."""
    run = finished(tmp_path, "one", "two")
    merges = []

    def merge(base, adapter, output, *, template, fsync):
        merges.append((base, adapter, output, fsync))
        output.mkdir(parents=True)

    monkeypatch.setattr(stages, "merge_folder", merge)
    both = stage(name="one", method="lora", r=4), stage(name="two", method="lora", r=8)
    train(recipe_of(*both, export="merged"), run, Kept(one=DONE, two=DONE))
    assert merges == [
        (Path("base"), run.result("one"), run.merged("one"), True),
        (run.merged("one"), run.result("two"), run.model, True),
    ]


def test_a_run_killed_between_a_result_and_the_manifest_says_later_that_it_is_done(tmp_path):
    run, manifest = finished(tmp_path, "one"), Kept(one=RUNNING)
    train(recipe_of(stage(name="one")), run, manifest)
    assert manifest.known["one"] == {"state": DONE, "result": "stages/one/result"}


@pytest.mark.parametrize("left", ["result", "checkpoints"])
def test_a_result_that_was_removed_under_a_later_stage_is_missed(tmp_path, left):
    run = finished(tmp_path, "one")
    getattr(run, left)("three").mkdir(parents=True)
    recipe = recipe_of(*(stage(name=name) for name in ("one", "two", "three")))
    with pytest.raises(TrainingError) as error:
        train(recipe, run, Kept(one=DONE, two=DONE, three=RUNNING))
    assert f"{run.result('two')} is not there" in str(error.value)
    assert str(tmp_path / "stages" / "three" / left) in str(error.value)
