"""Building blocks of a `tokenizers.Tokenizer`: pre-tokenizer patterns, added tokens with fixed ids, bos and eos."""

from itertools import groupby
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

from ..utils.errors import TokenizerError, report
from .config import ADDED_TOKENS_JSON, CONFIG_JSON, SPECIAL_MAP_JSON

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


# Classes that put bos in front of a text, and no eos behind it, unless told otherwise.
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")


def ends_of_a_text(config: dict) -> tuple[bool, bool]:
    """Whether the class of a SentencePiece tokenizer puts bos before and eos behind a text."""
    name = config.get("tokenizer_class")
    if name not in (None, "AquilaTokenizer", *LLAMA) and config.get("add_bos_token") is None:
        raise TokenizerError(
            f"tokenizer_config.json names the class {name}; whether it puts bos before a text is not known.\n"
            'Write "add_bos_token": true or false there (and "add_eos_token", which is false by default).'
        )
    return config.get("add_bos_token") is not False, bool(config.get("add_eos_token"))


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
