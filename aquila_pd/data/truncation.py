"""Overlong samples: split at turn borders, truncated, or dropped, and counted.

A turn is a user's message with the answers to it; a system message goes with every sample. Of four turns and a system
message S, where two turns and S fill a pack:

    drop       nothing
    truncate   S 1 2
    split      S 1 2 | S 3 4
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from ..text.prompts import ChatPrompts, in_turns
from ..utils.errors import ChatError, TokenizerError
from .counters import Rule
from .targets import Sample, encode_conversation

TOO_LONG = Rule("too_long", "longer than a pack", "dropped")
TRUNCATED = Rule("truncated", "longer than a pack: the turns that fit are kept, those behind them left out")
SPLIT = Rule("split", "longer than a pack: cut at turn borders into several samples")
TURN_TOO_LONG = Rule("turn_too_long", "a turn longer than a pack is left out, the others are kept")
NO_TARGET = Rule("no_target", "nothing of it would be learned", "dropped")
UNWRITABLE = Rule("unwritable", "the template or the vocabulary cannot write it", "dropped")
RULES = (TOO_LONG, TRUNCATED, SPLIT, TURN_TOO_LONG, NO_TARGET, UNWRITABLE)


class Part(NamedTuple):
    """A sample and the messages it was made of."""

    messages: list[Mapping]
    sample: Sample


class Fitted(NamedTuple):
    """What became of a conversation. rules: those that touched it, one of them a dropping one if there is no part.

    reason: why it cannot be written, else "".
    """

    parts: list[Part]
    rules: list[Rule]
    reason: str = ""


def fit(prompts: ChatPrompts, messages: Sequence[Mapping], *, length: int | None, overlong: str) -> Fitted:
    """The samples of a conversation, none longer than `length` tokens (None: as long as they are).

    overlong: "drop", "truncate" or "split". Every part has something to learn.
    """
    try:
        whole = Part(list(messages), encode_conversation(prompts, messages))
        if length is None or len(whole.sample.ids) <= length:
            parts, rules = [whole], []
        elif overlong == "drop":
            parts, rules = [], []
        else:
            parts, rules = _cut(prompts, messages, length, keep_rest=overlong == "split")
    except (ChatError, TokenizerError) as error:
        return Fitted([], [UNWRITABLE], str(error))
    if not parts:
        return Fitted([], [TOO_LONG])
    kept = [part for part in parts if part.sample.labels]
    return Fitted(kept, rules) if kept else Fitted([], [NO_TARGET])


def _cut(
    prompts: ChatPrompts, messages: Sequence[Mapping], length: int, *, keep_rest: bool
) -> tuple[list[Part], list[Rule]]:
    system, turns = in_turns(messages)
    if not keep_rest:
        part, _ = _leading(prompts, system, turns, length)
        return ([part] if part else []), [TRUNCATED]
    parts, is_left_out = [], False
    for part in _parts(prompts, system, turns, length):
        is_left_out |= part is None
        parts += [part] if part else []
    return parts, [SPLIT] * (len(parts) > 1) + [TURN_TOO_LONG] * is_left_out


def _parts(
    prompts: ChatPrompts, system: list[Mapping], turns: list[list[Mapping]], length: int
) -> Iterator[Part | None]:
    """As many turns as fit, one part after the other; None for a turn that does not fit alone."""
    begin = 0
    while begin < len(turns):
        part, count = _leading(prompts, system, turns[begin:], length)
        yield part
        begin += max(count, 1)


def _leading(
    prompts: ChatPrompts, system: list[Mapping], turns: list[list[Mapping]], length: int
) -> tuple[Part | None, int]:
    """(the most turns from the first on that fit, their number); (None, 0) where the first alone does not.

    Looked for by doubling, so that of a very long conversation no more is encoded than a few packs hold.
    """
    best, least, most = None, 0, 1  # so many fit; so many perhaps not

    def fits(count: int) -> bool:
        nonlocal best, least
        chosen = [*system, *chain(*turns[:count])]
        part = Part(chosen, encode_conversation(prompts, chosen))
        if len(part.sample.ids) > length:
            return False
        best, least = part, count
        return True

    while most <= len(turns) and fits(most):
        most *= 2
    most = min(most, len(turns) + 1)
    while most - least > 1:
        middle = (least + most) // 2
        if not fits(middle):
            most = middle
    return best, least
