"""Tokenizer loader: a `tokenizers.Tokenizer` from tokenizer.json, vocab.json + merges.txt, or tokenizer.model.

Vocabulary, merges and splitting pattern come from the folder; the one thing known beside it is the short list of
Aquila's special tokens, which the published folder uses and does not list (tokenization/config.py has it). How a
tokenizer.model becomes a Tokenizer is in tokenization/sentencepiece.py.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models

from ..utils.errors import TokenizerError, only_in_the_package, report
from ..utils.files import MAX_TEXT, refuse_larger, refuse_lfs_pointer
from .backend import (
    LLAMA,
    LLAMA3_PATTERN,
    PRE_TOKENIZERS,
    add_with_ids,
    check_names,
    ends_of_a_text,
    is_byte_level,
    set_pipeline,
    special,
    surround,
)
from .config import (
    AQUILA_SPECIALS,
    MERGES_TXT,
    SENTENCEPIECE,
    SENTENCEPIECE_ALONE,
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


# The class named in tokenizer_config.json decides the pattern of a vocab.json + merges.txt folder.
CLASS_TO_PRE = {
    None: "gpt-2",
    "AquilaTokenizer": "gpt-2",
    "GPT2Tokenizer": "gpt-2",
    "GPT2TokenizerFast": "gpt-2",
    "Qwen2Tokenizer": "qwen2",
    "Qwen2TokenizerFast": "qwen2",
}


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
        return _sentencepiece_backend(folder / SENTENCEPIECE, config)
    if pre_tokenizer is not None:
        config["pre_tokenizer"] = pre_tokenizer
    return build_bpe(folder / VOCAB_JSON, folder / MERGES_TXT, config=config)


def _sentencepiece_backend(file: Path, config: dict) -> Tokenizer:
    with only_in_the_package(SENTENCEPIECE_ALONE):
        from .sentencepiece import build_sentencepiece
    return build_sentencepiece(file, config=config)


def open_backend(
    vocab_file: str | None,
    merges_file: str | None,
    tokenizer_file: str | None,
    sentencepiece_file: str | None,
    *,
    config: dict,
) -> Tokenizer:
    """The backend behind the files PaddleNLP found."""
    if tokenizer_file:
        return load_backend(Path(tokenizer_file).parent)
    if vocab_file and merges_file:
        return build_bpe(Path(vocab_file), Path(merges_file), config=config)
    if sentencepiece_file:
        return _sentencepiece_backend(Path(sentencepiece_file), config)
    raise TokenizerError(
        f"AquilaTokenizer was given vocab_file={vocab_file!r} and merges_file={merges_file!r}.\n"
        "It needs both of them, or tokenizer_file, or sentencepiece_file, or tokenizer_object."
    )


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
    refuse_larger(path, MAX_TOKENIZER_JSON, TokenizerError)
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


def read_bpe(vocab_file: Path, merges_file: Path) -> models.BPE:
    for file in (vocab_file, merges_file):
        if file.is_file():
            refuse_lfs_pointer(file, TokenizerError)
            refuse_larger(file, MAX_TEXT, TokenizerError)
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


def is_bare_aquila(vocab: dict, names: dict, added: list[tuple[int, AddedToken]]) -> bool:
    """Whether the folder means Aquila's eight special tokens without listing any of them."""
    listed = set(vocab) | {token.content for _, token in added}
    bos_and_eos = names.get("bos_token"), names.get("eos_token")
    return bos_and_eos in (("[CLS]", "</s>"), (None, None)) and listed.isdisjoint(AQUILA_SPECIALS)
