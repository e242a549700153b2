"""Tokenizer writer: a `tokenizers.Tokenizer` as a complete set of files; loading them infers nothing."""

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from ..utils.errors import TokenizerError
from ..utils.files import refuse_lfs_pointer, write_text
from .backend import is_byte_level
from .config import (
    CONFIG_JSON,
    MERGES_TXT,
    NAME_KEYS,
    SENTENCEPIECE,
    SPECIAL_MAP_JSON,
    TOKEN_FIELDS,
    TOKENIZER_JSON,
    VOCAB_JSON,
    special_names,
)

# Keys of a source's tokenizer_config.json that speak of classes and files of another library, or (clean-up) damage
# decoded text. They have no place in the folder we write.
NOT_OURS = frozenset(
    """
    tokenizer_class auto_map errors clean_up_tokenization_spaces name_or_path init_class init_inputs from_slow
    use_fast trust_remote_code processor_class added_tokens added_tokens_decoder tokenizer_object tokenizer_file
    vocab_file merges_file sentencepiece_file special_tokens_map_file added_tokens_file chat_template_file
    """.split()  # noqa: SIM905  one name a line would be twenty lines
)


def write_files(
    backend: Tokenizer,
    config: dict,
    *,
    output: Path,
    prefix: str = "",
    sentencepiece: Path | None = None,
    tokenizer_class: str = "AquilaTokenizer",
) -> list[str]:
    """Write a tokenizer as files; `config` is what tokenizer_config.json says besides what the backend knows.

    sentencepiece: the tokenizer.model the backend comes from, copied when it is there and the tokens are no bytes.
    """
    names = all_names(backend, config)
    contents = {
        TOKENIZER_JSON: backend.to_str(pretty=False),
        **vocabulary_files(backend),
        CONFIG_JSON: as_json(described(backend, config, names) | {"tokenizer_class": tokenizer_class}),
        SPECIAL_MAP_JSON: as_json(names),
    }
    for name, text in contents.items():
        write_text(output / (prefix + name), text)
    written_names = [prefix + name for name in contents]
    if sentencepiece and sentencepiece.is_file() and not is_byte_level(backend):
        written_names.append(copy_file(sentencepiece, output / (prefix + SENTENCEPIECE)))
    return written_names


def all_names(backend: Tokenizer, config: dict) -> dict:
    """What special_tokens_map.json says: the named special tokens, and those that have no name."""
    names: dict = special_names(config, backend)
    added = sorted(backend.get_added_tokens_decoder().items())
    others = [token.content for _, token in added if token.special and token.content not in names.values()]
    return {**names, "additional_special_tokens": others} if others else names


def described(backend: Tokenizer, config: dict, names: dict) -> dict:
    """What tokenizer_config.json says, but for the class."""
    kept = {key: value for key, value in config.items() if key not in NOT_OURS | names.keys() | set(NAME_KEYS)}
    added = sorted(backend.get_added_tokens_decoder().items())
    tokens = {str(i): {field: getattr(token, field) for field in TOKEN_FIELDS} for i, token in added}
    return {**kept, **names, "clean_up_tokenization_spaces": False, "added_tokens_decoder": tokens}


def as_json(content: dict) -> str:
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def vocabulary_files(backend: Tokenizer) -> dict[str, str]:
    """vocab.json and merges.txt of a byte-level BPE, as texts; of others nothing, for they would be read as one."""
    if not is_byte_level(backend):
        return {}
    model = json.loads(backend.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    return {
        VOCAB_JSON: json.dumps(model["vocab"], ensure_ascii=False, separators=(",", ":")),
        MERGES_TXT: "\n".join(["#version: 0.2", *merges, ""]),
    }


def copy_file(source: Path, target: Path) -> str:
    refuse_lfs_pointer(source, TokenizerError)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)
    return target.name
