"""Row schemas to turns: Infinity-Instruct (ShareGPT), OpenAI messages, alpaca, PaddleNLP's src and tgt.

    infinity    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}
    openai      {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    alpaca      {"instruction": ..., "input": ..., "output": ..., "history": [[question, answer], ...], "system": ...}
    paddlenlp   {"src": text or [texts], "tgt": text or [texts], "context": {"system": ...}}

Only names are translated here; what is odd about a conversation is normalize.py's. What a conversation of texts cannot
say (calls of tools, pictures, answers not to be learnt) raises BadRow: without it the row would teach something else.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..utils.errors import shown_value

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "question", "用户"), USER),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "answer", "助手"), ASSISTANT),
    **dict.fromkeys(("system", "系统"), SYSTEM),
}
FROM_VALUE, ROLE_CONTENT = ("from", "value"), ("role", "content")  # a turn's keys
TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")
TOOL_KEYS = ("tools", "functions", "tool_calls", "function_call")
UNTRAINED_KEYS = ("weight", "train", "loss")  # of a turn: false or 0 where an answer is not to be learnt
IN_FRONT = ("system", "system_prompt", "instruction")  # keys beside a list of turns; their text stands before it
NEEDED = {  # the keys a format is known by
    "infinity": ("conversations",),
    "openai": ("messages",),
    "alpaca": ("instruction", "output"),
    "paddlenlp": ("src", "tgt"),
}
# every key that is looked at; the other columns of a table need not be read
KEYS = frozenset({key for keys in NEEDED.values() for key in keys}) | {
    *IN_FRONT, *TOOL_KEYS, "id", "source", "input", "history", "context",
}  # fmt: skip


class BadRow(Exception):
    """A row that is no conversation of texts, with the reason."""


class Turn(NamedTuple):
    """role: system, user, assistant, or a name that is none of them, as it was found."""

    role: str
    text: str


class Talk(NamedTuple):
    """A row as it came. id: "" where it has none, a number as text; source: "" where it has none."""

    turns: list[Turn]
    id: str
    source: str


def read_talk(value: Mapping, format: str = "auto") -> Talk:
    """The turns of a row's value. format: a key of NEEDED, or "auto". Raises BadRow."""
    found = _format_of(value) if format == "auto" else format
    missing = [key for key in NEEDED[found] if value.get(key) is None]
    if missing:
        raise BadRow(f"has no {' and no '.join(missing)}, which the format {found} needs; it has {_keys(value)}")
    _refuse_tools(value)
    return Talk(list(_READERS[found](value)), _label(value.get("id"), also=int), _label(value.get("source")))


def _format_of(value: Mapping) -> str:
    fits = [name for name, keys in NEEDED.items() if all(value.get(key) is not None for key in keys)]
    if len(fits) == 1:
        return fits[0]
    if not fits:
        known = ", ".join(" and ".join(keys) for keys in NEEDED.values())
        raise BadRow(f"is of no known format: it has {_keys(value)}, and none of {known}")
    raise BadRow(f"could be {' or '.join(fits)}: it has {_keys(value)}; say which by `format`")


def _keys(value: Mapping) -> str:
    names = [str(key) if item is not None else f"{key} (null)" for key, item in value.items()]
    return ", ".join(names) or "no keys"


def _label(found: object, *, also: type = str) -> str:
    """A text, or what is of another type, as text that files can hold; "" for anything else."""
    is_one = isinstance(found, (str, also)) and not isinstance(found, bool)
    return str(found).encode("utf-8", "replace").decode("utf-8") if is_one else ""


def _refuse_tools(value: Mapping) -> None:
    for key in TOOL_KEYS:
        if value.get(key):
            raise BadRow(f"has {key}; conversations with tools cannot be written")


# ------------------------------------------------------------------------------------------------- the four formats


def _turn_list(value: Mapping, key: str, names: tuple[str, str]) -> Iterator[Turn]:
    """The turns under a key, and what stands before them. names: of a turn's role and text."""
    listed = value[key]
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise BadRow(f"{key} is {shown_value(listed)}, no list")
    turns = [_turn(turn, names, f"{key}[{number}]") for number, turn in enumerate(listed)]
    for name in IN_FRONT:
        text = _optional(value, name)
        # some data sets repeat the first question in a column of its own
        if text and all(text != turn.text for turn in turns):
            yield Turn(SYSTEM, text)
    yield from turns


def _turn(turn: object, names: tuple[str, str], where: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise BadRow(f"{where} is {shown_value(turn)}, no object")
    if turn.get(names[0]) is None:  # turns named the one way are found under the other's key
        names = next((other for other in (FROM_VALUE, ROLE_CONTENT) if turn.get(other[0]) is not None), names)
    role = turn.get(names[0])
    if not isinstance(role, str):
        raise BadRow(f"{where}: {names[0]} is {shown_value(role)}, no text")
    plain = role.strip().lower()
    if plain in TOOL_ROLES:
        raise BadRow(f"{where} is from {plain}; conversations with tools cannot be written")
    _refuse_tools(turn)
    known = ROLES.get(plain, role)
    for key in UNTRAINED_KEYS if known == ASSISTANT else ():
        if turn.get(key) not in (None, 1):  # True is 1
            raise BadRow(f"{where} has {key} {shown_value(turn[key])}; every answer of a row is trained on alike")
    return Turn(known, _text(turn.get(names[1]), f"{where}: {names[1]}"))


def _infinity(value: Mapping) -> Iterator[Turn]:
    return _turn_list(value, "conversations", FROM_VALUE)


def _openai(value: Mapping) -> Iterator[Turn]:
    return _turn_list(value, "messages", ROLE_CONTENT)


def _alpaca(value: Mapping) -> Iterator[Turn]:
    system, given = _optional(value, "system"), _optional(value, "input")
    if system:
        yield Turn(SYSTEM, system)
    for number, pair in enumerate(value.get("history") or ()):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise BadRow(f"history[{number}] is {shown_value(pair)}, no pair of question and answer")
        yield from _exchange(pair[0], pair[1], f"history[{number}]")
    instruction = _text(value["instruction"], "instruction")
    question = "\n".join(part for part in (instruction, given) if part)
    yield from _exchange(question, value["output"], "output")


def _paddlenlp(value: Mapping) -> Iterator[Turn]:
    context = value.get("context") or {}
    other = sorted(context.keys() - {"system"}) if isinstance(context, Mapping) else [shown_value(context)]
    if other:
        raise BadRow(f"context has {', '.join(other)}; only its system can be written")
    system = _optional(context, "system")
    if system:
        yield Turn(SYSTEM, system)
    src, tgt = ([side] if isinstance(side, str) else side for side in (value["src"], value["tgt"]))
    if not isinstance(src, Sequence) or not isinstance(tgt, Sequence):
        raise BadRow("src and tgt are neither texts nor lists of them")
    if len(src) != len(tgt):
        raise BadRow(f"src has {len(src):,} texts and tgt {len(tgt):,}")
    for number, (question, answer) in enumerate(zip(src, tgt, strict=True)):
        yield from _exchange(question, answer, f"src and tgt [{number}]")


def _exchange(question: object, answer: object, where: str) -> Iterator[Turn]:
    yield Turn(USER, _text(question, where))
    yield Turn(ASSISTANT, _text(answer, where))


_READERS = {"infinity": _infinity, "openai": _openai, "alpaca": _alpaca, "paddlenlp": _paddlenlp}


def _optional(value: Mapping, key: str) -> str:
    return "" if value.get(key) is None else _text(value[key], key)


def _text(found: object, where: str) -> str:
    if isinstance(found, str):
        return found
    if found is None:
        raise BadRow(f"{where} is null, no text")
    if isinstance(found, Sequence):
        raise BadRow(f"{where} is a list of parts; only texts can be written")
    raise BadRow(f"{where} is {shown_value(found)}, no text")
