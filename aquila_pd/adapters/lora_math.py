"""LoRA merge in numpy: W + scaling * A B, with DoRA's column magnitudes; in memory and on files."""

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .spec import LoraSpec


def scaling_of(spec: "LoraSpec") -> float:
    """What the update is multiplied with: alpha / r, and alpha / sqrt(r) for rsLoRA."""
    return spec.alpha / (math.sqrt(spec.r) if spec.rslora else spec.r)


def merge_weight(weight: np.ndarray, A: np.ndarray, B: np.ndarray, scaling: float, magnitude=None) -> np.ndarray:
    """W + scaling * A B, for DoRA with each column brought to its magnitude [out]; all float32, weights [in, out]."""
    merged = weight + np.float32(scaling) * (A @ B)
    if magnitude is not None:
        merged *= magnitude / np.sqrt((merged * merged).sum(axis=0))
    return merged
