"""Backward compatibility with commit bd945b8, the last before the package was restructured: folders converted by it
load, and conversions, trainings and exports that it was killed in resume.

tests/fixtures/README.md documents the archive. It is unpacked to another place than it was made in, as if a user had
moved it, with its modification times. Recorded numbers are exact on the kind of processor they were made on.
"""

import json
import os
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

import checkpoint_factory as factory
import numpy as np
import pytest
from converted_folder import WITHOUT_THE_PACKAGE
from fixtures.make import ARCHIVE, code, processor
from paths import ROOT
from safetensors.numpy import load_file, save_file
from sft_command_factory import call, evaluations, records, refused, sft, trained, weights_of

from aquila_pd.checkpoint.bundle import CODE, SHIMS
from aquila_pd.checkpoint.io.manifest import check_manifest
from aquila_pd.runtime.versions import VERSION

MODULES = 37  # of the package, that a converted folder held beside its weights
ROUNDING = 1e-5  # recorded to six digits; float32 sums in another order
CURVE = 1e-5  # losses near 6 on another processor; 2e-7 were measured with the oldest kernels of MKL
SMALL = ("--max-shard-size", "8KB", "--workers", "1")

# Word for word the published usage text; `path` is its one variable.
USAGE = """
from modeling_aquila_pd import AquilaForCausalLM
from tokenizer_aquila_pd import AquilaTokenizer
from paddlenlp.transformers import AutoConfig
config = AutoConfig.from_pretrained(path); tokenizer = AquilaTokenizer.from_pretrained(path)
model = AquilaForCausalLM.from_pretrained(path, config=config)
features = tokenizer("Hello, please introduce yourself.\\n", return_tensors="pd")
outputs = model.generate(**features, max_new_tokens=128)
print(tokenizer.batch_decode(outputs[0], skip_special_tokens=True))
"""


# ----------------------------------------------------------------------------------------------------- the fixtures


def unpack(folder: Path) -> Path:
    """All that was made, with the times it had to the nanosecond: journals know them."""
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    for name, time in json.loads((folder / "times.json").read_text()).items():
        os.utime(folder / name, ns=(time, time))
        assert (folder / name).stat().st_mtime_ns == time, f"the file system of {folder} keeps no nanoseconds"
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """All that was made, to be read only."""
    return unpack(tmp_path_factory.mktemp("made"))


@pytest.fixture
def place(tmp_path) -> Path:
    """All that was made, for one test to go on with."""
    return unpack(tmp_path)


@pytest.fixture(scope="module")
def expected(made) -> dict:
    """What the old code computed without being stopped."""
    return json.loads((made / "expected.json").read_text())


@pytest.fixture
def same_version(expected) -> None:
    if expected["made_on"]["aquila_pd"] != VERSION:
        pytest.skip(f"journals are for {expected['made_on']['aquila_pd']}, which wrote them, and this is {VERSION}")


def is_made_here(expected: dict) -> bool:
    """Whether the same operations give the same bits here as where the fixtures were made."""
    from aquila_pd.sft.run.manifest import versions

    found, made_on = {"processor": processor(), **versions()}, expected["made_on"]
    return all(found[name] == made_on[name] for name in made_on.keys() - {"aquila_pd", "python"})


def untouched(files: list[Path], before: dict[Path, int]) -> None:
    """Fail for files that were written again; before: their times."""
    for file, time in zip(files, before.values(), strict=True):
        assert file.stat().st_mtime_ns == time, f"{file.name} was finished by the old code and is written again"


def differing(found: dict, wanted: dict) -> list[str]:
    """Names whose values are not the same, or that are on one side only."""
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def data_of(folder: Path) -> dict[str, str]:
    """File -> digest of a converted folder without its code, and the manifest that names the code."""
    return {name: digest for name, digest in factory.digests(folder).items() if not code(name)}


# ------------------------------------------------------------------------------------------- folders converted before


def logits_of(folder: Path, ids: list[list[int]]) -> list[np.ndarray]:
    """Logits behind each row of ids, by the package."""
    import paddle

    from aquila_pd import AquilaForCausalLM

    model = AquilaForCausalLM.from_pretrained(str(folder)).eval()
    with paddle.no_grad():
        return [model(paddle.to_tensor([row]))[0][0, -1].numpy() for row in ids]


def assert_logits(folder: Path, expected: dict) -> None:
    for prompt, found, wanted in zip(
        expected["prompts"], logits_of(folder, expected["ids"]), expected["logits"], strict=True
    ):
        difference = np.abs(found - np.float32(wanted)).max()
        assert difference <= ROUNDING, f"logits behind {prompt!r} are off by {difference:.1e}"


def test_the_folder_is_one_of_the_old_layout(made):
    modules = {path.name for path in (made / "model").glob("*.py")}
    assert len(modules) == MODULES and modules > SHIMS.keys()
    assert not (made / "model" / CODE).exists()


def test_the_package_computes_the_logits_that_the_old_code_did(made, expected):
    assert_logits(made / "model", expected["model"])


def test_control_one_other_weight_is_noticed(place, expected):
    weights = factory.load_folder(place / "model")
    weights["aquila.norm.weight"][0] += 0.1
    save_file(weights, place / "model" / "model.safetensors", {"format": "np"})
    with pytest.raises(AssertionError, match="are off by"):
        assert_logits(place / "model", expected["model"])


def test_the_package_reads_its_tokenizer_and_answers_as_the_old_code_did(made, expected):
    from aquila_pd import AquilaForCausalLM, AquilaTokenizer

    folder, wanted = str(made / "model"), expected["model"]
    model, tokenizer = AquilaForCausalLM.from_pretrained(folder).eval(), AquilaTokenizer.from_pretrained(folder)
    for prompt, ids, text in zip(wanted["prompts"], wanted["ids"], wanted["texts"], strict=True):
        features = tokenizer(prompt, return_tensors="pd")
        assert features["input_ids"][0].tolist() == ids
        outputs = model.generate(**features, max_new_tokens=128)
        assert tokenizer.batch_decode(outputs[0], skip_special_tokens=True) == text


def printed_by(*arguments: str, folder: Path) -> list[str]:
    """Lines that a new interpreter prints, started in a folder; it imports this tree's package, if any."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_its_own_modules_run_the_published_usage_text_without_the_package(made, expected):
    *_, printed = printed_by(WITHOUT_THE_PACKAGE + USAGE, folder=made / "model")
    assert len(expected["model"]["texts"][0][0]) > 5 and printed == str(expected["model"]["texts"][0])


# Imports are the subject, and most of what they cost is Paddle: each text runs in a fork of a process that has it.
FORKS = """
import os, sys
import paddle, paddlenlp.transformers
for text in sys.argv[1:]:
    sys.stdout.flush()
    if not os.fork():
        try:
            exec(text, {"path": "."})
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    assert os.wait()[1] == 0, text
"""
AUTO = """
import modeling_aquila_pd
from paddlenlp.transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
print("found", type(model).__module__, type(tokenizer).__module__)
"""
TOGETHER = """
import sys
sys.path.insert(0, "")
for module in {order}:
    __import__(module)
import aquila_pd, modeling_aquila_pd, tokenizer_aquila_pd
from paddlenlp.transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained(path)
print("found", type(AutoModelForCausalLM.from_pretrained(path)).__module__)
ids, logits = paddle.to_tensor([{ids}]), []
for module in (aquila_pd, modeling_aquila_pd):
    model = module.AquilaForCausalLM.from_pretrained(path, config=config).eval()
    logits.append(model(ids)[0])
    print("found", type(model).__module__)
print("found", float((logits[0] - logits[1]).abs().max()) < 1e-5)
for module in (aquila_pd, tokenizer_aquila_pd):
    print("found", module.AquilaTokenizer.from_pretrained(path)({prompt!r})["input_ids"] == {ids})
"""


def test_its_own_modules_serve_the_auto_classes_and_live_beside_the_package(made, expected):
    """Whichever came first serves the Auto classes, and each loads with a config of the other."""
    orders = (["aquila_pd", "modeling_aquila_pd"], ["modeling_aquila_pd", "aquila_pd"])
    known = {"prompt": expected["model"]["prompts"][0], "ids": expected["model"]["ids"][0]}
    texts = [WITHOUT_THE_PACKAGE + AUTO]
    texts += ["import paddle" + TOGETHER.format(order=order, **known) for order in orders]
    lines = printed_by(FORKS, *texts, folder=made / "model")
    found = [line.removeprefix("found ") for line in lines if line.startswith("found ")]
    modules = ["aquila_pd.modeling", "modeling_aquila_pd"]
    together = [[first, *modules, "True", "True", "True"] for first in modules]
    assert found == ["modeling_aquila_pd tokenizer_aquila_pd", *together[0], *together[1]], lines


def test_its_manifest_is_that_of_every_file(made):
    agree, findings, others = check_manifest(made / "model", workers=1)
    assert (agree, findings, others) == (len(factory.digests(made / "model")) - 1, [], [])
    outcome = call("inspect", made / "model", "--check")
    assert outcome.status == 0 and f"{agree} files have the hashes" in outcome.out, outcome.message


def test_verify_proves_it(made):
    outcome = call("verify", "--torch", made / "source", "--paddle", made / "model")
    assert outcome.status == 0 and "Proven: " in outcome.out, outcome.message


def test_control_a_changed_file_is_not_proven(place):
    weights = place / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + bytes(4))
    refused(call("verify", "--torch", place / "source", "--paddle", place / "model"), "lm_head.weight")
    refused(call("inspect", place / "model", "--check"), "changed     model.safetensors")


def test_it_goes_back_to_torch(made, tmp_path):
    outcome = call("to-torch", "--input", made / "model", "--output", tmp_path / "torch")
    assert outcome.status == 0, outcome.message
    found, wanted = factory.load_folder(tmp_path / "torch"), factory.load_folder(made / "source")
    assert found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


def overwrite(place: Path):
    (place / "model" / "__pycache__").mkdir()  # it was in use
    return call("convert", "--input", place / "source", "--output", place / "model", "--overwrite")


def test_overwrite_replaces_it_and_none_of_its_modules_is_left(place):
    outcome = overwrite(place)
    assert outcome.status == 0, outcome.message
    assert {path.name for path in (place / "model").glob("*.py")} == set(SHIMS)
    assert (place / "model" / CODE).is_dir()


@pytest.mark.parametrize("name", ["modeling_aquila_pd.py", "notes.txt"])
def test_control_overwrite_spares_what_no_conversion_wrote(place, name):
    with (place / "model" / name).open("a") as file:
        file.write("# mine\n")
    before = factory.digests(place / "model")
    refused(overwrite(place), name)
    assert factory.digests(place / "model") == before


# -------------------------------------------------------------------------------------------- a stopped conversion


def assert_resumed(outcome, count: str) -> None:
    """The command resumed after so many shards of the old code's journal."""
    assert "not the same now" not in outcome.err, (
        f"the fingerprint of this conversion is no longer the one that the old code recorded:\n{outcome.err}"
    )
    assert outcome.status == 0, outcome.message
    assert f"  resumed   {count} finished by an earlier run, hashes checked" in outcome.out, outcome.message


def convert(place: Path, output: str = "out"):
    return call("convert", "--input", place / "source", "--output", place / output, *SMALL)


def finished(partial: Path) -> dict[Path, int]:
    """Shards that a journal calls finished, with their times."""
    names = json.loads((partial / "conversion-journal.json").read_text())["finished"]
    return {partial / name: (partial / name).stat().st_mtime_ns for name in names}


@pytest.mark.usefixtures("same_version")
def test_a_stopped_conversion_goes_on_behind_its_finished_shards(place, expected):
    before = finished(place / "out.partial")
    assert len(before) == 3, "three of five shards were finished"
    assert_resumed(convert(place), "3 shards")
    untouched([place / "out" / path.name for path in before], before)
    assert not (place / "out.partial").exists()
    old = {name: digest for name, digest in data_of(place / "out").items() if not name.startswith(f"{CODE}/")}
    assert differing(old, expected["conversion"]) == [], "not the bytes that the old code wrote"
    assert convert(place, "unstopped").status == 0
    both = factory.digests(place / "out"), factory.digests(place / "unstopped")
    assert differing(*both) == [], "not what the same conversion writes that was not stopped"


@pytest.mark.usefixtures("same_version")
def test_control_a_changed_shard_is_not_believed(place, expected):
    *_, shard = finished(place / "out.partial")
    content = shard.read_bytes()
    shard.write_bytes(content[:-4] + bytes(4))
    outcome = convert(place)
    assert f"  damaged   {shard.name}, finished by an earlier run, has another hash now" in outcome.out, outcome.message
    assert_resumed(outcome, "2 shards")
    assert differing(data_of(place / "out"), expected["conversion"]) == []


@pytest.mark.usefixtures("same_version")
@pytest.mark.parametrize("change", ["another hash", "another source", "no journal"])
def test_control_a_changed_journal_is_not_believed(place, expected, change):
    journal = place / "out.partial" / "conversion-journal.json"
    content = json.loads(journal.read_text())
    if change == "another hash":
        for about in content["finished"].values():
            about["sha256"] = sha256(b"another").hexdigest()
    elif change == "another source":
        content["for"]["the source"][0][2] += 1
    journal.write_text(json.dumps(content) if change != "no journal" else "{")
    outcome = convert(place)
    if change == "another source":
        refused(outcome, "holds finished shards of an earlier run, but the source is not the same now")
        return
    assert outcome.status == 0 and "  resumed " not in outcome.out, outcome.message
    assert differing(data_of(place / "out"), expected["conversion"]) == []


# ------------------------------------------------------------------------------------------------ a stopped export


@pytest.mark.usefixtures("same_version")
def test_a_stopped_export_of_an_adapter_goes_on_behind_its_finished_shard(place, expected):
    before = finished(place / "exported.partial")
    assert len(before) == 1
    argv = ["export", place / "adapter", "--base", place / "model", "--output", place / "exported", "--workers", 1]
    assert_resumed(call(*argv), "1 shard")
    untouched([place / "exported" / path.name for path in before], before)
    assert differing(data_of(place / "exported"), expected["export"]) == [], "not the bytes that the old code wrote"


# ---------------------------------------------------------------------------------------------- stopped trainings


LAST = {"full": ("two", 2), "lora": ("one", 2), "qlora": ("one", 3)}  # the step that each run goes on behind


def kept(log: list[dict], run: str) -> list[dict]:
    """The records of steps up to the one that a run goes on behind."""
    stage, step = LAST[run]
    return [one for one in log if (one["stage"], one["step"]) <= (stage, step)]


def assert_as_unstopped(run: Path, wanted: dict, *, is_exact: bool) -> None:
    """Losses and evaluations of all steps, and every tensor, are those of the run that was not stopped."""
    losses = {f"{one['stage']} {one['step']}": one["loss"] for one in records(run)}
    tolerance = 0.0 if is_exact else CURVE
    assert losses.keys() == wanted["losses"].keys(), "other steps are in the log"
    off = {step: abs(loss - wanted["losses"][step]) for step, loss in losses.items()}
    wrong = {step: f"{by:.1e}" for step, by in off.items() if by > tolerance}
    assert not wrong, f"losses (stage, step) are off by {wrong}; allowed is {tolerance}"
    found = [list(one) for one in evaluations(run)]
    assert [one[:2] for one in found] == [one[:2] for one in wanted["evaluations"]], "other evaluations are in the log"
    loss = [(one[2], other[2]) for one, other in zip(found, wanted["evaluations"], strict=True)]
    assert max(abs(one - other) for one, other in loss) <= tolerance, f"evaluation losses (found, recorded): {loss}"
    found = weights_of(run)
    assert found.keys() == wanted["weights"].keys(), differing(found, wanted["weights"])
    if is_exact:
        assert differing(found, wanted["weights"]) == [], "these tensors of the results have other bytes"


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_stopped_training_ends_as_it_would_have(place, expected, name):
    run = place / name / "run"
    rows, log = factory.snapshot(run / "data"), kept(records(run), name)
    trained(place / name / "recipe.yaml")
    assert differing(factory.snapshot(run / "data"), rows) == [], "rows were prepared, or packs planned, again"
    assert kept(records(run), name) == log, "steps before the checkpoint were trained again"
    assert_as_unstopped(run, expected["runs"][name], is_exact=is_made_here(expected))


@pytest.mark.usefixtures("same_version")
def test_a_training_stopped_while_it_merged_goes_on_behind_the_finished_shard(place, expected):
    """Between a stage of QLoRA, which is done, and one of all weights."""
    run = place / "qlora" / "run"
    before, log = finished(run / "stages" / "one" / "merged.partial"), kept(records(run), "qlora")
    assert len(before) == 1
    trained(place / "qlora" / "recipe.yaml")
    assert not (run / "stages" / "one" / "merged.partial").exists()
    untouched([run / "stages" / "one" / "merged" / path.name for path in before], before)
    assert kept(records(run), "qlora") == log, "the stage that was done was trained again"
    assert_as_unstopped(run, expected["runs"]["qlora"], is_exact=is_made_here(expected))


def test_control_another_checkpoint_ends_otherwise(place, expected):
    """Its hash is right, so it is believed; that its numbers are not those of the run has to show in the losses."""
    checkpoint = place / "lora" / "run" / "stages" / "one" / "checkpoints" / "step-00000002"
    [weights] = checkpoint.glob("weights-*.safetensors")
    save_file({k: 1.5 * v for k, v in load_file(weights).items()}, weights, {"format": "np"})
    rehash(checkpoint, weights)
    trained(place / "lora" / "recipe.yaml")
    with pytest.raises(AssertionError, match="losses"):
        assert_as_unstopped(place / "lora" / "run", expected["runs"]["lora"], is_exact=False)


def rehash(checkpoint: Path, file: Path) -> None:
    manifest = checkpoint / "checkpoint.json"
    content = json.loads(manifest.read_text())
    content["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(content))


def test_control_what_would_be_another_training_is_refused(place):
    before = factory.snapshot(place / "lora" / "run")
    refused(sft(place / "lora" / "recipe.yaml", "seed=6"), "seed: was 5, is 6")
    rows = place / "lora" / "one.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    refused(sft(place / "lora" / "recipe.yaml"), "one.jsonl")
    after = factory.snapshot(place / "lora" / "run")
    assert [name for name in differing(before, after) if name != "run.lock"] == ["manifest.json"]
