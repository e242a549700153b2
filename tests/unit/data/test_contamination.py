"""A benchmark's item in a row is found wherever it stands and however it is written; what everybody says is not."""

import json
import random
import tempfile
from pathlib import Path

import pytest
from effort import tries
from hypothesis import given, settings
from hypothesis import strategies as st
from sft_rows_factory import chat, run, said, spec_of, write_lines

from aquila_pd.data.contamination import Benchmarks
from aquila_pd.data.ngrams import words
from aquila_pd.utils.errors import DataError

DUCKS = (
    "Janet\u2019s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her "
    "friends every day with four. She sells the remainder at the farmers' market daily for $2 per fresh duck egg."
)
ANSWER = "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18"
CHINESE = "小明有十六只鸭子，每天下十六个蛋，他早餐吃三个，用四个给朋友烤松饼，其余的拿到市场上卖，每个两元。"


@pytest.fixture
def ducks(tmp_path) -> Benchmarks:
    return Benchmarks([str(write_lines(tmp_path / "test.jsonl", [{"question": "Short?", "answer": "1"}, item()]))])


def item(**more) -> dict:
    return {"question": DUCKS, "answer": ANSWER, **more}


def met(benchmarks: Benchmarks, *texts: str) -> list[tuple[int, int]]:
    """(item, words in a run) of what a row shares."""
    return [(overlap.item, overlap.words) for overlap in benchmarks.overlaps(said(*texts))]


COUNT = len(words(DUCKS))


@pytest.mark.parametrize(
    "text",
    [
        DUCKS,
        f"Solve this step by step, please.\n\n### Problem\n{DUCKS}\n\n### Solution",
        DUCKS.upper(),
        DUCKS.replace("’", "'").replace(",", "").replace(".", " .\n"),
        DUCKS.replace(" ", "  \u3000"),
        "、".join(DUCKS.split(" ")),
        "x " * 50_000 + DUCKS + " y" * 50_000,
    ],
)
def test_an_item_is_found_in_a_longer_prompt_however_it_is_written(ducks, text):
    assert met(ducks, text, "18") == [(2, COUNT)]
    assert met(ducks, "Tell me a story.", text) == [(2, COUNT)]  # in an answer too


@settings(max_examples=tries(50, 150), deadline=None, derandomize=True)
@given(st.text(max_size=40), st.text(max_size=40), st.integers(0, COUNT - 13), st.integers(0, 20))
def test_any_part_is_found_between_any_texts(before, after, start, more):
    told = words(DUCKS)
    part = told[start : start + 13 + more]
    text = f"{before} {' '.join(part)} {after}"
    with tempfile.TemporaryDirectory() as folder:
        benchmarks = Benchmarks([str(write_lines(Path(folder) / "test.jsonl", [{"question": DUCKS}]))])
    (found,) = benchmarks.overlaps(said(text, "x"))
    assert found.words >= len(part) and " ".join(part) in found.text
    assert benchmarks.overlaps(said(before, after)) == []  # control


def test_a_part_is_found_from_13_words_on(ducks):
    told = words(DUCKS)
    for start in (0, 7, COUNT - 13):
        assert met(ducks, "Well, " + " ".join(told[start : start + 13]) + " indeed", "x") == [(2, 13)]
        assert met(ducks, "Well, " + " ".join(told[start : start + 12]) + " indeed", "x") == []  # control


def test_a_word_between_ends_a_run(ducks):
    told = words(DUCKS)
    assert met(ducks, " ".join([*told[:12], "really", *told[12:24]]), "x") == []
    assert met(ducks, " ".join([*told[:12], "really", *told[12:25]]), "x") == [(2, 13)]


def test_numbers_are_words_that_have_to_be_the_same(ducks):
    other = DUCKS.replace("16 eggs", "17 eggs")
    assert met(ducks, other, "x") == [(2, COUNT - 4)]  # the run begins behind the number
    assert met(ducks, " ".join(words(other)[:12]), "x") == []


def test_answers_are_found_with_or_without_their_annotations(ducks):
    plain = "Janet sells 16 - 3 - 4 = 9 duck eggs a day. She makes 9 * 2 = $18 every day. #### 18"
    assert met(ducks, "q", plain) == met(ducks, "q", ANSWER) == [(2, len(words(plain)))]


def test_the_report_names_item_and_text(ducks):
    found = ducks.overlaps(said("Once more: " + DUCKS[:76], "x"))[0]
    assert (Path(found.benchmark).name, found.item) == ("test.jsonl", 2)
    assert found.text == "janets ducks lay 16 eggs per day she eats three for breakfast every"
    assert found.share == pytest.approx(13 / COUNT)


@pytest.mark.parametrize(
    "text",
    [
        "How many eggs does she sell every day at the market?",
        "She sells the remainder at the farmers' market.",
        "Please answer the following question. Think step by step and explain your reasoning before the final answer.",
        "You are a helpful assistant.",
        "",
        "!!!",
    ],
)
def test_short_common_phrases_are_no_contamination(ducks, text):
    assert met(ducks, text, text) == []


# ----------------------------------------------------------------------------------------------- Chinese, short items


def test_chinese_items_are_found_by_21_characters(tmp_path):
    benchmarks = Benchmarks([str(write_lines(tmp_path / "ceval.jsonl", [{"question": CHINESE}]))])
    told = words(CHINESE)
    assert met(benchmarks, f"请回答下面的问题：{CHINESE}谢谢！", "x") == [(1, len(told))]
    assert met(benchmarks, "".join(told[3:24]), "x") == [(1, 21)]
    assert met(benchmarks, "".join(told[3:23]), "x") == []
    assert met(benchmarks, "请根据以下内容回答问题，并给出理由。", "x") == []
    found = benchmarks.overlaps(said("".join(told[3:24]), "x"))[0]
    assert found.text == "".join(told[3:24])


def test_a_short_item_is_looked_for_as_a_whole(tmp_path):
    items = [
        {"question": "Which planet of the sun has the most moons?", "answer": "Saturn"},
        {"question": "Why is the sky blue?"},
    ]
    benchmarks = Benchmarks([str(write_lines(tmp_path / "short.jsonl", items))])
    assert met(benchmarks, "Tell me: which planet of the sun has the most moons? Answer in a word.", "x") == [(1, 9)]
    assert met(benchmarks, "Which planet of the sun has the most rings?", "x") == []
    assert met(benchmarks, "Why is the sky blue?", "x") == []  # five words: anybody may ask
    assert benchmarks.too_short == [1]


def test_how_a_benchmark_asks_is_no_contamination(tmp_path):
    asking = "Please choose the correct answer to fill in the blank to complete the given sentence below: "
    rng = random.Random(1)
    own = [" ".join(rng.choices([f"w{n}" for n in range(999)], k=20)) for _ in range(30)]
    items = [{"instruction": asking + text} for text in own]
    benchmarks = Benchmarks([str(write_lines(tmp_path / "many.jsonl", items))])
    assert met(benchmarks, asking + "the cat sat on the mat because it was warm and soft and red", "x") == []
    assert met(benchmarks, asking + " ".join(own[4].split()[:4]) + " and something else", "x") == []
    assert met(benchmarks, asking + own[4], "x")[0] == (5, 36)
    few = Benchmarks([str(write_lines(tmp_path / "few.jsonl", items[:3]))])
    assert met(few, asking + "the cat sat on the mat", "x")  # control: of three items it cannot be told


# --------------------------------------------------------------------------------------------------- kinds of files


def test_every_kind_of_benchmark_file_is_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    nested = {"question": {"stem": DUCKS, "choices": [{"text": "18", "label": "A"}]}}
    (tmp_path / "a.csv").write_text(f'question,choice0,answer\n"{DUCKS}",18,A\n', encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps([{"x": "y"}, item()]))
    (tmp_path / "c.json").write_text(json.dumps({"version": "1", "data": [{"x": "y"}, nested]}))
    pq.write_table(pa.Table.from_pylist([item(), item()]), tmp_path / "d.parquet")
    for name, number in {"a.csv": 2, "b.json": 2, "c.json": 2, "d.parquet": 1}.items():
        assert met(Benchmarks([str(tmp_path / name)]), DUCKS, "x")[0] == (number, COUNT), name


def test_files_of_one_name_are_told_apart(tmp_path):
    paths = [write_lines(tmp_path / folder / "test.jsonl", [item()]) for folder in ("a", "b")]
    found = Benchmarks([f"{tmp_path}/*/test.jsonl"]).overlaps(said(DUCKS, "x"))
    assert [overlap.benchmark for overlap in found] == [str(path) for path in paths]


def test_a_benchmark_that_is_damaged_or_says_nothing_is_refused(tmp_path):
    damaged = write_lines(tmp_path / "damaged.jsonl", [item()])
    damaged.write_bytes(damaged.read_bytes() + b"{torn")
    with pytest.raises(DataError, match="has to be whole"):
        Benchmarks([str(damaged)])
    with pytest.raises(DataError, match="holds no text of at least 8 words"):
        Benchmarks([str(write_lines(tmp_path / "labels.jsonl", [{"answer": "A"}]))])
    (tmp_path / "x.csv").write_text('a,"b')
    with pytest.raises(DataError, match="cannot be read as CSV"):
        Benchmarks([str(tmp_path / "x.csv")])
    with pytest.raises(DataError, match="no file fits"):
        Benchmarks(["/nowhere/*.jsonl"])


# --------------------------------------------------------------------------------------------------- in the pipeline


@pytest.fixture
def contaminated(tmp_path) -> dict:
    rows = [chat("Hi, tell me about ducks.", "They swim."), chat(f"Please: {DUCKS}", "18"), chat("q", "a")]
    bench = write_lines(tmp_path / "bench" / "gsm8k.jsonl", [{"question": "Short?"}, item()])
    return {"file": write_lines(tmp_path / "rows.jsonl", rows), "bench": bench}


def test_a_contaminated_row_is_dropped_counted_and_reported(contaminated):
    rows, counters, findings = run(spec_of(contaminated["file"], contamination=(str(contaminated["bench"]),)))
    assert [row.number for row in rows] == [1, 3] and counters["contaminated"] == 1
    found = findings.contamination
    assert found["rows"] == 1
    assert found["benchmarks"] == [{"file": str(contaminated["bench"]), "items": 2, "too_short": 1, "met": 1}]
    (pair,) = found["overlaps"]
    assert (pair["file"], pair["row"], pair["item"], pair["words"]) == (str(contaminated["file"]), 2, 2, COUNT)
    assert pair["text"].startswith("janets ducks lay 16 eggs") and pair["share"] == 1.0


def test_a_row_that_is_only_like_a_contaminated_one_stays(tmp_path):
    """What a benchmark takes away must not take away others as near-duplicates of it."""
    rng = random.Random(2)
    story = " ".join(rng.choices([f"w{n}" for n in range(999)], k=150))
    asked = "which of these two old ships came home first with all her sails torn"
    rows = [chat(f"{story} {asked}", "x"), chat(f"{story} {asked.replace('home', 'back')}", "x")]
    bench = write_lines(tmp_path / "bench.jsonl", [{"question": asked}])
    file = write_lines(tmp_path / "rows.jsonl", rows)
    found, counters, _ = run(spec_of(file, contamination=(str(bench),), deduplicate="near"))
    assert [row.number for row in found] == [2] and counters["contaminated"] == 1
    assert [row.number for row in run(spec_of(file, deduplicate="near"))[0]] == [1]  # control: they are alike


def test_it_is_only_reported_when_it_is_to_be_kept(contaminated):
    spec = spec_of(contaminated["file"], contamination=(str(contaminated["bench"]),), drop_contaminated=False)
    rows, counters, findings = run(spec)
    assert len(rows) == 3 and counters["contaminated_kept"] == 1 and counters["contaminated"] == 0
    assert findings.contamination["rows"] == 1


def test_control_without_benchmarks_nothing_is_reported(contaminated):
    rows, counters, findings = run(spec_of(contaminated["file"]))
    assert len(rows) == 3 and counters["contaminated"] == 0 and findings.contamination == {}


# ------------------------------------------------------------------------------------------------ the real benchmarks


@pytest.fixture(scope="module")
def real() -> Benchmarks:
    from paths import BENCHMARKS, SHARED

    if not SHARED.is_dir():
        pytest.skip(f"no folder of shared data at {SHARED}: this test did not run")
    return Benchmarks(list(BENCHMARKS))


def test_every_question_of_gsm8k_is_found_in_a_longer_prompt(shared, real):
    lines = (shared / "eval" / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 150
    for number, line in enumerate(lines, 1):
        question = json.loads(line)["question"].replace(",", "").upper()
        found = real.overlaps(said(f"Solve the following, step by step. {question} Answer with a number.", "x"))
        assert any(o.item == number and o.benchmark.endswith("gsm8k_test.jsonl") for o in found), question


@pytest.mark.parametrize("name", ["ARC-Challenge.json", "ARC-Easy.json", "winogrande.json"])
def test_items_that_all_ask_alike_are_found_by_what_they_ask(shared, real, name):
    for number, row in enumerate(json.loads((shared / "eval" / name).read_text(encoding="utf-8")), 1):
        found = real.overlaps(said(row["instruction"], "x"))
        assert any(overlap.item == number and overlap.benchmark.endswith(name) for overlap in found), row


def test_real_rows_are_clean(shared, real):
    for name in ("alpaca_sharegpt", "multi_turn", "sft_samples"):
        for line in (shared / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            assert real.overlaps(said(*(turn["value"] for turn in json.loads(line)["conversations"]))) == []
