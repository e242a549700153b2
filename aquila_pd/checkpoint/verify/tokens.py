"""Tokenizer verification: fixed texts and the prompt give the same ids in source and output.

The ids of text alone are compared with those of the library that the source's files belong to, wherever it can read
them as they stand: `tokenizers` a tokenizer.json or GPT-2's vocab.json and merges.txt, `sentencepiece` a
tokenizer.model. What surrounds a text, and every other source, goes through this project's reading on both sides; so
there a file that was exchanged is found, and a wrong reading is not. Needs neither framework.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from ...utils.errors import TokenizerError, VerificationError, report
from ..sources import Source

TEXTS = (
    "Hello, please introduce yourself.\n",
    "北京是中国的首都，也是一座历史悠久的城市。",
    "请用Python写一个函数: def f(x): return x ** 2  # 平方",
    "人工智能 (AI) 在2023年的进展",
    "👋🏽 emoji 👨‍👩‍👧‍👦 and flags 🇨🇳",
    "  two spaces in front, three inside   and some behind  ",
    "tabs\tand\nlines\r\n\nof two systems",
    "1234567890 3.14159 1,000,000 0x7F",
    "don't can't we'll I'm",
    "Ünïcödé naïve café Привет こんにちは",
    "ｆｕｌｌ　ｗｉｄｔｈ， “quotes” — dash…",
    "",
)
# text that is a token of its own in some vocabularies; not every library adds it by itself
SPECIAL = ("[CLS]Hello</s>", "<s>[INST] a [/INST]</s>", "### Human: 你好###", "<|startofpiece|>a<|endofpiece|>")
GPT2_CLASSES = (None, "AquilaTokenizer", "GPT2Tokenizer", "GPT2TokenizerFast")


def compare_tokenizers(source: Source, folder: Path, prompt: str | None = None) -> str:
    """A sentence for the report. Raises VerificationError with the texts whose ids differ.

    Raises TokenizerError for files of the Paddle folder that cannot be read.
    """
    from ...tokenization.convert import from_gguf, load_backend  # imports the tokenizers library

    if not _has_tokenizer(folder):
        return "; tokenizers were not compared: the Paddle folder has none"
    in_gguf = source.layout.kind == "gguf"
    if not in_gguf and not _has_tokenizer(source.path):
        return "; tokenizers were not compared: the source has none"
    ours = load_backend(folder)
    try:
        read = from_gguf(source.path)[0] if in_gguf else load_backend(source.path)
    except TokenizerError:
        return "; tokenizers were not compared: the source's is of a kind that cannot be read here"
    library, alone = ("", None) if in_gguf else _of_the_library(source.path)
    texts = [*TEXTS, *SPECIAL, *([prompt] if prompt else [])]
    findings = _differences(texts, lambda text: read.encode(text).ids, lambda text: ours.encode(text).ids)
    if alone:  # special tokens are not every library's business, and a prompt may hold some
        findings += _differences(TEXTS, alone, lambda text: ours.encode(text, add_special_tokens=False).ids)
    if findings:
        headline = f"The tokenizer of {folder} is not that of {source.path}:"
        advice = "Values were not compared. Convert the source again, or fetch its tokenizer again."
        raise VerificationError(report(headline, list(dict.fromkeys(findings)), advice))
    how = f"the source's read by {library}" if alone else "both read by this project"
    return f"; tokenizers agree on {len(texts)} texts ({how})"


def _has_tokenizer(folder: Path) -> bool:
    from ...tokenization.config import MERGES_TXT, SENTENCEPIECE, TOKENIZER_JSON, VOCAB_JSON, files_in

    found = files_in(folder)
    return bool(found & {TOKENIZER_JSON, SENTENCEPIECE}) or {VOCAB_JSON, MERGES_TXT} <= found


def _differences(texts: Iterable[str], theirs: Callable, ours: Callable) -> list[str]:
    found = []
    for text in texts:
        wanted, ids = theirs(text), ours(text)
        if wanted != ids:
            at = next((i for i, pair in enumerate(zip(wanted, ids, strict=False)) if pair[0] != pair[1]), None)
            at = min(len(wanted), len(ids)) if at is None else at
            here = f"from token {at} on the source says {wanted[at : at + 4]}, the Paddle folder {ids[at : at + 4]}"
            found.append(f"tokens      {text[:40]!r}: {here}")
    return found


def _of_the_library(folder: Path) -> tuple[str, Callable[[str], list[int]] | None]:
    """The library that reads a folder's files as they stand, and its ids of a text without what surrounds it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from ...tokenization import config as files

    config = files.read_config(folder)
    if (folder / files.TOKENIZER_JSON).is_file():
        backend = Tokenizer.from_file(str(folder / files.TOKENIZER_JSON))
        backend.no_padding()
        backend.no_truncation()
    elif files.rests_on_sentencepiece(folder):
        return "sentencepiece", _sentencepiece(folder / files.SENTENCEPIECE, config)
    elif config.get("tokenizer_class") in GPT2_CLASSES and not config.get("pre_tokenizer"):
        backend = Tokenizer(models.BPE.from_file(*(str(folder / n) for n in (files.VOCAB_JSON, files.MERGES_TXT))))
        in_front = bool(config.get("add_prefix_space"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=in_front)
    else:
        return "", None
    return "the tokenizers library", lambda text: backend.encode(text, add_special_tokens=False).ids


def _sentencepiece(file: Path, config: dict) -> Callable[[str], list[int]] | None:
    """None where the library is not there, or a setting of transformers' makes other ids of the same file."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        return None
    if config.get("add_prefix_space") is False:
        return None
    processor = SentencePieceProcessor(model_file=str(file))
    return lambda text: processor.encode(text)
