"""`aquila-pd generate`: rows in, rows out, in their order; what fails says so and stops nothing else."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from chat_factory import tiny_chat_folder

from aquila_pd.chat import batch
from aquila_pd.generation import Engine, SamplingParams, sampler
from aquila_pd.text.loading import load
from aquila_pd.utils import progress

GREEDY = ["--threads", "1", "--temperature", "0", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_chat_folder(tmp_path_factory.mktemp("batch") / "chat", "aquila-v1")


@pytest.fixture
def generate(folder, capsys):
    """generate(*options) -> (status, stdout, stderr), greedily."""

    def run(*options: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = batch.main([str(folder), *GREEDY, *map(str, options)])
        return status, *capsys.readouterr()

    return run


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


PROMPTS = ["Hello", "please", "你好", "The quick brown fox", "北京", "a", "🙂", "x y z"]


def test_results_come_in_the_order_of_the_rows_and_are_those_of_each_alone(generate, folder, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", *({"prompt": p, "id": i} for i, p in enumerate(PROMPTS)))
    status, out, err = generate("--file", file, "--slots", "3", "--output", tmp_path / "out.jsonl")
    assert (status, out) == (0, "")
    assert re.fullmatch(r"8 rows; \d+ tokens, .* tokens/s\n", err)
    rows = read_rows((tmp_path / "out.jsonl").read_text())
    assert [(row["prompt"], row["id"]) for row in rows] == [(p, i) for i, p in enumerate(PROMPTS)]
    loaded = load(folder, threads=1)
    params = SamplingParams(temperature=0, max_new_tokens=8, stop_ids=loaded.stop_ids)
    for row in rows:
        ids = loaded.tokenizer.encode(row["prompt"])["input_ids"]
        (sequence,) = loaded.engine.generate([ids], params)[0]
        assert row["text"] == loaded.tokenizer.decode(sequence.tokens, skip_special_tokens=True)
        assert (row["tokens"], row["prompt_tokens"]) == (len(sequence.tokens), len(ids))
        assert row["finish_reason"] == sequence.finish_reason
    assert len({row["text"] for row in rows}) == len(rows), "control: answers differ, so an exchanged one is seen"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_rows_that_finish_early_wait_for_those_before_them(generate, tmp_path, monkeypatch):
    lengths = {"Hello": 8, "please": 2}
    file = write_rows(tmp_path / "in.jsonl", *({"prompt": p} for p in lengths))

    def choose(logits, sequence):
        return 319 if len(sequence.prompt) == 2 and len(sequence.tokens) >= 1 and sequence.number == 1 else 40

    monkeypatch.setattr(sampler, "choose", choose)
    _, out, _ = generate("--file", file)
    assert [(row["prompt"], row["tokens"], row["finish_reason"]) for row in read_rows(out)] == [
        ("Hello", 8, "length"),
        ("please", 2, "stop"),
    ]


def test_a_long_run_says_how_far_it_is(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0)
    file = write_rows(tmp_path / "in.jsonl", {"prompt": "Hello"}, {"prompt": "a"})
    lines = generate("--file", file)[2].splitlines()
    assert [line.split(",")[0] for line in lines[:2]] == ["  1 of 2 rows", "  2 of 2 rows"]
    assert lines[2].startswith("2 rows; 16 tokens")


def test_messages_and_chat_use_the_template_and_plain_prompts_do_not(generate, tmp_path, monkeypatch):
    seen, add = [], Engine.add
    monkeypatch.setattr(Engine, "add", lambda self, ids, *rest: seen.append(len(ids)) or add(self, ids, *rest))
    said = [{"role": "user", "content": "Hello"}]
    file = write_rows(tmp_path / "in.jsonl", {"prompt": "Hello"}, {"messages": said})
    plain, chat = read_rows(generate("--file", file)[1])
    assert chat["messages"] == said and seen[1] == seen[0] + 2
    seen.clear()
    plain_as_chat, same = read_rows(generate("--file", file, "--chat")[1])
    assert seen[0] == seen[1]
    assert plain_as_chat["text"] == same["text"] == chat["text"] != plain["text"]


def test_each_row_has_its_own_seed(generate, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", {"prompt": "Hello"}, {"prompt": "Hello"})
    runs = [read_rows(generate("--file", file, "--temperature", "1", "--seed", seed)[1]) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert len({row["text"] for row in (*runs[0], *runs[2])}) == 3  # 1, 2; 2, 3


def test_one_prompt_is_printed_as_it_comes(generate, monkeypatch):
    said, step = [], Engine.step
    monkeypatch.setattr(batch, "_say", lambda text: said.append((len(steps), text)))
    steps: list[int] = []
    monkeypatch.setattr(Engine, "step", lambda self: steps.append(1) or step(self))
    status, out, err = generate("--prompt", "Hello")
    assert (status, out, err) == (0, "", "")
    assert len({when for when, _ in said}) > 3
    monkeypatch.undo()
    assert generate("--prompt", "Hello")[1] == "".join(text for _, text in said)


def test_several_prompts_are_printed_each_under_its_own(generate):
    one, two = generate("--prompt", "Hello")[1], generate("--prompt", "你好")[1]
    assert generate("--prompt", "Hello", "--prompt", "你好")[1] == f"==> Hello <==\n{one}==> 你好 <==\n{two}"


# ---------------------------------------------------------------------------------------------- rows that fail


def test_rows_that_fail_say_so_and_the_others_complete(generate, tmp_path, monkeypatch):
    finite, seen = sampler.finite, []
    prompts = ["Hello", "word " * 300, "", "please", "你好"]

    def bad_third(logits):
        seen.append(1)
        return len(seen) != 2 and finite(logits)  # of the first step: Hello, please, 你好

    monkeypatch.setattr(sampler, "finite", bad_third)
    file = write_rows(tmp_path / "in.jsonl", *({"prompt": p} for p in prompts))
    status, out, err = generate("--file", file)
    rows = read_rows(out)
    assert status == 1 and "5 rows, 3 of them failed" in err
    assert [row["finish_reason"] for row in rows] == ["length", "error", "error", "error", "length"]
    assert [row["prompt"] for row in rows] == prompts
    errors = [row.get("error", "") for row in rows]
    assert "fit" in errors[1] and "empty" in errors[2] and "NaN or infinite" in errors[3]
    assert not errors[0] and not errors[4] and rows[0]["text"] and rows[4]["text"]


def test_a_failing_prompt_is_an_error_and_the_status(generate):
    status, out, err = generate("--prompt", "", "--prompt", "Hello")
    assert status == 1 and "error: --prompt 1: The prompt is empty" in err and "==> Hello <==" in out


def test_bad_lines_are_all_named_before_anything_is_loaded(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "load", lambda *args, **options: pytest.fail("loaded"))
    file = write_rows(
        tmp_path / "in.jsonl",
        {"prompt": "fine"},
        "{",
        "",
        "[1]",
        {"text": "x"},
        {"prompt": "x", "messages": []},
        {"prompt": 7},
        {"prompt": "x", "tokens": 1},
    )
    status, out, err = generate("--file", file, "--output", tmp_path / "out.jsonl")
    assert (status, out) == (1, "")
    assert re.findall(r"in\.jsonl, line (\d+)", err) == ["2", "4", "5", "6", "7", "8"]
    assert not (tmp_path / "out.jsonl").exists()


def test_conversations_that_cannot_be_written_are_named_before_anything_runs(generate, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "step", lambda self: pytest.fail("ran"))
    file = write_rows(
        tmp_path / "in.jsonl",
        {"messages": [{"role": "user", "content": "fine"}]},
        {"messages": []},
        {"messages": [{"role": "robot", "content": "x"}]},
        '{"prompt": "\\ud800"}',
    )
    status, out, err = generate("--file", file)
    assert (status, out) == (1, "")
    assert re.findall(r"in\.jsonl, line (\d+)", err) == ["2", "3", "4"]


def test_chat_without_a_template_is_an_error(tmp_path, capsys):
    folder = tiny_chat_folder(tmp_path / "base", None)
    assert batch.main([str(folder), *GREEDY, "--prompt", "x", "--chat"]) == 1
    assert "has no chat template" in capsys.readouterr().err
    assert batch.main([str(folder), *GREEDY, "--prompt", "x"]) == 0


def test_files_that_are_none_are_named(generate, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, words in {"absent.jsonl": "does not exist", "empty.jsonl": "holds no rows", ".": "folder"}.items():
        status, _, err = generate("--file", tmp_path / name)
        assert status == 1 and words in err


# --------------------------------------------------------------------------------------------------- the output


def test_an_earlier_output_is_replaced_only_when_asked_and_when_the_new_one_is_complete(generate, tmp_path):
    file, out = write_rows(tmp_path / "in.jsonl", {"prompt": "Hello"}), tmp_path / "out.jsonl"
    out.write_text("mine")
    status, _, err = generate("--file", file, "--output", out)
    assert status == 1 and "is there already" in err and out.read_text() == "mine"
    assert generate("--file", file, "--output", out, "--overwrite")[0] == 0
    assert read_rows(out.read_text())[0]["prompt"] == "Hello"
    status, _, err = generate("--file", file, "--output", file, "--overwrite")
    assert status == 1 and "prompts come from" in err
    assert generate("--file", file, "--output", tmp_path)[0] == 1
    assert generate("--prompt", "Hello", "--output", tmp_path / "new" / "out.jsonl")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_finished_rows_under_another_name(generate, tmp_path, monkeypatch, number):
    file = write_rows(tmp_path / "in.jsonl", *({"prompt": p} for p in PROMPTS))
    out, step, steps = tmp_path / "out.jsonl", Engine.step, []
    out.write_text("earlier")

    def interrupted(self):
        steps.append(1)
        if len(steps) == 12:
            os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(Engine, "step", interrupted)
    status, _, err = generate("--file", file, "--slots", "2", "--output", out, "--overwrite")
    assert status == 128 + number and "rows of the results are in" in err
    assert out.read_text() == "earlier"
    kept = read_rows((tmp_path / "out.jsonl.partial").read_text())
    assert [row["prompt"] for row in kept] == PROMPTS[: len(kept)] and 0 < len(kept) < len(PROMPTS)


def test_a_full_disk_is_one_message(generate, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / "out.jsonl.partial").symlink_to("/dev/full")
    file = write_rows(tmp_path / "in.jsonl", {"prompt": "Hello"})
    status, _, err = generate("--file", file, "--output", tmp_path / "out.jsonl")
    assert status == 1 and "No space left" in err and "Traceback" not in err
    assert not (tmp_path / "out.jsonl").exists()


def test_what_a_model_says_cannot_steer_a_terminal(monkeypatch, capsys):
    batch._say("a\x1b[2J")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    batch._say("a\x1b[2J")
    assert capsys.readouterr().out == "a\x1b[2Ja␛[2J"
