"""docs/sft.md tells the truth: its tables are those of the program, its pictures what it shows, its commands run."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from chat_factory import tiny_torch_folder
from fork_server import warm
from paths import ROOT
from recipes_factory import example_rows, small_recipes

from aquila_pd.data import packing, pipeline, truncation
from aquila_pd.sft import command
from aquila_pd.sft.estimate.dry_run import dry_run
from aquila_pd.sft.estimate.rows import unknown
from aquila_pd.sft.estimate.stage import GIB, Machine, Model, memory_of
from aquila_pd.sft.recipe.load import load_recipe
from aquila_pd.sft.run import resuming

GUIDE = (ROOT / "docs" / "sft.md").read_text(encoding="utf-8")
RECIPES = ROOT / "recipes"


def table(head: str) -> list[list[str]]:
    """The cells of the table whose first header cell is this."""
    found = re.search(rf"^\| {re.escape(head)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", GUIDE, re.MULTILINE)
    assert found, f"the guide has no table of {head}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


# ------------------------------------------------------------------------------------------- tables of the program


def test_every_counter_is_explained_with_its_effect_in_the_order_it_is_met():
    rules = [*pipeline.RULES, *truncation.RULES]
    shown = [(name, row[1]) for row in table("counter") for name in code(row[0])]
    beside = {"language_unsure", "contaminated_kept"}  # named in the words of the row they belong to
    assert shown == [(rule.name, rule.effect) for rule in rules if rule.name not in beside]
    assert all(f"`{name}`" in GUIDE for name in beside)


def test_every_option_of_the_command_is_explained():
    known = {option for action in command.parser()._actions for option in action.option_strings if len(option) > 2}
    assert {code(row[0])[0] for row in table("option of `aquila-pd sft`")} == known - {"--help"}


def test_what_may_be_changed_while_a_run_is_under_way():
    (free, computed, *_) = (set(code(row[0])) for row in table("may be changed"))
    assert free - {"keep_best"} == resuming.FREE - {"output"}  # the place of a run has a line of its own
    assert computed == resuming.COMPUTED


# ------------------------------------------------------------------------------------------------- what fits

SIZES_34B = dict(hidden_size=6144, intermediate_size=24576, num_hidden_layers=60, num_attention_heads=48)
SIZES_7B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory) -> dict[str, Path]:
    """Folders with nothing but a config.json, of the published sizes."""
    from checkpoint_factory import config

    folders = {}
    for name, said, heads, positions in (("34b", SIZES_34B, 8, 4096), ("7b", SIZES_7B, 32, 2048)):
        folders[name] = tmp_path_factory.mktemp(name)
        full = config(**said, num_key_value_heads=heads, vocab_size=100_008, max_position_embeddings=positions)
        (folders[name] / "config.json").write_text(json.dumps(full))
    return folders


def needed(recipe: str, model: Path) -> dict[str, float]:
    """GiB on a card, by part."""
    stage = load_recipe(RECIPES / recipe, [f"model={model}"]).stages[0]
    found = memory_of(stage, Model.read(model), Machine.named(8, "A100-80GB"), unknown(stage))
    return {name: size / GIB for name, size in found.parts.items()} | {"all": found.total / GIB}


def test_the_table_of_what_fits_is_the_estimate(sizes):
    for cells in table("recipe"):
        (recipe,) = code(cells[0])
        part = needed(recipe, sizes["34b" if "34" in cells[0] else "7b"])
        part = {name: part.get(name, 0.0) for name in {*part, "weights in NF4"}}
        sums = (
            part["weights"] + part["weights in NF4"],
            part["gradients"] + part["optimizer"],
            part["activations"] + part["logits"] + part.get("unpacking NF4", 0),
            part["all"],
        )
        assert cells[2:] == [f"{size:.1f}" for size in sums], recipe


def test_every_recipe_but_the_tiny_one_is_in_the_table_of_what_fits():
    assert {code(row[0])[0] for row in table("recipe")} == {path.name for path in RECIPES.glob("*.yaml")} - {
        "tiny.yaml"
    }


def test_all_weights_of_34b_stand_in_the_way_and_those_of_7b_do_not(sizes, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"src": "Hello", "tgt": "Hello!"}\n')
    for model, fits in (("34b", False), ("7b", True)):
        changes = [f"model={sizes[model]}", f"stages.*.data.train.files={tmp_path / 'rows.jsonl'}"]
        found = dry_run(load_recipe(RECIPES / "infinity_two_stage.yaml", changes), Machine.named(8, "A100-80GB"))
        assert any("GiB on a device" in line for line in found.findings) is not fits, found.text


# -------------------------------------------------------------------------------------------------- pictures


def test_the_drawing_of_a_pack_is_the_programs():
    (drawn,) = (block for block in blocks("text") if "segment_ids" in block)
    of_the_program = [line.split()[:13] for line in packing.__doc__.splitlines()]  # a name and 12 places
    assert all(line.split()[:13] in of_the_program for line in drawn.splitlines())


def test_what_is_learned_is_what_the_preview_shows(shared):
    from aquila_pd.data.preview import marked, segments_of
    from aquila_pd.text.prompts import ChatPrompts
    from aquila_pd.tokenization.chat_templates import SYSTEM
    from aquila_pd.tokenizer import AquilaTokenizer

    (block,) = (block for block in blocks("text") if block.startswith("aquila-legacy"))
    shown: dict[str, list[str]] = {}
    for line in block.splitlines():
        name = line[:18].strip() or list(shown)[-1]
        shown.setdefault(name, []).append(line[18:])
    said = [("user", "Hello"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Good bye.")]
    tokenizer = AquilaTokenizer.from_pretrained(str(shared / "tokenizer"))
    for name, lines in shown.items():
        prompts = ChatPrompts(tokenizer, name)
        text = marked(segments_of(prompts, [{"role": role, "content": text} for role, text in said]), borders=False)
        assert "\n".join(lines) == text.replace(SYSTEM, "A chat between ..."), name


# -------------------------------------------------------------------------------------------------- commands

MODEL = "Aquila2-34B"
SERVED = "aquila-pd serve"  # test_readme.py and test_serving_*.py run servers
ALL_OF_THEM = """
import shlex, sys
from aquila_pd.cli import main
for line in sys.stdin.read().splitlines():
    print("$", line, flush=True)
    status = main(shlex.split(line)[1:])
    if status:
        sys.exit(f"{line}: {status}")
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder as the guide has it, with a tiny model and recipes that are small in its measure; all commands done."""
    work = tmp_path_factory.mktemp("guide")
    tiny_torch_folder(work / MODEL, max_position_embeddings=4096)
    small_recipes(work / "recipes")
    example_rows(work / "data" / "train.jsonl")
    here = [line for line in "".join(blocks("bash")).splitlines() if line.startswith("aquila-pd")]
    commands = [line for line in here if not line.startswith(SERVED)]
    assert len(commands) > 10 and len(here) == len(commands) + 1
    done = warm().run(["-c", ALL_OF_THEM], cwd=work, input="\n".join(commands), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return work


def test_every_command_of_the_guide_runs(workplace):
    for made in ("lengths.png", f"{MODEL}-tuned-HF/model.safetensors", "adapter-for-peft/adapter_model.safetensors"):
        assert (workplace / made).is_file(), made
    adapter = json.loads((workplace / "adapter-for-peft" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "BAAI/Aquila2-34B"


def test_the_run_folder_looks_as_it_is_drawn(workplace):
    (drawn,) = (block for block in blocks("text") if block.startswith("RUN/"))
    run = workplace / "runs" / "aquila2-34b-qlora"
    names = [name for line in drawn.splitlines()[1:] for name in re.split(r",? +", line.strip())[:2]]
    paths = [name.replace("STAGE", "tune").strip(",") for name in names if re.search(r"^(?!step).*(/|\.\w+)$", name)]
    assert len(paths) > 6
    missing = [path for path in paths if not (run / path).exists()]
    assert missing == ["ranks/"], "of one process alone"


def test_paddles_own_launcher_trains_on_two_machines_as_one_process_does(workplace):
    """Two launchers on this machine, one process each: the guide's command but for the address and the GPUs.

    The launchers are forks of a warm process; what they start are new ones, from the installed script.
    """
    (line,) = (line for line in "".join(blocks("bash")).splitlines() if "paddle.distributed.launch" in line)
    alone, both = workplace / "runs" / "aquila2-34b-qlora", workplace / "runs" / "two"
    recipe = ["recipes/aquila2_34b_qlora.yaml", f"output={both}"]
    prepared = warm().run(["-m", "aquila_pd.cli", "sft", *recipe, "--prepare"], cwd=workplace)
    assert prepared.returncode == 0, prepared.stderr
    from aquila_pd.sft.run.launch import _free_ports

    line = line.replace("10.0.0.1:8090", f"127.0.0.1:{_free_ports(1)[0]}").replace("runs/aquila2-34b-qlora", str(both))
    script = Path(sys.executable).with_name("aquila-pd")
    words = shlex.split(line.replace('"$(command -v aquila-pd)"', shlex.quote(str(script))))
    assert words[0] == "python" and "--nnodes" in words and script.is_file()
    words = words[1:]
    words[words.index("--nnodes") : words.index("--nnodes")] = ["--nproc_per_node", "1"]
    # an empty list of GPUs, which tests have, is taken for GPUs by the launcher
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    machines = []
    for number in range(2):
        words[words.index("--log_dir") + 1] = str(workplace / f"logs-{number}")
        with (workplace / f"machine-{number}.txt").open("w") as output:
            machines.append(warm().start(words, cwd=workplace, env=environment, stdout=output, stderr=output))
    try:
        statuses = [machine.wait(300) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert statuses == [0, 0], "".join((workplace / f"machine-{number}.txt").read_text() for number in range(2))
    losses = [losses_of(run / "log.jsonl") for run in (alone, both)]
    assert losses[0].keys() == losses[1].keys() and len(losses[0]) > 2
    # float32 sums in another order; losses near 6. Dropout differs by rank, and moves them in the third digit
    assert all(abs(losses[0][step] - losses[1][step]) < 0.02 for step in losses[0]), losses
    assert {record["devices"] for record in records(both / "log.jsonl") if record["kind"] == "step"} == {2}


def records(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def losses_of(log: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(log) if record["kind"] == "step"}


def test_the_messages_it_explains_are_those_of_the_program():
    """Each piece of a message, without what stands for names and numbers, is in a text of the program's."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "aquila_pd").rglob("*.py"))
    texts = re.sub(r"\"\s*\n\s*f?\"", "", source)  # a text over several lines of code
    for row in table("message"):
        pieces = [piece.strip(" ,") for piece in re.split(r"\.\.\.|, (?=No )", row[0])]
        assert all(piece in texts for piece in pieces), pieces


def test_links_lead_somewhere():
    for target in [*re.findall(r"\]\(([^)#:]+)\)", GUIDE), *re.findall(r"(?:tests|docs|examples)/\w+\.\w+", GUIDE)]:
        assert (ROOT / target).exists() or (ROOT / "docs" / target).exists(), target


def test_the_keys_of_the_guides_recipe_are_read(tmp_path):
    (text,) = blocks("yaml")
    (tmp_path / "two.yaml").write_text(text)
    foundation, chat = load_recipe(tmp_path / "two.yaml").stages
    assert (foundation.optim.lr, chat.optim.lr, chat.optim.warmup_steps) == (1e-4, 5e-5, 40)
    assert [source.weight for source in chat.data.train] == [1.0, 2.0]
