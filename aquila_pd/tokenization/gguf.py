"""Tokenizer of a GGUF file as a `tokenizers.Tokenizer`: byte-level BPE and SentencePiece bpe."""

import logging
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models

from ..formats.gguf import PRE_TOKENIZER, UNNAMED, open_gguf, pre_tokenizer_note, read_value
from ..formats.sentencepiece import BPE, BYTE, SentencePieceModel
from ..utils.errors import TokenizerError, report
from .backend import set_pipeline, special, surround
from .config import named_in
from .sentencepiece import from_sentencepiece

logger = logging.getLogger(__name__)

CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # tokenizer.ggml.model
CHAT_TEMPLATE = "tokenizer.chat_template"

Reading = Callable[..., object]  # (key, default) -> the metadata under a key


def from_gguf(path: Path) -> tuple[Tokenizer, dict]:
    """The tokenizer a GGUF file carries, and what tokenizer_config.json would say of it.

    Control tokens are special; user-defined tokens are matched whole.
    A byte-level file without tokenizer.ggml.pre, or with "default" in it, was written by a converter that did not
    recognise the pattern: GPT-2's is used, which is Aquila's, and a warning says so.
    Raises TokenizerError for another kind of tokenizer, an unknown pattern, or missing or contradicting fields;
    CheckpointError for a damaged file.
    """
    read = reading(path)
    kind = read("tokenizer.ggml.model")
    if kind == BYTE_LEVEL:
        return byte_level_of(path, read)
    if kind == SENTENCEPIECE:
        return sentencepiece_of(path, read)
    raise TokenizerError(
        f"The tokenizer in {path} is of kind {kind!r}; only {BYTE_LEVEL!r} (byte-level BPE) and {SENTENCEPIECE!r} "
        "(SentencePiece) can be read.\nConvert from the model's Hugging Face folder, which has its tokenizer files."
    )


def reading(path: Path) -> Reading:
    """A function from key and default to a GGUF file's metadata."""
    file = open_gguf(path)

    def read(key: str, default: object = None) -> object:
        value = read_value(file, key, path)
        return default if value is None else value

    return read


def chat_template_in(path: Path) -> str | None:
    """The chat template of a GGUF file, without the rest of its tokenizer."""
    return reading(path)(CHAT_TEMPLATE)


# ---------------------------------------------------------------------------------------------- byte-level BPE


def byte_level_of(path: Path, read: Reading) -> tuple[Tokenizer, dict]:
    tokens = read("tokenizer.ggml.tokens", [])
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges", [])]
    types = read("tokenizer.ggml.token_type", [1] * len(tokens))
    check_bpe(path, tokens, merges, types)
    pre = read(PRE_TOKENIZER)
    if pre in UNNAMED:
        logger.warning("%s: %s", path, pre_tokenizer_note(pre))
        pre = "gpt-2"
    ends = bool(read("tokenizer.ggml.add_bos_token", False)), False
    config = {"pre_tokenizer": pre, "add_bos_token": ends[0], **gguf_config(path, read, tokens)}
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    set_pipeline(backend, pre)
    backend.add_special_tokens([special(token) for token, kind in zip(tokens, types, strict=True) if kind == CONTROL])
    symbols = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False) for token in symbols])
    backend.add_special_tokens([special(token) for token in dict.fromkeys(named_in(config).values())])
    surround(backend, named_in(config), ends=ends)
    return backend, config


def check_bpe(path: Path, tokens: list, merges: list, types: list) -> None:
    vocab, findings = set(tokens), []
    if not tokens:
        findings.append("tokenizer.ggml.tokens is missing or empty")
    if not merges:
        findings.append("tokenizer.ggml.merges is missing or empty")
    if len(vocab) != len(tokens):
        findings.append(f"tokenizer.ggml.tokens lists {len(tokens) - len(vocab)} tokens twice")
    if len(types) != len(tokens):
        findings.append(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    unknown = [merge for merge in merges if len(merge) != 2 or any(t not in vocab for t in (*merge, "".join(merge)))]
    findings += [f"tokenizer.ggml.merges joins tokens that do not exist: {' '.join(merge)}" for merge in unknown[:5]]
    if findings:
        raise incomplete(path, findings)


# ----------------------------------------------------------------------------------------------- SentencePiece


def sentencepiece_of(path: Path, read: Reading) -> tuple[Tokenizer, dict]:
    model = model_of(path, read)
    config = gguf_config(path, read, model.pieces)
    ends = {"add_bos_token": True, "add_eos_token": False}
    config |= {key: bool(read(f"tokenizer.ggml.{key}", default)) for key, default in ends.items()}
    return from_sentencepiece(model, path, config=config), config


def model_of(path: Path, read: Reading) -> SentencePieceModel:
    """The SentencePiece model in a file's metadata, which repeats its tokenizer.model."""
    pieces = read("tokenizer.ggml.tokens", [])
    scores, types = read("tokenizer.ggml.scores", []), read("tokenizer.ggml.token_type", [])
    findings = [] if pieces else ["tokenizer.ggml.tokens is missing or empty"]
    if not (isinstance(scores, list) and all(isinstance(score, float) for score in scores)):
        scores, findings = [], [*findings, "tokenizer.ggml.scores is no list of numbers"]
    for key, values in {"scores": scores, "token_type": types}.items():
        if len(values) != len(pieces):
            findings.append(f"tokenizer.ggml.{key} has {len(values)} entries for {len(pieces)} tokens")
    if read("tokenizer.ggml.precompiled_charsmap") is not None:
        findings.append("it has a normalizer of its own (tokenizer.ggml.precompiled_charsmap), which is not read")
    if findings:
        raise incomplete(path, findings)
    return SentencePieceModel(
        pieces,
        scores,
        types,
        kind=BPE,
        byte_fallback=BYTE in types,
        space_at_end=False,
        names={},
        charsmap=b"",
        dummy_prefix=bool(read("tokenizer.ggml.add_space_prefix", True)),
        remove_extra_whitespaces=bool(read("tokenizer.ggml.remove_extra_whitespaces", False)),
        escape_whitespaces=True,
        changes_decoded_text=False,
    )


def sentencepiece_in(path: Path) -> SentencePieceModel | None:
    """The SentencePiece model of a GGUF file, None for a file with another kind of tokenizer."""
    read = reading(path)
    return model_of(path, read) if read("tokenizer.ggml.model") == SENTENCEPIECE else None


# ---------------------------------------------------------------------------------------------------- both kinds


def incomplete(path: Path, findings: list[str]) -> TokenizerError:
    advice = "Fetch the file again, or use another one."
    return TokenizerError(report(f"The tokenizer in {path} is not complete:", findings, advice))


def gguf_config(path: Path, read: Reading, tokens: list[str]) -> dict:
    """What tokenizer_config.json would say of both kinds of tokenizers: names, length and chat template."""
    config = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token_id = read(f"tokenizer.ggml.{key}_token_id")
        if token_id is None:
            continue
        if not 0 <= token_id < len(tokens):
            raise TokenizerError(
                f"{path} gives {name} the id {token_id}, but its vocabulary has {len(tokens)} tokens.\n"
                "Fetch the file again, or use another one."
            )
        config[f"{name}_token"] = tokens[token_id]
    length = read(f"{read('general.architecture')}.context_length")
    if length is not None:
        config["model_max_length"] = int(length)
    template = read(CHAT_TEMPLATE)
    if template is not None:
        config["chat_template"] = template
    return config
