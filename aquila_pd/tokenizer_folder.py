"""The tokenizer of a folder as a `tokenizers.Tokenizer`: tokenizer.json, vocab.json + merges.txt, or tokenizer.model.

Vocabulary, merges and splitting pattern come from the folder; the one thing known beside it is the short list of
Aquila's special tokens, which the published folder uses and does not list (tokenizer_config.py has it). How a
tokenizer.model becomes a Tokenizer is in sentencepiece_files.py.
"""

from itertools import groupby
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .errors import TokenizerError, report
from .files import MAX_TEXT, refuse_lfs_pointer
from .sentencepiece_files import SentencePieceModel, build_backend, check_model, read_model, refuse_larger
from .tokenizer_config import (
    ADDED_TOKENS_JSON,
    AQUILA_SPECIALS,
    CONFIG_JSON,
    MERGES_TXT,
    SENTENCEPIECE,
    SPECIAL_MAP_JSON,
    TOKENIZER_JSON,
    VOCAB_JSON,
    added_tokens_of,
    content_of,
    files_in,
    named_in,
    read_config,
    read_json,
    rests_on_sentencepiece,
    special_names,
)

MAX_TOKENIZER_JSON = 256_000_000  # bytes; the largest known have thirty million

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
# Classes that put bos in front of a text, and no eos behind it, unless told otherwise.
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")


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
    refuse_larger(path, MAX_TOKENIZER_JSON)
    try:
        backend = Tokenizer.from_file(str(path))
        backend.encode("a")  # some of what is wrong in it shows when it is used
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
    make_special(backend, names, config)
    check_names(names, backend, vocab_file.parent)
    surround(backend, names, ends=(bool(config.get("add_bos_token")), False))
    return backend


def make_special(backend: Tokenizer, names: dict, config: dict) -> None:
    """Let tokens be special that the vocabulary holds as ordinary ones: named, additional and Aquila's."""
    others = map(content_of, config.get("additional_special_tokens") or ())
    known = dict.fromkeys([*names.values(), *others, *AQUILA_SPECIALS])
    already = {token.content for token in backend.get_added_tokens_decoder().values()}
    held = [token for token in known if token not in already and backend.token_to_id(token) is not None]
    backend.add_special_tokens([special(token) for token in held])


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
            refuse_larger(file, MAX_TEXT)
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


def is_bare_aquila(vocab: dict, names: dict, added: list[tuple[int, AddedToken]]) -> bool:
    """Whether the folder means Aquila's eight special tokens without listing any of them."""
    listed = set(vocab) | {token.content for _, token in added}
    bos_and_eos = names.get("bos_token"), names.get("eos_token")
    return bos_and_eos in (("[CLS]", "</s>"), (None, None)) and listed.isdisjoint(AQUILA_SPECIALS)


def add_with_ids(backend: Tokenizer, vocab: dict, added: list[tuple[int, AddedToken]]) -> None:
    """Register added tokens and prove that each has the id its file gives it (the library only counts upwards)."""
    in_order = [token for _, token in sorted(added, key=lambda pair: pair[0])]
    for is_special, tokens in groupby(in_order, key=lambda token: token.special):
        add = backend.add_special_tokens if is_special else backend.add_tokens
        add(list(tokens))  # in one call: each goes through all the tokens there are
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


def is_byte_level(backend: Tokenizer) -> bool:
    """Whether tokens are bytes spelled as letters; vocab.json and merges.txt can say all of such a tokenizer."""
    return backend.decoder is not None and b"ByteLevel" in backend.decoder.__getstate__()
