"""A text as words that can be compared: case, punctuation and white space do not matter, numbers do.

A run of letters and digits is a word; of Chinese and Japanese, which write no spaces, every character is one.
"""

import re
import unicodedata
import zlib
from collections.abc import Sequence

import numpy as np

# CJK ideographs with their extensions, and kana
IDEOGRAPH = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{IDEOGRAPH}]|[^\\W_{IDEOGRAPH}]+")
_IDEOGRAPH = re.compile(f"[{IDEOGRAPH}]")
_INSIDE = re.compile(r"(?<=\d),(?=\d{3})|(?<=\w)['’ʼ`](?=\w)")  # 1,000 and Janet’s are one word each
_BASE = 0x9E3779B97F4A7C15  # odd: powers of it, modulo 2^64, never become 0


def words(text: str) -> list[str]:
    """The words of a text in order, each in the one form that all its spellings have."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(_INSIDE.sub("", plain))


def is_ideograph(word: str) -> bool:
    return _IDEOGRAPH.fullmatch(word) is not None


def joined(found: Sequence[str]) -> str:
    """Words as a text to show: spaces between, but not around ideographs."""
    parts = [
        " " + word if number and not (is_ideograph(word) and is_ideograph(found[number - 1])) else word
        for number, word in enumerate(found)
    ]
    return "".join(parts)


def hashes(found: Sequence[str]) -> np.ndarray:
    """uint64 [words]: a number for each word, the same in every process."""
    return np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in found], dtype=np.uint64)


def runs(numbers: np.ndarray, length: int) -> np.ndarray:
    """uint64 [max(words - length + 1, 0)]: a number for each run of `length` words, from `hashes`."""
    count = len(numbers) - length + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    found = np.zeros(count, dtype=np.uint64)
    factor = 1
    for offset in range(length):
        found += (numbers[offset : offset + count] + np.uint64(offset + 1)) * np.uint64(factor)
        factor = factor * _BASE % 2**64
    return found ^ (found >> np.uint64(29))  # sums of products are weakest in their low bits
