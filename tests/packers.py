"""Packed checkpoints by the definition of each format: plain loops over Python's integers, none of the product's code.

q [in][out], zeros [groups][out] and scales [groups, out] are made up; the weight they mean is computed from them alone.
"""

from collections.abc import Callable

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NATURAL = tuple(range(8))
Integers = list[list[int]]


def signed(word: int) -> int:
    """The int32 with these 32 bits."""
    return word - 2**32 if word >= 2**31 else word


def stream(values: list[int], bits: int) -> list[int]:
    """One long number with the first value lowest, cut into words."""
    number = sum(value << bits * place for place, value in enumerate(values))
    return [signed(number >> 32 * i & 2**32 - 1) for i in range(len(values) * bits // 32)]


def ten_to_a_word(values: list[int]) -> list[int]:
    """What 3-bit values would be if none lay over two words: the wrong layout, for a control."""
    words = [sum(v << 3 * i for i, v in enumerate(values[at : at + 10])) for at in range(0, len(values), 10)]
    return [signed(word) for word in words]


def by_column(table: Integers, pack: Callable[[list[int]], list[int]]) -> np.ndarray:
    return np.array([pack(list(column)) for column in zip(*table, strict=True)], np.int32).T.copy()


def by_row(table: Integers, pack: Callable[[list[int]], list[int]]) -> np.ndarray:
    return np.array([pack(row) for row in table], np.int32)


def gptq(q: Integers, zeros: Integers, bits: int, *, less: int = 1) -> dict[str, np.ndarray]:
    """qweight and qzeros; less: what is taken off a zero point before it is stored (1 in v1, 0 in v2)."""
    stored = [[zero - less & 2**bits - 1 for zero in row] for row in zeros]
    return {
        "qweight": by_column(q, lambda values: stream(values, bits)),
        "qzeros": by_row(stored, lambda values: stream(values, bits)),
    }


def awq(q: Integers, zeros: Integers, order: tuple[int, ...] = AWQ_ORDER) -> dict[str, np.ndarray]:
    """qweight and qzeros; value i of a word is column order[i] of its eight."""

    def pack(values: list[int]) -> list[int]:
        eights = [values[at : at + 8] for at in range(0, len(values), 8)]
        return [signed(sum(eight[order[i]] << 4 * i for i in range(8))) for eight in eights]

    return {"qweight": by_row(q, pack), "qzeros": by_row(zeros, pack)}


def meant(q: Integers, zeros: Integers, scales: np.ndarray, group_of: list[int]) -> np.ndarray:
    """The weight [out, in]: scale * (q - zero), in Python's numbers, where it is exact."""
    scale = scales.astype(np.float64).tolist()
    rows = [
        [scale[group][o] * (q[i][o] - zeros[group][o]) for i, group in enumerate(group_of)] for o in range(len(q[0]))
    ]
    return np.array(rows, np.float32)


def random_integers(rng: np.random.Generator, rows: int, columns: int, bits: int) -> Integers:
    return rng.integers(0, 2**bits, (rows, columns)).tolist()


def random_scales(rng: np.random.Generator, groups: int, columns: int) -> np.ndarray:
    return (rng.random((groups, columns)) * 0.02 + 0.001).astype(np.float16)


def nf4_values(packed: bytes, table: list[float], absmax: list[float], blocksize: int) -> list[np.float32]:
    """The values of NF4 bytes: high half first, each times the magnitude of its block, in float32."""
    codes = [code for byte in packed for code in (byte >> 4, byte & 15)]
    return [np.float32(table[code]) * np.float32(absmax[i // blocksize]) for i, code in enumerate(codes)]
