"""--prefill-chunk and --no-prefix-caching: from the command line of each command to its engine."""

import inspect
import re

import pytest
from chat_factory import tiny_chat_folder

from aquila_pd.chat import batch, terminal
from aquila_pd.generation import Engine, SamplingParams
from aquila_pd.serving import command
from aquila_pd.text import loading
from aquila_pd.utils.errors import ConfigError

LOAD = loading.load  # which tests replace
COMMANDS = {
    "serve": (command, loading, ["--port", "0"]),
    "generate": (batch, batch, ["--prompt", "Hello"]),
    "chat": (terminal, terminal, []),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat_folder(tmp_path_factory.mktemp("options") / "chat", "aquila-v1")


@pytest.fixture(params=COMMANDS)
def started(request, monkeypatch):
    """started(*options) -> what the command asks load() for; the command ends there, with status 1."""
    module, loads, arguments = COMMANDS[request.param]

    def start(*options: str) -> dict:
        seen = []

        def load(folder, **asked):
            seen.append(asked)
            raise ConfigError("far enough")

        monkeypatch.setattr(loads, "load", load)
        assert module.main(["folder", *arguments, *options]) == 1
        return seen[0]

    return start


def test_options_reach_load(started, capsys):
    asked = started("--prefill-chunk", "64", "--no-prefix-caching")
    assert (asked["prefill_chunk"], asked["prefix_reuse"]) == (64, False)
    assert "far enough" in capsys.readouterr().err


def test_defaults_are_those_of_load_and_of_the_engine(started):
    asked = started()
    for function in (LOAD, Engine):
        defaults = inspect.signature(function).parameters
        assert {name: defaults[name].default for name in ("prefill_chunk", "prefix_reuse")} == {
            name: asked[name] for name in ("prefill_chunk", "prefix_reuse")
        }


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", ""])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_chunk_that_is_no_count_is_status_2_and_one_message(name, value, capsys):
    module, _, arguments = COMMANDS[name]
    with pytest.raises(SystemExit) as ended:
        module.main(["folder", *arguments, f"--prefill-chunk={value}"])
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert err.count("error:") == 1
    assert f"argument --prefill-chunk: '{value}' is no number of things; a whole number from 1" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_states_both_with_their_defaults(name, capsys):
    module, *_ = COMMANDS[name]
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--prefill-chunk N" in text and "(default: 512)" in text and "--no-prefix-caching" in text


def test_an_engine_is_built_with_them(folder):
    params = SamplingParams(max_new_tokens=2, temperature=0)
    found = {}
    for caching in (True, False):
        engine = loading.load(folder, threads=1, prefill_chunk=4, prefix_reuse=caching).engine
        prompt = [5, 6, 7, 8, 9] * 5
        sequences = [engine.generate([prompt], params)[0][0] for _ in range(2)]
        found[caching] = [(s.reused, s.tokens) for s in sequences], engine.stats.steps
    tokens = found[True][0][0][1]
    # 25 prompt tokens by fours are 7 steps, the last of which gives the first new token
    assert found[False] == ([(0, tokens), (0, tokens)], 16)
    assert found[True] == ([(0, tokens), (24, tokens)], 8 + 2)


def test_generate_gives_the_same_text_with_any_of_them(folder, capsys):
    texts = []
    for options in ([], ["--prefill-chunk", "1"], ["--no-prefix-caching"]):
        assert batch.main([str(folder), "--threads", "1", "--temperature", "0", "--prompt", "Hello you", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 5
