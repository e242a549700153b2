"""`aquila-pd sft` as its user sees it: what a run leaves, how it ends and goes on, what it says of bad input."""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from chat_factory import tiny_chat_folder, tiny_torch_folder
from safetensors.numpy import load_file, save_file
from sft_command_factory import (
    call,
    curve,
    distance,
    evaluations,
    loss_of,
    losses,
    manifest,
    records,
    refused,
    rows,
    same,
    sft,
    stage,
    tensors,
    trained,
    tree,
    turn,
    weights_of,
    write_recipe,
    write_rows,
)

from aquila_pd.sft.logs.jsonl import JsonLines

CUT = 1e-5  # float32 sums in another order; losses near 6
OTHER = 1e-4  # the same weights in fp32 in another library


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model and three files of rows."""
    folder = tmp_path_factory.mktemp("sft")
    tiny_chat_folder(folder / "base", "aquila-v1")
    for seed, name in enumerate("abc"):
        write_rows(folder / f"{name}.jsonl", rows(24, seed=seed))
    return folder


@pytest.fixture
def recipe(place, tmp_path):
    """Makes a recipe of one stage; keywords are of the stage."""

    def make(name: str = "recipe", **more) -> Path:
        return write_recipe(
            tmp_path / f"{name}.yaml",
            [stage("tune", place / "a.jsonl", **more)],
            model=str(place / "base"),
            output=str(tmp_path / name),
        )

    return make


def ended_early(run: Path, number: signal.Signals, *arguments: object, steps: int = 4):
    """Run the command, which gets a signal when so many steps are in the run's log; unheard, the test fails."""
    write = JsonLines.write

    def write_and_tell(self, kind: str, record: dict) -> None:
        write(self, kind, record)
        if kind == "step" and len(curve(run)) == steps:
            os.kill(os.getpid(), number)

    before = signal.signal(number, lambda *_: pytest.fail(f"nobody listened to {number.name}"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JsonLines, "write", write_and_tell)
            return sft(*arguments)
    finally:
        signal.signal(number, before)


# --------------------------------------------------------------------------------------------- a run of two stages


@pytest.fixture(scope="module")
def done(place):
    """A finished run: six steps with evaluation on file a, then one step over all of file b in another template."""
    first = stage("one", place / "a.jsonl", data={"held_out": 0.3}, epochs=3, max_steps=6, eval_every=2)
    second = stage(
        "two", place / "b.jsonl", template="aquila-legacy", global_batch=64, micro_batch=8, visualdl=True,
        optim={"lr": 5e-4, "warmup_steps": 0},
    )  # fmt: skip
    file = write_recipe(place / "two.yaml", [first, second], model="base", name="both")
    outcome = trained(file)
    return file, place / "run", outcome


def test_the_tuned_model_answers_in_the_template_of_the_last_stage(done):
    from aquila_pd.generation import SamplingParams
    from aquila_pd.text.loading import load

    loaded = load(done[1] / "model", threads=1)
    assert loaded.prompts.name == "aquila-legacy"
    prompt = loaded.prompts.encode([{"role": "user", "content": "你好"}])
    (sequence,) = loaded.engine.generate([prompt], SamplingParams(max_new_tokens=4, temperature=0))[0]
    assert 1 <= len(sequence.tokens) <= 4
    assert load(done[1] / "stages" / "one" / "result", threads=1).prompts.name == "aquila-v1"


def test_results_are_what_was_trained(done, place):
    base, one, two, model = (
        tensors(folder)
        for folder in (place / "base", done[1] / "stages/one/result", done[1] / "stages/two/result", done[1] / "model")
    )
    assert same(two, model)
    assert distance(base, one) > 1e-3 and distance(one, two) > 1e-4
    assert all(not np.array_equal(base[name], one[name]) for name in base), "full training moves every tensor"


def test_the_log_has_every_step_once_with_its_learning_rate(done):
    found = curve(done[1])
    assert list(found) == [("one", step) for step in range(1, 7)] + [("two", 1)]
    cosine = [0.5 * (1 + math.cos(math.pi * done / 5)) for done in range(5)]
    rates = [record["lr"] for record in records(done[1])]
    assert rates == pytest.approx([3e-3 * part for part in (1.0, *cosine)] + [5e-4])
    assert [record["step"] for record in records(done[1], "eval") if record["step"]] == [2, 4, 6]
    for record in records(done[1]):
        assert 0 < record["valid_tokens"] < record["tokens"] <= record["positions"]
        assert record["positions"] % 256 == 0
        assert record["tokens_per_s"] > 0 and record["memory_resident_mib"] > 0


def test_the_curve_is_a_picture(done):
    picture = matplotlib.image.imread(done[1] / "curve.png")
    assert min(picture.shape[:2]) > 200 and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 5


def test_visualdl_writes_where_it_was_asked_for(done):
    files = [str(file.relative_to(done[1])) for file in done[1].rglob("*vdlrecords*")]
    assert files and all("one" not in file.split("/") for file in files), files


def test_the_manifest_says_what_was_trained_on(done, place):
    said = manifest(done[1])
    text = json.dumps(said) + (done[1] / "data/one/dataset.json").read_text()
    text += (done[1] / "data/two/dataset.json").read_text()
    for name in ("a.jsonl", "b.jsonl", "base/model.safetensors"):
        assert hashlib.sha256((place / name).read_bytes()).hexdigest() in text, name
    assert said["recipe"]["values"]["seed"] == 5 and said["recipe"]["text"] == done[0].read_text()
    assert said["environment"]["versions"]["paddlepaddle"].startswith("3.")
    one, two = said["stages"]["one"], said["stages"]["two"]
    assert one["state"] == two["state"] == "done" and (one["steps"], two["steps"]) == (6, 1)
    assert one["data"]["train"]["rows"] + one["data"]["held_out"]["rows"] == two["data"]["train"]["rows"] == 24
    assert two["data"]["train"]["targets"] == records(done[1])[-1]["valid_tokens"]


def test_the_second_stage_starts_from_the_weights_of_the_first(done, place, tmp_path):
    """One step over all rows: its loss is that of the first stage's result, by transformers, on file b."""
    first, rows_b = done[1] / "stages/one/result", place / "b.jsonl"
    (found,) = losses(done[1], "two")
    assert found == pytest.approx(loss_of(first, rows_b, "aquila-legacy", tmp_path / "torch"), abs=CUT)
    for folder, file, template in (
        (place / "base", rows_b, "aquila-legacy"),
        (first, rows_b, "aquila-v1"),
        (first, place / "a.jsonl", "aquila-legacy"),
    ):
        assert abs(found - loss_of(folder, file, template, tmp_path / "torch")) > 50 * CUT, "control"


def test_an_export_of_the_run_is_transformers_model(done, tmp_path):
    import paddle
    import torch
    from transformers import AutoModelForCausalLM

    from aquila_pd import AquilaForCausalLM

    outcome = call("export", done[1], "--output", tmp_path / "plain")
    assert outcome.status == 0, outcome.message
    assert call("to-torch", "--input", tmp_path / "plain", "--output", tmp_path / "torch").status == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "torch", torch_dtype=torch.float32).eval()
    ours = AquilaForCausalLM.from_pretrained(str(done[1] / "model")).eval()
    ids = np.random.default_rng(0).integers(1, 300, (2, 30))
    with torch.no_grad(), paddle.no_grad():
        logits = theirs(torch.from_numpy(ids)).logits.numpy()
        found = ours(paddle.to_tensor(ids))
    found = (found[0] if isinstance(found, (tuple, list)) else getattr(found, "logits", found)).numpy()
    np.testing.assert_allclose(found, logits, atol=OTHER, rtol=0)
    assert same(tensors(tmp_path / "plain"), tensors(done[1] / "model"))
    assert call("export", done[1], "--stage", "one", "--output", tmp_path / "first").status == 0
    assert same(tensors(tmp_path / "first"), tensors(done[1] / "stages/one/result"))


def test_a_finished_run_says_so_and_does_nothing(done):
    before = tree(done[1])
    for what in (done[0], done[1]):
        outcome = trained(what)
        assert "Done" in outcome.out and str(done[1] / "model") in outcome.out
        assert "loss" not in outcome.out
    assert tree(done[1]) == before


def test_another_recipe_is_refused_with_exactly_what_differs(done):
    before = tree(done[1])
    message = refused(sft(done[0], "seed=6", "stages.1.optim.lr=1e-3", "stages.0.length=80"), "cannot go on")
    told = re.findall(r"^  (\S+): was (.+), is (.+)$", message, re.MULTILINE)
    assert sorted(told) == [("one.length", "256", "80"), ("seed", "5", "6"), ("two.optim.lr", "0.0005", "0.001")]
    assert tree(done[1]) == before
    message = refused(sft(done[0], "stages.0.log_every=3", "stages.1.keep=7", "stages.1.epochs=2"))
    assert re.findall(r"^  (\S+): was", message, re.MULTILINE) == ["two.epochs"], "what may change is not named"


def test_what_is_said_to_a_pipe_has_no_control_characters(done):
    for text in done[2][1:]:
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), "control characters"
    assert "loss" in done[2].out


# --------------------------------------------------------------------------------------------- dry runs, preparing


def said_number(label: str, text: str) -> int:
    found = re.findall(rf"^\s+{label}\s+(?:about )?([\d,]+)", text, re.MULTILINE)
    assert len(found) == 1, (label, text)
    return int(found[0].replace(",", ""))


def test_a_dry_run_writes_nothing(recipe, place, tmp_path):
    file = recipe()
    before = tree(place), tree(tmp_path)
    outcome = trained(file, "--dry-run")
    assert "tune" in outcome.out and (tree(place), tree(tmp_path)) == before
    assert not (tmp_path / "recipe").exists()


def test_prepared_rows_tell_the_dry_run_what_the_run_then_does(recipe, tmp_path):
    file, run = recipe(global_batch=1), tmp_path / "recipe"
    trained(file, "--prepare")
    assert not list(run.rglob("*.png")) and not list(run.rglob("checkpoints/*")) and not (run / "model").exists()
    before = tree(run)
    told = trained(file, "--dry-run").out
    assert tree(run) == before
    outcome = trained(run)
    assert "found prepared" in outcome.out or "prepared" not in outcome.out, "rows are prepared once"
    steps = records(run)
    assert said_number("packs", told) == said_number("steps", told) == len(steps) == steps[0]["steps"]
    assert said_number("tokens", told) == sum(record["tokens"] for record in steps)
    trained_on = int(re.search(r"([\d,]+) of them trained on", told)[1].replace(",", ""))
    assert trained_on == sum(record["valid_tokens"] for record in steps)
    assert steps[-1]["epoch"] == pytest.approx(1.0)


def test_an_epoch_may_be_a_fraction_and_max_steps_ends_before_it(recipe, tmp_path):
    whole = recipe("whole", global_batch=1)
    trained(whole, "--prepare")
    packs = said_number("packs", trained(whole, "--dry-run").out)
    for epochs, more, steps in ((0.5, {}, packs / 2), (1.5, {}, 1.5 * packs), (5.0, {"max_steps": 3}, 3)):
        name = f"epochs-{epochs}"
        trained(recipe(name, global_batch=1, epochs=epochs, **more))
        found = records(tmp_path / name)
        assert abs(len(found) - steps) <= 1 and found[-1]["steps"] == len(found) == found[-1]["step"]
    seen = [record["tokens"] for record in records(tmp_path / "epochs-1.5")]
    assert seen[:packs] != seen[packs : 2 * packs], "the second epoch has another order"


# ------------------------------------------------------------------------------------------------- what is trained


def test_the_best_weights_are_the_result_where_asked(recipe, place, tmp_path):
    """A learning rate that rises until it ruins the model: judged by transformers, the result is what was best."""
    optim = {"lr": 0.5, "schedule": "constant", "warmup_steps": 6}
    found, judged = {}, {}
    for keep_best in (True, False):
        run = tmp_path / f"best-{keep_best}"
        file = recipe(
            run.name, data={"evaluate": {"files": str(place / "c.jsonl")}}, max_steps=7, epochs=9, eval_every=1,
            keep_best=keep_best, optim=optim,
        )  # fmt: skip
        trained(file, "export=none")
        assert not (run / "model").exists(), "export: none"
        found[keep_best] = evaluations(run)
        judged[keep_best] = loss_of(run / "stages/tune/result", place / "c.jsonl", "aquila-v1", tmp_path / "torch")
    seen = [one[2] for one in found[True]]
    assert found[True] == found[False] and min(seen) < min(seen[0], seen[-1]) - 0.1
    assert judged[True] == pytest.approx(min(seen), abs=OTHER)
    assert judged[False] == pytest.approx(seen[-1], abs=OTHER)
    assert manifest(tmp_path / "best-True")["stages"]["tune"]["best_step"] == found[True][seen.index(min(seen))][1]


def test_one_batch_of_eight_and_eight_of_one_have_the_same_curve(recipe, tmp_path):
    for micro in (8, 1):
        trained(recipe(f"cut-{micro}", global_batch=8, micro_batch=micro, max_steps=4, epochs=9))
    whole, cut = (losses(tmp_path / f"cut-{micro}", "tune") for micro in (8, 1))
    assert whole == pytest.approx(cut, abs=CUT) and len(whole) == 4 and whole[-1] < whole[0]


# --------------------------------------------------------------------------------------- ended early, and going on


@pytest.fixture(scope="module")
def ended(place, tmp_path_factory):
    """A run ended by SIGTERM after some steps of its second stage, with what it said; and the same uninterrupted."""
    folder = tmp_path_factory.mktemp("ended")
    common = dict(epochs=20, save_every=2, keep=3)
    stages = [
        stage("one", place / "a.jsonl", max_steps=3, **common),
        stage("two", place / "b.jsonl", max_steps=14, **common),
    ]
    file = write_recipe(folder / "r.yaml", stages, model=str(place / "base"))
    trained(file, f"output={folder / 'whole'}")
    outcome = ended_early(folder / "run", signal.SIGTERM, file, steps=9)
    return file, folder / "run", folder / "whole", outcome


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def newest_first(run: Path) -> list[Path]:
    return sorted((run / "stages/two/checkpoints").iterdir(), reverse=True)


def test_sigterm_ends_after_a_step_and_says_how_to_go_on(ended):
    _, run, whole, outcome = ended
    assert outcome.status == 128 + signal.SIGTERM, outcome.message
    assert f"aquila-pd sft {run}" in outcome.message
    assert "Traceback" not in outcome.message
    done = curve(run)
    last = max(step for name, step in done if name == "two")
    assert 6 <= last < 14 and newest_first(run)[0].name == f"step-{last:08d}", "the last step is saved"
    assert not (run / "model").exists() and not (run / "stages/two/result").exists()
    assert done == {step: curve(whole)[step] for step in done}


def test_ctrl_c_ends_with_130_and_going_on_by_the_folder_is_exact(ended, place):
    file, _, whole, _ = ended
    run = file.parent / "keys"
    outcome = ended_early(run, signal.SIGINT, file, f"output={run}", steps=2)
    assert outcome.status == 130 and f"aquila-pd sft {run}" in outcome.message, outcome.message
    assert "Traceback" not in outcome.message
    trained(run)
    assert curve(run) == curve(whole) and weights_of(run) == weights_of(whole)


def test_going_on_by_the_recipe_is_exact_and_logs_and_checkpoints_may_change(ended):
    file, run, whole, _ = ended
    at = newest_first(run)[0].name
    refused(sft(file, "stages.1.optim.lr=1e-3"), "two.optim.lr: was 0.003, is 0.001")
    outcome = trained(file, "stages.1.keep=1", "stages.1.visualdl=true", "stages.*.log_every=1")
    assert int(at.removeprefix("step-")) > 6 and str(int(at.removeprefix("step-"))) in outcome.out
    assert curve(run) == curve(whole) and weights_of(run) == weights_of(whole)
    assert len(newest_first(run)) == 1 and list(run.rglob("*vdlrecords*"))


@pytest.fixture
def stopped(place, tmp_path):
    """A run ended in its only stage with three checkpoints, on rows of its own."""
    file = write_recipe(
        tmp_path / "r.yaml",
        [
            stage(
                "two", write_rows(tmp_path / "b.jsonl", rows(24, seed=1)), max_steps=12, epochs=20, save_every=2, keep=3
            )
        ],
        model=str(place / "base"),
    )
    outcome = ended_early(tmp_path / "run", signal.SIGINT, file, steps=7)
    assert outcome.status == 130, outcome.message
    return file, tmp_path / "run"


def damage(checkpoint: Path) -> None:
    """One bit of the weights is another."""
    file = max(checkpoint.glob("*.safetensors"), key=lambda one: one.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def test_a_run_that_was_moved_goes_on_by_its_recipe_where_it_is_now(stopped, tmp_path):
    moved = copied(stopped[1], tmp_path / "moved")
    before = tree(stopped[1])
    refused(sft(moved), str(moved), str(stopped[1]), "output=")
    assert tree(moved) == before
    trained(stopped[0], f"output={moved}")
    trained(stopped[0], f"output={tmp_path / 'whole'}")
    assert tree(stopped[1]) == before, "the folder it was copied from is left alone"
    assert curve(moved) == curve(tmp_path / "whole") and weights_of(moved) == weights_of(tmp_path / "whole")


def test_damaged_checkpoints_are_told_of_and_the_one_before_is_taken(stopped, tmp_path):
    file, run = stopped
    newest, *older = newest_first(run)
    assert older
    damage(newest)
    outcome = trained(run)
    number = int(newest.name.removeprefix("step-"))
    assert f"step {number} is damaged" in outcome.message
    trained(file, f"output={tmp_path / 'whole'}")
    assert curve(run) == curve(tmp_path / "whole") and weights_of(run) == weights_of(tmp_path / "whole")


def test_with_all_checkpoints_damaged_the_run_stops_and_says_so(stopped):
    _, run = stopped
    for checkpoint in newest_first(run):
        damage(checkpoint)
    before = tree(run / "stages"), curve(run)
    message = refused(sft(run), "damaged")
    assert str(run) in message
    assert (tree(run / "stages"), curve(run)) == before and not (run / "model").exists()


def test_rows_that_are_others_than_at_the_beginning_are_refused(stopped):
    """Also once the prepared ones are removed, as the message proposes: half a stage on other rows is no stage."""
    _, run = stopped
    before = curve(run)
    rows_of_run = Path(manifest(run)["recipe"]["values"]["stages"][0]["data"]["train"][0]["files"][0])
    write_rows(rows_of_run, rows(24, seed=77))
    refused(sft(run), rows_of_run.name)
    assert curve(run) == before
    shutil.rmtree(run / "data" / "two")
    refused(sft(run))
    assert curve(run) == before


def test_prepared_rows_that_are_lost_are_prepared_again_and_the_run_is_the_same(stopped, tmp_path):
    file, run = stopped
    shutil.rmtree(run / "data")
    trained(run)
    trained(file, f"output={tmp_path / 'whole'}")
    assert curve(run) == curve(tmp_path / "whole") and weights_of(run) == weights_of(tmp_path / "whole")


def test_a_base_that_is_another_than_at_the_beginning_is_refused(stopped, place, tmp_path):
    file, run = stopped
    before = tree(run)
    other = tiny_chat_folder(tmp_path / "other", seed=3)
    refused(sft(file, f"model={other}"), f"{other}/model.safetensors")
    assert tree(run) == before
    weights = Path(manifest(run)["recipe"]["values"]["model"]) / "model.safetensors"
    kept = weights.read_bytes()
    try:
        shutil.copyfile(other / "model.safetensors", weights)
        assert "model.safetensors is not what the run began with" in refused(sft(run))
        assert tree(run) == before
    finally:
        weights.write_bytes(kept)


def test_a_dry_run_says_that_the_run_would_be_refused(done):
    told = sft(done[0], "seed=6", "--dry-run")
    assert told.status == 1 and "seed" in told.message


# ---------------------------------------------------------------------------------------------------- bad input


def whole_things(run: Path) -> list[Path]:
    """What in a run folder would be taken for finished."""
    return [*run.glob("model"), *run.glob("stages/*/result"), *run.glob("data/*/dataset.json")]


def test_a_missing_model_is_named_before_anything_is_made(recipe, tmp_path):
    refused(sft(recipe(), "model=nowhere"), "nowhere")
    assert not tree(tmp_path / "recipe")


def test_a_torch_folder_is_sent_to_the_converter(recipe, tmp_path):
    folder = tiny_torch_folder(tmp_path / "AquilaChat2-7B")
    refused(sft(recipe(), f"model={folder}"), "torch checkpoint", "aquila-pd convert")
    assert not whole_things(tmp_path / "recipe")


def test_after_a_mistake_the_same_output_can_be_used(recipe, place, tmp_path):
    """A run in which nothing was prepared holds nothing that a better recipe could contradict."""
    refused(sft(recipe(max_steps=1), f"model={tiny_torch_folder(tmp_path / 'torch')}"), "torch checkpoint")
    refused(sft(recipe(max_steps=1), f"stages.0.data.train.files={tmp_path}/none.jsonl"), "none.jsonl")
    refused(sft(recipe(max_steps=1), "stages.0.data.sources=[none]"), "No row is left")
    trained(recipe(max_steps=1))


def test_a_model_without_template_needs_one(recipe, tmp_path):
    folder = tiny_chat_folder(tmp_path / "base", None)
    refused(sft(recipe(), f"model={folder}"), "template")
    assert not whole_things(tmp_path / "recipe")
    trained(recipe("named", max_steps=1, template="aquila-v2"), f"model={folder}")
    from aquila_pd.text.loading import load

    assert load(tmp_path / "named/model", threads=1).prompts.name == "aquila-v2"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], ("bad.jsonl",)),
        ([{"conversations": [turn("human", "Hello")]}] * 3, ("question_last", "nothing_left")),
        ([{"conversations": [turn("human", "Hello"), turn("gpt", " ")]}], ("empty_turn", "nothing_left")),
        (["{not json"] * 5 + rows(20, seed=4), ("bad.jsonl, row 4", "max_bad_lines")),
        ([{"text": "what is this"}] * 9, ("bad.jsonl",)),
    ],
    ids=["empty", "no-answers", "empty-answers", "bad-lines", "other-format"],
)
def test_rows_that_cannot_be_trained_on(recipe, tmp_path, lines, said):
    file = write_rows(tmp_path / "bad.jsonl", lines)
    arguments = (recipe(), f"stages.0.data.train.files={file}")
    refused(sft(*arguments, "stages.0.data.max_bad_lines=3"), *said)
    assert not whole_things(tmp_path / "recipe")
    if "max_bad_lines" in said:
        trained(*arguments, "stages.0.data.max_bad_lines=5", "--prepare")


def test_rows_that_are_dropped_are_told_of(recipe, tmp_path):
    message = trained(recipe(length=45, max_steps=1)).message
    counters = {one["rule"]: one["rows"] for one in manifest(tmp_path / "recipe")["stages"]["tune"]["data"]["counters"]}
    assert counters["split"] + counters["too_long"] > 0
    assert "too_long" in message or "longer than a pack" in message


def test_after_bad_rows_are_mended_the_same_command_trains(recipe, tmp_path):
    file = write_rows(tmp_path / "bad.jsonl", ["{}"] * 200)
    arguments = (recipe(max_steps=1), f"stages.0.data.train.files={file}")
    refused(sft(*arguments), "bad.jsonl")
    write_rows(file, rows(20, seed=1))
    trained(*arguments)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("stages.0.optim.lrr=1",), ("lrr", "lr")),
        (("stages.0.epoch=1",), ("epoch", "epochs")),
        (("modle=x",), ("modle", "model")),
        (("stages.0.method=lorra",), ("lorra", "lora")),
        (("stages.3.epochs=1",), ("stages",)),
        (("stages.0.epochs=-1",), ("epochs", "-1")),
        (("stages.0.epochs=often",), ("epochs", "often")),
        (("stages.0.template=aquila-v9",), ("aquila-v9", "aquila-v1")),
        (("stages.0.data.train.files=none/*.jsonl",), ("none/*.jsonl",)),
        (("stages.0.keep_best=true",), ("keep_best",)),
        (("stages.0.micro_batch=3",), ("micro_batch", "global_batch")),
        (("stages.0.method=lora", "stages.0.lora.targets=[q_prj]"), ("q_prj", "q_proj")),
        (("stages.0.name=../../x",), ("name",)),
        (("stages.0.dtype=bfloat16",), ("bfloat16",)),
        (("--processes", "3"), ("global_batch",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_mistakes_in_a_recipe_are_named_before_anything_is_made(recipe, tmp_path, change, said):
    file = recipe()
    before = tree(tmp_path)
    refused(sft(file, *change), *said)
    assert tree(tmp_path) == before and not (tmp_path / "recipe").exists()
    told = sft(file, *change, "--dry-run")
    assert told.status == 1 and all(text in told.message for text in said), told.message


def test_packs_longer_than_the_context_are_told_of(recipe):
    assert "length 300 is more than the model's 256" in trained(recipe(length=300), "--dry-run").message


def test_what_is_printed_can_be_pasted_also_where_a_folder_has_a_space_in_its_name(recipe, tmp_path):
    run = tmp_path / "my run"
    told = trained(recipe(max_steps=1), f"output={run}").out.strip().splitlines()[-1]
    assert shlex.split(told) == ["aquila-pd", "chat", str(run / "model")]


@pytest.mark.parametrize("content", ["model: [", "", "- a\n- b\n", "stages: []\nmodel: m\noutput: o\n", "\x00\xff"])
def test_a_file_that_is_no_recipe_is_said_to_be_none(tmp_path, content):
    file = tmp_path / "r.yaml"
    file.write_text(content, encoding="latin-1")
    refused(sft(file), "r.yaml")
    refused(sft(tmp_path / "missing.yaml"), "missing.yaml")
    refused(sft(tmp_path), str(tmp_path))
    assert tree(tmp_path).keys() == {"r.yaml"}


@pytest.mark.parametrize("arguments", [(), ("--bogus",), ("RECIPE", "--processes", "two")], ids=str)
def test_wrong_arguments_are_status_2(recipe, arguments):
    file = recipe()
    outcome = call("sft", *(file if word == "RECIPE" else word for word in arguments))
    refused(outcome, "aquila-pd sft", status=2)


def test_an_output_that_cannot_be_is_refused_and_what_is_there_stays(recipe, place, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    before = tree(tmp_path / "mine"), tree(place / "base")
    for output in ("file", "file/below", place / "base", place / "base" / "run", "/proc/run"):
        outcome = sft(recipe(max_steps=1), f"output={output if Path(output).is_absolute() else tmp_path / output}")
        assert outcome.status == 1 and "Traceback" not in outcome.message, (output, outcome)
    sft(recipe(max_steps=1), f"output={tmp_path / 'mine'}")  # whether it goes on or not
    after = tree(tmp_path / "mine")
    assert after["thesis.txt"] == before[0]["thesis.txt"] and tree(place / "base") == before[1]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_base_that_is_not_a_number_ends_the_run_and_names_rows(recipe, place, tmp_path):
    base = copied(place / "base", tmp_path / "nan")
    weights = load_file(base / "model.safetensors")
    next(value for name, value in weights.items() if "mlp.up_proj" in name)[3, 4] = np.nan
    save_file(weights, base / "model.safetensors", {"format": "np"})
    message = refused(sft(recipe(), f"model={base}"), "nan")
    assert "a.jsonl" in message or "up_proj" in message, message
    run = tmp_path / "recipe"
    assert not list(run.glob("stages/*/result")) and not (run / "model").exists()
    assert not list(run.glob("stages/*/checkpoints/*"))
    assert all(math.isfinite(record["loss"]) for record in (records(run) if (run / "log.jsonl").exists() else []))
