"""Rows of four formats as the same turns, and what a conversation of texts cannot say is refused with its reason."""

import json

import pytest
from effort import tries
from hypothesis import given, settings
from hypothesis import strategies as st
from sft_rows_factory import chat

from aquila_pd.data.formats import KEYS, NEEDED, BadRow, Talk, Turn, read_talk

TURNS = [Turn("system", "s"), Turn("user", "q1"), Turn("assistant", "a1"), Turn("user", "q2"), Turn("assistant", "a2")]
SAME = {
    "infinity": {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q1"},
            {"from": "gpt", "value": "a1"},
            {"from": "human", "value": "q2"},
            {"from": "gpt", "value": "a2"},
        ]
    },
    "openai": {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q1", "name": "Ann"},
            {"role": "assistant", "content": "a1", "tool_calls": None, "weight": 1},
            {"role": "user", "content": "q2", "weight": 0},
            {"role": "assistant", "content": "a2", "weight": None},
        ]
    },
    "alpaca": {"instruction": "q2", "input": "", "output": "a2", "history": [["q1", "a1"]], "system": "s"},
    "paddlenlp": {"src": ["q1", "q2"], "tgt": ["a1", "a2"], "context": {"system": "s"}},
}


def turns(value: dict, format: str = "auto") -> list[Turn]:
    return read_talk(value, format).turns


def why_not(value: dict, format: str = "auto") -> str:
    with pytest.raises(BadRow) as caught:
        read_talk(value, format)
    return str(caught.value)


@pytest.mark.parametrize("format", SAME)
def test_every_format_gives_the_same_turns(format):
    row = {**SAME[format], "id": 7, "source": "x"}
    assert read_talk(row) == read_talk(row, format) == Talk(TURNS, "7", "x")


@pytest.mark.parametrize("format", SAME)
def test_a_row_without_its_keys_is_refused_by_name(format):
    others = [other for other in SAME if other != format]
    for other in others:
        assert f"which the format {other} needs" in why_not(SAME[format], other)
    for key in NEEDED[format]:
        assert "is of no known format" in why_not({**SAME[format], key: None})
        assert f"{key} (null)" in why_not({**SAME[format], key: None}, format)


def test_what_could_be_two_formats_is_asked_about():
    both = {**SAME["openai"], **SAME["infinity"]}
    assert "could be infinity or openai" in why_not(both)
    assert turns(both, "openai") == turns(both, "infinity") == TURNS


def test_an_unknown_row_shows_what_it_has():
    found = why_not({"text": "x", "prompt": None})
    assert "text, prompt (null)" in found and "conversations" in found and "src and tgt" in found
    assert "no keys" in why_not({})


@pytest.mark.parametrize(
    ("name", "role"),
    [("human", "user"), ("Human", "user"), (" USER ", "user"), ("gpt", "assistant"), ("GPT", "assistant"),
     ("bot", "assistant"), ("model", "assistant"), ("system", "system"), ("narrator", "narrator"), ("", "")],
)  # fmt: skip
def test_names_of_roles(name, role):
    assert turns({"conversations": [{"from": name, "value": "x"}]}) == [Turn(role, "x")]


def test_turns_are_found_under_either_pair_of_keys():
    assert turns({"conversations": SAME["openai"]["messages"]}) == TURNS
    assert turns({"messages": SAME["infinity"]["conversations"]}) == TURNS
    both = {"from": "human", "value": "x", "role": None, "content": None}  # as tables of both kinds have it
    assert turns({"messages": [both]}) == turns({"conversations": [both]}) == [Turn("user", "x")]


@pytest.mark.parametrize(("found", "known"), [(5, "5"), ("0a1b", "0a1b"), (None, ""), (True, ""), ([1], ""), (1.5, "")])
def test_an_id_is_a_number_or_a_text_or_absent(found, known):
    assert read_talk(chat("q", "a", id=found)).id == known
    assert read_talk(chat("q", "a")).id == ""


def test_labels_are_texts_that_files_can_hold():
    found = read_talk(chat("q", "a", id="\ud83d1", source="\udfff"))
    assert (found.id, found.source) == ("?1", "?")
    assert read_talk(chat("q", "a", source=5)).source == ""


def test_text_beside_the_turns_stands_in_front():
    assert turns(chat("q", "a", instruction="be brief")) == [Turn("system", "be brief"), *turns(chat("q", "a"))]
    assert turns(chat("q", "a", instruction="")) == turns(chat("q", "a", system=None)) == turns(chat("q", "a"))


def test_a_column_that_repeats_the_question_is_no_system_text():
    assert turns(chat("q", "a", instruction="q", response="a")) == turns(chat("q", "a"))


def test_alpaca_joins_instruction_and_input():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert turns(row)[0] == Turn("user", "Add.\n1 2")
    assert turns({**row, "input": None})[0] == turns({k: row[k] for k in ("instruction", "output")})[0]
    assert turns({**row, "instruction": ""})[0] == Turn("user", "1 2")


def test_paddlenlp_has_texts_or_lists_of_them():
    assert turns({"src": "q", "tgt": "a"}) == turns({"src": ["q"], "tgt": ["a"]}) == turns({"src": ["q"], "tgt": "a"})


BAD = {
    "value is null": (chat("q", None), "conversations[1]: value is null"),
    "value is a number": (chat("q", 5), "conversations[1]: value is 5"),
    "value has parts": (chat([{"type": "text", "text": "q"}], "a"), "list of parts"),
    "from is null": ({"conversations": [{"from": None, "value": "x"}]}, "conversations[0]: from is None"),
    "role is absent": ({"messages": [{"content": "x"}]}, "messages[0]: role is None"),
    "a turn is text": ({"conversations": ["q", "a"]}, "conversations[0] is 'q', no object"),
    "no list": ({"conversations": "[{}]"}, "no list"),
    "a turn of a tool": ({"messages": [{"role": "tool", "content": "x"}]}, "is from tool"),
    "a call of a tool": (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
        "has tool_calls",
    ),
    "tools offered": (chat("q", "a", tools=[{"type": "function"}]), "has tools"),
    "not to be learnt": ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "weight 0"),
    "no loss": ({"conversations": [{"from": "gpt", "value": "a", "loss": False}]}, "loss False"),
    "system is no text": (chat("q", "a", system={"x": 1}), "system is {'x': 1}"),
    "history is odd": ({**SAME["alpaca"], "history": [["q1"]]}, "history[0]"),
    "history has null": ({**SAME["alpaca"], "history": [["q1", None]]}, "history[0] is null"),
    "history is text": ({**SAME["alpaca"], "history": "q1"}, "history[0]"),
    "output is no text": ({"instruction": "q", "output": ["a"]}, "list of parts"),
    "lengths differ": ({"src": ["q"], "tgt": ["a", "b"]}, "src has 1 texts and tgt 2"),
    "src is a number": ({"src": 1, "tgt": "a"}, "neither texts nor lists"),
    "other context": ({"src": "q", "tgt": "a", "context": {"knowledge": "x"}}, "context has knowledge"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_said_is_refused(name):
    value, reason = BAD[name]
    assert reason in why_not(value)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(sorted({*KEYS, "from", "value", "role", "content", "weight"})) | st.text(max_size=3), inner
        )
    ),
    max_leaves=15,
)


@settings(max_examples=tries(83, 250), deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(sorted(KEYS)), anything, max_size=6), st.sampled_from(["auto", *NEEDED]))
def test_whatever_stands_in_a_row_it_is_turns_or_a_bad_row(value, format):
    try:
        found = read_talk(value, format)
    except BadRow as reason:
        assert str(reason)
        return
    assert all(isinstance(text, str) for turn in found.turns for text in turn)
    assert isinstance(found.id, str) and isinstance(found.source, str)


def test_real_rows_are_turns_in_turn(shared):
    for line in (shared / "data" / "multi_turn.jsonl").read_text(encoding="utf-8").splitlines():
        found = read_talk(json.loads(line)).turns
        assert [turn.role for turn in found] == ["user", "assistant"] * (len(found) // 2) + ["user"] * (len(found) % 2)
