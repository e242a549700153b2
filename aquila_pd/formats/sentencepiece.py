"""SentencePiece model (tokenizer.model): protobuf parser, and conversion to a `tokenizers.Tokenizer` of equal ids.

What the files beside a model add to it - bos and eos around a text, more tokens -
is tokenization/sentencepiece.py's subject.
"""

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..utils.errors import TokenizerError, report
from ..utils.files import refuse_larger, refuse_lfs_pointer
from .sentencepiece_merges import Merges, recover_merges

SPACE = "▁"  # how pieces spell a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces
UNIGRAM, BPE = 1, 2  # kinds of models that can be made into a Tokenizer
KINDS = {UNIGRAM: "unigram", BPE: "bpe", 3: "word", 4: "char"}
ALL_SPACES = 2**31 - 1  # more than any text begins with
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# In trainer_spec: the field with the name of a special token, and what it is when the field is absent.
NAME_FIELDS = {
    "unk_token": (45, "<unk>"),
    "bos_token": (46, "<s>"),
    "eos_token": (47, "</s>"),
    "pad_token": (48, "<pad>"),
}

MAX_BYTES = 64_000_000  # of a tokenizer.model; the largest known have five million
LONGEST_PIECE = 256  # characters; trainers allow 16 unless told otherwise
MOST_LETTERS = 4_000_000  # of all pieces; a vocabulary of 250,000 has two million

VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5  # how protobuf stores a value
FIXED = {EIGHT_BYTES: 8, FOUR_BYTES: 4}


@dataclass(frozen=True)
class SentencePieceModel:
    """A parsed tokenizer.model; pieces, scores and types are in id order."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    kind: int  # one of KINDS
    byte_fallback: bool  # text that no piece spells becomes its UTF-8 bytes
    space_at_end: bool  # of a word, instead of in front of it
    names: dict[str, str]  # {"bos_token": "<s>", ...}: those of its special tokens that it holds
    charsmap: bytes  # the normalizer's table, empty for identity
    dummy_prefix: bool  # a space goes in front of every text
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    changes_decoded_text: bool
    by_type: dict[int, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for piece, kind in zip(self.pieces, self.types, strict=True):
            self.by_type.setdefault(kind, []).append(piece)

    def of_type(self, kind: int) -> list[str]:
        return self.by_type.get(kind, [])


# ---------------------------------------------------------------------------------------------------- reading
# The file is a protobuf message. Its few fields are read here: sentencepiece's generated reader refuses to load beside
# any protobuf older than the one it was generated with, and PaddlePaddle decides which protobuf is installed.


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A protobuf varint, and the offset behind it."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("it ends inside a number")
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at


def read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message: an int where it is stored as a varint, bytes otherwise."""
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        number, stored_as = tag >> 3, tag & 7
        if stored_as == VARINT:
            value, at = read_varint(data, at)
            yield number, value
            continue
        if stored_as == LENGTH:
            size, at = read_varint(data, at)
        elif stored_as in FIXED:
            size = FIXED[stored_as]
        else:
            raise ValueError(f"field {number} is stored in the unknown way {stored_as}")
        if at + size > len(data):
            raise ValueError(f"it ends inside field {number}")
        yield number, data[at : at + size]
        at += size


def value_of(fields: dict[int, int | bytes], number: int, default: int | bytes) -> int | bytes:
    """A field of a message, or what it is when absent, which is of the kind it has to be of."""
    value = fields.get(number, default)
    if not isinstance(value, type(default)):
        raise ValueError(f"field {number} of a part is stored as a value of another kind")
    return value


def read_piece(data: bytes) -> tuple[str, float, int]:
    fields = dict(read_fields(data))
    piece = value_of(fields, 1, b"").decode("utf-8")
    return piece, struct.unpack("<f", value_of(fields, 2, bytes(4)))[0], value_of(fields, 3, NORMAL)


def parse_model(data: bytes) -> SentencePieceModel:
    """The model in the bytes of a tokenizer.model; raises ValueError or TypeError for bytes that are none."""
    pieces, parts = [], {2: {}, 3: {}, 5: {}}
    for number, value in read_fields(data):
        if number == 1:
            pieces.append(read_piece(value))
        elif number in parts:
            parts[number].update(read_fields(value))
    if not pieces:
        raise ValueError("it lists no pieces")
    trainer, normalizer, denormalizer = parts[2], parts[3], parts[5]
    special = {piece for piece, _, kind in pieces if kind in (UNKNOWN, CONTROL)}
    names = {key: value_of(trainer, at, usual.encode()).decode("utf-8") for key, (at, usual) in NAME_FIELDS.items()}
    return SentencePieceModel(
        *map(list, zip(*pieces, strict=True)),
        kind=value_of(trainer, 3, UNIGRAM),
        byte_fallback=bool(value_of(trainer, 35, 0)),
        space_at_end=bool(value_of(trainer, 24, 0)),
        names={key: name for key, name in names.items() if name in special},
        charsmap=value_of(normalizer, 2, b""),
        dummy_prefix=bool(value_of(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(value_of(normalizer, 4, 1)),
        escape_whitespaces=bool(value_of(normalizer, 5, 1)),
        changes_decoded_text=bool(value_of(denormalizer, 2, b"")),
    )


def read_model(path: Path) -> SentencePieceModel:
    """The model in a tokenizer.model. Raises TokenizerError when it is damaged."""
    path = Path(path)
    refuse_lfs_pointer(path, TokenizerError)
    refuse_larger(path, MAX_BYTES, TokenizerError)
    found = path.stat()
    return read_once(path, (found.st_mtime_ns, found.st_size))


@lru_cache(maxsize=1)  # names, tokens and ids of one folder are asked for one after the other
def read_once(path: Path, version: tuple[int, int]) -> SentencePieceModel:
    try:
        return parse_model(path.read_bytes())
    except (ValueError, TypeError, AttributeError, struct.error) as error:
        raise TokenizerError(f"{path} is not a SentencePiece model ({error}). Fetch it again.") from error


# ----------------------------------------------------------------------------------------------------- checks


def check_model(model: SentencePieceModel, path: Path) -> None:
    """Raise TokenizerError, with all findings, for a model that a Tokenizer would not follow to the same ids."""
    findings = damage_in(model)
    if model.kind not in (UNIGRAM, BPE):
        findings.append(f"it is of kind {KINDS.get(model.kind, model.kind)!r}; bpe and unigram can be read")
    if len(set(model.pieces)) != len(model.pieces):
        findings.append(f"it lists {len(model.pieces) - len(set(model.pieces))} pieces twice")
    if len(model.of_type(UNKNOWN)) != 1:
        findings.append(f"it has {len(model.of_type(UNKNOWN))} pieces for unknown text, not one")
    if model.of_type(UNUSED):
        findings.append(f"{len(model.of_type(UNUSED))} of its pieces are marked as unused")
    if model.byte_fallback and set(model.of_type(BYTE)) != set(BYTES):
        findings.append(f"it falls back to bytes and has {len(model.of_type(BYTE))} of the 256 pieces for them")
    if model.space_at_end:
        findings.append("it writes spaces at the end of words (treat_whitespace_as_suffix)")
    if not model.escape_whitespaces:
        findings.append("it does not escape spaces (escape_whitespaces is false)")
    if model.changes_decoded_text:
        findings.append("it changes decoded text (denormalizer_spec)")
    if findings:
        advice = "Use a folder with the tokenizer.json made for this model."
        raise TokenizerError(report(f"{path} cannot be read with the same ids:", findings, advice))


def damage_in(model: SentencePieceModel) -> list[str]:
    """Findings: values that no trainer writes, and sizes that would take unbounded time."""
    findings = []
    longest, letters = max(map(len, model.pieces)), sum(map(len, model.pieces))
    if longest > LONGEST_PIECE:
        findings.append(f"it has a piece of {longest:,} characters; up to {LONGEST_PIECE} can be read")
    if letters > MOST_LETTERS:
        findings.append(f"its pieces have {letters:,} characters together; up to {MOST_LETTERS:,} can be read")
    if "" in model.pieces:
        findings.append("it has a piece without any character")
    strange = sum(not math.isfinite(score) for score in model.scores)
    if strange:
        findings.append(f"the scores of {strange} pieces are no numbers")
    if model.charsmap and not is_charsmap(model.charsmap):
        findings.append("the table of its normalizer (precompiled_charsmap) is damaged")
    return findings


def is_charsmap(data: bytes) -> bool:
    """Whether a normalizer's table leads nowhere out of itself; the library believes it, and panics in the end.

    Its size, a trie of 32-bit units, and the texts that the trie's leaves point at. A unit with the highest bit is a
    leaf; another points at a block of 256, one for each byte that may follow, and at a leaf when bit 8 is set.
    """
    size = int.from_bytes(data[:4], "little")
    trie, texts = data[4 : 4 + size], data[4 + size :]
    if not size or size % 4 or len(trie) != size:
        return False
    units = np.frombuffer(trie, dtype="<u4").astype(np.int64)
    target = np.arange(len(units)) ^ ((units >> 10) << ((units & 512) >> 6))
    inner = units < 2**31
    if (target[inner] | 255).max(initial=0) >= len(units):
        return False
    begins = units[target[inner & (units & 256 != 0)]] & (2**31 - 1)
    if begins.max(initial=0) >= len(texts):
        return False
    within = np.frombuffer(texts, dtype=np.uint8)[begins] & 0xC0 == 0x80  # the middle of a character
    return is_utf8(texts) and not within.any()


def is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------- building


def scores_of(model: SentencePieceModel) -> dict[str, float]:
    """The pieces that merging may make, with their scores."""
    rows = zip(model.pieces, model.scores, model.types, strict=True)
    return {piece: score for piece, score, kind in rows if kind == NORMAL}


@lru_cache(maxsize=1)
def merges_once(pieces: tuple[tuple[str, float], ...]) -> Merges:
    return recover_merges(dict(pieces))


def merges_of(model: SentencePieceModel) -> Merges:
    """The merges behind the pieces of a bpe model; cached, since build_backend() and doubts() both need them."""
    return merges_once(tuple(scores_of(model).items()))


def build_model(model: SentencePieceModel) -> models.Model:
    (unknown,) = model.of_type(UNKNOWN)
    if model.kind == UNIGRAM:
        rows = list(zip(model.pieces, model.scores, strict=True))
        return models.Unigram(rows, unk_id=model.pieces.index(unknown), byte_fallback=model.byte_fallback)
    vocab = {piece: i for i, piece in enumerate(model.pieces)}
    merges = merges_of(model).ordered
    return models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback)


def build_normalizer(model: SentencePieceModel, *, prefix: bool) -> normalizers.Normalizer:
    """charsmap, extra spaces, the space in front (prefix), and spaces in the spelling of pieces."""
    steps = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    steps += [normalizers.Prepend(SPACE)] if prefix else []
    steps.append(normalizers.Replace(" ", SPACE))
    if prefix and model.of_type(USER_DEFINED):
        # The library also normalizes the tokens it looks for; their text must stay without the space in front. So does
        # a text that is one of them and nothing else: sentencepiece would give it the space.
        alone = "|".join(map(re.escape, model.of_type(USER_DEFINED)))
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}(?=(?:{alone})\z)"), ""))
    return normalizers.Sequence(steps)


def build_decoder(*, strip: int) -> decoders.Decoder:
    """Spaces, bytes, one text, without up to `strip` spaces at its start."""
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", strip, 0)] if strip else steps)


def doubts(model: SentencePieceModel) -> list[str]:
    """Possible differences in segmentation from sentencepiece, a sentence each; none for a model as trained."""
    found = []
    if model.kind == BPE:
        merges, symbols = merges_of(model), set(model.of_type(USER_DEFINED))
        otherwise = [piece for piece in merges.spelled_otherwise if symbols.isdisjoint(piece)]
        if merges.doubtful:
            found.append(
                f"{len(merges.doubtful)} pieces share their score with others they overlap: where they meet in a text, "
                "one further right may be taken first, and sentencepiece takes the leftmost"
            )
        if otherwise:
            found.append(
                f"{len(otherwise)} pieces hold characters that are no pieces themselves: these pieces are never made"
            )
    normalizer = build_normalizer(model, prefix=False)
    changed = [piece for piece in model.of_type(USER_DEFINED) if normalizer.normalize_str(piece) != piece]
    if changed:
        found.append(f"the normalizer changes {len(changed)} user-defined pieces: text behind them begins anew")
    return found


def build_backend(model: SentencePieceModel, *, prefix: bool = True, legacy: bool = True) -> Tokenizer:
    """The Tokenizer with a model's ids; `check_model` says whether there is one.

    prefix: false leaves out the space in front that the model asks for. legacy: true puts that space in front of
    every piece of text between special tokens, false only at the very start and not before a space, both as LLaMA's
    tokenizers do. Control pieces and the unknown one are special and match in a text, unlike with sentencepiece.
    """
    prefix = prefix and model.dummy_prefix
    backend = Tokenizer(build_model(model))
    backend.normalizer = build_normalizer(model, prefix=prefix and legacy)
    if prefix and not legacy:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    backend.decoder = build_decoder(strip=ALL_SPACES if model.remove_extra_whitespaces else int(prefix))
    special = [piece for piece, kind in zip(model.pieces, model.types, strict=True) if kind in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    # Looked for after normalizing, so that the space in front is that of the whole text; a piece that the charsmap
    # would change is looked for before. All in one call: each goes through all the tokens there are.
    normalizer = build_normalizer(model, prefix=False)
    symbols = [(piece, normalizer.normalize_str(piece) == piece) for piece in model.of_type(USER_DEFINED)]
    backend.add_tokens([AddedToken(piece, special=False, normalized=stays) for piece, stays in symbols])
    return backend
