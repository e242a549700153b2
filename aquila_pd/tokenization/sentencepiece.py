"""SentencePiece model as a `tokenizers.Tokenizer`, with the added tokens of the files beside it.

Not in a converted folder's copy of the code: such a folder always has tokenizer.json.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from ..formats.sentencepiece import SentencePieceModel, build_backend, check_model, read_model
from .backend import add_with_ids, check_names, ends_of_a_text, special, surround
from .config import added_tokens_of, named_in, special_names


def build_sentencepiece(file: Path, *, config: dict) -> Tokenizer:
    """The tokenizer of a tokenizer.model; see `from_sentencepiece`."""
    return from_sentencepiece(read_model(file), file, config=config)


def from_sentencepiece(model: SentencePieceModel, file: Path, *, config: dict) -> Tokenizer:
    """The tokenizer of a model found in a file; `config` is what `read_config` returns for its folder.

    Added tokens keep the ids the config gives them. bos goes in front of every text and eos behind none, as LLaMA's
    tokenizers have it, unless add_bos_token and add_eos_token say otherwise; add_prefix_space and legacy mean what
    they mean there. Raises TokenizerError for a model that cannot be followed to the same ids, for added tokens that
    cannot have their ids, for named tokens that do not exist, and for a class whose way with bos is not known.
    """
    check_model(model, file)
    ends = ends_of_a_text(config)
    config = {**config, **model.names, **named_in(config)}
    backend = build_backend(
        model, prefix=config.get("add_prefix_space") is not False, legacy=config.get("legacy") is not False
    )
    added = [(token_id, found_as_written(token)) for token_id, token in added_tokens_of(config)]
    add_with_ids(backend, {piece: i for i, piece in enumerate(model.pieces)}, added)
    names = special_names(config, backend)
    check_names(names, backend, file.parent)
    backend.add_special_tokens([special(token) for token in dict.fromkeys(names.values())])
    surround(backend, names, ends=ends)
    return backend


def found_as_written(token: AddedToken) -> AddedToken:
    """The token, looked for before a text is normalized: normalizing would put a space in front of its own text too."""
    kept = {key: getattr(token, key) for key in ("lstrip", "rstrip", "single_word", "special")}
    return AddedToken(token.content, normalized=False, **kept)
