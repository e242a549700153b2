"""Does the output hold what the source holds? Every value of both is read again and compared.

Shared with the conversion, and so not found wrong here: the table of weights and Source.read (names, unpacking, the
order of rotary rows). Only the move is checked, through numpy's own cast and transpose.
"""

from pathlib import Path

import numpy as np

from ... import shards
from ...errors import VerificationError, report
from ...weight_map import Weight, weights
from ..progress import Progress
from ..sources import Source
from .result import Verified

BLOCK = 512  # rows and columns compared at a time; both sides of a transposed block fit the cache

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
EXACT = {*((tag, tag) for tag in NAMES), ("F16", "F32"), ("BF16", "F32")}  # casts that keep every value


def verify_content(source: Source, output: Path) -> Verified:
    """Read source and output again and compare every value. Raises VerificationError naming the worst tensors."""
    wanted = weights(source.dims)
    held = shards.read_layout(output)
    findings = [f"missing     {weight.paddle}" for weight in wanted if weight.paddle not in held]
    names = {weight.paddle for weight in wanted}
    findings += [f"unexpected  {name}" for name in held if name not in names]
    progress = Progress("verify", total=sum(info.nbytes for info in held.values()), tensors=len(held))
    values, worst, rounded = 0, [], set()
    for weight in wanted:
        if weight.paddle in held:
            info = held[weight.paddle]
            found = _compare_tensor(source, weight, shards.view(info))
            worst += [found] if found else []
            values += int(np.prod(weight.hf_shape))
            rounded |= {info.dtype} if (source.tensors[weight.hf].dtype, info.dtype) not in EXACT else set()
            progress.advance(info.nbytes)
    progress.close()
    findings += [line for _, line in sorted(worst, key=lambda pair: -pair[0])]
    if findings:
        headline = f"The output does not hold what {source.path} holds (worst first):"
        raise VerificationError(report(headline, findings, "Nothing was kept. Convert again; report it if it repeats."))
    after = f" after rounding to {' and '.join(sorted(NAMES[tag] for tag in rounded))}" if rounded else ""
    return Verified("content", values, f"content equal{after} ({values:,} values)")


def _compare_tensor(source: Source, weight: Weight, output: np.ndarray) -> tuple[float, str] | None:
    """The largest difference of one tensor and a line about it, None when all values are the same bits."""
    tensor = source.read(weight.hf)
    there = output.T if weight.transpose else output  # [as in the source]
    if there.shape != tensor.shape:
        return np.inf, f"shape       {weight.paddle}: {list(output.shape)}, its source {list(tensor.shape)}"
    rows, there_rows = (tensor[None], there[None]) if tensor.ndim == 1 else (tensor, there)
    differing, worst, line = 0, -1.0, ""
    for r in range(0, rows.shape[0], BLOCK):
        for c in range(0, rows.shape[1], BLOCK):
            block = (slice(r, r + BLOCK), slice(c, c + BLOCK))
            with np.errstate(over="ignore", invalid="ignore"):
                wanted = rows[block].astype(output.dtype)
            found = np.ascontiguousarray(there_rows[block])
            unequal = _bits(wanted) != _bits(found)
            if not unequal.any():
                continue
            differing += int(unequal.sum())
            size, at = _largest(wanted, found, unequal)
            if size > worst:
                worst, place = size, (r + at[0], c + at[1])[-tensor.ndim :]
                line = f"at {list(map(int, place))} the source says {wanted[at]}, the output {found[at]}"
    shards.release(tensor)
    shards.release(output)
    return (worst, f"values      {weight.paddle}: {differing:,} of {tensor.size:,}; {line}") if differing else None


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def _largest(a: np.ndarray, b: np.ndarray, unequal: np.ndarray) -> tuple[float, tuple[int, int]]:
    """The largest difference of two blocks and its place; a NaN on one side counts as infinite."""
    with np.errstate(invalid="ignore"):
        size = np.abs(a.astype(np.float64) - b.astype(np.float64))
    size = np.where(unequal, np.where(np.isnan(size), np.inf, size), -1.0)
    row, column = np.unravel_index(int(size.argmax()), size.shape)
    return float(size[row, column]), (int(row), int(column))
