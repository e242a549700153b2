"""Label-mask preview: a conversation as text with the trained spans marked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..text.prompts import ChatPrompts
from ..utils.console import visible
from .targets import write_conversation

LEARNED, SPECIAL = "bold green", "reverse"  # styles; both together for a special token that is learned
READ = "dim"
MARKS = {"learned": "⟦⟧", "special": "⟨⟩"}  # around them where there are no colours
BORDER = "│"
DIGITS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


@dataclass
class Segment:
    """A stretch of text that whole tokens write.

    tokens: how many; more than one where they share characters, as those of one emoji do. is_special: it is a special
    token, and not a text that looks like one.
    """

    text: str
    is_learned: bool
    is_special: bool = False
    tokens: int = 1


def segments_of(prompts: ChatPrompts, messages: Sequence[Mapping]) -> list[Segment]:
    """What all the tokens of a conversation write, in their order. Text that no token writes has a segment of none.

    Raises ChatError and TokenizerError like targets.encode_conversation.
    """
    text, (ids, is_target), spans = write_conversation(prompts, messages)
    added = prompts.tokenizer.added_tokens_decoder
    found: list[Segment] = []
    at = 0
    for i, is_learned, (begin, end) in zip(ids.tolist(), is_target.tolist(), spans, strict=True):
        if begin == end:  # in front of the text, or eos behind it
            found.append(Segment(prompts.tokenizer.convert_ids_to_tokens(i), is_learned, is_special=True))
            continue
        if end <= at:
            found[-1].tokens += 1
            found[-1].is_learned |= is_learned
            continue
        if begin > at:
            found.append(Segment(text[at:begin], False, tokens=0))
        is_special = i in added and text[begin:end] == added[i].content
        found.append(Segment(text[max(begin, at) : end], is_learned, is_special))
        at = end
    return [*found, Segment(text[at:], False, tokens=0)] if at < len(text) else found


def coloured(segments: Sequence[Segment], *, borders: bool) -> Iterator[tuple[str, str]]:
    """(text, style) for rich. borders: between tokens, with the number of those that share their characters."""
    for number, segment in enumerate(segments):
        if borders and number and segment.tokens:
            yield BORDER, READ
        style = LEARNED if segment.is_learned else READ
        yield visible(segment.text), f"{style} {SPECIAL}" if segment.is_special else style
        if borders and segment.tokens > 1:
            yield str(segment.tokens).translate(DIGITS), READ


def marked(segments: Sequence[Segment], *, borders: bool) -> str:
    """The same in plain characters: ⟦what is learned⟧, ⟨special tokens⟩."""
    parts, is_open = [], False
    for number, segment in enumerate(segments):
        if is_open and not segment.is_learned:
            parts.append(MARKS["learned"][1])
        if borders and number and segment.tokens:
            parts.append(BORDER)
        if segment.is_learned and not is_open:
            parts.append(MARKS["learned"][0])
        is_open = segment.is_learned
        text = visible(segment.text)
        parts.append(f"{MARKS['special'][0]}{text}{MARKS['special'][1]}" if segment.is_special else text)
        if borders and segment.tokens > 1:
            parts.append(str(segment.tokens).translate(DIGITS))
    return "".join(parts) + (MARKS["learned"][1] if is_open else "")
