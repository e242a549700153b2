"""Tokenizer files: read them into a `tokenizers.Tokenizer`, and write those of a converted folder.

Sources are a Hugging Face folder (tokenizer.json, or vocab.json + merges.txt) or a GGUF file. Vocabulary, merges
and splitting pattern come from the source; the one thing known here is the short list of Aquila's special tokens,
which the published folder uses and does not list. What users call is in tokenizer.py.
"""

import json
import logging
import shutil
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .errors import TokenizerError, report
from .files import read_object, read_text, refuse_lfs_pointer, write_text
from .gguf_file import PRE_TOKENIZER, UNNAMED, open_gguf, pre_tokenizer_note, read_value

logger = logging.getLogger(__name__)

TOKENIZER_JSON = "tokenizer.json"
VOCAB_JSON = "vocab.json"
MERGES_TXT = "merges.txt"
CONFIG_JSON = "tokenizer_config.json"
SPECIAL_MAP_JSON = "special_tokens_map.json"
ADDED_TOKENS_JSON = "added_tokens.json"
SENTENCEPIECE = "tokenizer.model"

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
NAME_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")

# How text is cut before merging, by the names GGUF files use in tokenizer.ggml.pre. Checked against the table in
# llama.cpp's llama-vocab.cpp: its second column is the pattern each name stands for.
#   gpt-2     the pattern of GPT-2, which the tokenizers library has built in
#   digits    every digit on its own, then GPT-2's pattern (SmolLM, StarCoder)
#   otherwise a regular expression; "qwen2" also normalizes to NFC, "llama-bpe" looks for whole words before it merges
PRE_TOKENIZERS = {
    "gpt-2": "gpt-2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "qwen2": QWEN2_PATTERN,
    "llama-bpe": LLAMA3_PATTERN,
}
# The class named in tokenizer_config.json decides the pattern of a vocab.json + merges.txt folder.
CLASS_TO_PRE = {
    None: "gpt-2",
    "AquilaTokenizer": "gpt-2",
    "GPT2Tokenizer": "gpt-2",
    "GPT2TokenizerFast": "gpt-2",
    "Qwen2Tokenizer": "qwen2",
    "Qwen2TokenizerFast": "qwen2",
}
GGUF_CONTROL, GGUF_USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

# Keys of a source's tokenizer_config.json that speak of classes and files of another library, or (clean-up) damage
# decoded text. They have no place in the folder we write.
NOT_OURS = frozenset(
    """
    tokenizer_class auto_map errors clean_up_tokenization_spaces name_or_path init_class init_inputs from_slow
    use_fast trust_remote_code processor_class added_tokens added_tokens_decoder tokenizer_object tokenizer_file
    vocab_file merges_file special_tokens_map_file added_tokens_file chat_template_file
    """.split()  # noqa: SIM905  one name a line would be twenty lines
)


# ---------------------------------------------------------------------------------------------- reading a folder


def load_backend(folder: Path, *, pre_tokenizer: str | None = None) -> Tokenizer:
    """The tokenizer a folder describes: from tokenizer.json when it is there, else from vocab.json + merges.txt.

    pre_tokenizer: a name from PRE_TOKENIZERS that overrides what the folder says (only without tokenizer.json, which
    carries its own pattern). See `build_bpe` for how special tokens get their ids.
    Raises TokenizerError when the folder holds no usable tokenizer, saying what it does hold.
    """
    folder = Path(folder)
    if (folder / TOKENIZER_JSON).is_file():
        backend = load_tokenizer_json(folder / TOKENIZER_JSON)
        check_names(special_names(read_config(folder), backend), backend, folder)
        return backend
    require_tokenizer(folder)
    config = read_config(folder)
    if pre_tokenizer is not None:
        config["pre_tokenizer"] = pre_tokenizer
    return build_bpe(folder / VOCAB_JSON, folder / MERGES_TXT, config=config)


def require_tokenizer(folder: Path) -> None:
    """Raise TokenizerError, saying what is there, when a folder lacks tokenizer.json and vocab.json + merges.txt."""
    missing = [name for name in (VOCAB_JSON, MERGES_TXT) if not (folder / name).is_file()]
    if not missing or (folder / TOKENIZER_JSON).is_file():
        return
    if (folder / SENTENCEPIECE).is_file():
        raise TokenizerError(
            f"{folder} holds a SentencePiece model ({SENTENCEPIECE}), which AquilaTokenizer does not read.\n"
            "Use a folder with tokenizer.json, or with vocab.json and merges.txt."
        )
    raise TokenizerError(
        report(
            f"{folder} holds no tokenizer that can be loaded:",
            [f"missing     {name}" for name in (TOKENIZER_JSON, *missing)],
            "Put tokenizer.json there, or vocab.json together with merges.txt.",
        )
    )


def load_tokenizer_json(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, without the padding and truncation it may have been saved with."""
    refuse_lfs_pointer(path, TokenizerError)
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            f"{path} cannot be read as a tokenizer: {error}\nFetch the file again, or delete it to use vocab.json "
            "and merges.txt."
        ) from error
    if not isinstance(backend.model, models.BPE):
        raise TokenizerError(
            f"{path} holds a {type(backend.model).__name__} model; AquilaTokenizer reads byte-pair encodings (BPE).\n"
            "Load this tokenizer with the library it was made for."
        )
    backend.no_padding()
    backend.no_truncation()
    return backend


def build_bpe(vocab_file: Path, merges_file: Path, *, config: dict) -> Tokenizer:
    """A byte-level BPE from vocab.json and merges.txt; `config` is what `read_config` returns (or part of it).

    Added tokens get their ids from the config's added tokens (added_tokens.json, added_tokens_decoder). Where the
    config is Aquila's - bos is [CLS] and eos is </s>, or it names neither - and neither vocab.json nor the added
    tokens hold any of the eight AQUILA_SPECIALS, those follow the vocabulary in order: the first gets the id
    len(vocab). Taking the named ones in the order the config names them, as a generic loader does, would give [CLS]
    the first of these ids, which belongs to <|startofpiece|>.

    Raises TokenizerError for unreadable files, for an added token that cannot have the id the files give it, and
    for a bos, eos, pad or other special token that is named but nowhere defined.
    """
    vocab = read_json(vocab_file)
    model = read_bpe(vocab_file, merges_file)
    pre = config.get("pre_tokenizer") or pre_tokenizer_of_class(config)
    if PRE_TOKENIZERS.get(pre) == LLAMA3_PATTERN:
        model.ignore_merges = True
    backend = Tokenizer(model)
    set_pipeline(backend, pre, add_prefix_space=bool(config.get("add_prefix_space")))

    added = added_tokens_of(config)
    if is_bare_aquila(vocab, named_in(config), added):
        added += [(len(vocab) + i, special(token)) for i, token in enumerate(AQUILA_SPECIALS)]
    add_with_ids(backend, vocab, added)

    names = special_names(config, backend)
    others = map(content_of, config.get("additional_special_tokens") or ())
    known = dict.fromkeys([*names.values(), *others, *AQUILA_SPECIALS])
    already = {token.content for token in backend.get_added_tokens_decoder().values()}
    held = [token for token in known if token not in already and backend.token_to_id(token) is not None]
    backend.add_special_tokens([special(token) for token in held])
    check_names(names, backend, vocab_file.parent)
    if config.get("add_bos_token") and "bos_token" in names:
        prepend_bos(backend, names["bos_token"])
    return backend


def read_bpe(vocab_file: Path, merges_file: Path) -> models.BPE:
    for file in (vocab_file, merges_file):
        if file.is_file():
            refuse_lfs_pointer(file, TokenizerError)
    try:
        return models.BPE.from_file(str(vocab_file), str(merges_file))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            f"{merges_file.name} and {vocab_file.name} of {vocab_file.parent} do not make a BPE: {error}\n"
            "One of the two is damaged or they come from different models; fetch both again."
        ) from error


def pre_tokenizer_of_class(config: dict) -> str:
    name = config.get("tokenizer_class")
    if name not in CLASS_TO_PRE:
        known = ", ".join(sorted(filter(None, CLASS_TO_PRE)))
        raise TokenizerError(
            f"tokenizer_config.json names the class {name}, whose splitting pattern is not known (known: {known}).\n"
            f'Use a folder with tokenizer.json, or add "pre_tokenizer": one of {", ".join(PRE_TOKENIZERS)}.'
        )
    return CLASS_TO_PRE[name]


def set_pipeline(backend: Tokenizer, pre: str, *, add_prefix_space: bool = False) -> None:
    """Everything around the BPE itself: normalizer, splitting pattern, decoder and offsets."""
    if pre not in PRE_TOKENIZERS:
        raise TokenizerError(
            f"The pre-tokenizer {pre!r} is not known, so text would be cut in the wrong places.\n"
            f"Known are: {', '.join(PRE_TOKENIZERS)}. Use the model's original Hugging Face folder instead."
        )
    pattern = PRE_TOKENIZERS[pre]
    if pattern == "gpt-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    elif pattern == "digits":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)


def prepend_bos(backend: Tokenizer, bos: str) -> None:
    """Encoding puts the bos token in front of every text, as the source says its model expects."""
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, backend.token_to_id(bos))]
            ),
        ]
    )


def special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def named_in(config: dict) -> dict[str, str]:
    """The special tokens a config names, as {"bos_token": "[CLS]", ...}."""
    return {key: content_of(config[key]) for key in NAME_KEYS if config.get(key) is not None}


def special_names(config: dict, backend: Tokenizer) -> dict[str, str]:
    """The named special tokens: the config's; under them Aquila's, where the config names neither bos nor eos."""
    names = named_in(config)
    if "bos_token" in names or "eos_token" in names:
        return names
    return {**{key: token for key, token in AQUILA_NAMES.items() if backend.token_to_id(token) is not None}, **names}


def is_bare_aquila(vocab: dict, names: dict, added: list[tuple[int, AddedToken]]) -> bool:
    """Whether the folder means Aquila's eight special tokens without listing any of them."""
    listed = set(vocab) | {token.content for _, token in added}
    bos_and_eos = names.get("bos_token"), names.get("eos_token")
    return bos_and_eos in (("[CLS]", "</s>"), (None, None)) and listed.isdisjoint(AQUILA_SPECIALS)


def add_with_ids(backend: Tokenizer, vocab: dict, added: list[tuple[int, AddedToken]]) -> None:
    """Register added tokens and prove that each has the id its file gives it (the library only counts upwards)."""
    for _, token in sorted(added, key=lambda pair: pair[0]):
        backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
    wrong = [
        f"{token.content!r} should have id {wanted}, would get {backend.token_to_id(token.content)}"
        for wanted, token in added
        if backend.token_to_id(token.content) != wanted
    ]
    highest = max(vocab.values(), default=-1)
    if added and highest >= len(vocab):
        wrong.append(f"the ids of vocab.json run to {highest}, though it has only {len(vocab)} entries")
    if wrong:
        raise TokenizerError(
            report(
                "The added tokens do not fit the vocabulary:",
                wrong,
                "vocab.json and the added tokens come from different models, or entries are missing from one of them.",
            )
        )


def check_names(names: dict, backend: Tokenizer, folder: Path) -> None:
    missing = [f"{key:<12}{token!r}" for key, token in names.items() if backend.token_to_id(token) is None]
    if missing:
        raise TokenizerError(
            report(
                f"{folder} names special tokens that its vocabulary does not hold:",
                missing,
                f"Give them ids in {ADDED_TOKENS_JSON}, or correct {CONFIG_JSON} and {SPECIAL_MAP_JSON}.",
            )
        )


# -------------------------------------------------------------------------------------------- the small JSON files


def read_json(path: Path) -> dict:
    """The object in a JSON file; raises TokenizerError naming the file when it is damaged."""
    return read_object(path, TokenizerError)


def read_config(folder: Path) -> dict:
    """tokenizer_config.json with special_tokens_map.json, added_tokens.json and chat_template.jinja laid over it.

    added_tokens.json appears under the key "added_tokens" as {token: id}. Absent files add nothing.
    """

    def read(name: str) -> dict:
        return read_json(folder / name) if (folder / name).is_file() else {}

    config = read(CONFIG_JSON)
    config.update({key: value for key, value in read(SPECIAL_MAP_JSON).items() if value})
    added = read(ADDED_TOKENS_JSON)
    if added:
        config["added_tokens"] = added
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = read_text(folder / "chat_template.jinja", TokenizerError)
    return config


def content_of(token: str | dict | AddedToken) -> str:
    """The text of a token, however a JSON file spells it."""
    return token["content"] if isinstance(token, dict) else str(token)


def added_tokens_of(config: dict) -> list[tuple[int, AddedToken]]:
    """(id, token) of everything added_tokens_decoder and added_tokens.json list."""
    others = map(content_of, config.get("additional_special_tokens") or ())
    named = {*named_in(config).values(), *others, *AQUILA_SPECIALS}
    found = {}
    for token, token_id in (config.get("added_tokens") or {}).items():
        found[int(token_id)] = AddedToken(token, special=token in named, normalized=False)
    for token_id, token in (config.get("added_tokens_decoder") or {}).items():
        if isinstance(token, dict):
            token = AddedToken(**{key: value for key, value in token.items() if key != "__type"})
        found[int(token_id)] = token
    return sorted(found.items())


# --------------------------------------------------------------------------------------------------------- GGUF


def from_gguf(path: Path) -> tuple[Tokenizer, dict]:
    """The tokenizer a GGUF file carries, and what tokenizer_config.json would say of it.

    Only byte-level BPE ("gpt2") files are read. Control tokens are special; user-defined tokens are matched whole.
    A file without tokenizer.ggml.pre, or with "default" in it, was written by a converter that did not recognise
    the pattern: GPT-2's is used, which is Aquila's, and a warning says so.
    Raises TokenizerError for another kind of tokenizer, an unknown pattern, or missing or contradicting fields;
    CheckpointError for a damaged file.
    """
    file = open_gguf(path)

    def read(key: str, default: object = None) -> object:
        value = read_value(file, key, path)
        return default if value is None else value

    kind = read("tokenizer.ggml.model")
    if kind != "gpt2":
        raise TokenizerError(
            f"The tokenizer in {path} is of kind {kind!r}; only 'gpt2' (byte-level BPE) can be read.\n"
            "Convert from the model's Hugging Face folder, which has its tokenizer files."
        )
    tokens = read("tokenizer.ggml.tokens", [])
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges", [])]
    types = read("tokenizer.ggml.token_type", [1] * len(tokens))
    check_gguf(path, vocab, tokens, merges, types)

    config = gguf_config(path, read, tokens)
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=config["pre_tokenizer"] == "llama-bpe"))
    set_pipeline(backend, config["pre_tokenizer"])
    for token, kind in zip(tokens, types, strict=True):
        if kind == GGUF_CONTROL:
            backend.add_special_tokens([special(token)])
        elif kind == GGUF_USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    backend.add_special_tokens([special(token) for token in dict.fromkeys(named_in(config).values())])
    if config.get("add_bos_token") and "bos_token" in config:
        prepend_bos(backend, config["bos_token"])
    return backend, config


def check_gguf(path: Path, vocab: dict, tokens: list, merges: list, types: list) -> None:
    findings = []
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
        raise TokenizerError(
            report(f"The tokenizer in {path} is not complete:", findings, "Fetch the file again, or use another one.")
        )


def gguf_config(path: Path, read, tokens: list[str]) -> dict:
    """What tokenizer_config.json would say of the tokenizer behind `read`, a function from key to value."""
    pre = read(PRE_TOKENIZER)
    if pre in UNNAMED:
        logger.warning("%s: %s", path, pre_tokenizer_note(pre))
        pre = "gpt-2"
    config = {"pre_tokenizer": pre, "add_bos_token": bool(read("tokenizer.ggml.add_bos_token", False))}
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
    template = read("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return config


# ------------------------------------------------------------------------------------------------ writing a folder


def write_tokenizer(source: Path, output: Path) -> list[str]:
    """Write the tokenizer files of a converted folder; return the names of the files written.

    source: a Hugging Face folder or a .gguf file. The output gets tokenizer.json, vocab.json, merges.txt,
    tokenizer_config.json and special_tokens_map.json, complete, so that nothing is inferred when it is loaded.
    A source that has only a SentencePiece model gets its files copied ("tokenizer.model" is then among the names,
    and no tokenizer.json). A source without tokenizer files gets nothing, and [] says so.
    Raises TokenizerError when the source's tokenizer is damaged or of a kind that is not known.
    """
    source, output = Path(source), Path(output)
    if source.is_file():
        return write_files(*from_gguf(source), output=output)
    present = {name for name in (TOKENIZER_JSON, VOCAB_JSON, MERGES_TXT, SENTENCEPIECE) if (source / name).is_file()}
    if not present:
        return []
    if present == {SENTENCEPIECE}:
        names = (SENTENCEPIECE, CONFIG_JSON, SPECIAL_MAP_JSON, ADDED_TOKENS_JSON)
        return [copy_file(source / name, output / name) for name in names if (source / name).is_file()]
    return write_files(load_backend(source), read_config(source), output=output)


def write_files(backend: Tokenizer, config: dict, *, output: Path, prefix: str = "") -> list[str]:
    """Write a tokenizer as files; `config` is what tokenizer_config.json says besides what the backend knows."""
    model = json.loads(backend.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    names: dict = special_names(config, backend)
    added = backend.get_added_tokens_decoder()
    others = [t.content for _, t in sorted(added.items()) if t.special and t.content not in names.values()]
    if others:
        names["additional_special_tokens"] = others

    written = {key: value for key, value in config.items() if key not in NOT_OURS and key not in names}
    written.update(names, tokenizer_class="AquilaTokenizer", clean_up_tokenization_spaces=False)
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    described = {str(i): {field: getattr(token, field) for field in fields} for i, token in sorted(added.items())}
    written["added_tokens_decoder"] = described
    contents = {
        TOKENIZER_JSON: backend.to_str(pretty=False),
        VOCAB_JSON: json.dumps(model["vocab"], ensure_ascii=False, separators=(",", ":")),
        MERGES_TXT: "\n".join(["#version: 0.2", *merges, ""]),
        CONFIG_JSON: json.dumps(written, ensure_ascii=False, indent=2) + "\n",
        SPECIAL_MAP_JSON: json.dumps(names, ensure_ascii=False, indent=2) + "\n",
    }
    for name, text in contents.items():
        write_text(output / (prefix + name), text)
    return [prefix + name for name in contents]


def copy_file(source: Path, target: Path) -> str:
    refuse_lfs_pointer(source, TokenizerError)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target.name
