"""Packed checkpoints by the definition of each format: plain loops over Python's integers, none of the product's code.

q [in][out], zeros [groups][out] and scales [groups, out] are made up; the weight they mean is computed from them alone.
"""

import json
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


def nf4(
    rng: np.random.Generator, shape: tuple[int, int], *, blocksize: int = 64, nested: int | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The tensors of a weight by what follows its module's name, and the weight; the product of sizes is even.

    nested: the blocksize of magnitudes that are packed themselves.
    """
    count = shape[0] * shape[1]
    blocks = -(-count // blocksize)
    table = np.sort(rng.normal(size=16)).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": blocksize, "dtype": "float16", "shape": list(shape)}
    absmax = (rng.random(blocks) * 0.1 + 0.01).astype(np.float32)
    parts = {"absmax": absmax, "quant_map": table}
    if nested:
        codes, inner = rng.integers(0, 256, blocks, np.uint8), rng.normal(size=256).astype(np.float32)
        scales = (rng.random(-(-blocks // nested)) * 0.1).astype(np.float32)
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.1875}
        parts |= {"absmax": codes, "nested_absmax": scales, "nested_quant_map": inner}
        absmax = [inner[code] * scales[i // nested] + np.float32(0.1875) for i, code in enumerate(codes.tolist())]
    packed = rng.integers(0, 256, count // 2, np.uint8)
    values = nf4_values(packed.tobytes(), table.tolist(), list(absmax), blocksize)
    parts["quant_state.bitsandbytes__nf4"] = as_bytes(state)
    members = {"weight": packed[:, None], **{f"weight.{kind}": part for kind, part in parts.items()}}
    return members, np.array(values, np.float32).reshape(shape)


def as_bytes(state: dict) -> np.ndarray:
    """JSON as bitsandbytes keeps it in a tensor."""
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def nf4_values(packed: bytes, table: list[float], absmax: list[float], blocksize: int) -> list[np.float32]:
    """The values of NF4 bytes: high half first, each times the magnitude of its block, in float32."""
    codes = [code for byte in packed for code in (byte >> 4, byte & 15)]
    return [np.float32(table[code]) * np.float32(absmax[i // blocksize]) for i, code in enumerate(codes)]
