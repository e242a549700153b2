"""Preparing data: rows become samples once, whole or not at all, the same whoever works on it."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from chat_factory import write_aquila_tokenizer, write_sentencepiece_tokenizer
from paths import SHARED

from aquila_pd import AquilaTokenizer
from aquila_pd.data import building, encoding
from aquila_pd.data import prepare as prepare_module
from aquila_pd.data import samples as samples_module
from aquila_pd.data.best_fit import best_fit
from aquila_pd.data.packing import plan_epoch
from aquila_pd.data.prepare import PreparedSummary, prepare
from aquila_pd.data.samples import Samples
from aquila_pd.data.settings import DataSpec, Source
from aquila_pd.data.targets import encode_conversation
from aquila_pd.text.prompts import ChatPrompts
from aquila_pd.utils.errors import ConfigError, DataError, OutputError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> AquilaTokenizer:
    return AquilaTokenizer.from_pretrained(str(write_aquila_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(scope="module")
def prompts(tokenizer) -> ChatPrompts:
    return ChatPrompts(tokenizer, "aquila-v1")


def row(*texts: str, **more) -> dict:
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": said, **more}


def rows(count: int, *, start: int = 0) -> list[dict]:
    """Rows that differ in words and length."""
    return [row(f"question {i}?", f"answer {i} " + "word " * (i % 17)) for i in range(start, start + count)]


def write_rows(path: Path, content: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in content), encoding="utf-8")
    return path


def spec(*files: Path, weight: float = 1.0, **more) -> DataSpec:
    return DataSpec(train=(Source(tuple(map(str, files)), weight=weight),), **more)


def made(folder: Path, spec: DataSpec, prompts: ChatPrompts, **more) -> PreparedSummary:
    return prepare(spec, prompts, **{"length": 256, "seed": 3, "folder": folder, "workers": 1, **more})


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def messages_of(value: dict) -> list[dict]:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in value["conversations"]]


# ------------------------------------------------------------------------------------------------ what is made


def test_every_row_is_a_sample_with_its_ids_targets_and_origin(tmp_path, prompts):
    first, second = rows(5), [row("你好", "🙂 </s>", "q", "a"), *rows(3, start=50)]
    files = [write_rows(tmp_path / "a.jsonl", first), write_rows(tmp_path / "b.jsonl", second)]
    summary = made(tmp_path / "out", spec(*files), prompts)
    samples = Samples.open(tmp_path / "out" / "train", verify=True)
    assert len(samples) == 9 == summary.train["samples"] == summary.train["rows"]
    for number, value in enumerate(first + second):
        expected = encode_conversation(prompts, messages_of(value))
        ids, is_target = samples.sample(number)
        assert np.array_equal(ids, expected.ids) and np.array_equal(is_target, expected.is_target)
        file, line = (files[0], number + 1) if number < 5 else (files[1], number - 4)
        assert samples.origin(number) == (str(file), line, 0)
    assert summary.held_out is None and not (tmp_path / "out" / "held_out").exists()
    assert summary.train["tokens"] == samples.lengths.sum()
    assert summary.train["targets"] == samples.target_counts.sum()
    assert not summary.is_reused and not list(tmp_path.glob("*.partial")) and not list((tmp_path / "out").glob(".*"))
    assert summary.counters["kept"] == 9


def test_long_rows_are_split_into_parts_that_are_named(tmp_path, prompts):
    file = write_rows(
        tmp_path / "a.jsonl", [row("q", "a"), row(*(f"text {i} " + "x" * 60 for i in range(8))), row("Q", "A")]
    )
    summary = made(tmp_path / "out", spec(file), prompts, length=200)
    samples = Samples.open(tmp_path / "out" / "train")
    origins = [samples.origin(i)[1:] for i in range(len(samples))]
    assert origins[0] == (1, 0) and origins[-1] == (3, 0) and origins[1:-1] == [(2, i) for i in range(len(samples) - 2)]
    assert summary.counters["split"] == 1 and samples.lengths.max() <= 200 < samples.lengths.sum()
    assert summary.train["rows"] == 3


@pytest.mark.parametrize(("overlong", "rule", "kept"), [("drop", "too_long", 1), ("truncate", "truncated", 2)])
def test_long_rows_are_dropped_or_truncated_and_counted(tmp_path, prompts, overlong, rule, kept):
    file = write_rows(tmp_path / "a.jsonl", [row("q", "a"), row(*(f"text {i} " + "x" * 60 for i in range(8)))])
    summary = made(tmp_path / "out", spec(file, overlong=overlong), prompts, length=200)
    assert summary.train["samples"] == kept and summary.counters[rule] == 1


def test_rows_are_held_out_and_seen_once_there(tmp_path, prompts):
    file = write_rows(tmp_path / "a.jsonl", rows(200))
    summary = made(tmp_path / "out", spec(file, weight=2.5, held_out=0.2), prompts)
    train, held_out = (Samples.open(tmp_path / "out" / part) for part in ("train", "held_out"))
    assert len(train) + len(held_out) == 200 and 20 < len(held_out) < 60
    lines = [[samples.origin(i).row for i in range(len(samples))] for samples in (train, held_out)]
    assert sorted(lines[0] + lines[1]) == list(range(1, 201))
    assert set(train.records["weight"]) == {2.5} and set(held_out.records["weight"]) == {1}
    assert summary.held_out["samples"] == len(held_out) == summary.counters["held_out"]


def test_files_of_evaluation_are_held_out(tmp_path, prompts):
    train, evaluate = write_rows(tmp_path / "t.jsonl", rows(9)), write_rows(tmp_path / "e.jsonl", rows(4, start=7))
    made(tmp_path / "out", spec(train, evaluate=(Source((str(evaluate),)),)), prompts)
    held_out = Samples.open(tmp_path / "out" / "held_out")
    assert {held_out.origin(i).file for i in range(len(held_out))} == {str(evaluate)} and len(held_out) == 4
    assert len(Samples.open(tmp_path / "out" / "train")) == 7  # two rows are in both


def test_a_template_without_system_messages_gets_them_in_front_of_the_first_turn(tmp_path, tokenizer):
    value = {"conversations": [{"from": "system", "value": "be brief"}, *row("q", "a")["conversations"]]}
    file = write_rows(tmp_path / "a.jsonl", [value])
    texts = []
    for name in ("aquila-v1", "aquila-v2"):
        made(tmp_path / name, spec(file), ChatPrompts(tokenizer, name))
        texts.append(tokenizer.decode(Samples.open(tmp_path / name / "train").sample(0)[0]))
    assert texts == [
        "<|startofpiece|>be brief\n\nq<|endofpiece|>a</s>",
        "be brief\n\n<|startofpiece|>q<|endofpiece|>a</s>",
    ]


def test_sentencepiece_vocabularies_are_prepared_too(tmp_path):
    tokenizer = AquilaTokenizer.from_pretrained(str(write_sentencepiece_tokenizer(tmp_path / "tokenizer")))
    file = write_rows(tmp_path / "a.jsonl", [row("hello", "world")])
    made(tmp_path / "out", spec(file), ChatPrompts(tokenizer, "ziya"))
    ids, is_target = Samples.open(tmp_path / "out" / "train").sample(0)
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id and is_target[-1] and not is_target[0]


def test_a_row_that_cannot_be_written_is_counted_and_named(tmp_path, tokenizer):
    import copy

    picky = copy.deepcopy(tokenizer)
    picky.init_chat_template(
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    )
    file = write_rows(tmp_path / "a.jsonl", [row("q", "a"), row("bad", "a"), row("q2", "a")])
    notes = []
    summary = made(tmp_path / "out", spec(file), ChatPrompts(picky), note=notes.append)
    assert summary.train["samples"] == 2 and summary.counters["unwritable"] == 1
    assert summary.manifest["unwritable"][0].startswith(f"{file}:2: ") and f"{file}:2: " in " ".join(notes)


def test_nothing_left_to_train_or_evaluate_on_is_an_error_with_the_counts(tmp_path, prompts):
    long = write_rows(tmp_path / "long.jsonl", [row("q" * 300, "a")])
    with pytest.raises(DataError, match=r"(?s)No sample is left to train on:\n.* too_long"):
        made(tmp_path / "out", spec(long), prompts, length=100)
    short = write_rows(tmp_path / "short.jsonl", rows(2))
    with pytest.raises(DataError, match="No sample is left to evaluate on"):
        made(tmp_path / "out", spec(short, evaluate=(Source((str(long),)),)), prompts, length=100)
    with pytest.raises(ConfigError, match="hold nothing to learn"):
        made(tmp_path / "out", spec(short), prompts, length=1)
    with pytest.raises(ConfigError, match="number of workers"):
        made(tmp_path / "out", spec(short), prompts, workers=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.jsonl", "short.jsonl"]


def test_progress_is_told(tmp_path, prompts, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 10)
    files = [write_rows(tmp_path / name, rows(20, start=start)) for name, start in (("a.jsonl", 0), ("b.jsonl", 20))]
    told = []
    made(tmp_path / "out", spec(*files), prompts, progress=told.append)
    assert [(progress.rows, progress.file, progress.files) for progress in told] == [
        (10, 1, 2),
        (20, 1, 2),
        (30, 2, 2),
        (40, 2, 2),
    ]
    assert told[-1].tokens == Samples.open(tmp_path / "out" / "train").lengths.sum()


# ------------------------------------------------------------------------------------------------ real rows


@pytest.mark.parametrize(("template", "length"), [("aquila-v1", 2048), ("aquila-legacy", 2048), ("aquila-legacy", 512)])
def test_real_rows_are_in_the_fewest_packs_and_seen_more_often_with_hardly_any_padding(
    tmp_path, shared, template, length
):
    prompts = ChatPrompts(AquilaTokenizer.from_pretrained(str(shared / "tokenizer")), template)
    summary = made(tmp_path / "out", spec(SHARED / "data" / "*.jsonl", weight=20), prompts, length=length)
    assert summary.counters["no_target"] == summary.counters["unwritable"] == 0 and summary.train["rows"] == 773
    samples = Samples.open(tmp_path / "out" / "train")
    plan = plan_epoch(samples, length=length, seed=1, epoch=0, folder=tmp_path / "plans")
    tokens = int(samples.lengths.sum())
    assert plan.token_counts.sum() == 20 * tokens and plan.padding_share < 0.01
    # Once each they are 100,000 tokens: of so few packs, what the last one leaves open may be more than 1 %.
    assert len(best_fit(samples.lengths, length)[1]) == -(-tokens // length)


# ------------------------------------------------------------------------------------------------ the same again


def test_the_same_inputs_are_found_again_and_said(tmp_path, prompts, monkeypatch):
    file = write_rows(tmp_path / "a.jsonl", rows(20))
    before = made(tmp_path / "out", spec(file), prompts)
    written = content(tmp_path / "out")
    monkeypatch.setattr(prepare_module, "building", lambda folder: pytest.fail("made again"))
    again = made(tmp_path / "out", spec(file, max_bad_lines=7), prompts)
    assert again.is_reused and again.manifest == before.manifest and content(tmp_path / "out") == written


def test_files_that_moved_or_were_touched_are_the_same_inputs(tmp_path, prompts):
    file = write_rows(tmp_path / "a.jsonl", rows(20))
    made(tmp_path / "out", spec(file), prompts)
    os.utime(file, (1, 1))
    assert made(tmp_path / "out", spec(file), prompts).is_reused
    file.rename(tmp_path / "b.jsonl")
    assert made(tmp_path / "out", spec(tmp_path / "b.jsonl"), prompts).is_reused


def test_other_inputs_are_an_error_that_says_what_differs(tmp_path, prompts, tokenizer):
    file, other = write_rows(tmp_path / "a.jsonl", rows(20)), write_rows(tmp_path / "b.jsonl", rows(3))
    made(tmp_path / "out", spec(file), prompts)
    written = content(tmp_path / "out")

    def refused(spec: DataSpec, prompts=prompts, **more) -> str:
        with pytest.raises(DataError, match="was prepared of something else") as error:
            made(tmp_path / "out", spec, prompts, **more)
        assert content(tmp_path / "out") == written
        return str(error.value).split("\n", 1)[1].rsplit("\n", 1)[0].strip()

    assert refused(spec(file), length=128) == "length: prepared with 256, now 128"
    assert refused(spec(file), seed=4) == "seed: prepared with 3, now 4"
    assert refused(spec(file), ChatPrompts(tokenizer, "aquila")) == "template: prepared with aquila-v1, now aquila"
    assert refused(spec(file, overlong="drop")) == 'overlong: prepared with "split", now "drop"'
    assert refused(spec(file, sources=("x*",))) == 'sources: prepared with [], now ["x*"]'
    assert refused(spec(file, other)) == f"file {other}: was not among them"
    assert refused(spec(other)) == f"file {file}: is not among them now\n  file {other}: was not among them"
    assert "holds something else, or is read in another way" in refused(spec(file, weight=2))
    write_rows(file, rows(21))
    assert refused(spec(file)) == f"file {file}: holds something else, or is read in another way"
    more = AquilaTokenizer.from_pretrained(str(write_aquila_tokenizer(tmp_path / "tokenizer")))
    more.add_tokens(["<new>"])
    write_rows(file, rows(20))
    assert refused(spec(file), ChatPrompts(more, "aquila-v1")) == "tokenizer: another one than it was prepared with"


def test_other_bytes_of_the_same_number_are_other_inputs(tmp_path, prompts):
    file = write_rows(tmp_path / "a.jsonl", [row("q", "a"), row("r", "b")])
    made(tmp_path / "out", spec(file), prompts)
    write_rows(file, [row("q", "a"), row("r", "c")])
    os.utime(file, ns=(1, 1))
    with pytest.raises(DataError, match="holds something else"):
        made(tmp_path / "out", spec(file), prompts)


def test_two_files_in_another_order_are_other_inputs(tmp_path, prompts):
    files = [write_rows(tmp_path / f"{i}.jsonl", rows(3, start=i)) for i in (0, 10)]
    made(tmp_path / "out", spec(*files), prompts)
    with pytest.raises(DataError, match="in another order"):
        made(tmp_path / "out", spec(*reversed(files)), prompts)


def test_what_is_no_prepared_folder_is_left_alone(tmp_path, prompts):
    file = write_rows(tmp_path / "a.jsonl", rows(3))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for name, what in (("mine", "holds no dataset.json"), ("a.jsonl", "is no folder")):
        with pytest.raises(DataError, match=what):
            made(tmp_path / name, spec(file), prompts)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work" and file.is_file()


def test_a_damaged_folder_is_not_used_again(tmp_path, prompts):
    file = write_rows(tmp_path / "a.jsonl", rows(3))
    made(tmp_path / "out", spec(file), prompts)
    tokens = tmp_path / "out" / "train" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(DataError, match="are damaged"):
        made(tmp_path / "out", spec(file), prompts)
    shutil.rmtree(tmp_path / "out" / "train")
    shutil.copytree(_another(tmp_path, prompts), tmp_path / "out" / "train")
    with pytest.raises(DataError, match=r"is not what dataset\.json says"):
        made(tmp_path / "out", spec(file), prompts)
    (tmp_path / "out" / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match="does not say what was prepared"):
        made(tmp_path / "out", spec(file), prompts)


def _another(tmp_path: Path, prompts: ChatPrompts) -> Path:
    made(tmp_path / "another", spec(write_rows(tmp_path / "another.jsonl", rows(4))), prompts)
    return tmp_path / "another" / "train"


def test_the_size_of_batches_changes_nothing(tmp_path, prompts, monkeypatch):
    file = write_rows(tmp_path / "a.jsonl", rows(90))
    written = []
    for size in (7, 64):
        monkeypatch.setattr(encoding, "BATCH", size)
        made(tmp_path / str(size), spec(file, held_out=0.2), prompts)
        written.append(content(tmp_path / str(size)))
    assert written[0] == written[1]


# ------------------------------------------------------------------------------------------------ whole or nothing


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken disk"), RuntimeError("bug")])
def test_whatever_stops_a_run_nothing_is_left(tmp_path, prompts, monkeypatch, error):
    file = write_rows(tmp_path / "a.jsonl", rows(20))

    def stop(*args: object) -> None:
        raise error

    monkeypatch.setattr(samples_module.SamplesWriter, "finish", stop)
    with pytest.raises(type(error)) as raised:
        made(tmp_path / "out", spec(file), prompts)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert any("Nothing was left behind" in note for note in raised.value.__notes__)


def test_a_full_disk_is_said(tmp_path, prompts, monkeypatch):
    def full(self, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(samples_module._Stream, "write", full)
    with pytest.raises(OutputError, match="is full"):
        made(tmp_path / "out", spec(write_rows(tmp_path / "a.jsonl", rows(5))), prompts)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_a_killed_run_has_left_is_no_matter(tmp_path, prompts):
    file = write_rows(tmp_path / "a.jsonl", rows(5))
    (tmp_path / "out.partial" / "train").mkdir(parents=True)
    (tmp_path / "out.partial" / ".lock").write_text("")
    (tmp_path / "out.partial" / "train" / "tokens.bin").write_bytes(b"half")
    (tmp_path / "out.partial" / "dataset.json").write_text("half")
    assert made(tmp_path / "out", spec(file), prompts).train["samples"] == 5
    assert not (tmp_path / "out.partial").exists()


def test_what_no_run_has_left_is_not_removed(tmp_path, prompts):
    file = write_rows(tmp_path / "a.jsonl", rows(5))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="was made by no run"):
        made(tmp_path / "out", spec(file), prompts)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years of work"


def test_ctrl_c_in_the_middle_leaves_nothing(tmp_path, prompts, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 5)
    file = write_rows(tmp_path / "a.jsonl", rows(20))

    def press(progress: object) -> None:
        assert list((tmp_path / "out.partial").iterdir()) and not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "out", spec(file), prompts, progress=press)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_two_runs_do_not_make_one_folder(tmp_path, prompts):
    file = write_rows(tmp_path / "a.jsonl", rows(5))
    with building.building(tmp_path / "out") as partial:
        (partial / "mine").write_text("x")
        with pytest.raises(OutputError, match="Another run is making"):
            made(tmp_path / "out", spec(file), prompts)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(OutputError, match="appeared"), building.building(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "theirs").is_file()
    with pytest.raises(OutputError, match="is there already"), building.building(tmp_path / "out"):
        pass


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, prompts):
    file = write_rows(tmp_path / "a.jsonl", rows(20))

    def change(progress: object) -> None:
        write_rows(file, rows(21))

    with pytest.raises(DataError, match="was changed while it was read"):
        made(tmp_path / "out", spec(file), prompts, progress=change)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path, prompts):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        made(tmp_path / "file" / "out", spec(write_rows(tmp_path / "a.jsonl", rows(5))), prompts)
