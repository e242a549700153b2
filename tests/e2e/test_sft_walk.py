"""The walk from rows to a tuned model, as a person would start it, on a tiny model; each in a warm process."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from chat_factory import tiny_chat_folder
from fork_server import warm
from paths import ROOT
from safetensors.numpy import load_file

FAST = "stages.0.optim.lr=2e-2"  # random weights move little in a dozen steps with less


def walk(folder: Path, *changes: str) -> subprocess.CompletedProcess:
    """The walk with everything it makes in a folder, on the rows and the recipe beside it."""
    model = tiny_chat_folder(folder / "tiny", "aquila-v1")
    command = [ROOT / "examples" / "sft_walk.py", "--model", model, "--output", folder / "walk", *changes]
    return warm().run(command, cwd=folder, timeout=600)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    done = walk(folder, FAST)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_the_loss_on_rows_held_out_falls_and_the_answer_takes_up_the_habit(walked):
    folder, said = walked
    before, after = map(float, re.search(r"^Held-out loss  (\S+) before, (\S+) after$", said, re.MULTILINE).groups())
    assert after < 0.8 * before  # 5.94 to 4.50; nothing learned is log(320) = 5.77
    texts = [json.loads((folder / "walk" / name).read_text())["text"] for name in ("before.jsonl", "after.jsonl")]
    assert texts[0] != texts[1] and "word" in texts[1] and "word" not in texts[0]


def test_every_command_is_shown_as_one_would_type_it(walked):
    typed = [shlex.split(line)[1:] for line in walked[1].splitlines() if line.startswith("$ ")]
    assert [words[:2] for words in typed if words[1] == "data"] == [["aquila-pd", "data"]] * 2
    assert [words[1] for words in typed] == [
        "data", "data", "generate", "sft", "sft", "sft", "export", "generate", "to-torch",
    ]  # fmt: skip
    recipe, *changes = typed[5][2:]
    assert Path(recipe).is_file() and FAST in changes


def test_what_goes_back_to_hugging_face_is_the_tuned_model(walked):
    folder, _ = walked
    there, here = (load_file(folder / place / "model.safetensors") for place in ("walk/model-HF", "tiny"))
    name = "layers.0.mlp.up_proj.weight"
    (base,) = (array for key, array in here.items() if key.endswith(name))
    moved = np.abs(there["model." + name].T - base).max()  # torch keeps [out, in]
    assert 1e-4 < moved < 1.0
    embeddings = [next(tensors[key] for key in tensors if "embed_tokens" in key) for tensors in (there, here)]
    assert np.array_equal(*embeddings)  # what has no adapter stays


def test_a_walk_that_learns_nothing_says_so(tmp_path):
    done = walk(tmp_path, "stages.0.optim.lr=1e-20")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^Held-out loss  (\S+) before, \1 after$", done.stdout, re.MULTILINE)
