"""Weights of a Paddle checkpoint, handed out under Hugging Face names in Hugging Face layout: the table backwards."""

import re

import numpy as np

from ...errors import CheckpointError
from ...families.dialect import Dialect
from ...weight_map import BASE_MODEL_PREFIX, HF_PREFIX, is_transposed
from .reader import ALL, Reader, Stored

# Aquila's, of the published release and of ours, and that of PaddleNLP's own LLaMA; both store matrices as [in, out]
PREFIXES = (BASE_MODEL_PREFIX, "llama")
PREFIX = re.compile(rf"^({'|'.join(PREFIXES)})\.")


def is_paddle(names: list[str]) -> bool:
    """Whether tensors of these names are a Paddle model's."""
    return any(PREFIX.match(name) for name in names)


class PaddleReader:
    """Wraps the reader of a Paddle folder: another spelling of names, and matrices turned (a view, not a copy)."""

    dialect: Dialect | None = None  # names are Hugging Face's already

    def __init__(self, reader: Reader):
        self._reader = reader
        self.config, self.notes = reader.config, list(reader.notes)
        self._names = {PREFIX.sub(HF_PREFIX, name): name for name in reader.stored}
        if len(self._names) < len(reader.stored):
            raise CheckpointError(
                f"The Paddle checkpoint holds tensors of two models ({' and '.join(PREFIXES)}). Remove one of them."
            )
        self.stored = {hf: _turned(hf, reader.stored[name]) for hf, name in self._names.items()}

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        if is_transposed(name):
            return self._reader.read(self._names[name], columns, rows).T
        return self._reader.read(self._names[name], rows, columns)

    def close(self) -> None:
        self._reader.close()


def _turned(hf: str, stored: Stored) -> Stored:
    shape = stored.shape[::-1] if is_transposed(hf) else stored.shape
    return Stored(stored.dtype, shape, stored.file, stored.packed)
