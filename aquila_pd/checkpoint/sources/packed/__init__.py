"""Quantized checkpoints (GPTQ, AWQ, bitsandbytes NF4; 2 to 8 bits), dequantized to float32 [out, in] on read.

Which packing it is stands in config.json or in a file beside it; every tensor of it is checked before the first is
unpacked, and a part is unpacked when it is read.
"""

from pathlib import Path

import numpy as np

from ....utils.errors import CheckpointError, report, shown_value
from ..reader import ALL, Reader, Stored
from . import awq, gptq, nf4
from .settings import KEY, Settings, find_settings
from .survey import Survey, group_names

METHODS = {"gptq": gptq.find, "awq": awq.find, "bitsandbytes": nf4.find}
# ends of names that no unpacked checkpoint has, those of packings that are not known among them
SIGNS = (
    *gptq.KINDS,
    *nf4.KINDS,
    *(nf4.STATE, *nf4.OTHER_STATES),
    *("SCB", "weight_format", "weight_packed", "weight_scale", "weight_scale_inv"),
)
HEADLINE = "{} does not hold packed weights that can be read:"
ADVICE = (
    "Known are GPTQ in 2, 3, 4 and 8 bits (formats gptq and gptq_v2), AWQ in 4 bits (version gemm) and bitsandbytes "
    "NF4.\nWhere tensors do not fit each other, fetch their files again. Of any other packing, convert the weights it "
    "was made from."
)


class PackedReader:
    """Reader wrapper that dequantizes packed matrices; other tensors pass through."""

    def __init__(self, reader: Reader, found: Survey):
        self._reader = reader
        self._matrices = found.matrices
        self.config = {key: value for key, value in reader.config.items() if key != KEY}
        kept = {name: stored for name, stored in reader.stored.items() if name not in found.used}
        self.stored: dict[str, Stored] = {**kept, **{name: m.stored for name, m in found.matrices.items()}}
        self.dialect = reader.dialect
        self.notes = [*reader.notes, *found.notes]

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        matrix = self._matrices.get(name)
        if matrix is None:
            return self._reader.read(name, rows, columns)
        return matrix.read(self._reader, rows, columns)

    def close(self) -> None:
        self._reader.close()


def unpack(reader: Reader, folder: Path) -> Reader:
    """Wrap the reader of a quantized checkpoint; any other reader is returned as it is.

    Raises CheckpointError with everything that stands in the way.
    """
    settings = find_settings(reader.config, folder)
    found = _without_settings(reader) if settings is None else _find(reader, settings)
    if found.findings:
        raise CheckpointError(report(HEADLINE.format(folder), found.findings, ADVICE))
    return PackedReader(reader, found) if found.matrices else reader


def _without_settings(reader: Reader) -> Survey:
    """Nothing, or the finding that there are packed tensors which nothing describes."""
    modules = group_names(reader.stored, SIGNS)
    if not modules:
        return Survey()
    first, members = next(iter(modules.items()))
    finding = (
        f"{len(modules)} tensors are packed, {first} first (it has {', '.join(members)}), but neither {KEY} in "
        f"config.json nor a quantize_config.json or quant_config.json says how"
    )
    return Survey(findings=[finding])


def _find(reader: Reader, settings: Settings) -> Survey:
    method = settings.method
    if method is None and any(key in settings.values for key in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"  # which its first configs did not name
    find = METHODS.get(method.lower()) if isinstance(method, str) else None
    if find is None:
        known = ", ".join(map(repr, METHODS))
        return Survey(findings=[f"{settings.file} says quant_method = {shown_value(method)}; known: {known}"])
    found = find(reader, settings)
    if not found.matrices and not found.findings:
        found.findings.append(f"{settings.file} says that weights are packed by {method}, but no tensor is")
    return found
