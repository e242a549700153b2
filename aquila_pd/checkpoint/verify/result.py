"""Result of a passed verification."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verified:
    """A check that passed. worst: the largest difference found; spread: standard deviation of the logits."""

    kind: str
    compared: int
    sentence: str
    worst: float = 0.0
    spread: float | None = None
