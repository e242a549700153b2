"""Conversations become what a template can write; every rule is counted once a row, and there is nothing left to do."""

import json

import pytest
from effort import tries
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aquila_pd.data import normalize as rules
from aquila_pd.data.counters import Counters
from aquila_pd.data.formats import Turn, read_talk
from aquila_pd.data.normalize import gives_instructions, normalize
from aquila_pd.tokenization.chat_templates import TEMPLATES, check_messages

S, U, A = "system", "user", "assistant"
PROMPT = "You are a helpful assistant."


def normalized(*turns: tuple[str, str], knows_system: bool = True) -> tuple[list[tuple] | None, set[str]]:
    """(role, text) of the messages, and names of the rules that were counted."""
    counters = Counters()
    found = normalize([Turn(*turn) for turn in turns], knows_system=knows_system, counters=counters)
    assert all(rows == 1 for _, rows in counters)  # a row is one row, however often a rule met it
    messages = found and [(message["role"], message["content"]) for message in found]
    return messages, {rule.name for rule, _ in counters}


Q, R = (U, "q"), (A, "r")
TABLE = {
    "nothing to do": ([Q, R], [Q, R], set()),
    "several turns": ([Q, R, Q, R], [Q, R, Q, R], set()),
    "a system turn stays": ([(S, "s"), Q, R], [(S, "s"), Q, R], set()),
    "system under the name of gpt": ([(A, PROMPT), Q, R], [(S, PROMPT), Q, R], {"system_from_gpt"}),
    "a greeting is none": ([(A, "Hello! How can I help you?"), Q, R], [Q, R], {"answer_first"}),
    "an answer to nobody": ([(S, "s"), (A, "x"), (A, "y"), Q, R], [(S, "s"), Q, R], {"answer_first"}),
    "instructions without a user": ([(A, PROMPT), R], None, {"answer_first", "nothing_left"}),
    "empty turns": ([(S, " "), Q, (A, ""), (U, "\n\t　"), R], [Q, R], {"empty_turn"}),
    "one role twice": ([Q, (U, "p"), R, (A, "t")], [(U, "q\n\np"), (A, "r\n\nt")], {"same_role"}),
    "two system turns": ([(S, "s"), (S, "t"), Q, R], [(S, "s\n\nt"), Q, R], {"same_role"}),
    "no last answer": ([Q, R, (U, "p")], [Q, R], {"question_last"}),
    "an empty last answer": ([Q, R, (U, "p"), (A, " ")], [Q, R], {"empty_turn", "question_last"}),
    "an unknown role": ([Q, ("narrator", "x"), R], None, {"unknown_role"}),
    "no turn": ([], None, {"nothing_left"}),
    "system only": ([(S, "s")], None, {"nothing_left"}),
    "user only": ([Q], None, {"question_last", "nothing_left"}),
    "system later": ([Q, R, (S, "s"), (U, "p"), R], [Q, R, (U, "s\n\np"), R], {"system_later"}),
    "system behind a question": ([Q, (S, "s"), R], [(U, "q\n\ns"), R], {"system_later"}),
    "system between answers": ([Q, R, (S, "s"), (S, "t"), R], [Q, R, (U, "s\n\nt"), R], {"system_later"}),
    "system last": ([Q, R, (S, "s")], [Q, R], {"system_later", "question_last"}),
    "system before the first question": ([(A, "x"), (S, "s"), Q, R], [(S, "s"), Q, R], {"answer_first"}),
    "control characters": ([(U, "\ufeffa\x00b\x1b[1m\tc\n\x7f"), R], [(U, "ab[1m\tc\n"), R], {"control_character"}),
    "line ends": ([(U, "a\r\nb\rc\n"), R], [(U, "a\nb\nc\n"), R], {"line_end"}),
    "a line end around a control character": (
        [(U, "a\r\x00\nb"), R], [(U, "a\nb"), R], {"control_character", "line_end"},
    ),
    "half a surrogate pair": ([(U, "a\ud83d"), R], [(U, "a\ufffd"), R], {"surrogate"}),
    "only control characters": ([(U, "\x00\ufeff"), Q, R], [Q, R], {"control_character", "empty_turn"}),
    "not NFC": ([(U, "e\u0301 ﬁ Ａ"), R], [(U, "e\u0301 ﬁ Ａ"), R], set()),
    "white space around": ([(U, "  q\n\n"), R], [(U, "  q\n\n"), R], set()),
    "emoji": ([(U, "👩‍👩‍👧‍👦 😀"), R], [(U, "👩‍👩‍👧‍👦 😀"), R], set()),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_each_rule_does_what_it_says(name):
    turns, messages, names = TABLE[name]
    assert normalized(*turns) == (messages, names)


def test_every_rule_has_a_row_above_or_below():
    met = {name for _, _, names in TABLE.values() for name in names} | {"system_in_front"}
    assert met == {rule.name for rule in rules.RULES}
    for rule in rules.RULES:  # the table in the docstring is complete, too
        assert f"    {rule.name} " in rules.__doc__


def test_without_system_its_text_goes_in_front_of_the_first_question():
    found = normalized((S, "s"), (S, "t"), Q, R, Q, R, knows_system=False)
    assert found == ([(U, "s\n\nt\n\nq"), R, Q, R], {"system_in_front"})
    found = normalized((A, PROMPT), Q, R, knows_system=False)
    assert found == ([(U, f"{PROMPT}\n\nq"), R], {"system_from_gpt", "system_in_front"})
    assert normalized((S, "s"), (A, "r"), knows_system=False)[0] is None
    assert normalized(Q, R, knows_system=False) == ([Q, R], set())  # control


@pytest.mark.parametrize(
    "text",
    [
        "You are an AI assistant. You will be given a task. You must generate a detailed and long answer.",
        "You should describe the task and explain your answer. Think like you are answering to a five year old.",
        "Explain how you used the definition to come up with the answer.",
        "User will you give you a task with instruction. Your job is follow the instructions as faithfully as you can.",
        "Given a definition of a task and a sample input, break the definition into small parts.",
        "你是一个有用的助手。",
        "请扮演一位历史学家回答问题。",
    ],
)
def test_instructions_are_known_by_their_words(text):
    assert gives_instructions(text)


@pytest.mark.parametrize(
    "text",
    [
        "Hello! How can I assist you today?",
        "你好，请问有什么可以帮您？",
        "Paris is the capital.",
        "What can you do?",
        "",
    ],
)
def test_greetings_and_answers_are_no_instructions(text):
    assert not gives_instructions(text)


# -------------------------------------------------------------------------------------------------- for every row

pieces = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\r\n",
        "\r",
        "\x00",
        "\ufeff",
        "\ud83d",
        "\ude00",
        "a",
        "你好",
        PROMPT,
        "Hello?",
        "###Human:",
        "</s>",
    ]
)
texts = st.lists(pieces, max_size=4).map("".join) | st.text(st.characters(), max_size=8)
hostile = st.lists(st.builds(Turn, st.sampled_from([S, U, A, A, U, "tool?"]), texts), max_size=8)
turns_of_known_roles = hostile.map(lambda turns: [turn for turn in turns if turn.role != "tool?"])


@settings(max_examples=tries(200, 600), deadline=None, derandomize=True)
@given(hostile, st.booleans())
@example([Turn(A, PROMPT), Turn(S, "s"), Turn(U, "q"), Turn(A, "r")], True)
@example([Turn(U, "q"), Turn(A, "r\r\x00\n")], False)
def test_what_comes_out_every_template_can_write(turns, knows_system):
    counters = Counters()
    messages = normalize(turns, knows_system=knows_system, counters=counters)
    assert (messages is None) == (counters.dropped == 1)
    if messages is not None:
        check_writable(messages, knows_system)


def check_writable(messages: list[dict], knows_system: bool) -> None:
    roles = [message["role"] for message in messages]
    rest = roles[1:] if roles[0] == S else roles
    assert rest and rest == [U, A] * (len(rest) // 2)
    assert knows_system or roles[0] == U
    for template in TEMPLATES.values():
        if template.system or not knows_system:
            check_messages(messages, template)
    for message in messages:
        assert message["content"].strip() and "\r" not in message["content"]
        message["content"].encode("utf-8")


@settings(max_examples=tries(200, 600), deadline=None, derandomize=True)
@given(hostile, st.booleans())
def test_normalizing_again_changes_and_counts_nothing(turns, knows_system):
    messages = normalize(turns, knows_system=knows_system, counters=Counters())
    if messages is None:
        return
    again, counters = [Turn(message["role"], message["content"]) for message in messages], Counters()
    assert normalize(again, knows_system=knows_system, counters=counters) == messages
    assert list(counters) == []


@settings(max_examples=tries(133, 400), deadline=None, derandomize=True)
@given(turns_of_known_roles)
def test_no_word_of_a_kept_turn_is_lost(turns):
    """Of alternating turns that end in an answer, every visible character comes out again, in order."""
    cut = next((place for place, turn in enumerate(turns) if turn.role == U and turn.text.strip()), len(turns))
    turns = [Turn(S, "s"), *(turn for turn in turns[cut:]), Turn(A, "end")]
    messages = normalize(turns, knows_system=True, counters=Counters())

    def visible(found: list[str]) -> str:
        kept = (letter for letter in "".join(found) if letter.isprintable() and letter != "\ufffd")
        return "".join(letter for letter in kept if not letter.isspace())

    if messages is not None:
        assert visible([turn.text for turn in turns]) == visible([message["content"] for message in messages])


@settings(max_examples=tries(100, 300), deadline=None, derandomize=True)
@given(turns_of_known_roles)
def test_a_template_without_system_is_told_the_same_words(turns):
    """With and without: the texts joined by blank lines are the same text, which held-out rows rely on."""
    with_system = normalize(turns, knows_system=True, counters=Counters())
    without = normalize(turns, knows_system=False, counters=Counters())
    assert (with_system is None) == (without is None)
    if with_system is not None:
        joined = ["\n\n".join(message["content"] for message in messages) for messages in (with_system, without)]
        assert joined[0] == joined[1]


def test_real_rows_need_no_more_than_is_known_of_them(shared):
    counters, rows = Counters(), 0
    for name in ("alpaca_sharegpt", "multi_turn", "sft_samples"):
        for line in (shared / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            rows += normalize(read_talk(json.loads(line)).turns, knows_system=True, counters=counters) is not None
    assert rows == 773
    assert {rule.name: found for rule, found in counters} == {"question_last": 56}


@pytest.mark.parametrize("broken", ["_merged", "_system_first", "_one_system", "_system_in_front", "_clean"])
def test_control_a_rule_that_does_nothing_is_noticed(monkeypatch, broken):
    monkeypatch.setattr(rules, broken, lambda found, *_: found)
    turns = [Turn(S, "s"), Turn(A, "x"), Turn(U, "\ud83dq"), Turn(U, "p"), Turn(A, "r"), Turn(S, "t"), Turn(A, "r")]
    with pytest.raises((AssertionError, UnicodeEncodeError)):
        for knows_system in (False, True):
            check_writable(normalize(turns, knows_system=knows_system, counters=Counters()), knows_system)
