"""Tokenizer conversion in both directions: the functions that the converter calls.

Sources are a folder or a GGUF file. What users call is in tokenizer.py, which does without this module.
"""

import json
import logging
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from ..formats.sentencepiece import doubts as doubts_of_model
from ..formats.sentencepiece import read_model
from ..utils.files import write_text
from .backend import is_byte_level
from .config import (
    AQUILA_SPECIALS,
    CONFIG_JSON,
    SENTENCEPIECE,
    TOKENIZER_JSON,
    files_in,
    read_config,
    rests_on_sentencepiece,
    special_names,
)
from .gguf import chat_template_in, from_gguf, sentencepiece_in
from .load import load_backend, load_tokenizer_json
from .save import write_files

__all__ = [
    "AQUILA_SPECIALS",
    "CONFIG_JSON",
    "SENTENCEPIECE",
    "TOKENIZER_JSON",
    "doubts",
    "from_gguf",
    "has_tokenizer",
    "load_backend",
    "load_tokenizer_json",
    "name_as_paddlenlp",
    "own_chat_template",
    "read_config",
    "special_names",
    "write_tokenizer",
    "write_torch_tokenizer",
]

logger = logging.getLogger(__name__)

PADDLENLP_SENTENCEPIECE = "sentencepiece.bpe.model"  # under which PaddleNLP's LlamaTokenizer looks for tokenizer.model
# Settings of AquilaTokenizer that no class of transformers has, and one that makes LlamaTokenizerFast build itself anew
# from tokenizer.model.
NOT_TORCH = ("surrogates", "pre_tokenizer", "add_prefix_space")


def has_tokenizer(source: Path) -> bool:
    """Whether a folder has files of a tokenizer; a .gguf file carries one."""
    return source.is_file() or bool(files_in(source))


def own_chat_template(source: Path) -> str | list | dict | None:
    """The chat template in the files of a folder, or in a .gguf file; None (or an empty one) where there is none."""
    return chat_template_in(source) if source.is_file() else read_config(source).get("chat_template")


def write_tokenizer(source: Path, output: Path, *, chat_template: str | None = None) -> list[str]:
    """Write the tokenizer files of a converted folder; return the names of the files written.

    source: a folder or a .gguf file. The output gets tokenizer.json, tokenizer_config.json, special_tokens_map.json
    and what `vocabulary_files` names, complete, so that nothing is inferred when it is loaded. A source without
    tokenizer files gets nothing, and [] says so. chat_template: written in place of the source's own; None keeps that.
    Raises TokenizerError when the source's tokenizer is damaged or of a kind that is not known.
    """
    source, output = Path(source), Path(output)
    if source.is_file():
        backend, config = from_gguf(source)
    elif not files_in(source):
        return []
    else:
        backend, config = load_backend(source), read_config(source)
    if chat_template is not None:
        config["chat_template"] = chat_template
    return write_files(backend, config, output=output, sentencepiece=source / SENTENCEPIECE)


def doubts(source: Path) -> list[str]:
    """What a folder or a .gguf file's tokenizer may do otherwise than the model's own, a sentence each; usually [].

    Only SentencePiece models leave room for doubt: formats/sentencepiece_merges.py says why. Raises TokenizerError.
    """
    if source.is_file():
        model = sentencepiece_in(source)
        return [f"{doubt}." for doubt in doubts_of_model(model)] if model else []
    if not rests_on_sentencepiece(source):
        return []
    exact = "PaddleNLP's own LlamaTokenizer (--architecture llama) runs sentencepiece itself and is exact"
    return [f"{doubt}; {exact}." for doubt in doubts_of_model(read_model(source / SENTENCEPIECE))]


def name_as_paddlenlp(folder: Path) -> None:
    """Let PaddleNLP's own LlamaTokenizer load a folder that `write_tokenizer` filled from a SentencePiece model."""
    shutil.copyfile(folder / SENTENCEPIECE, folder / PADDLENLP_SENTENCEPIECE)
    config = read_config(folder)
    write_text(folder / CONFIG_JSON, json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}, indent=2) + "\n")


def write_torch_tokenizer(source: Path, output: Path) -> list[str]:
    """Write a folder's tokenizer for transformers and compatible readers; return the names of the files written.

    The files are those of `write_tokenizer`, under the name of a class that transformers knows and that encodes the
    same. PaddleNLP's own form of a chat template has no place there: it is left out, and a warning says so.
    Raises TokenizerError for a tokenizer that cannot be read.
    """
    source, output = Path(source), Path(output)
    if not files_in(source):
        return []
    backend, config = load_backend(source), read_config(source)
    if isinstance(config.get("chat_template"), dict):
        logger.warning("%s: its chat template is PaddleNLP's and no Jinja text; it is left out", source)
        del config["chat_template"]
    name, settings = torch_class(backend, special_names(config, backend))
    if name == "LlamaTokenizerFast":
        config.setdefault("legacy", True)  # it warns when this is not said; tokenizer.json has it already
    kept = {key: value for key, value in config.items() if key not in NOT_TORCH}
    return write_files(
        backend, kept | settings, output=output, sentencepiece=source / SENTENCEPIECE, tokenizer_class=name
    )


def torch_class(backend: Tokenizer, names: dict) -> tuple[str, dict]:
    """The class of transformers that changes nothing of what tokenizer.json says, and the settings it needs for that.

    GPT2TokenizerFast and LlamaTokenizerFast invent names that are not given, and the second puts its own bos and eos
    around a text: they are named where that comes out the same, PreTrainedTokenizerFast otherwise.
    """
    pipeline = json.loads(backend.to_str())
    splits = pipeline["pre_tokenizer"] or {}
    space = {"add_prefix_space": splits.get("add_prefix_space", False)}
    ends = llama_ends(backend, names) if {"bos_token", "eos_token", "unk_token"} <= set(names) else None
    if ends is not None and not is_byte_level(backend):
        return "LlamaTokenizerFast", {"add_bos_token": ends[0], "add_eos_token": ends[1]}
    if ends == (False, False) and splits.get("type") == "ByteLevel" and pipeline["normalizer"] is None:
        return "GPT2TokenizerFast", space
    inputs = ["input_ids", "attention_mask"]  # this class adds token_type_ids, which generation refuses
    return "PreTrainedTokenizerFast", {"model_input_names": inputs, **space}


def llama_ends(backend: Tokenizer, names: dict) -> tuple[bool, bool] | None:
    """Whether (bos, eos) go around a text; None when something else does."""
    full, inner = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
    bos, eos = (backend.token_to_id(names.get(key, "")) for key in ("bos_token", "eos_token"))
    ends = [(before, behind) for before in (False, True) for behind in (False, True)]
    return next((end for end in ends if full == [bos] * end[0] + inner + [eos] * end[1]), None)
