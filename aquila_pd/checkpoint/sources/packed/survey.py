"""Survey of packed matrices: tensors grouped by name, checked for consistency, each with its decoder."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ....formats import dtypes, safetensors
from ..reader import Reader, Stored

FLOATS = ("F16", "BF16", "F32")
HALF = ("float16", "bfloat16")  # what torch computes with after unpacking
AT_ONCE = 2**17  # values that are looked at together
BIAS = "bias"


class Matrix(Protocol):
    """Protocol of a weight [out, in] packed in several stored tensors."""

    stored: Stored

    def read(self, reader: Reader, rows: slice, columns: slice) -> np.ndarray:
        """This part in float32, in memory proportional to it."""


@dataclass
class Survey:
    """matrices: name of a weight -> how to unpack it; used: the names in the file they are made of, or left out on
    purpose; notes: for the user; findings: what stands in the way."""

    matrices: dict[str, Matrix] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def group_names(names: Iterable[str], kinds: Collection[str]) -> dict[str, dict[str, str]]:
    """What precedes the kind -> kind -> name, of every name that ends in one of the kinds."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        for kind in kinds:
            if name.endswith(f".{kind}"):
                found.setdefault(name.removesuffix(f".{kind}"), {})[kind] = name
    return found


def missing(whose: str, members: Mapping[str, str], needed: Iterable[str]) -> list[str]:
    """A finding when members of a group are not there."""
    absent = [kind for kind in needed if kind not in members]
    return [f"{whose} has {', '.join(sorted(members))}, but no {' and no '.join(absent)}"] if absent else []


def twice(module: str, members: Mapping[str, str], stored: Mapping[str, Stored]) -> list[str]:
    """A finding when a module has a plain weight beside a packed one."""
    both = f"{module}.weight" in stored
    return [f"{module} has both weight and {', '.join(sorted(members))}"] if both else []


def differing(name: str, stored: Stored, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> list[str]:
    """A finding when a tensor is of another dtype or shape than its group asks for."""
    if stored.dtype in dtypes and stored.shape == shape:
        return []
    return [f"{name} is {stored.dtype} {list(stored.shape)}, where {' or '.join(dtypes)} {list(shape)} was due"]


def strips(reader: Reader, name: str) -> Iterator[np.ndarray]:
    """All rows of a tensor, a few at a time; what was looked at does not stay in memory."""
    count, *rest = reader.stored[name].shape
    height = max(1, AT_ONCE // math.prod(rest))
    for begin in range(0, count, height):
        some = reader.read(name, slice(begin, begin + height))
        yield some
        safetensors.release(some)


def drop_biases(reader: Reader, modules: Iterable[str], found: Survey) -> None:
    """Biases of packed matrices: AutoGPTQ writes some of zeros for models that have none. Others are a finding."""
    empty = 0
    for module in modules:
        name, matrix = f"{module}.{BIAS}", found.matrices.get(f"{module}.weight")
        if name not in reader.stored:
            continue
        found.used.add(name)
        if matrix is None:  # which is a finding already
            continue
        wrong = differing(name, reader.stored[name], FLOATS, matrix.stored.shape[:1])
        if not wrong and any(map(np.any, strips(reader, name))):
            wrong = [f"{name} is not zero; the models known here have no biases"]
        found.findings += wrong
        empty += not wrong
    if empty:
        found.notes.append(f"{empty} biases of packed tensors are left out: all their values are zero")


def unpacking_note(count: int, name: str, scales: set[str]) -> str:
    """What is done with the packed tensors, and which dtype of the output is the one torch computes with.

    scales: the dtypes of their scales. The product of a 16-bit float and a small integer is exact in float32.
    """
    half = dtypes.FLOATS[next(iter(scales))] if scales in ({"F16"}, {"BF16"}) else None
    rounding = f" without rounding; --dtype {half} rounds each value once, as torch does" if half else ""
    return f"{count} tensors are packed as {name} and are unpacked to float32{rounding}"


def bounds(part: slice, size: int) -> slice:
    """A slice with explicit, ordered bounds."""
    begin, end, _ = part.indices(size)
    return slice(begin, max(begin, end))
