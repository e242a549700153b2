"""Tokenizer files: read them into a `tokenizers.Tokenizer`, and write those of a converted folder and of the way back.

Sources are a folder (tokenizer.json, or vocab.json + merges.txt, or tokenizer.model) or a GGUF file. Vocabulary, merges
and splitting pattern come from the source; the one thing known here is the short list of Aquila's special tokens,
which the published folder uses and does not list. How a tokenizer.model becomes a Tokenizer is in
sentencepiece_files.py, what users call in tokenizer.py.
"""

import json
import logging
import shutil
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .errors import TokenizerError, report, shown_value
from .files import read_object, read_text, refuse_lfs_pointer, write_text
from .gguf_file import PRE_TOKENIZER, UNNAMED, open_gguf, pre_tokenizer_note, read_value
from .sentencepiece_files import build_backend, check_model, doubts, read_model

logger = logging.getLogger(__name__)

TOKENIZER_JSON = "tokenizer.json"
VOCAB_JSON = "vocab.json"
MERGES_TXT = "merges.txt"
CONFIG_JSON = "tokenizer_config.json"
SPECIAL_MAP_JSON = "special_tokens_map.json"
ADDED_TOKENS_JSON = "added_tokens.json"
SENTENCEPIECE = "tokenizer.model"
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
# Classes that put bos in front of a text, and no eos behind it, unless told otherwise.
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")

# Keys of a source's tokenizer_config.json that speak of classes and files of another library, or (clean-up) damage
# decoded text. They have no place in the folder we write.
NOT_OURS = frozenset(
    """
    tokenizer_class auto_map errors clean_up_tokenization_spaces name_or_path init_class init_inputs from_slow
    use_fast trust_remote_code processor_class added_tokens added_tokens_decoder tokenizer_object tokenizer_file
    vocab_file merges_file sentencepiece_file special_tokens_map_file added_tokens_file chat_template_file
    """.split()  # noqa: SIM905  one name a line would be twenty lines
)
# Settings of AquilaTokenizer that no class of transformers has, and one that makes LlamaTokenizerFast build itself anew
# from tokenizer.model.
NOT_TORCH = ("surrogates", "pre_tokenizer", "add_prefix_space")


# ---------------------------------------------------------------------------------------------- reading a folder


def load_backend(folder: Path, *, pre_tokenizer: str | None = None) -> Tokenizer:
    """The tokenizer a folder describes: its tokenizer.json, else vocab.json + merges.txt, else tokenizer.model.

    pre_tokenizer: a name from PRE_TOKENIZERS that overrides what the folder says of vocab.json + merges.txt (the other
    two carry their own way). See `build_bpe` and `build_sentencepiece` for how special tokens get their ids.
    Raises TokenizerError when the folder holds no usable tokenizer, saying what it does hold.
    """
    folder = Path(folder)
    if (folder / TOKENIZER_JSON).is_file():
        backend, config = load_tokenizer_json(folder / TOKENIZER_JSON), read_config(folder)
        names = special_names(config, backend)
        check_names(names, backend, folder)
        if not is_byte_level(backend) and (config.get("tokenizer_class") in LLAMA or "add_bos_token" in config):
            # LLaMA's class looks at the config for this, whatever tokenizer.json says
            backend.post_processor = None
            surround(backend, names, ends=ends_of_a_text(config))
        return backend
    require_tokenizer(folder)
    config = read_config(folder)
    if rests_on_sentencepiece(folder):
        return build_sentencepiece(folder / SENTENCEPIECE, config=config)
    if pre_tokenizer is not None:
        config["pre_tokenizer"] = pre_tokenizer
    return build_bpe(folder / VOCAB_JSON, folder / MERGES_TXT, config=config)


def files_in(folder: Path) -> set[str]:
    """Those of a folder's files that hold a vocabulary."""
    return {name for name in (TOKENIZER_JSON, VOCAB_JSON, MERGES_TXT, SENTENCEPIECE) if (folder / name).is_file()}


def rests_on_sentencepiece(folder: Path) -> bool:
    """Whether tokenizer.model is what a folder's tokenizer is made from."""
    present = files_in(folder)
    return SENTENCEPIECE in present and TOKENIZER_JSON not in present and not {VOCAB_JSON, MERGES_TXT} <= present


def require_tokenizer(folder: Path) -> None:
    """Raise TokenizerError, saying what is missing, when a folder lacks the files of a tokenizer."""
    present = files_in(folder)
    if present & {TOKENIZER_JSON, SENTENCEPIECE} or {VOCAB_JSON, MERGES_TXT} <= present:
        return
    missing = [name for name in (TOKENIZER_JSON, SENTENCEPIECE, VOCAB_JSON, MERGES_TXT) if name not in present]
    raise TokenizerError(
        report(
            f"{folder} holds no tokenizer that can be loaded:",
            [f"missing     {name}" for name in missing],
            f"Put {TOKENIZER_JSON} there, or {SENTENCEPIECE}, or {VOCAB_JSON} together with {MERGES_TXT}.",
        )
    )


def load_tokenizer_json(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, without the padding and truncation it may have been saved with."""
    refuse_lfs_pointer(path, TokenizerError)
    try:
        backend = Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and a PanicException that is none
        raise TokenizerError(
            f"{path} cannot be read as a tokenizer: {error}\nFetch the file again, or delete it to use vocab.json "
            "and merges.txt."
        ) from error
    if not isinstance(backend.model, models.BPE | models.Unigram):
        raise TokenizerError(
            f"{path} holds a {type(backend.model).__name__} model; AquilaTokenizer reads byte-pair encodings (BPE) and "
            "Unigram models.\nLoad this tokenizer with the library it was made for."
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
    surround(backend, names, ends=(bool(config.get("add_bos_token")), False))
    return backend


def build_sentencepiece(file: Path, *, config: dict) -> Tokenizer:
    """The tokenizer of a tokenizer.model; `config` is what `read_config` returns for its folder.

    Added tokens keep the ids the config gives them. bos goes in front of every text and eos behind none, as LLaMA's
    tokenizers have it, unless add_bos_token and add_eos_token say otherwise; add_prefix_space and legacy mean what
    they mean there. Raises TokenizerError for a model that cannot be followed to the same ids, for added tokens that
    cannot have their ids, for named tokens that do not exist, and for a class whose way with bos is not known.
    """
    model = read_model(file)
    check_model(model, file)
    ends = ends_of_a_text(config)
    config = {**config, **model.names, **named_in(config)}
    for doubt in doubts(model):
        logger.warning("%s: %s", file, doubt)
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


def ends_of_a_text(config: dict) -> tuple[bool, bool]:
    """Whether the class of a SentencePiece tokenizer puts bos before and eos behind a text."""
    name = config.get("tokenizer_class")
    if name not in (None, "AquilaTokenizer", *LLAMA) and config.get("add_bos_token") is None:
        raise TokenizerError(
            f"tokenizer_config.json names the class {name}; whether it puts bos before a text is not known.\n"
            'Write "add_bos_token": true or false there (and "add_eos_token", which is false by default).'
        )
    return config.get("add_bos_token") is not False, bool(config.get("add_eos_token"))


def read_bpe(vocab_file: Path, merges_file: Path) -> models.BPE:
    for file in (vocab_file, merges_file):
        if file.is_file():
            refuse_lfs_pointer(file, TokenizerError)
    try:
        return models.BPE.from_file(str(vocab_file), str(merges_file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and a PanicException that is none
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


def surround(backend: Tokenizer, names: dict, *, ends: tuple[bool, bool]) -> None:
    """Encoding puts bos before and eos behind every text, each where `ends` asks for it and the token has a name."""
    bos, eos = (names.get(key) if asked else None for key, asked in zip(("bos_token", "eos_token"), ends, strict=True))
    if bos is None and eos is None:
        return
    parts = [filter(None, (bos and f"{bos}:{i}", f"${name}:{i}", eos and f"{eos}:{i}")) for i, name in enumerate("AB")]
    single, second = map(list, parts)
    ids = [(token, backend.token_to_id(token)) for token in {bos, eos} if token is not None]
    template = processors.TemplateProcessing(single=single, pair=single + second, special_tokens=ids)
    before = [] if backend.post_processor is None else [backend.post_processor]
    backend.post_processor = processors.Sequence([*before, template])


def special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def found_as_written(token: AddedToken) -> AddedToken:
    """The token, looked for before a text is normalized: normalizing would put a space in front of its own text too."""
    kept = {key: getattr(token, key) for key in ("lstrip", "rstrip", "single_word", "special")}
    return AddedToken(token.content, normalized=False, **kept)


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
                "The vocabulary and the added tokens come from different models, or one of them has lost entries.",
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
    """tokenizer_config.json with special_tokens_map.json, added_tokens.json and the chat template laid over it.

    added_tokens.json appears under the key "added_tokens" as {token: id}. Absent files add nothing. Special tokens
    that are named nowhere but in a tokenizer.model, where that is the folder's tokenizer, are named here too.
    """

    def read(name: str) -> dict:
        return read_json(folder / name) if (folder / name).is_file() else {}

    config = read(CONFIG_JSON)
    config.update({key: value for key, value in read(SPECIAL_MAP_JSON).items() if value})
    added = read(ADDED_TOKENS_JSON)
    if added:
        config["added_tokens"] = added
    if rests_on_sentencepiece(folder):
        config.update(read_model(folder / SENTENCEPIECE).names | named_in(config))
    if template := read_chat_template(folder):
        config["chat_template"] = template
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


def content_of(token: str | dict | AddedToken) -> str:
    """The text of a token, however a JSON file spells it."""
    text = token.get("content") if isinstance(token, dict) else str(token)
    if not isinstance(text, str):
        raise TokenizerError(f"{shown_value(token)} is no token. Fetch the tokenizer's files again.")
    return text


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
    surround(backend, named_in(config), ends=(config["add_bos_token"], False))
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


def write_tokenizer(source: Path, output: Path, *, chat_template: str | None = None) -> list[str]:
    """Write the tokenizer files of a converted folder; return the names of the files written.

    source: a folder or a .gguf file. The output gets tokenizer.json, tokenizer_config.json, special_tokens_map.json
    and what `vocabulary_files` names, complete, so that nothing is inferred when it is loaded. A source without
    tokenizer files gets nothing, and [] says so. chat_template: written when the source has none.
    Raises TokenizerError when the source's tokenizer is damaged or of a kind that is not known.
    """
    source, output = Path(source), Path(output)
    if source.is_file():
        backend, config = from_gguf(source)
    elif not files_in(source):
        return []
    else:
        backend, config = load_backend(source), read_config(source)
    if chat_template is not None and not config.get("chat_template"):
        config["chat_template"] = chat_template
    return write_files(backend, config, output=output, sentencepiece=source / SENTENCEPIECE)


PADDLENLP_SENTENCEPIECE = "sentencepiece.bpe.model"  # under which PaddleNLP's LlamaTokenizer looks for tokenizer.model


def name_as_paddlenlp(folder: Path) -> None:
    """Let PaddleNLP's own LlamaTokenizer load a folder that `write_tokenizer` filled from a SentencePiece model."""
    shutil.copyfile(folder / SENTENCEPIECE, folder / PADDLENLP_SENTENCEPIECE)
    config = read_config(folder)
    write_text(folder / CONFIG_JSON, json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}, indent=2) + "\n")


def write_torch_tokenizer(source: Path, output: Path) -> list[str]:
    """Write a folder's tokenizer for transformers and those who read its files; return the names of the files written.

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


def is_byte_level(backend: Tokenizer) -> bool:
    """Whether tokens are bytes spelled as letters; vocab.json and merges.txt can say all of such a tokenizer."""
    return backend.decoder is not None and b"ByteLevel" in backend.decoder.__getstate__()


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
    names: dict = special_names(config, backend)
    added = backend.get_added_tokens_decoder()
    others = [t.content for _, t in sorted(added.items()) if t.special and t.content not in names.values()]
    if others:
        names["additional_special_tokens"] = others

    written = {key: value for key, value in config.items() if key not in NOT_OURS | names.keys() | set(NAME_KEYS)}
    written.update(names, tokenizer_class=tokenizer_class, clean_up_tokenization_spaces=False)
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    described = {str(i): {field: getattr(token, field) for field in fields} for i, token in sorted(added.items())}
    written["added_tokens_decoder"] = described
    contents = {
        TOKENIZER_JSON: backend.to_str(pretty=False),
        **vocabulary_files(backend),
        CONFIG_JSON: json.dumps(written, ensure_ascii=False, indent=2) + "\n",
        SPECIAL_MAP_JSON: json.dumps(names, ensure_ascii=False, indent=2) + "\n",
    }
    for name, text in contents.items():
        write_text(output / (prefix + name), text)
    written_names = [prefix + name for name in contents]
    if sentencepiece and sentencepiece.is_file() and not is_byte_level(backend):
        written_names.append(copy_file(sentencepiece, output / (prefix + SENTENCEPIECE)))
    return written_names


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
