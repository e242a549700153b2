"""Paddle checkpoints as a source: the weight table read right to left, matrices transposed as views."""

import re

import numpy as np

from ...architecture.families.dialect import Dialect
from ...architecture.weight_map import BASE_MODEL_PREFIX, EMBEDDING, HEAD, HF_PREFIX, is_transposed
from ...utils.errors import CheckpointError
from .reader import ALL, Reader, Stored

# Aquila's, of the published release and of ours, and that of PaddleNLP's own LLaMA; both store matrices as [in, out]
PREFIXES = (BASE_MODEL_PREFIX, "llama")
PREFIX = re.compile(rf"^({'|'.join(PREFIXES)})\.")


def is_paddle(names: list[str]) -> bool:
    """Whether tensors of these names are a Paddle model's."""
    return any(PREFIX.match(name) for name in names)


class PaddleReader:
    """Wraps the reader of a Paddle folder: renames tensors and transposes matrices (a view, not a copy)."""

    dialect = Dialect("Paddle")  # what this reader hands out has Hugging Face's names

    def __init__(self, reader: Reader):
        self._reader = reader
        self.config, self.notes = reader.config, list(reader.notes)
        self._names = {PREFIX.sub(HF_PREFIX, name): name for name in reader.stored}
        if len(self._names) < len(reader.stored):
            raise CheckpointError(
                f"The Paddle checkpoint holds tensors of two models ({' and '.join(PREFIXES)}). Remove one of them."
            )
        self._transposed = {hf for hf in self._names if is_transposed(hf) and not self._is_tied_head(hf)}
        self.stored = {hf: self._in_hf_layout(hf, reader.stored[name]) for hf, name in self._names.items()}

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        if name in self._transposed:
            return self._reader.read(self._names[name], columns, rows).T
        return self._reader.read(self._names[name], rows, columns)

    def close(self) -> None:
        self._reader.close()

    def _is_tied_head(self, hf: str) -> bool:
        """PaddleNLP stores a head that is tied once more, in the embedding's layout."""
        embedding = self._names.get(EMBEDDING.hf)
        shapes = [self._reader.stored[name].shape for name in (self._names[hf], embedding) if name]
        return hf == HEAD.hf and len(shapes) == 2 and shapes[0] == shapes[1]

    def _in_hf_layout(self, hf: str, stored: Stored) -> Stored:
        shape = stored.shape[::-1] if hf in self._transposed else stored.shape
        return Stored(stored.dtype, shape, stored.file, stored.packed)
