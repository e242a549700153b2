"""Reader protocol: what a file format implements to be a source."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ...architecture.families.dialect import Dialect

ALL = slice(None)


@dataclass(frozen=True)
class Stored:
    """Header of a stored tensor: safetensors dtype tag of what read() returns, shape, file name.

    packed: the format's name of its own packing, such as "Q4_1", when read() has to unpack it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    packed: str | None = None


class Reader(Protocol):
    """Weights under the names and in the row order of their file; Source turns both into Hugging Face's.

    dialect: of the format itself; None leaves it to the family. notes: what the user should be told.
    """

    config: dict
    stored: dict[str, Stored]
    dialect: Dialect | None
    notes: list[str]

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        """Part of one tensor: these rows and, of a matrix, these columns; slices have no step.

        A read-only view of the mapped file where the format allows it; otherwise only what was asked for is unpacked.
        Several threads may call it at once, and what one of them releases is no other's.
        """

    def close(self) -> None:
        """Release files and memory."""
