"""Byte-level BPE by tiktoken: several times as fast as the tokenizers library, ids and spans proven equal.

Used for batches of plain texts and for the conversations of SFT preparation. A tokenizer that has no twin here, and
every text that tiktoken cannot take, stays with the library. Imported inside functions only: a converted folder's copy
of the code leaves it out.

Why the ids are the same. Both cut a text at added tokens, then by one pattern, and merge the bytes of each piece. In
each step the library takes, of the neighbours that are a listed pair, those whose pair stands first in the list;
tiktoken knows no pairs and takes, of the neighbours x, y whose bytes xy are a token of its table, those whose token has
the lowest rank; both the leftmost of these. The table holds the single bytes and, ranked as the list is ordered, every
token t that a listed pair makes, if
  (1) no other pair makes t, and
  (2) the library, given the bytes of t alone, ends with the one token t.
Where (1) fails there is no twin; a token that fails (2) stays out of the table.

  A stretch goes alone. Take a stretch of bytes inside a word over whose borders no token reaches now. None ever did,
  for tokens only grow. What the library took first among all neighbours it took first among those of the stretch, so
  the merges in it so far are, in their order, the first ones it does with the stretch alone.
  (a) So a token that the library makes anywhere fulfils (2): its bytes are such a stretch, and alone they become [t].
  (b) And neighbours x, y of which xy is a token t of the table are t's listed pair: [x, y] is a state that the bytes
      of t pass alone. There each step leaves one token less and the last makes t, so only one state has two tokens:
      the pair that makes t, of which by (1) there is one.
  Equal by induction. Let both be in the same state. By (b) tiktoken's candidates are among the library's, in the same
  order. What the library has beside them would make tokens that fail (2), and by (a) it never takes those. So what it
  takes is tiktoken's first too, and it stops when tiktoken does. A piece that is itself in the table becomes that token
  at once in tiktoken, and by (2) in the library.

The spans are the same because both cut one string of bytes, none of which is dropped: a token's bytes follow those of
the token before it, and its span reaches from the character of its first byte to that of its last.

The library keeps its candidates in a heap and knows outdated ones by the id they would make; by (1) an id stands for
one pair, so that is exact. It leaves out bytes that its vocabulary lacks: there must be all 256. That both see the same
letters, numbers and spaces in a text is no theorem, their Unicode tables differ in age: a test compares every code
point, and other versions than the tested ones get no twin.
"""

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, pairwise, product
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import PreTokenizer

from ..formats.byte_level import LETTERS
from ..runtime.versions import pin
from ..utils import cores
from .segments import Encoded, Span

log = logging.getLogger("aquila_pd")

# Building takes about as long as the twin saves on 4 MB of the texts in benchmarks/tokenizer.py. Waiting until about
# that much has come by costs at most twice what knowing the future would.
REPAID = 3_000_000  # characters
LARGEST_BLOCK, SMALLEST_BLOCK = 500_000, 20_000  # characters in one call of tiktoken
MOST_THREADS = 8  # lists and arrays are made under Python's lock, more would wait for it
NO = ("", "off", "false", "f", "no", "n", "0")  # how the library reads TOKENIZERS_PARALLELISM
# Between texts. The two code points are no characters; they differ, so no end of a text can shift where one is found.
SEPARATOR = "\U0010fffe\U0010ffff"
END = -1  # the separator among ids

# Patterns that cut as a pre-tokenizer does. GPT-2's has 's, 't ... first. No word begins with an apostrophe, so words
# and numbers may go first; most pieces are such, and need no look at the rest: 1.3 times the speed.
ENDINGS = r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\s\p{L}\p{N}]+"
WORDS = r" ?\p{L}+| ?\p{N}+|" + ENDINGS + r"|\s+(?!\S)|\s+"
# A digit is a text of its own there: what comes before one ends, also for the look ahead of spaces.
SINGLE_DIGITS = r" ?\p{L}+|\p{N}|" + ENDINGS + r"|\s+(?![^\s\p{N}])|\s+"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
PATTERNS = (([BYTE_LEVEL], WORDS), ([DIGITS, BYTE_LEVEL], SINGLE_DIGITS))


class NoTwin(Exception):
    """Why a tokenizer cannot have a twin whose ids are certain."""


class Twin(NamedTuple):
    """A tiktoken encoding, and by its ranks, int64 [ranks] each: the vocabulary's ids (END is the separator's), and the
    lengths of the tokens in bytes."""

    encoding: object
    ids: np.ndarray
    lengths: np.ndarray

    def rows(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, int64 [T]; ValueError for texts that tiktoken cannot take."""
        ids = self.ids[self._ranks(SEPARATOR.join(texts))]
        ends = np.flatnonzero(ids == END)
        if len(ends) != len(texts) - 1:
            raise ValueError("a text holds the separator")
        return [ids[end + 1 : next_end] for end, next_end in pairwise([-1, *ends.tolist(), len(ids)])]

    def encoded(self, text: str) -> Encoded:
        """The ids of one text and their spans; ValueError for a text that tiktoken cannot take."""
        ranks = self._ranks(text)
        ids = self.ids[ranks].tolist()
        if END in ids:
            raise ValueError("a text holds the separator")
        return Encoded(ids, spans_in(text, self.lengths[ranks]))

    def _ranks(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, allowed_special="all", disallowed_special=())


def spans_in(text: str, lengths: np.ndarray) -> list[Span]:
    """(begin, end) of each token: the characters of which it writes a part. lengths: in bytes, int64 [T]."""
    ends = np.cumsum(lengths)
    begins = ends - lengths
    if text.isascii():
        return list(zip(begins.tolist(), ends.tolist(), strict=True))
    data = np.frombuffer(text.encode("utf-8"), np.uint8)
    of_byte = np.cumsum((data & 0xC0) != 0x80) - 1  # [bytes]; a continuation byte belongs to the character before it
    return list(zip(of_byte[begins].tolist(), (of_byte[ends - 1] + 1).tolist(), strict=True))


class FastIds:
    """Encodes plain texts as a backend does, by its twin once enough text has come by to repay building that.

    Safe with threads and after a fork: no lock is held, and the threads of a call end with it. At worst two threads
    build the same twin. Copies and pickles carry the backend only. Added tokens must stay what they are.
    """

    def __init__(self, backend: Tokenizer):
        self._backend = backend
        self._asked = 0  # characters so far
        self._twin: Twin | None = None
        self._refused = False

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_asked": 0, "_twin": None}

    def rows(self, texts: list[str]) -> list[np.ndarray] | None:
        """The ids of each text, int64 [T], without those around a text; None where the library has to give them."""
        size = sum(map(len, texts))
        if not texts or not self._is_ready(size):
            return None
        with left_to_the_library():
            return list(chain.from_iterable(in_threads(self._twin, texts, size)))

    def encoded(self, text: str) -> Encoded | None:
        """The ids of one text and their spans; None where the library has to give them."""
        if not self._is_ready(len(text)):
            return None
        with left_to_the_library():
            return self._twin.encoded(text)

    def _is_ready(self, size: int) -> bool:
        """Count so many characters more; whether there is a twin, built now if they repay it."""
        self._asked += size
        if self._refused or (self._twin is None and self._asked < REPAID):
            return False
        return bool(self._twin or self.build()) and plain(self._backend)

    def build(self) -> bool:
        """Build the twin now; returns whether there is one."""
        try:
            self._twin = build(self._backend)
        except NoTwin as reason:
            log.info("texts in large numbers are encoded by the tokenizers library, without tiktoken: %s", reason)
            self.refuse()
        return self._twin is not None

    def refuse(self) -> None:
        """Have every text encoded by the library from now on."""
        self._twin, self._refused = None, True


@contextmanager
def left_to_the_library() -> Iterator[None]:
    """Swallows what tiktoken raises for a text it cannot take: a lone surrogate, a million spaces, the separator."""
    try:
        yield
    except ValueError as error:
        log.debug("these texts are left to the tokenizers library: %s", error)


def in_threads(twin: Twin, texts: list[str], size: int) -> Iterator[list[np.ndarray]]:
    """The ids of blocks of texts. One call for many texts keeps Python's lock out of the way of the threads."""
    workers = threads()
    parts = list(blocks(texts, min(max(size // (4 * workers), SMALLEST_BLOCK), LARGEST_BLOCK)))
    if workers == 1 or len(parts) == 1:
        yield from map(twin.rows, parts)
        return
    with ThreadPoolExecutor(min(workers, len(parts))) as pool:
        yield from pool.map(twin.rows, parts)


def blocks(texts: list[str], limit: int) -> Iterator[list[str]]:
    """The texts in their order, in lists that are full at `limit` characters."""
    block, size = [], 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= limit:
            yield block
            block, size = [], 0
    if block:
        yield block


def threads() -> int:
    """One where TOKENIZERS_PARALLELISM says so, as in the library, else a few of the cores this process may use."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "true").lower() in NO:
        return 1
    return min(cores.count(), MOST_THREADS)


# ---------------------------------------------------------------------------------------------------- the twin


def build(backend: Tokenizer) -> Twin:
    """The twin of a backend; raises NoTwin where equal ids are not certain. Takes up to a second for 100,000 tokens."""
    for package in ("tokenizers", "tiktoken"):
        require_tested(package)
    pattern = pattern_of(backend.pre_tokenizer)
    if not plain(backend):
        raise NoTwin(
            "text is changed before it is cut, merges are dropped, special tokens split, ids padded or truncated"
            if pattern
            else "text is cut in another way than GPT-2's"
        )
    parts = json.loads(backend.to_str())
    model, added = parts["model"], parts["added_tokens"]
    check_model(model, size=backend.get_vocab_size(with_added_tokens=False))
    check_added([(token["content"], token["normalized"]) for token in added], added)

    vocab = model["vocab"]
    made = [left + right for left, right in model["merges"]]
    if len(set(made)) < len(made):
        raise NoTwin("a token that two pairs make")
    tokens = [*LETTERS, *alone_themselves(made, backend)]
    as_bytes = str.maketrans({letter: chr(byte) for letter, byte in LETTERS.items()})
    ranks = {token.translate(as_bytes).encode("latin-1"): rank for rank, token in enumerate(tokens)}
    whole = {text: len(ranks) + n for n, text in enumerate([*(token["content"] for token in added), SEPARATOR])}
    ids = [*map(vocab.__getitem__, tokens), *(token["id"] for token in added), END]
    lengths = [*map(len, ranks), *(len(text.encode("utf-8")) for text in whole)]

    from tiktoken import Encoding

    encoding = Encoding("aquila_pd", pat_str=pattern, mergeable_ranks=ranks, special_tokens=whole)
    return Twin(encoding, np.array(ids, dtype=np.int64), np.array(lengths, dtype=np.int64))


def require_tested(package: str) -> None:
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "none"
    if found != pin(package).tested:
        raise NoTwin(f"{package} {found} is installed, and every character was compared with {pin(package).tested}")


def plain(backend: Tokenizer) -> bool:
    """Whether text goes from cutting to merging to ids and nothing else happens; quick, for settings can change."""
    return (
        backend.normalizer is None
        and backend.truncation is None
        and backend.padding is None
        and not backend.encode_special_tokens
        and not getattr(backend.model, "dropout", None)
        and pattern_of(backend.pre_tokenizer) is not None
    )


def pattern_of(pre_tokenizer: PreTokenizer | None) -> str | None:
    """The pattern that cuts as this pre-tokenizer does, None where none is known."""
    try:
        state = json.loads(pre_tokenizer.__getstate__())
    except Exception:  # bare ones come from the library: there is none, or it is written in Python
        return None
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    return next((pattern for known, pattern in PATTERNS if known == steps), None)


def check_model(model: dict, *, size: int) -> None:
    """Raise NoTwin where the model does more than the merges of its list, or lacks a byte. size: tokens it has."""
    if model["type"] != "BPE":
        raise NoTwin(f"a {model['type']} model")
    asked = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    more = [key for key in asked if model.get(key)]
    if more:
        raise NoTwin(f"a model with {' and '.join(more)}")
    if len(model["vocab"]) < size:  # written by id: of two tokens with one id, either is gone
        raise NoTwin("a vocabulary with one id for two tokens")
    missing = [byte for letter, byte in LETTERS.items() if letter not in model["vocab"]]
    if missing:  # with all of them there, nothing is unknown: unk_token and byte_fallback have nothing to do
        raise NoTwin(f"a vocabulary without {len(missing)} of the bytes, the first of them {missing[0]}")


def check_added(tokens: list[tuple[str, bool]], rows: list[dict]) -> None:
    """Raise NoTwin where the two would find added tokens in different places.

    tokens: text and whether it is looked for in normalized text. Of those that begin at one place the library takes the
    longest and tiktoken any; the library looks for the normalized ones last, in what the others leave.
    """
    if any(row["lstrip"] or row["rstrip"] or row["single_word"] for row in rows):
        raise NoTwin("added tokens that take white space with them, or are whole words only")
    if any(not text or not set(text).isdisjoint(SEPARATOR) for text, _ in tokens):
        raise NoTwin("an added token that is empty, or holds code points that are no characters")
    texts = sorted(text for text, _ in tokens)
    if any(longer.startswith(text) for text, longer in pairwise(texts)):
        raise NoTwin("an added token that another one begins with")
    first, last = ([text for text, is_normalized in tokens if is_normalized is late] for late in (False, True))
    if len(first) * len(last) > 10_000 or any(overlap(a, b) for a, b in product(first, last)):
        raise NoTwin("added tokens that may overlap, some of them looked for before the others")


def overlap(a: str, b: str) -> bool:
    """Whether two texts can share characters of a third one."""
    ends = range(1, min(len(a), len(b)))
    return a in b or b in a or any(a.endswith(b[:n]) or b.endswith(a[:n]) for n in ends)


def alone_themselves(made: list[str], backend: Tokenizer) -> list[str]:
    """The tokens that fulfil (2), in their order. One with a character that is no byte is never made."""
    strange = set("".join(made)) - LETTERS.keys()
    spellable = [token for token in made if strange.isdisjoint(token)]
    alone = Tokenizer(backend.model)  # the same model, with nothing around it
    counts = list(map(len, alone.encode_batch_fast(spellable, add_special_tokens=False)))
    backend.model._clear_cache()  # it remembers a number of words and forgets none: these would keep real ones out
    return [token for token, count in zip(spellable, counts, strict=True) if count == 1]
