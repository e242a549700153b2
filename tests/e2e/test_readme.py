"""The README tells the truth: its commands and its Python run, on a tiny folder under the name it uses.

They run in forks of a process that has loaded PaddleNLP; that a fresh one can is for test_converted_folder.py and the
tests of the commands.
"""

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from chat_factory import tiny_torch_folder
from fork_server import warm
from paths import ROOT
from recipes_factory import example_rows, small_recipes

README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "AquilaChat2-34B"
# Commands that this test is part of, that the demo's test runs, or that the test of the client's snippet runs.
RUN_ELSEWHERE = {
    "make demo": "tests/e2e/test_demo.py",
    "make test": ".ci/run",
    "python examples/sft_walk.py": "tests/e2e/test_sft_walk.py",
    f"aquila-pd serve {MODEL}-PD --port 8000": "tests/e2e/test_readme.py",
}
PROGRAMS = {"python": [], "aquila-pd": ["-m", "aquila_pd.cli"]}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the model the README speaks of (tiny), rows, and the project's convert/ and recipes/ beside it."""
    work = tmp_path_factory.mktemp("readme")
    tiny_torch_folder(work / MODEL, max_position_embeddings=2048)
    shutil.copytree(ROOT / "convert", work / "convert")
    small_recipes(work / "recipes")
    example_rows(work / "rows.jsonl")
    for line in "\n".join(blocks("bash")).splitlines():
        words = shlex.split(line)
        if not line or line in RUN_ELSEWHERE:
            continue
        if words[0] not in PROGRAMS:
            pytest.fail(f"README has a command no test runs: {line}")
        done = warm().run([*PROGRAMS[words[0]], *words[1:]], cwd=work, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return work


def test_every_command_of_the_readme_runs(workplace):
    assert (workplace / f"{MODEL}-PD" / "model.safetensors").is_file()
    assert (workplace / "report.json").is_file()
    assert (workplace / "tuned-HF" / "model.safetensors").is_file()
    assert all(Path(ROOT, place).exists() for place in RUN_ELSEWHERE.values())


@contextmanager
def served(workplace: Path) -> Iterator[str]:
    """The README's server, on a free port: the address it says it has."""
    (line,) = (line for line in RUN_ELSEWHERE if line.startswith("aquila-pd serve"))
    words = [*PROGRAMS["aquila-pd"], *shlex.split(line.replace("8000", "0"))[1:]]
    reading, writing = os.pipe()
    process = warm().start(words, cwd=workplace, stdout=writing, stderr=writing)
    os.close(writing)
    with open(reading) as output:
        try:
            said = next((line for line in output if "http://" in line), None)
            assert said, "the server has ended before it was ready"
            yield re.search(r"http://\S+", said)[0]
        finally:
            process.terminate()
            assert process.wait(60) == 0


PYTHON = blocks("python")


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_the_python_of_the_readme_runs(workplace, number):
    code = PYTHON[number]
    folder = workplace if MODEL in code else workplace / f"{MODEL}-PD"
    with served(workplace) if "OpenAI(" in code else nullcontext("http://127.0.0.1:8000") as address:
        code = code.replace("http://127.0.0.1:8000", address)
        done = warm().run(["-c", code], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or "print" not in code


def test_every_piece_of_python_that_the_readme_shows_is_there():
    assert [word in code for word, code in zip(("predict(", "OpenAI(", "generate("), PYTHON, strict=False)] == [
        True
    ] * 3


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_option_of_the_converter_is_explained():
    text = warm().run([ROOT / "convert" / "torch2paddle.py", "--help"]).stdout
    options = set(re.findall(r"--[a-z][a-z-]+", text)) - {"--help"}
    assert options == set(re.findall(r"--[a-z][a-z-]+", README)) & options, "an option is missing in the README"
