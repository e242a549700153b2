"""From a spec to conversations: the same ones on every run, every row accounted for, nothing on both sides."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import BENCHMARKS
from sft_rows_factory import chat, run, said, spec_of, write_lines

from aquila_pd.data.counters import Counters, Rule
from aquila_pd.data.pipeline import RULES, Findings, conversations, data_files
from aquila_pd.data.settings import DataSpec, Source
from aquila_pd.utils.errors import DataError

MANY = [
    chat(f"question number {number}", f"answer {number * 7}", id=number, source="ab"[number % 2])
    for number in range(3000)
]
LONG = "the mitochondria is the powerhouse of the cell and it makes energy for everything that the cell does all day"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("many") / "rows.jsonl", MANY)


def balanced(counters: Counters) -> bool:
    """Every row is dropped by one rule, held out, or kept."""
    return counters["rows"] == counters.dropped + counters["held_out"] + counters["kept"]


# ------------------------------------------------------------------------------------------------------ what comes


def test_rows_come_in_order_with_what_is_known_of_them(many):
    rows, counters, _ = run(spec_of(many))
    assert [row.number for row in rows] == list(range(1, 3001))
    assert rows[5].messages == said("question number 5", "answer 35")
    assert (rows[5].id, rows[5].file, rows[5].source, rows[5].weight, rows[5].held_out) == ("5", 0, "b", 1.0, False)
    assert counters["rows"] == counters["kept"] == 3000 and balanced(counters)


def test_files_come_in_order_with_their_weights(tmp_path):
    for name in ("b", "a", "c", "d"):
        write_lines(tmp_path / f"{name}.jsonl", [chat(name, "x")])
    first = Source((f"{tmp_path}/[ab].jsonl",), weight=2.5)
    spec = DataSpec(
        train=(first, Source((f"{tmp_path}/c.jsonl",), format="infinity")), evaluate=(Source((f"{tmp_path}/d.jsonl",)),)
    )
    files = data_files(spec)
    assert [file.path.stem for file in files] == ["d", "a", "b", "c"]
    rows, _, _ = run(spec)
    assert [(row.messages[0]["content"], row.weight, row.held_out) for row in rows] == [
        ("d", 1.0, True), ("a", 2.5, False), ("b", 2.5, False), ("c", 1.0, False),
    ]  # fmt: skip
    assert [files[row.file].path.stem for row in rows] == ["d", "a", "b", "c"]


def test_the_same_spec_gives_the_same_conversations(many):
    spec = spec_of(many, held_out=0.2, deduplicate="near", exclude_sources=("x",))
    one, other = run(spec, 3), run(spec, 3)
    assert one[0] == other[0] and one[1] == other[1] and one[2] == other[2]


def test_several_processes_give_the_same(tmp_path, many):
    """Bad rows among them, whose order depends on nothing either."""
    bench = write_lines(tmp_path / "bench.jsonl", [{"question": LONG}])
    rows = [
        *MANY[:400],
        chat(LONG, "x"),
        {"text": "x"},
        *(chat(LONG[9:], str(number)) for number in range(9)),
        *MANY[:9],
    ]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    file.write_bytes(file.read_bytes().replace(b"\n", b"\n{torn\n", 3) + b"{torn")
    spec = spec_of(
        file, held_out=0.2, deduplicate="near", languages=("en",), sources=("*", "none"), contamination=(str(bench),)
    )
    one, other = run(spec, 3), run(spec, 3, workers=2)
    assert one[0] == other[0] and one[1] == other[1] and one[2] == other[2]
    assert one[1]["contaminated"] and one[1]["duplicate_exact"] and one[1]["bad_row"] == 5 and balanced(one[1])
    assert one[2].notes == ["No row has a source that fits none."]


def test_several_processes_end_when_nobody_reads_on(many):
    import multiprocessing

    rows = conversations(spec_of(many), 0, counters=Counters(), workers=2)
    assert next(rows).number == 1
    rows.close()
    assert multiprocessing.active_children() == []


def test_a_process_that_is_gone_is_told_of(many):
    import multiprocessing

    rows = conversations(spec_of(many), 0, counters=Counters(), workers=2)
    next(rows)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(DataError, match="ended before its time"):
        list(rows)


def test_counters_may_have_counted_another_stage(many):
    counters = Counters()
    for _ in range(2):
        assert len(list(conversations(spec_of(many), 0, counters=counters))) == 3000
    assert counters["kept"] == 6000 and balanced(counters)


# ------------------------------------------------------------------------------------------------- evaluation rows


def test_the_share_held_out_is_about_what_was_asked_and_depends_on_the_seed(many):
    chosen = []
    for seed in (0, 1):
        rows, counters, _ = run(spec_of(many, held_out=0.1), seed)
        chosen.append({row.id for row in rows if row.held_out})
        assert 220 < len(chosen[-1]) < 380  # 300, with a standard deviation of 16
        assert counters["held_out"] == len(chosen[-1]) and balanced(counters)
    assert len(chosen[0] & chosen[1]) < 70  # a tenth of a tenth is 30


def test_which_rows_are_held_out_depends_on_content_alone(tmp_path, many):
    """Not on place, files, id, source, weight: a row stays on its side when others come and go."""
    rows, _, _ = run(spec_of(many, held_out=0.1))
    moved = write_lines(tmp_path / "moved.jsonl", [{**row, "id": None, "source": "x"} for row in reversed(MANY[::2])])
    other, _, _ = run(spec_of(moved, held_out=0.1))
    sides = {row.messages[0]["content"]: row.held_out for row in rows}
    assert all(sides[row.messages[0]["content"]] == row.held_out for row in other) and len(other) == 1500


def test_duplicates_are_never_on_both_sides(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [chat(f"q{number % 50}", "a", id=number) for number in range(500)])
    rows, _, _ = run(spec_of(file, held_out=0.3, deduplicate="none"))
    sides = {side: {row.messages[0]["content"] for row in rows if row.held_out == side} for side in (True, False)}
    assert len(rows) == 500 and sides[True] and sides[False] and not sides[True] & sides[False]


def test_a_template_without_system_holds_the_same_rows_out(tmp_path):
    rows = [
        {"conversations": [{"from": "system", "value": "be brief"}, *chat(f"q{n}", "a")["conversations"]]}
        for n in range(300)
    ]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    sides = [
        [row.held_out for row in run(spec_of(file, held_out=0.3), knows_system=knows)[0]] for knows in (True, False)
    ]
    assert sides[0] == sides[1] and True in sides[0]


@pytest.mark.parametrize("deduplicate", ["none", "exact", "near"])
def test_a_row_of_the_files_for_evaluation_is_not_trained_on(tmp_path, deduplicate):
    held = write_lines(tmp_path / "held.jsonl", [chat("q", "a"), chat(LONG, LONG), chat("q", "a")])
    train = write_lines(
        tmp_path / "train.jsonl", [chat("q", "a"), chat("q", "b"), chat(LONG, LONG + " too"), chat("q", "b")]
    )
    spec = DataSpec(train=(Source((str(train),)),), evaluate=(Source((str(held),)),), deduplicate=deduplicate)
    rows, counters, _ = run(spec)
    trained = [row.messages[1]["content"] for row in rows if not row.held_out]
    assert trained == {"none": ["b", LONG + " too", "b"], "exact": ["b", LONG + " too"], "near": ["b"]}[deduplicate]
    assert counters["in_evaluation"] == (2 if deduplicate == "near" else 1)
    assert counters["held_out"] == (3 if deduplicate == "none" else 2) and balanced(counters)


def test_files_for_evaluation_are_not_filtered(tmp_path, many):
    french = chat("Bonjour tout le monde, comment allez-vous ce soir?", "Très bien, merci beaucoup mes chers amis.")
    bench = write_lines(tmp_path / "bench.jsonl", [{"question": LONG}])
    held = write_lines(tmp_path / "held.jsonl", [chat(LONG, "x", source="b"), french])
    spec = DataSpec(
        train=(Source((str(many),)),),
        evaluate=(Source((str(held),)),),
        sources=("a",),
        languages=("en",),
        contamination=(str(bench),),
    )
    rows, counters, _ = run(spec)
    assert sum(row.held_out for row in rows) == 2 and counters["source_not_asked"] == 1500 and balanced(counters)


# -------------------------------------------------------------------------------------------------------- duplicates


def test_exact_duplicates_are_dropped_after_normalizing_and_reported(tmp_path):
    rows = [chat("q", "a", id=1), chat("q\r\n", "a"), chat("q\n", "a"), chat("q", "a", "more"), chat("q", "a", id=2)]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    found, counters, findings = run(spec_of(file))
    assert [row.number for row in found] == [1, 2] and counters["duplicate_exact"] == 3 and balanced(counters)
    where = {number: {"file": str(file), "row": number} for number in range(1, 6)}
    assert findings.duplicates == {
        "exact": {
            "rows": 3,
            "groups": 2,
            "examples": [
                {"kept": where[2], "dropped": [where[3]]},
                {"kept": where[1], "dropped": [where[4], where[5]]},
            ],
        }
    }
    assert len(run(spec_of(file, deduplicate="none"))[0]) == 5  # control


def test_near_duplicates_are_dropped_when_asked_for(tmp_path):
    answer = "certainly it does and here is how that works in every living thing from yeast to whales"
    rows = [chat(LONG, answer), chat(LONG + "!", answer.upper()), chat(LONG, "no"), chat(LONG, answer + " ok")]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    found, counters, findings = run(spec_of(file, deduplicate="near"))
    assert [row.number for row in found] == [1, 3] and counters["duplicate_near"] == 2 and balanced(counters)
    assert findings.duplicates["near"]["groups"] == 1
    assert len(run(spec_of(file))[0]) == 4  # control: exactly, none is the same
    assert len(run(spec_of(file, deduplicate="near", near_threshold=0.99))[0]) == 3  # one differs in punctuation alone


# --------------------------------------------------------------------------------------------------------- bad rows


def test_bad_rows_are_told_counted_and_in_the_findings(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [chat("q", "a"), {"text": "x"}, chat("p", None), chat("r", "a"), 5])
    notes = []
    rows, counters, findings = run(spec_of(file), note=notes.append)
    assert [row.number for row in rows] == [1, 4] and counters["bad_row"] == 3 and balanced(counters)
    assert notes == findings.bad_rows
    for line, number, reason in zip(notes, (2, 3, 5), ("no known format", "value is null", "no object"), strict=True):
        assert line.startswith(f"{file}, row {number}: ") and reason in line


@pytest.mark.parametrize("bad", [{"text": "x"}, "no object"])
def test_one_bad_row_too_many_stops_whatever_is_wrong_with_it(tmp_path, bad):
    file = write_lines(tmp_path / "rows.jsonl", [chat("q", "a"), *([bad] * 500), chat("p", "a")])
    with pytest.raises(DataError, match="11 rows cannot be read, and no more than 10 may") as caught:
        run(spec_of(file, max_bad_lines=10))
    assert f"{file}, row 12: " in str(caught.value) and "max_bad_lines" in str(caught.value)
    assert len(run(spec_of(file, max_bad_lines=500))[0]) == 2


def test_a_file_without_a_row_that_can_be_read_stops(tmp_path):
    good = write_lines(tmp_path / "a.jsonl", [chat("q", "a")])
    wrong = write_lines(tmp_path / "b.jsonl", [{"prompt": "q", "response": "a"}] * 3)
    last = write_lines(tmp_path / "c.jsonl", [chat("p", "a")])
    with pytest.raises(DataError, match="not one of its 3 rows can be read") as caught:
        run(spec_of(good, wrong, last))
    assert str(wrong) in str(caught.value) and "prompt, response" in str(caught.value)
    with pytest.raises(DataError, match="which the format alpaca needs"):
        run(DataSpec(train=(Source((str(good),), format="alpaca"),)))


def test_an_empty_file_is_told_of(tmp_path, many):
    rows, _, findings = run(spec_of(many, write_lines(tmp_path / "empty.jsonl", [])))
    assert len(rows) == 3000 and findings.notes == [f"{tmp_path}/empty.jsonl holds no rows."]


def test_when_nothing_is_left_it_is_said_what_dropped_the_rows(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [chat("q"), chat("q", "a", source="x")])
    with pytest.raises(DataError) as caught:
        run(spec_of(file, sources=("y",)))
    text = str(caught.value)
    assert "No row is left to train on" in text and "source_not_asked" in text
    with pytest.raises(DataError, match="No row is left"):
        run(spec_of(file, held_out=0.999999))


def test_names_that_fit_nothing_are_told(many):
    notes = []
    run(spec_of(many, sources=("a", "c"), exclude_sources=("d*",), held_out=1e-9), note=notes.append)
    assert notes == ["No row has a source that fits c, d*.", "No row is held out: 1e-09 of 1,500 rows came to none."]


def test_findings_of_a_run_that_stopped_are_there(tmp_path):
    file = write_lines(tmp_path / "rows.jsonl", [chat("q", "a"), chat("q", "a"), *[5] * 300])
    findings = Findings()
    with pytest.raises(DataError):
        list(conversations(spec_of(file, max_bad_lines=200), 0, counters=Counters(), findings=findings))
    assert len(findings.bad_rows) == 5 and findings.duplicates["exact"]["rows"] == 1
    json.dumps(findings.to_json())


# ------------------------------------------------------------------------------------------------------ hostile rows

texts = st.sampled_from(["q", "a", "", "\ud83d", "\x00", LONG, "你好世界", "😀", "###Human:", "1 2 3"])
turn = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", "x", None]), "value": texts | st.none()}
)
row = st.one_of(
    st.fixed_dictionaries(
        {"conversations": st.lists(turn, max_size=5), "source": st.sampled_from(["a", "b", None, 3])}
    ),
    st.fixed_dictionaries({"instruction": texts, "output": texts}),
    st.fixed_dictionaries({"src": texts, "tgt": texts}),
    st.just([]),
    st.just({}),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(row, max_size=25), st.sampled_from(["none", "exact", "near"]), st.booleans(), st.data())
def test_every_row_is_accounted_for(tmp_path_factory, rows, deduplicate, knows_system, data):
    file = tmp_path_factory.getbasetemp() / "hostile.jsonl"
    lines = [json.dumps(value).encode() for value in [*rows, chat("good", "row")]]
    for place in data.draw(st.lists(st.integers(0, len(lines) - 1), max_size=3)):
        lines[place] = lines[place][:-1]
    file.write_bytes(b"\n".join(lines))
    spec = spec_of(file, max_bad_lines=100, deduplicate=deduplicate, held_out=0.3, exclude_sources=("b",))
    counters = Counters()
    found = []
    try:
        found += conversations(spec, 1, counters=counters, knows_system=knows_system)
    except DataError as reason:
        assert "No row is left" in str(reason) or "can be read" in str(reason)
    assert balanced(counters) and counters["rows"] == len([line for line in lines if line])
    places = [(conversation.file, conversation.number) for conversation in found]
    assert places == sorted(set(places))
    assert all(isinstance(message["content"], str) for conversation in found for message in conversation.messages)


def test_real_rows_are_all_there(shared):
    rows, counters, findings = run(
        DataSpec(
            train=(Source((f"{shared}/data/*.jsonl",)),),
            held_out=0.05,
            deduplicate="near",
            contamination=BENCHMARKS,
        )
    )
    assert len(rows) == 773 and counters.dropped == 0 and balanced(counters)
    assert {rule.name: number for rule, number in counters if number} == {
        "rows": 773, "question_last": 56, "held_out": counters["held_out"], "kept": 773 - counters["held_out"],
    }  # fmt: skip
    assert 20 < counters["held_out"] < 60
    assert findings.contamination["rows"] == 0 and len(findings.contamination["benchmarks"]) == 8


# ------------------------------------------------------------------------------------------------ counters, settings


def test_every_rule_has_a_name_of_its_own_and_a_line():
    names = Counter(rule.name for rule in RULES)
    assert max(names.values()) == 1
    assert all(rule.meaning and rule.effect in ("counted", "changed", "dropped") for rule in RULES)


def test_counters_add_up_and_survive_json():
    one, other = Rule("one", "the first"), Rule("other", "the second", "dropped")
    left, right = Counters([one]), Counters()
    left.count(other, 2)
    right.count(other, 1000)
    right.count(one)
    total = left + right
    assert list(total) == [(one, 1), (other, 1002)] and total.dropped == 1002 and total["absent"] == 0
    assert Counters.from_json(json.loads(json.dumps(total.to_json()))) == total
    assert total.lines() == ["    1  one    changed: the first", "1,002  other  dropped: the second"]
    assert Counters([one]).lines() == [] and len(Counters([one]).lines(zeros=True)) == 1
    assert left["one"] == 0 and left["other"] == 2  # a sum changes neither


GOOD = {"train": (Source(("a.jsonl",)),)}


@pytest.mark.parametrize(
    ("values", "finding"),
    [
        ({"train": ()}, "train: it is empty"),
        ({"train": ({"files": ()},)}, "train.0.files: it is empty"),
        ({"train": ({"files": ("a", 5)},)}, "train.0.files.1: it is 5 and must be text"),
        (
            {"train": (Source(("a",)), {"files": "a", "format": "sharegpt"})},
            "train.1.format: it is 'sharegpt' and must be 'auto', ",
        ),
        ({"train": ({"files": "a", "weight": 0},)}, "train.0.weight: it is 0 and must be more than 0"),
        ({"train": ({"files": "a", "weight": float("nan")},)}, "train.0.weight: it is nan and must be a finite number"),
        ({"evaluate": (Source(("a",), weight=2),)}, "evaluate.0: rows for evaluation are seen once"),
        ({"held_out": 1}, "held_out: it is 1 and must be less than 1"),
        ({"held_out": True}, "held_out: it is True and must be a number"),
        ({"held_out": 0.1, "evaluate": (Source(("a",)),)}, "evaluate: held_out is there too"),
        ({"overlong": "cut"}, "overlong: it is 'cut' and must be 'split', 'truncate' or 'drop'"),
        ({"max_bad_lines": -1}, "max_bad_lines: it is -1"),
        ({"max_bad_lines": 1.5}, "max_bad_lines: it is 1.5"),
        ({"deduplicate": "fuzzy"}, "deduplicate: it is 'fuzzy'"),
        ({"near_threshold": 0.2}, "near_threshold: it is 0.2"),
        ({"languages": 3}, "languages.0: it is 3 and must be text"),
        ({"sources": ("",)}, "sources.0: it is empty"),
        ({"drop_contaminated": 1}, "drop_contaminated: it is 1"),
    ],
)
def test_settings_that_cannot_be_are_named(values, finding):
    with pytest.raises(DataError) as caught:
        DataSpec(**{**GOOD, **values})
    assert f"  {finding}" in str(caught.value)


def test_all_settings_that_cannot_be_are_named_at_once():
    with pytest.raises(DataError) as caught:
        DataSpec(train=(), held_out=-1, overlong="x", languages=3)
    assert str(caught.value).count("\n  ") == 4
    assert DataSpec(**GOOD).deduplicate == "exact"


def test_a_source_alone_names_its_own_keys_and_one_text_is_a_list_of_one():
    with pytest.raises(DataError) as caught:
        Source((), "sharegpt", weight=0)
    assert re.findall(r"  (\w+): ", str(caught.value)) == ["files", "format", "weight"]
    assert Source("a.jsonl") == Source(("a.jsonl",)) == DataSpec(Source("a.jsonl")).train[0]
    with pytest.raises(TypeError, match="wieght"):
        Source("a.jsonl", wieght=2)
