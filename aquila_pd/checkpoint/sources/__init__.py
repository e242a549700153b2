"""Checkpoint sources: any format, read under Hugging Face names in Hugging Face layout [out, in]."""

import math
from pathlib import Path
from typing import Self

import numpy as np

from ...architecture import families
from ...architecture.families.base import dims
from ...architecture.families.dialect import rotate_half_rows
from ...formats.dtypes import DTYPES
from ...utils.errors import CheckpointError, report
from ..layout import Layout, find_layout, read_config
from ..targets import PADDLE, TORCH
from .paddle import PaddleReader, is_paddle
from .planned import PlannedReader
from .reader import ALL, Reader, Stored

MAPPED = 64 * 2**20  # bytes of a mapped file looked at before its pages are let go
UNPACKED_ROWS = 2048  # of a few hundred columns each: some megabytes of float32


class Source:
    """An open checkpoint, a context manager.

    fields: the family's reading of config.json; dims: sizes; tensors: Hugging Face name -> how it is stored;
    framework: whose checkpoint it is, "torch" or "paddle".
    """

    def __init__(self, layout: Layout, reader: Reader, family: families.Family):
        self.layout, self.family, self._reader = layout, family, reader
        self.path = layout.path
        self.framework = PADDLE if isinstance(reader, PaddleReader) else TORCH
        self.config = reader.config
        self.fields = family.fields(reader.config)
        self.dims = dims(self.fields)
        self.notes = [*layout.notes, *reader.notes]
        self.dialect = reader.dialect or family.dialect
        self._names = _hf_names(self.dialect.to_hf, list(reader.stored), layout.path)
        self.tensors: dict[str, Stored] = {hf: reader.stored[name] for hf, name in self._names.items()}

    def read(self, hf_name: str, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """Part of one tensor in Hugging Face's layout [out, in], mapped from the file where possible.

        Several threads may call it at once. A transposed view (strides, not values) is as good as any other array.
        """
        name, whose = self._names[hf_name], self.dialect.heads_of(hf_name)
        if whose is None:
            return self._reader.read(name, rows, columns)
        heads = self.fields["num_attention_heads" if whose == "q" else "num_key_value_heads"]
        begin, end, _ = rows.indices(self.tensors[hf_name].shape[0])
        size = self.tensors[hf_name].shape[0] // heads
        first, last = begin // size, -(-end // size)  # whole heads, then cut
        part = self._reader.read(name, slice(first * size, last * size), columns)
        return rotate_half_rows(part, last - first)[begin - first * size : end - first * size]

    def tiles(self, hf_name: str) -> list[slice]:
        """Row slices to read in turn where all rows of some columns are needed: bounds what is unpacked or mapped."""
        stored = self.tensors[hf_name]
        rows, row = stored.shape[0], math.prod(stored.shape[1:]) * DTYPES[stored.dtype].itemsize
        most = UNPACKED_ROWS if stored.packed else max(256, MAPPED // max(row, 1) // 256 * 256)
        return [slice(begin, min(begin + most, rows)) for begin in range(0, rows, most)]

    @property
    def files(self) -> list[Path]:
        """Weight files, sorted; none for a config-only checkpoint."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return sorted(path for path in {folder / stored.file for stored in self.tensors.values()} if path.is_file())

    @property
    def nbytes(self) -> int:
        """Total size of the weight files."""
        return sum(path.stat().st_size for path in self.files)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_source(path: Path, family: str = families.AUTO, *, may_be_planned: bool = False) -> Source:
    """Open the checkpoint at a path, a torch one or a Paddle one; reads headers and config only.

    may_be_planned: a folder with config.json and no weights will do; then nothing can be read from it.
    Raises CheckpointError for files that cannot be read, ConfigError for a config.json that cannot be understood.
    """
    layout = find_layout(path, may_be_planned=may_be_planned)
    if layout.kind == "planned":
        config = read_config(layout.path)
        found = families.find_family(config, family)
        return Source(layout, PlannedReader(config, found), found)
    reader = _open_reader(layout)
    try:
        return Source(layout, reader, families.find_family(reader.config, family))
    except BaseException:
        reader.close()
        raise


def _open_reader(layout: Layout) -> Reader:
    if layout.kind == "gguf":
        from .gguf import GGUFReader

        return GGUFReader(layout.path)
    if layout.kind == "torch_bin":
        from .torch_bin import TorchBinReader as reader
    else:
        from .safetensors import SafetensorsReader as reader
    opened = reader(layout.path)
    try:
        return _interpreted(opened, layout.path)
    except BaseException:
        opened.close()
        raise


def _interpreted(reader: Reader, folder: Path) -> Reader:
    """The reader of a folder, seen as what its tensors are: a Paddle model's, packed ones, or plain ones."""
    if is_paddle(list(reader.stored)):
        return PaddleReader(reader)
    from . import packed

    return packed.unpack(reader, folder)


def _hf_names(to_hf, names: list[str], path: Path) -> dict[str, str]:
    """Hugging Face name -> name in the file."""
    found: dict[str, str] = {}
    twice = []
    for name in names:
        hf = to_hf(name)
        if hf in found:
            twice.append(f"{found[hf]} and {name} are both {hf}")
        found[hf] = name
    if twice:
        raise CheckpointError(report(f"{path} holds tensors twice under two names:", twice, "Remove one of each."))
    return found
