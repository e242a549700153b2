"""Dialect: tensor names and row order of q and k in checkpoints that differ from Hugging Face's."""

import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Dialect:
    """A naming of tensors.

    names: name in the file -> Hugging Face name, "{i}" standing for the layer; what is not listed keeps its name.
    interleaved: Hugging Face names whose rows are stored for rotary embedding of neighbouring pairs (0, 1), (2, 3)
    ...; Hugging Face turns (0, H/2), (1, H/2 + 1), ... The value says whose heads they are, "q" or "kv".
    """

    title: str
    names: dict[str, str] = field(default_factory=dict)
    interleaved: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern, str]]:
        return [(_pattern(theirs), hf) for theirs, hf in self.names.items()]

    @cached_property
    def _interleaved_patterns(self) -> list[tuple[re.Pattern, str]]:
        return [(_pattern(hf), heads) for hf, heads in self.interleaved.items()]

    def to_hf(self, name: str) -> str:
        """The Hugging Face name of a stored tensor; a name this dialect does not know is returned as it is."""
        for pattern, hf in self._patterns:
            if match := pattern.fullmatch(name):
                return hf.format(**match.groupdict())
        return name

    def heads_of(self, hf_name: str) -> str | None:
        """Heads that the interleaved rows of this tensor belong to, "q" or "kv"; None when rows are in order."""
        return next((heads for pattern, heads in self._interleaved_patterns if pattern.fullmatch(hf_name)), None)


def _pattern(name: str) -> re.Pattern:
    return re.compile(re.escape(name).replace(r"\{i\}", r"(?P<i>\d+)"))


def rotate_half_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * H, D] reordered in each head from interleaved pairs to two halves: 0 2 4 ... 1 3 5 ..."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, width)


HUGGING_FACE = Dialect("Hugging Face")
