"""Verification by content: every value of source and output is read again and compared.

Shared with the conversion, and so not found wrong so: the table of weights and Source.read (names, unpacking, the order
of rotary rows). The move is checked, through numpy's own cast and transpose; and where Source.read does more than hand
out stored values, a sample is worked out anew by independent.py.
"""

import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...architecture.weight_map import Weight, weights
from ...formats import safetensors
from ...formats.dtypes import DTYPES, FLOATS
from ...formats.safetensors import TensorInfo
from ...utils.errors import VerificationError, report
from ...utils.progress import Progress
from ..io.pipeline import buffer_size, in_order
from ..io.stream_copy import parts
from ..sources import ALL, Source
from ..targets import PADDLE, Target, find_target
from .comparison import EXACT, header_differences
from .independent import recomputed
from .result import Verified

BLOCK = 512  # rows and columns compared at a time; both sides of a transposed block fit the cache
ADVICE = "Convert again; report it if it repeats."


@dataclass
class Differences:
    """Of one tensor: how many values differ, the largest difference, and a line about its place."""

    compared: int = 0
    differing: int = 0
    worst: float = -1.0
    line: str = ""

    def add(self, other: "Differences") -> None:
        self.compared += other.compared
        self.differing += other.differing
        if other.worst > self.worst:
            self.worst, self.line = other.worst, other.line


def verify_content(source: Source, output: Path, *, target: Target | None = None, workers: int = 1) -> Verified:
    """Read source and output again and compare every value. Raises VerificationError naming the worst tensors.

    target: what the output was made as, by default our own Paddle decoder.
    """
    target = target or find_target(PADDLE)
    wanted = {target.name(weight): weight for weight in weights(source.dims)}
    held = safetensors.read_layout(output)
    findings = header_differences({name: target.shape(weight) for name, weight in wanted.items()}, held)
    found = {} if findings else _compare(source, held, wanted, target, workers=workers)
    worst = sorted(((d.worst, name, d) for name, d in found.items() if d.differing), reverse=True)
    findings += [f"values      {name}: {d.differing:,} of {d.compared:,}; {d.line}" for _, name, d in worst]
    if findings:
        headline = f"The output does not hold what {source.path} holds (worst first):"
        raise VerificationError(report(headline, findings, _why_changed(source, held) + ADVICE))
    places = {weight.hf: (held[name], target.transposes(weight)) for name, weight in wanted.items()}
    pairs = {(source.tensors[name].dtype, info.dtype) for name, (info, _) in places.items()}
    rounded = sorted(FLOATS[to] for _, to in pairs - EXACT)
    after = f" after rounding to {' and '.join(dict.fromkeys(rounded))}" if rounded else ""
    values = sum(d.compared for d in found.values())
    assert values == sum(math.prod(weight.hf_shape) for weight in wanted.values())
    return Verified("content", values, f"content equal{after} ({values:,} values{recomputed(source, places)})")


def _why_changed(source: Source, held: dict[str, TensorInfo]) -> str:
    """What to say when a file of the source is newer than the output made of it."""
    made = [info.file.stat().st_mtime_ns for info in held.values()]
    newer = [path.name for path in source.files if made and path.stat().st_mtime_ns > min(made)]
    return f"{newer[0]} of the source was written after the output was: it may be another by now.\n" if newer else ""


def _compare(
    source: Source, held: dict[str, TensorInfo], wanted: dict[str, Weight], target: Target, *, workers: int
) -> dict[str, Differences]:
    tasks = [
        (name, rows)
        for name in sorted(wanted, key=lambda name: (held[name].file, held[name].offset))
        for rows in parts(held[name].shape, max(4, DTYPES[held[name].dtype].itemsize), buffer_size(workers))
    ]
    last = dict(tasks)
    total = sum(info.nbytes for info in held.values())
    found = {name: Differences() for name in wanted}

    def work(task: tuple[str, slice]) -> tuple[str, slice, Differences]:
        name, rows = task
        weight = wanted[name]
        return name, rows, _compare_part(source, weight, held[name], rows, transposed=target.transposes(weight))

    with (
        Progress("verify", total=total, tensors=len(last)) as progress,
        closing(in_order(work, tasks, workers=workers)) as results,
    ):
        for name, rows, differences in results:
            found[name].add(differences)
            progress.advance(differences.compared * DTYPES[held[name].dtype].itemsize, int(rows is last[name]))
    return found


def _compare_part(source: Source, weight: Weight, info: TensorInfo, rows: slice, *, transposed: bool) -> Differences:
    """Compare rows of the output with what the source holds there, both in the source's layout."""
    there, found = safetensors.view(info)[rows], Differences()
    for some in source.tiles(weight.hf) if transposed else [rows]:  # rows of the source
        tensor = source.read(weight.hf, some, rows if transposed else ALL)
        begin = (some.start, rows.start if transposed else 0)
        found.add(_compare_arrays(tensor, there[:, some].T if transposed else there, begin))
        safetensors.release(tensor)
    safetensors.release(there)
    return found


def _compare_arrays(tensor: np.ndarray, there: np.ndarray, begin: tuple[int, int]) -> Differences:
    """begin: the first row and column of these parts in the whole tensor."""
    matrix = tensor.ndim == 2
    a, b = (tensor, there) if matrix else (tensor[:, None], there[:, None])
    found = Differences(compared=tensor.size)
    for r in range(0, a.shape[0], BLOCK):
        for c in range(0, a.shape[1], BLOCK):
            block = (slice(r, r + BLOCK), slice(c, c + BLOCK))
            with np.errstate(over="ignore", invalid="ignore"):
                wanted = np.ascontiguousarray(a[block].astype(b.dtype))
            held = np.ascontiguousarray(b[block])
            unequal = _bits(wanted) != _bits(held)
            if unequal.any():
                size, at = _largest(wanted, held, unequal)
                place = (begin[0] + r + at[0], begin[1] + c + at[1])
                line = f"at {list(place[: tensor.ndim])} the source says {wanted[at]}, the output {held[at]}"
                found.add(Differences(0, int(unequal.sum()), size, line))
    return found


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def _largest(a: np.ndarray, b: np.ndarray, unequal: np.ndarray) -> tuple[float, tuple[int, int]]:
    """The largest difference of two blocks and its place; a NaN on one side counts as infinite."""
    with np.errstate(invalid="ignore"):
        size = np.abs(a.astype(np.float64) - b.astype(np.float64))
    size = np.where(unequal, np.where(np.isnan(size), np.inf, size), -1.0)
    row, column = np.unravel_index(int(size.argmax()), size.shape)
    return float(size[row, column]), (int(row), int(column))
