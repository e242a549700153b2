"""Piecewise encoding of a rendered conversation: special tokens from the template only, never from contents.

Ids are those of the whole text encoded at once, so that merges run across the borders of pieces. What no words can do
is to become a special token: "</s>" in contents is four characters. Two backends share one vocabulary for that, one
that finds special tokens in a text and one that does not; neither is ever switched over, so any number of threads may
encode at the same time.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import Metaspace

from ..utils.errors import TokenizerError, shown
from .chat_templates import Piece

UNSPELLED = "\U0010fffe"  # a code point that is no character
SPACES_BEFORE = r"(?:(?<!\s)\s+)?"  # from their first on only, so that a long run is looked at once
SPACES_BEHIND = r"\s*"
NO_OTHERS: frozenset[str] = frozenset()

Span = tuple[int, int]  # (begin, end) in characters


class Encoded(NamedTuple):
    """The ids of a text and their character spans; spans stay empty where only ids were asked for.

    A token's span holds every character of which it writes a part: the tokens of one emoji have the same, and a space
    that the tokenizer puts in front of a text has that of the first character.
    """

    ids: list[int]
    spans: list[Span]


Encode = Callable[[Tokenizer, str], Encoded]


class Mark(NamedTuple):
    """A special token in a text: its own place, and the stretch it takes with the white space it swallows."""

    token: str
    place: int
    begin: int
    end: int


class PieceEncoder:
    """Encodes pieces with a backend whose added tokens do not change.

    The control tokens of a text are the special ones, and `others`: added tokens that are not called special and stand
    in the scaffolding all the same, as some GGUF files have them.
    """

    def __init__(self, backend: Tokenizer):
        self.backend = backend
        self.added = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
        self.special = frozenset(token.content for token in self.added if token.special)
        # What the model itself makes of text it cannot spell is no forgery, though that token is special.
        self._unknown = {token.id for token in backend.model.tokenize(UNSPELLED)}
        self._twins: dict[tuple[frozenset[str], bool], Tokenizer] = {}
        self._untrimmed: Tokenizer | None = None

    def encoded(self, pieces: Sequence[Piece], encode: Encode) -> Encoded:
        """The ids of the pieces' text, and their spans if `encode` gives any; a special token's is its own text alone.

        encode: (backend, text) -> what a backend makes of a text, without the ids around it.
        Raises TokenizerError where the vocabulary cannot spell words otherwise than as a special token; byte-level ones
        and SentencePiece models of kind bpe always can.
        """
        text, others, marks = self._survey(pieces)
        wanted = self._controls([self.backend.token_to_id(mark.token) for mark in marks], others)
        if [mark[:2] for mark in marks] == [mark[:2] for mark in self.marks(text, others)]:
            found = encode(self.backend, text)
            if self._controls(found.ids, others) == wanted:
                return self._without_swallowed(found, marks, others)
        found = self._between(text, marks, others, encode)
        made = self._controls(found.ids, others)
        if made != wanted:
            names = sorted({str(self.backend.id_to_token(i)) for i in made if made.count(i) != wanted.count(i)})
            raise TokenizerError(
                f"This vocabulary can write {', '.join(map(shown, names))} only as a special token, and somebody's "
                "words hold it. Take it out of them."
            )
        return found

    def _survey(self, pieces: Sequence[Piece]) -> tuple[str, frozenset[str], list[Mark]]:
        """The whole text, the control tokens that are not called special, and where the scaffolding has any."""
        groups = groupby(pieces, lambda piece: piece.is_content)
        runs = [(is_content, "".join(piece.text for piece in run)) for is_content, run in groups]
        scaffold = [run for is_content, run in runs if not is_content]
        plain = (token.content for token in self.added if not token.special)
        others = frozenset(token for token in plain if any(token in run for run in scaffold))
        marks, at = [], 0
        for is_content, run in runs:
            marks += [] if is_content else self.marks(run, others, at)
            at += len(run)
        return "".join(run for _, run in runs), others, marks

    def marks(self, text: str, others: frozenset[str] = NO_OTHERS, offset: int = 0) -> list[Mark]:
        """The control tokens in a text as the backend finds them: the leftmost, of these the longest."""
        pattern = control_pattern(tuple(self._control_tokens(others)))
        found = pattern.finditer(text) if pattern else ()
        places = ((match, match.lastindex) for match in found)
        return [Mark(m[i], m.start(i) + offset, m.start() + offset, m.end() + offset) for m, i in places]

    def _control_tokens(self, others: frozenset[str]) -> list[tuple[str, bool, bool]]:
        tokens = (t for t in self.added if t.special or t.content in others)
        return sorted(((t.content, t.lstrip, t.rstrip) for t in tokens), key=lambda token: -len(token[0]))

    def _controls(self, ids: Iterable[int], others: frozenset[str]) -> list[int]:
        """The control tokens among ids, but for that of unknown text, which any text may hold."""
        controls = {self.backend.token_to_id(token) for token in self.special | others} - self._unknown
        return [i for i in ids if i in controls]

    def _without_swallowed(self, found: Encoded, marks: list[Mark], others: frozenset[str]) -> Encoded:
        """The same, the spans of special tokens without the white space that they swallow."""
        if not found.spans:
            return found
        places = {mark.begin: own_span(mark) for mark in marks if mark.end - mark.begin > len(mark.token)}
        controls = {self.backend.token_to_id(mark.token) for mark in marks} if places else ()
        spans = [places.get(s[0], s) if i in controls else s for i, s in zip(*found, strict=True)]
        return Encoded(found.ids, spans)

    def _between(self, text: str, marks: list[Mark], others: frozenset[str], encode: Encode) -> Encoded:
        """Control tokens at the marks, and the text between them with no other in it."""
        ids, spans, at = [], [], 0
        for mark in [*marks, None]:
            words = self._words(text[at : mark.begin if mark else None], at, others, encode)
            ids += words.ids
            spans += [(begin + at, end + at) for begin, end in words.spans]
            if mark:
                ids.append(self.backend.token_to_id(mark.token))
                spans.append(own_span(mark))
                at = mark.end
        return Encoded(ids, spans if len(spans) == len(ids) else [])

    def _words(self, text: str, at: int, others: frozenset[str], encode: Encode) -> Encoded:
        return encode(self.for_words(others, at_start=at == 0), text) if text else Encoded([], [])

    def for_words(self, others: frozenset[str] = NO_OTHERS, *, at_start: bool = True) -> Tokenizer:
        """The backend's twin that finds no control token in a text.

        at_start: false for text behind a special token, where some tokenizers put no space in front.
        """
        key = others, at_start
        if key not in self._twins:
            self._twins[key] = self._twin(others, at_start=at_start)
        return self._twins[key]

    def without_trimming(self) -> Tokenizer:
        """The backend, or where it cuts spans short (post-processors do that) a twin of it that makes the same ids."""
        if self.backend.post_processor is None:
            return self.backend
        if self._untrimmed is None:
            self._untrimmed = self._twin(NO_OTHERS, at_start=True)
            self._untrimmed.encode_special_tokens = False
        return self._untrimmed

    def _twin(self, others: frozenset[str], *, at_start: bool) -> Tokenizer:
        backend, twin = self.backend, Tokenizer(self.backend.model)  # the same model, no copy
        if backend.normalizer is not None:
            twin.normalizer = backend.normalizer
        splits = backend.pre_tokenizer
        if isinstance(splits, Metaspace) and splits.prepend_scheme == "first" and not at_start:
            splits = Metaspace(splits.replacement, prepend_scheme="never", split=splits.split)
        if splits is not None:
            twin.pre_tokenizer = splits
        # In the order of their ids, which the library gives out by counting; few calls, for each goes through them all.
        for is_control, run in groupby(self.added, lambda token: token.special or token.content in others):
            (twin.add_special_tokens if is_control else twin.add_tokens)([special(t) if is_control else t for t in run])
        twin.encode_special_tokens = True
        assert twin.get_vocab_size() == backend.get_vocab_size()
        assert all(twin.token_to_id(t.content) == backend.token_to_id(t.content) for t in self.added)
        return twin


def own_span(mark: Mark) -> Span:
    """A special token's own characters, without the white space that it swallows."""
    return mark.place, mark.place + len(mark.token)


def special(token: AddedToken) -> AddedToken:
    kept = {key: getattr(token, key) for key in ("lstrip", "rstrip", "single_word", "normalized")}
    return AddedToken(token.content, special=True, **kept)


@lru_cache(maxsize=16)
def control_pattern(tokens: tuple[tuple[str, bool, bool], ...]) -> re.Pattern | None:
    """Finds tokens, given as (text, swallows white space before, after it); each in a group of its own."""
    parts = [before * SPACES_BEFORE + f"({re.escape(text)})" + after * SPACES_BEHIND for text, before, after in tokens]
    return re.compile("|".join(parts)) if parts else None
