"""Label masking: a conversation as input ids and the ids that are trained on.

The text is made once, in pieces that say what is learned (see chat_templates.py), and encoded as a whole: ids are those
the model meets when it is used. A token is a target when any character that it writes a part of is: every answer and
the separator that closes it, and nothing else. Where a merge runs over the border of pieces the whole token is
learned, so at either end of an answer one token may hold characters that are not the answer's: the last ones of the
header in front ("Assistant: " and "Hello" share the token " Hello"), the first ones of what follows the separator.
No other token of a header, a system message or a user's turn is ever learned.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..text.prompts import ChatPrompts
from ..tokenization.chat_templates import Piece
from ..tokenization.segments import Span
from ..utils.errors import ChatError, ConfigError
from .samples import label_count


class Sample(NamedTuple):
    """ids: int32 [n]; is_target: bool [n], True for tokens that are learned."""

    ids: np.ndarray
    is_target: np.ndarray

    @property
    def labels(self) -> int:
        """How many labels it gives; a sample without any teaches nothing."""
        return label_count(self.is_target)


class Written(NamedTuple):
    """A conversation's text with its sample. spans: of each id in the text, (begin, end) in characters; an id that
    writes nothing of it has an empty one."""

    text: str
    sample: Sample
    spans: list[Span]


def encode_conversation(prompts: ChatPrompts, messages: Sequence[Mapping]) -> Sample:
    """The ids of a conversation, and which are learned.

    Where the template closes answers with nothing that ends one when the model is used (a line break, "ziya"), the
    tokenizer's eos follows the last answer and is learned; without it the model would never stop.
    Raises ChatError for what cannot be written, TokenizerError for words that cannot be spelled, ConfigError where eos
    is needed and the tokenizer has none.
    """
    return write_conversation(prompts, messages).sample


def write_conversation(prompts: ChatPrompts, messages: Sequence[Mapping]) -> Written:
    """The same, with the text and where each id stands in it."""
    pieces = prompts.pieces(messages, add_generation_prompt=False)
    ids, spans = prompts.tokenizer.encode_pieces_with_spans(pieces)
    is_target = targets_of(pieces, spans)  # [n]
    written = Written(
        "".join(piece.text for piece in pieces), Sample(np.array(ids, dtype=np.int32), is_target), list(spans)
    )
    if messages[-1]["role"] == "assistant" and not is_closed(prompts, pieces):
        return _with_eos(prompts, written)
    return written


def targets_of(pieces: Sequence[Piece], spans: Sequence[Span]) -> np.ndarray:
    """Which tokens write a part of a piece that is learned, bool [n]. spans: of the tokens in the pieces' text."""
    lengths = [len(piece.text) for piece in pieces]
    is_learned = np.repeat([piece.is_target for piece in pieces], lengths)  # [characters]
    learned_before = np.concatenate([[0], np.cumsum(is_learned)])  # [characters + 1]
    begin, end = np.array(spans, dtype=np.int64).reshape(-1, 2).T  # [n] each
    return learned_before[end] > learned_before[begin]


def is_closed(prompts: ChatPrompts, pieces: Sequence[Piece]) -> bool:
    """Whether what stands behind the last answer is something at which the model would stop when it is used."""
    last = max((i for i, piece in enumerate(pieces) if piece.is_content and piece.is_target), default=len(pieces))
    closing = "".join(piece.text for piece in pieces[last + 1 :] if piece.is_target)
    tokens = filter(None, prompts.tokenizer.convert_ids_to_tokens(prompts.stop_ids))
    return any(stop in closing for stop in (*prompts.stop_strings, *tokens))


def _with_eos(prompts: ChatPrompts, written: Written) -> Written:
    """eos behind the last token that is learned; what a foreign template writes behind that is cut."""
    eos = prompts.tokenizer.eos_token_id
    if eos is None:
        raise ConfigError(
            f"Nothing ends an answer: the chat template {prompts.name} closes it with no special token, and the "
            "tokenizer names no eos_token.\nName one in tokenizer_config.json, or use another template."
        )
    text, (ids, is_target), spans = written
    end = int(np.flatnonzero(is_target)[-1]) + 1 if is_target.any() else len(ids)
    text = text[: max((span[1] for span in spans[:end]), default=0)]
    sample = Sample(np.append(ids[:end], np.int32(eos)), np.append(is_target[:end], True))
    return Written(text, sample, [*spans[:end], (len(text), len(text))])


SYSTEM = "a1b2"  # what no template says of its own accord


def knows_system(prompts: ChatPrompts) -> bool:
    """Whether conversations may begin with a system message, which the template then writes."""
    talk = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    try:
        return SYSTEM in "".join(piece.text for piece in prompts.pieces(talk, add_generation_prompt=False))
    except ChatError:
        return False
