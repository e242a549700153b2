"""Tokenizer configuration files, read and checked: names of special tokens, added tokens, chat template.

The vocabulary itself is tokenization/load.py's subject.
"""

from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from ..utils.errors import TokenizerError, only_in_the_package, report, shown_value
from ..utils.files import read_object, read_text

TOKENIZER_JSON = "tokenizer.json"
VOCAB_JSON = "vocab.json"
MERGES_TXT = "merges.txt"
CONFIG_JSON = "tokenizer_config.json"
SPECIAL_MAP_JSON = "special_tokens_map.json"
ADDED_TOKENS_JSON = "added_tokens.json"
SENTENCEPIECE = "tokenizer.model"
SENTENCEPIECE_ALONE = f"A folder with {SENTENCEPIECE} and without {TOKENIZER_JSON}"  # as errors name it
CHAT_TEMPLATE_JINJA = "chat_template.jinja"
CHAT_TEMPLATE_JSON = "chat_template.json"

# Aquila's special tokens in id order; the first has the id that follows the last of vocab.json.
AQUILA_SPECIALS = (
    "<|startofpiece|>",
    "<|endofpiece|>",
    "<|LDWANG|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "[CLS]",
    "</s>",
)
AQUILA_NAMES = {
    "bos_token": "[CLS]",
    "eos_token": "</s>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
TOKEN_FIELDS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
NAME_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def files_in(folder: Path) -> set[str]:
    """Those of a folder's files that hold a vocabulary."""
    return {name for name in (TOKENIZER_JSON, VOCAB_JSON, MERGES_TXT, SENTENCEPIECE) if (folder / name).is_file()}


def rests_on_sentencepiece(folder: Path) -> bool:
    """Whether tokenizer.model is what a folder's tokenizer is made from."""
    present = files_in(folder)
    return SENTENCEPIECE in present and TOKENIZER_JSON not in present and not {VOCAB_JSON, MERGES_TXT} <= present


def read_json(path: Path) -> dict:
    """The object in a JSON file; raises TokenizerError naming the file when it is damaged."""
    return read_object(path, TokenizerError)


def read_config(folder: Path) -> dict:
    """tokenizer_config.json with special_tokens_map.json, added_tokens.json and the chat template laid over it.

    added_tokens.json appears under the key "added_tokens" as {token: id}. Absent files add nothing. Special tokens
    that are named nowhere but in a tokenizer.model, where that is the folder's tokenizer, are named here too.
    Raises TokenizerError for damaged files, and for values that are not of the kind their key wants.
    """

    def read(name: str) -> dict:
        return read_json(folder / name) if (folder / name).is_file() else {}

    config = read(CONFIG_JSON)
    config.update({key: value for key, value in read(SPECIAL_MAP_JSON).items() if value})
    added = read(ADDED_TOKENS_JSON)
    if added:
        config["added_tokens"] = added
    template = read_chat_template(folder)
    if template is not None and template != "":
        config["chat_template"] = template
    check_config(config, folder)
    if rests_on_sentencepiece(folder):
        with only_in_the_package(SENTENCEPIECE_ALONE):
            from ..formats.sentencepiece import read_model
        config.update(read_model(folder / SENTENCEPIECE).names | named_in(config))
    return config


def read_chat_template(folder: Path) -> str | list | dict | None:
    """The chat template in a file of its own: chat_template.jinja, else chat_template.json.

    A Jinja text, a list of named ones, or PaddleNLP's object of texts for conversation, system and query.
    """
    if (folder / CHAT_TEMPLATE_JINJA).is_file():
        return read_text(folder / CHAT_TEMPLATE_JINJA, TokenizerError)
    if (folder / CHAT_TEMPLATE_JSON).is_file():
        return read_chat_template_json(folder / CHAT_TEMPLATE_JSON)
    return None


def read_chat_template_json(file: Path) -> str | list | dict:
    """What transformers writes under the key "chat_template", or PaddleNLP's object itself."""
    found = read_json(file)
    return found.get("chat_template", found)


def is_token(value: object) -> bool:
    """Whether a value says what a token is: its text, or an object with it and how it is to be found."""
    if not isinstance(value, dict):
        return isinstance(value, str)
    others = (value[key] for key in TOKEN_FIELDS[1:] if value.get(key) is not None)
    return isinstance(value.get("content"), str) and all(isinstance(other, bool) for other in others)


def is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def is_id_text(value: str) -> bool:
    return value.isascii() and value.isdecimal() and len(value) < 11 and is_id(int(value))


def is_template(value: object) -> bool:
    if isinstance(value, list):
        texts = [(named.get("name"), named.get("template")) for named in value if isinstance(named, dict)]
        return len(texts) == len(value) and all(isinstance(text, str) for pair in texts for text in pair)
    return isinstance(value, str | dict)


# What the values are that are read here: in words, and how that is seen. null is as good as absent.
WANTED: dict[str, tuple[str, Callable[[object], bool]]] = {
    **dict.fromkeys(NAME_KEYS, ("a token", is_token)),
    **dict.fromkeys(("tokenizer_class", "pre_tokenizer"), ("a text", lambda value: isinstance(value, str))),
    **dict.fromkeys(
        ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"),
        ("true or false", lambda value: isinstance(value, bool)),
    ),
    "model_max_length": ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    "chat_template": ("a text, a list of named texts, or PaddleNLP's object", is_template),
    "additional_special_tokens": (
        "a list of tokens",
        lambda value: isinstance(value, list) and all(map(is_token, value)),
    ),
    "added_tokens": (
        "an object of token to id",
        lambda value: isinstance(value, dict) and all(map(is_id, value.values())),
    ),
    "added_tokens_decoder": (
        "an object of id to token",
        lambda value: isinstance(value, dict) and all(is_id_text(i) and is_token(value[i]) for i in value),
    ),
}


def check_config(config: dict, folder: Path) -> None:
    """Raise TokenizerError, with all findings, for values that are not what is read under their keys."""
    findings = [
        f"{key} is {shown_value(config[key])}, not {words}"
        for key, (words, holds) in WANTED.items()
        if config.get(key) is not None and not holds(config[key])
    ]
    if findings:
        advice = f"Correct {CONFIG_JSON}, {SPECIAL_MAP_JSON} or {ADDED_TOKENS_JSON}, or fetch them again."
        raise TokenizerError(report(f"The tokenizer's settings in {folder} cannot be used:", findings, advice))


def content_of(token: str | dict | AddedToken) -> str:
    """The text of a token, however a JSON file or a caller spells it."""
    return token["content"] if isinstance(token, dict) else str(token)


def as_added(token: str | dict | AddedToken, *, special: bool) -> AddedToken:
    """The AddedToken to register; `special` is the default where the entry does not say."""
    if isinstance(token, dict):
        return AddedToken(**{key: token[key] for key in TOKEN_FIELDS if token.get(key) is not None})
    return token if isinstance(token, AddedToken) else AddedToken(token, special=special, normalized=False)


def added_tokens_of(config: dict) -> list[tuple[int, AddedToken]]:
    """(id, token) of everything added_tokens_decoder and added_tokens.json list."""
    others = map(content_of, config.get("additional_special_tokens") or ())
    named = {*named_in(config).values(), *others, *AQUILA_SPECIALS}
    listed = [(token_id, token) for token, token_id in (config.get("added_tokens") or {}).items()]
    listed += list((config.get("added_tokens_decoder") or {}).items())
    found = {int(token_id): as_added(token, special=content_of(token) in named) for token_id, token in listed}
    return sorted(found.items())


def named_in(config: dict) -> dict[str, str]:
    """The special tokens a config names, as {"bos_token": "[CLS]", ...}."""
    found = {key: content_of(config[key]) for key in NAME_KEYS if config.get(key) is not None}
    return {key: token for key, token in found.items() if token}  # "" in old LLaMA folders: nothing is named


def special_names(config: dict, backend: Tokenizer) -> dict[str, str]:
    """The named special tokens: the config's; under them Aquila's, where the config names neither bos nor eos."""
    names = named_in(config)
    if "bos_token" in names or "eos_token" in names:
        return names
    return {**{key: token for key, token in AQUILA_NAMES.items() if backend.token_to_id(token) is not None}, **names}
