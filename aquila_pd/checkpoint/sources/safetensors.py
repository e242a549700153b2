"""Weights of a folder of safetensors files."""

from pathlib import Path

import numpy as np

from ... import shards
from ...families.dialect import Dialect
from ..layout import read_config
from .reader import Stored


class SafetensorsReader:
    """Maps each tensor from its file when asked for it."""

    dialect: Dialect | None = None  # the family's

    def __init__(self, folder: Path):
        self.config = read_config(folder)
        self._infos = shards.read_layout(folder)
        self.stored = {name: Stored(i.dtype, i.shape, i.file.name) for name, i in self._infos.items()}
        self.notes: list[str] = []

    def read(self, name: str) -> np.ndarray:
        return shards.view(self._infos[name])

    def close(self) -> None:
        pass  # every map closes with its array
