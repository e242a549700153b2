"""Safetensors reader: memory-mapped weights of a folder."""

from pathlib import Path

import numpy as np

from ...architecture.families.dialect import Dialect
from ...formats import safetensors
from ..layout import read_config
from .reader import ALL, Stored


class SafetensorsReader:
    """Memory-maps each tensor when it is read."""

    dialect: Dialect | None = None  # the family's

    def __init__(self, folder: Path):
        self.config = read_config(folder)
        self._infos = safetensors.read_layout(folder)
        self.stored = {name: Stored(i.dtype, i.shape, i.file.name) for name, i in self._infos.items()}
        self.notes: list[str] = []

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        tensor = safetensors.view(self._infos[name])  # a map of its own each time, so that it can be released alone
        return tensor[(*(rows, columns)[: tensor.ndim], ...)]  # the dots: a scalar stays an array

    def close(self) -> None:
        pass  # every map closes with its array
