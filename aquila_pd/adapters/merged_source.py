"""A converter source that merges a LoRA adapter into its base while parts of tensors are read.

    W + scaling * (A B)^T of an adapted matrix [out, in]; DoRA brings each row to its magnitude; float32

W is as stored, or round-tripped through NF4 where the adapter was trained on that (QLoRA). In memory are the adapters,
the NF4 form of a few matrices, and the parts being read.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint.sources import ALL, Source
from ..checkpoint.targets import TORCH
from ..formats.nf4 import NF4, dequantize
from ..formats.safetensors import view
from ..quantization.encode import quantize
from ..utils.errors import CheckpointError, report
from .lora_math import scaling_of
from .peft_files import Adapter

if TYPE_CHECKING:
    from .spec import LoraSpec

ROWS, COLUMNS = 512, 64  # blocks of an update that are always computed whole: no cut changes the last bits of a product
UNPACKED_ROWS = 2048
HELD = 8  # matrices whose factors, and four bits, are in memory: those that threads are at; 80 MB each at 34B
AT_ONCE = 2**20  # values of which lengths are taken


@dataclass
class _Matrix:
    """Cached state of a matrix that is merged or packed. factors: A [in, r], B [r, out], magnitude [out] or None;
    lengths: of the rows of W + update, [out], once they are needed."""

    factors: tuple[np.ndarray, np.ndarray, np.ndarray | None] | None
    packed: NF4 | None
    lengths: np.ndarray | None = None


def _as_fingerprinted(spec: "LoraSpec") -> str:
    """The settings as fingerprints of stopped merges hold them: with a whole alpha as adapter_config.json writes it."""
    alpha = int(spec.alpha) if spec.alpha.is_integer() else spec.alpha
    others = f"dropout={spec.dropout}, targets={spec.targets}, rslora={spec.rslora}, dora={spec.dora}"
    return f"LoraSpec(r={spec.r}, alpha={alpha}, {others})"


class MergedSource:
    """Source of a base model merged with an adapter. adapter: None for the base alone; packed: projections that are
    rounded to NF4 first. Everything else is as of Source.

    Raises CheckpointError, in the beginning, for an adapter with NaN or infinite values.
    """

    framework = TORCH  # names and layout of what it hands out, whatever the base's are

    def __init__(self, base: Source, adapter: Adapter | None, *, packed: tuple[str, ...] = ()):
        self.base, self.adapter, self.packed = base, adapter, packed
        self.path, self.layout, self.family = base.path, base.layout, base.family
        self.fields, self.dims, self.notes, self.tensors = base.fields, base.dims, base.notes, base.tensors
        self.scaling = np.float32(scaling_of(adapter.spec)) if adapter else None
        self._lock = threading.Lock()
        self._held: OrderedDict[str, _Matrix] = OrderedDict()
        if adapter is not None:
            _check_finite(adapter)

    @property
    def config(self) -> dict:
        """config.json and the merge options: part of the fingerprint for resume."""
        settings = self.adapter and _as_fingerprinted(self.adapter.spec)
        return {**self.base.config, "merged": [settings, list(self.packed)]}

    @property
    def files(self) -> list[Path]:
        return self.base.files + (self.adapter.files if self.adapter else [])

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def tiles(self, hf_name: str) -> list[slice]:
        """Rows to read at once where all rows of some columns are wanted."""
        if not (self._is_packed(hf_name) or self._is_adapted(hf_name)):
            return self.base.tiles(hf_name)
        rows = self.tensors[hf_name].shape[0]
        return [slice(begin, min(begin + UNPACKED_ROWS, rows)) for begin in range(0, rows, UNPACKED_ROWS)]

    def read(self, hf_name: str, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """Part of one tensor in Hugging Face's layout [out, in]: float32 where it is merged or was packed."""
        if not (self._is_packed(hf_name) or self._is_adapted(hf_name)):
            return self.base.read(hf_name, rows, columns)
        matrix = self._matrix(hf_name)
        if matrix.factors is None:
            return self._weight(hf_name, matrix, rows, columns)
        merged = self._merged(hf_name, matrix, rows, columns)
        magnitude = matrix.factors[2]
        if magnitude is not None:
            merged *= (magnitude / self._lengths_of(hf_name, matrix))[rows, None]
        return merged

    def _is_adapted(self, name: str) -> bool:
        return self.adapter is not None and self.adapter.has(name.removesuffix(".weight"))

    def _is_packed(self, name: str) -> bool:
        return name.removesuffix(".weight").rpartition(".")[2] in self.packed

    def _matrix(self, name: str) -> _Matrix:
        with self._lock:  # one thread makes it, the others wait for it
            if name not in self._held:
                factors = self.adapter.values(name.removesuffix(".weight")) if self._is_adapted(name) else None
                packed = quantize(self.base.read(name), name) if self._is_packed(name) else None
                self._held[name] = _Matrix(factors, packed)
                if len(self._held) > HELD:
                    self._held.popitem(last=False)
            self._held.move_to_end(name)
            return self._held[name]

    def _weight(self, name: str, matrix: _Matrix, rows: slice, columns: slice) -> np.ndarray:
        if matrix.packed is None:
            return self.base.read(name, rows, columns)
        return dequantize(matrix.packed, rows, columns)

    def _merged(self, name: str, matrix: _Matrix, rows: slice, columns: slice) -> np.ndarray:
        """W + update, before DoRA's magnitudes, float32 in new memory."""
        shape = self.tensors[name].shape
        (first, last), (left, right) = rows.indices(shape[0])[:2], columns.indices(shape[1])[:2]
        A, B, _ = matrix.factors
        # in the memory order of a Paddle file, [in, out], so that nothing is transposed twice
        merged = np.array(self._weight(name, matrix, rows, columns).T, np.float32, order="C")
        for i in _grid(left, right, COLUMNS):
            for o in _grid(first, last, ROWS):
                update = (A[i] @ B[:, o]) * self.scaling
                ins, outs = _cut(i, left, right), _cut(o, first, last)
                merged[_shifted(ins, left), _shifted(outs, first)] += update[
                    _shifted(ins, i.start), _shifted(outs, o.start)
                ]
        return merged.T

    def _lengths_of(self, name: str, matrix: _Matrix) -> np.ndarray:
        if matrix.lengths is None:  # two threads may find out the same
            out, in_ = self.tensors[name].shape
            height = max(1, AT_ONCE // in_)
            parts = (self._merged(name, matrix, slice(i, i + height), ALL) for i in range(0, out, height))
            matrix.lengths = np.concatenate([np.sqrt((part * part).sum(axis=1)) for part in parts])
        return matrix.lengths


def _check_finite(adapter: Adapter) -> None:
    bad = [info.name for info in adapter.tensors.values() if not np.isfinite(np.float32(view(info))).all()]
    if bad:
        advice = "It came out of a training that failed. Nothing was written; merge an earlier checkpoint's."
        raise CheckpointError(report(f"{adapter.folder} holds NaN or infinite values:", bad, advice))


def _grid(begin: int, end: int, step: int) -> Iterator[slice]:
    """The blocks of a grid that touch a range."""
    for start in range(begin // step * step, end, step):
        yield slice(start, start + step)


def _cut(block: slice, begin: int, end: int) -> slice:
    return slice(max(block.start, begin), min(block.stop, end))


def _shifted(part: slice, by: int) -> slice:
    return slice(part.start - by, part.stop - by)
