"""Text and bytes of single tokens, for OpenAI's log-probability formats."""

import codecs
from functools import lru_cache

from ..formats.byte_level import LETTERS
from ..generation import TokenLogprob
from ..text.text_stream import BYTE_TOKENS, SPACE, ByteLevelText, text_of

LEAST = -9999.0  # JSON has no infinity; a probability that underflows is given as this


class Vocabulary:
    """The tokens of one tokenizer.

    Raises TokenizerError for a tokenizer of a kind whose tokens are not known.
    """

    def __init__(self, tokenizer):
        self._token_of = tokenizer.backend.id_to_token
        self._added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        self._byte_level = isinstance(text_of(tokenizer), ByteLevelText)
        self.special_ids = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.bytes_of = lru_cache(maxsize=2**16)(self._bytes_of)

    def _bytes_of(self, token_id: int) -> bytes:
        """The bytes a token stands for; none for an id that only pads the model's vocabulary."""
        token = self._token_of(token_id)
        if token is None:
            return b""
        if token in self._added:
            return token.encode("utf-8")
        if self._byte_level:
            return bytes(LETTERS[letter] for letter in token)
        if token in BYTE_TOKENS:
            return bytes([BYTE_TOKENS[token]])
        return token.replace(SPACE, " ").encode("utf-8")

    def text_of(self, token_id: int) -> str:
        """The text of a token; a part of a character is written as OpenAI writes it, bytes:\\xe4\\xbd."""
        data = self.bytes_of(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Offsets:
    """text_offset of each token, in characters: a token inside a character has the offset of that character.

    strip_start: white space at its beginning is no part of the text. special: special tokens are.
    """

    def __init__(self, vocabulary: Vocabulary, *, strip_start: bool = False, special: bool = False):
        self._vocabulary, self._strip_start = vocabulary, strip_start
        self._left_out = frozenset() if special else vocabulary.special_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def push(self, token_id: int) -> int:
        """The offset of the next token."""
        begin = self._length
        if token_id not in self._left_out:
            text = self._utf8.decode(self._vocabulary.bytes_of(token_id))
            if self._strip_start:
                text = text.lstrip()
                self._strip_start = not text
            self._length += len(text)
        return begin


def chat_logprob(found: TokenLogprob, top: int, vocabulary: Vocabulary) -> dict:
    """One entry of choices[].logprobs.content, with `top` alternatives."""

    def entry(token_id: int, logprob: float) -> dict:
        data = vocabulary.bytes_of(token_id)
        return {"token": vocabulary.text_of(token_id), "logprob": max(logprob, LEAST), "bytes": list(data)}

    alternatives = [entry(*one) for one in found.top[:top]]
    return {**entry(found.id, found.logprob), "top_logprobs": alternatives}


def legacy_logprobs(
    tokens: list[tuple[int, TokenLogprob | None, int]], top: int, vocabulary: Vocabulary
) -> dict[str, list]:
    """choices[].logprobs of the completions endpoint for (id, log-probability or None, offset in the text) of tokens.

    Of several tokens with one text (parts of characters can have that), the likeliest is in top_logprobs.
    """
    listed: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, found, offset in tokens:
        listed["tokens"].append(vocabulary.text_of(token_id))
        listed["token_logprobs"].append(None if found is None else max(found.logprob, LEAST))
        listed["top_logprobs"].append(None if found is None else _by_text(found, top, vocabulary))
        listed["text_offset"].append(offset)
    return listed


def _by_text(found: TokenLogprob, top: int, vocabulary: Vocabulary) -> dict[str, float]:
    """{text: log-probability} of the `top` likeliest tokens and of the token itself."""
    likeliest: dict[str, float] = {}
    for token_id, logprob in (*found.top[:top], (found.id, found.logprob)):
        likeliest.setdefault(vocabulary.text_of(token_id), max(logprob, LEAST))
    return likeliest
