"""Word n-grams of normalized text: case, punctuation and white space are ignored, numbers are not.

A run of letters and digits is a word; of Chinese and Japanese, which write no spaces, every character is one.
"""

import re
import unicodedata
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# CJK ideographs with their extensions, and kana
IDEOGRAPH = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{IDEOGRAPH}]|[^\\W_{IDEOGRAPH}]+")
_IDEOGRAPH = re.compile(f"[{IDEOGRAPH}]")
_THOUSANDS = re.compile(r",(?<=\d,)(?=\d{3})")  # 1,000 is one word, and the same as 1000
_APOSTROPHES = dict.fromkeys(map(ord, "'’ʼ`´"))  # so is Janet's
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 2**64)


def words(text: str) -> list[str]:
    """The words of a text in order, each in the one form that all its spellings have."""
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_APOSTROPHES)
    return _WORD.findall(_THOUSANDS.sub("", plain))


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
    """uint64 [max(words - length + 1, 0)]: a number for each run of `length` words, from `hashes`.

    The number of w[0] ... w[n-1] is the sum of w[i] * BASE^i modulo 2^64, mixed. Of all runs at once it is a difference
    of two sums from the text's beginning, shifted back: the same work for any length.
    """
    count = len(numbers) - length + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    forward, back = _powers(1 << len(numbers).bit_length())
    sums = np.zeros(len(numbers) + 1, dtype=np.uint64)
    np.cumsum(numbers * forward[: len(numbers)], out=sums[1:])
    found = (sums[length:] - sums[:count]) * back[:count]
    return (found ^ (found >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)  # the low bits alone would be weak


@lru_cache(maxsize=4)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [count]: BASE^i and BASE^-i modulo 2^64."""
    exponents = np.ones((2, count), dtype=np.uint64)
    exponents[0, 1:], exponents[1, 1:] = _BASE, _INVERSE
    forward, back = np.cumprod(exponents, axis=1, dtype=np.uint64)
    return forward, back
