"""The README tells the truth: its commands and its Python run, on a tiny folder under the name it uses."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_converted_folder import write_tokenizer
from twins import torch_model

pytestmark = pytest.mark.slow  # each command and each piece of Python is a process that loads PaddleNLP

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "AquilaChat2-34B"
# Commands that this test is part of, or that the demo's test runs.
RUN_ELSEWHERE = {"make demo": "tests/test_demo.py", "make test": ".ci/run"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the model the README speaks of (tiny) and the project's convert/ beside it."""
    work = tmp_path_factory.mktemp("readme")
    torch_model("gqa", vocab_size=300, bos_token_id=1, eos_token_id=2).save_pretrained(work / MODEL)
    write_tokenizer(work / MODEL)
    shutil.copytree(ROOT / "convert", work / "convert")
    for line in "\n".join(blocks("bash")).splitlines():
        words = shlex.split(line)
        if not line or line in RUN_ELSEWHERE:
            continue
        if words[0] == "python":
            words[0] = sys.executable
        elif words[0] == "aquila-pd":
            words[:1] = [sys.executable, "-m", "aquila_pd.cli"]
        else:
            pytest.fail(f"README has a command no test runs: {line}")
        done = subprocess.run(words, cwd=work, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return work


def test_every_command_of_the_readme_runs(workplace):
    assert (workplace / f"{MODEL}-PD" / "model.safetensors").is_file()
    assert (workplace / "report.json").is_file()
    assert all(Path(ROOT, place).exists() for place in RUN_ELSEWHERE.values())


@pytest.mark.parametrize("number", range(2))
def test_the_python_of_the_readme_runs(workplace, number):
    code = blocks("python")[number]
    folder = workplace if MODEL in code else workplace / f"{MODEL}-PD"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(blocks("python")) == 2


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_option_of_the_converter_is_explained():
    text = subprocess.run(
        [sys.executable, str(ROOT / "convert" / "torch2paddle.py"), "--help"], capture_output=True, text=True
    ).stdout
    options = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--help"}
    assert options == set(re.findall(r"--[a-z][a-z-]+", README)) & options, "an option is missing in the README"
