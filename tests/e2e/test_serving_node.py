"""OpenAI's npm package as a client of the server. Skipped where `make test` could not install it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chat_factory import tiny_chat_folder
from paths import SUPPORT
from serving_factory import running, wait_for

MODULES = Path(sys.prefix) / "node" / "node_modules"


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict:
    """What the JavaScript program printed, and whether the server was quiet soon after it hung up."""
    if shutil.which("node") is None or not (MODULES / "openai").is_dir():
        pytest.skip("no Node.js, or no npm package openai in the environment (`make test` installs it): not run")
    from aquila_pd.text.loading import load

    work = tmp_path_factory.mktemp("node")
    loaded = load(tiny_chat_folder(work / "tiny", "aquila-v1"), slots=2, threads=1)
    with running(loaded, work / "log") as server:
        command = ["node", str(SUPPORT / "node_client.mjs"), str(MODULES), f"{server.url}/v1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        wait_for(server.quiet)
    return json.loads(done.stdout)


def test_a_javascript_program_gets_the_same_answer_whole_and_streamed(said):
    assert said["whole"] and said["streamed"] == said["whole"]
    assert said["finishes"] == ["length"] and said["usage"]["completion_tokens"] == 20


def test_it_is_told_what_is_refused_and_what_is_there(said):
    assert said["refused"] == {"status": 400, "param": "tools", "type": "invalid_request_error"}
    assert said["models"] == ["tiny"] and said["completion"]["completion_tokens"] == 5
