"""Normalization of turns to chat messages: an optional system message, then user and assistant in turn, an
assistant's last.

Rules in the order they are applied; each counts the rows it touched:

    unknown_role       a turn is from none of system, user, assistant          the row is dropped
    surrogate          half of a surrogate pair                                becomes U+FFFD
    control_character  below U+0020 but tab and newline; U+007F; and U+FEFF,
                       the byte order mark                                     goes
    line_end           CR LF, and CR alone                                     becomes LF
    empty_turn         nothing but white space                                 goes
    system_from_gpt    the first turn is the assistant's, gives instructions,
                       and a user's turn follows                               becomes a system turn
    answer_first       the assistant speaks before any user                    goes
    system_later       a system turn behind the first turn                     is said by the user
    system_in_front    a system turn, and the template has none                goes in front of the first user turn
    same_role          two turns of one role                                   become one, a blank line between them
    question_last      no answer follows the last user turn                    goes
    nothing_left       no question with an answer is left                      the row is dropped

Text that is not NFC stays as it is: an author's spelling is kept. Normalizing twice changes nothing more.
"""

import re
from collections.abc import Sequence

from .counters import Counters, Rule
from .formats import ASSISTANT, SYSTEM, USER, Turn

UNKNOWN_ROLE = Rule("unknown_role", "a turn is from none of system, user and assistant", "dropped")
SURROGATE = Rule("surrogate", "half of a surrogate pair, now U+FFFD")
CONTROL_CHARACTER = Rule("control_character", "control characters or a byte order mark inside the text, taken out")
LINE_END = Rule("line_end", "lines ended by CR LF or CR, now by LF")
EMPTY_TURN = Rule("empty_turn", "a turn without words, taken out")
SYSTEM_FROM_GPT = Rule("system_from_gpt", "instructions to the model in a first turn of its own, now a system turn")
ANSWER_FIRST = Rule("answer_first", "the assistant spoke before any user, taken out")
SYSTEM_LATER = Rule("system_later", "a system turn behind the first turn, now the user's words")
SYSTEM_IN_FRONT = Rule("system_in_front", "system text for a template without system, now before the first question")
SAME_ROLE = Rule("same_role", "two turns of one role, now one with a blank line between")
QUESTION_LAST = Rule("question_last", "no answer to the last user turn, taken out")
NOTHING_LEFT = Rule("nothing_left", "no question with an answer is left", "dropped")
RULES = (
    UNKNOWN_ROLE, SURROGATE, CONTROL_CHARACTER, LINE_END, EMPTY_TURN, SYSTEM_FROM_GPT, ANSWER_FIRST, SYSTEM_LATER,
    SYSTEM_IN_FRONT, SAME_ROLE, QUESTION_LAST, NOTHING_LEFT,
)  # fmt: skip

BLANK_LINE = "\n\n"
_SURROGATES = re.compile("[\ud800-\udfff]")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
_ODD_LINE_ENDS = re.compile("\r\n?")
# A first turn of the assistant's is either instructions that a data set filed under the wrong name, or a greeting.
# Instructions speak to the model; a greeting greets, or ends in a question.
_INSTRUCTS = re.compile(
    r"\byou (?:are|will|should|must|can|have|need)\b|\byour (?:task|job|goal|role|answers?|responses?)\b|\bact as\b"
    r"|\b(?:user|human) will\b|^\W*(?:given|explain|answer|respond|follow|pretend|imagine|use|write|translate|below)\b"
    r"|你是|你将|你需要|你的(?:任务|工作|角色|职责)|请你?(?:扮演|根据|按照|作为|用|以)|扮演|^作为",
    re.IGNORECASE,
)
_GREETS = re.compile(
    r"^\W*(?:hi|hello|hey|welcome|greetings|sure|good (?:morning|day|evening)|你好|您好|嗨|欢迎)(?![a-z])|[?？]\W*$",
    re.IGNORECASE,
)


def normalize(turns: Sequence[Turn], *, knows_system: bool, counters: Counters) -> list[dict] | None:
    """The messages of a conversation, [{"role", "content"}, ...]; None when the row is dropped.

    knows_system: the template can write a system message. Exactly one dropping rule is counted for a dropped row.
    """
    if any(turn.role not in (SYSTEM, USER, ASSISTANT) for turn in turns):
        counters.count(UNKNOWN_ROLE)
        return None
    touched: set[Rule] = set()
    turns = [Turn(turn.role, _clean(turn.text, touched)) for turn in turns]
    turns = _keep([turn for turn in turns if turn.text.strip()], turns, EMPTY_TURN, touched)
    turns = _system_first(turns, touched)
    turns = _one_system(turns, touched)
    if not knows_system:
        turns = _system_in_front(turns, touched)
    turns = _keep(_merged(turns), turns, SAME_ROLE, touched)
    if turns and turns[-1].role == USER:
        turns = _keep(turns[:-1], turns, QUESTION_LAST, touched)
    if not any(turn.role == ASSISTANT for turn in turns):
        touched.add(NOTHING_LEFT)
    for rule in touched:
        counters.count(rule)
    return None if NOTHING_LEFT in touched else [{"role": turn.role, "content": turn.text} for turn in turns]


def _keep(after: list[Turn], before: list[Turn], rule: Rule, touched: set[Rule]) -> list[Turn]:
    if len(after) < len(before):
        touched.add(rule)
    return after


def _clean(text: str, touched: set[Rule]) -> str:
    for rule, pattern, instead in (
        (SURROGATE, _SURROGATES, "\ufffd"),
        (CONTROL_CHARACTER, _CONTROLS, ""),
        (LINE_END, _ODD_LINE_ENDS, "\n"),
    ):
        changed = pattern.sub(instead, text)
        if changed != text:
            touched.add(rule)
            text = changed
    return text


def gives_instructions(text: str) -> bool:
    """Whether a first turn under the assistant's name is what a system message says, by its words."""
    return bool(_INSTRUCTS.search(text)) and not _GREETS.search(text)


def _system_first(turns: list[Turn], touched: set[Rule]) -> list[Turn]:
    """The first turns are the system's or a user's."""
    if [turn.role for turn in turns[:2]] == [ASSISTANT, USER] and gives_instructions(turns[0].text):
        touched.add(SYSTEM_FROM_GPT)
        turns = [Turn(SYSTEM, turns[0].text), *turns[1:]]
    leading = next((place for place, turn in enumerate(turns) if turn.role == USER), len(turns))
    early = [turn for turn in turns[:leading] if turn.role != ASSISTANT]
    return _keep([*early, *turns[leading:]], turns, ANSWER_FIRST, touched)


def _one_system(turns: list[Turn], touched: set[Rule]) -> list[Turn]:
    """System turns stand in front only; a later one joins the user's turn behind it, else the one before it."""
    first = next((place for place, turn in enumerate(turns) if turn.role != SYSTEM), len(turns))
    if any(turn.role == SYSTEM for turn in turns[first:]):
        touched.add(SYSTEM_LATER)
    found = turns[:first]
    waiting: list[str] = []  # later system texts, on their way into a user's turn
    for turn in turns[first:]:
        if turn.role == SYSTEM:
            waiting.append(turn.text)
            continue
        if waiting and turn.role == USER:
            turn = Turn(USER, BLANK_LINE.join([*waiting, turn.text]))
        elif waiting:
            found = _said_by_user(found, waiting)
        waiting = []
        found.append(turn)
    return _said_by_user(found, waiting) if waiting else found


def _said_by_user(turns: list[Turn], texts: list[str]) -> list[Turn]:
    """Texts behind the last turn: part of it when it is the user's, else a turn of the user's."""
    if turns[-1].role == USER:
        return [*turns[:-1], Turn(USER, BLANK_LINE.join([turns[-1].text, *texts]))]
    return [*turns, Turn(USER, BLANK_LINE.join(texts))]


def _system_in_front(turns: list[Turn], touched: set[Rule]) -> list[Turn]:
    texts = [turn.text for turn in turns if turn.role == SYSTEM]
    rest = [turn for turn in turns if turn.role != SYSTEM]
    if not texts or not rest:
        return rest
    touched.add(SYSTEM_IN_FRONT)
    return [Turn(USER, BLANK_LINE.join([*texts, rest[0].text])), *rest[1:]]


def _merged(turns: list[Turn]) -> list[Turn]:
    found: list[list] = []
    for turn in turns:
        if found and found[-1][0] == turn.role:
            found[-1][1].append(turn.text)
        else:
            found.append([turn.role, [turn.text]])
    return [Turn(role, BLANK_LINE.join(texts)) for role, texts in found]
