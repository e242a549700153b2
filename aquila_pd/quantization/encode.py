"""NF4 encoding of a stored or loaded weight: cast to float32 strip by strip, refuse non-finite values."""

from collections.abc import Iterator

import numpy as np

from ..checkpoint.io.stream_copy import move
from ..formats.nf4 import NF4, encode, strip_height
from ..utils.errors import CheckpointError

STRIP = 2**22  # values that are transposed and cast at once


def quantize(weight: np.ndarray, name: str = "a weight") -> NF4:
    """Encode a matrix [out, in] of any float dtype and any strides; a transposed view costs no copy of it.

    Beside the result there are no more than a few strips of 16 MB. Raises CheckpointError, with the name, for NaN or
    infinite values: a single one would spoil its block, and NaN the whole matrix.
    """
    return encode(weight.shape, _strips(weight, name))


def _strips(weight: np.ndarray, name: str) -> Iterator[np.ndarray]:
    height = strip_height(weight.shape[1], STRIP)
    for begin in range(0, len(weight), height):
        some = weight[begin : begin + height]
        strip = np.empty(some.shape, np.float32)
        if move(some, strip).nonfinite:
            raise CheckpointError(f"{name} holds NaN or infinite values, which NF4 cannot keep. Look at its source.")
        yield strip
