"""Drift of activations and logits from a float64 reference, and its tolerance.

float32 arithmetic alone moves a result away from its float64 reference. What it moves torch's own layers by (the
control) is the yardstick for Paddle's: ours may drift by FACTOR times as much, at every place of the model.

Measured, in units of what float32 explains (CPU, 2026-11-22). Right models: at the most 2.1 over 4 seeds, 4 tiny shapes
and 3 dtypes; 1.2 with hidden size 6144; 3.9 with a trained model of 30 layers (SmolLM2-135M). One value of a projection
wrong by a tenth of a usual weight: 300 and more (q_proj least, o_proj and v_proj 10^4); a transposed, swapped or
permuted matrix: 10^5 and more; rope_theta off by a thousandth: 54; rms_norm_eps off by a tenth: 7 at the weakest place,
13 at the strongest. Places that were not broken stayed below 1.2.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np

FACTOR = 8.0
UNIT = 2.0**-24  # half a unit in the last place of float32
FLOOR_LARGEST = 16  # times the floor of the rms: the largest of many normal differences, in outputs that have peaks too
UNSOUND = 1e-3  # a control further away than this computes another model than the reference


@dataclass(frozen=True)
class Drift:
    """Differences from a reference, each relative to its own size and its token's median: rms and largest."""

    rms: float
    largest: float


def floor_for(width: int) -> float:
    """The rms below which no control counts: kernels may add up `width` numbers one after the other in float32.

    Paddle's mean does so on a CPU: at a width of 6144 the plain RMSNorm is ten times as far from the truth as torch's.
    """
    return UNIT * max(1.0, width**0.5 / 8)


@dataclass(frozen=True)
class Pair:
    """The same place in Paddle and in torch's float32 layers (the control). floor: see floor_for()."""

    ours: Drift
    control: Drift
    floor: float = UNIT

    @property
    def ratio(self) -> float:
        """Ours in units of what float32 explains; above FACTOR it is no rounding any more."""
        explained = max(self.control.rms, self.floor), max(self.control.largest, self.floor * FLOOR_LARGEST)
        return max(_times(self.ours.rms, explained[0]), _times(self.ours.largest, explained[1]))

    @property
    def proven(self) -> bool:
        return self.ratio <= FACTOR


@dataclass(frozen=True)
class Place:
    """One place of the model. layer: its number, None outside of the decoder layers.

    isolated: fed with the reference's values, so an error shows where it is made. accumulated: fed with what the same
    framework computed before. rounding: what the dtype of the Paddle folder costs, None when it costs nothing.
    """

    name: str
    layer: int | None
    isolated: Pair
    accumulated: Pair | None = None
    rounding: Drift | None = None

    @property
    def proven(self) -> bool:
        return self.isolated.proven and (self.accumulated is None or self.accumulated.proven)

    def as_dict(self) -> dict:
        alone = {"ratio": self.isolated.ratio, "isolated_proven": self.isolated.proven}
        return {**asdict(self), **alone, "proven": self.proven}


@dataclass(frozen=True)
class Token:
    """One logit, in the reference and in the stream compared with it."""

    position: int
    vocabulary_id: int
    reference: float
    found: float


@dataclass(frozen=True)
class LogitDrift:
    """Logits beside the reference's. agreement: share of positions with the same most likely token; kl in nats."""

    agreement: float
    mean_kl: float
    largest_kl: float
    drift: Drift
    worst: tuple[Token, ...]  # the largest difference of each of the worst positions


def drift(found: np.ndarray, reference: np.ndarray) -> Drift:
    """The drift of an array [T, D] from a float64 array of the same shape; NaN counts as infinite."""
    total = DriftTotal()
    total.add(found, reference)
    return total.drift()


class DriftTotal:
    """Drift of something that comes in pieces."""

    def __init__(self):
        self.squares = self.largest = 0.0
        self.count = 0

    def add(self, found: np.ndarray, reference: np.ndarray) -> None:
        size = np.abs(reference)
        # A trained model has a few values a thousand times its others. They must not hide the others' errors, nor
        # must their own rounding be held against the others: hence their own size, and the median, which they leave.
        scale = size + np.median(size, axis=1, keepdims=True)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            difference = np.abs(found.astype(np.float64) - reference)
            difference = np.where(difference == 0, 0.0, difference / scale)
        difference = np.where(np.isnan(difference), np.inf, difference)
        self.squares += float(np.square(difference).sum())
        self.largest = max(self.largest, float(difference.max(initial=0.0)))
        self.count += difference.size

    def drift(self) -> Drift:
        return Drift((self.squares / self.count) ** 0.5, self.largest)


class LogitTotal:
    """Statistics of logits [T, V] that come in slices of the vocabulary, without ever holding them whole."""

    WORST = 5  # positions told about

    def __init__(self, positions: int):
        self.total = DriftTotal()
        self.top = np.full((2, positions), -np.inf), np.zeros((2, positions), np.int64)  # reference, found
        self.highest = np.full(positions, -np.inf)  # of the reference, for the exponentials
        self.sums = np.zeros((3, positions))  # of p, of p d, of p (exp(-d) - 1); d = reference - found
        self.worst = np.full(positions, -1.0), [Token(t, 0, 0.0, 0.0) for t in range(positions)]

    def add(self, found: np.ndarray, reference: np.ndarray, first: int) -> None:
        """found, reference [T, v]: the logits of the vocabulary from id `first` on."""
        self.total.add(found, reference)
        found = found.astype(np.float64)
        for row, logits in enumerate((reference, found)):
            self._note_top(row, logits, first)
        highest = np.maximum(self.highest, reference.max(axis=1))
        with np.errstate(invalid="ignore", over="ignore"):
            d = reference - found
            p = np.exp(reference - highest[:, None])
            self.sums *= np.exp(self.highest - highest)
            self.sums += np.stack([p.sum(1), (p * d).sum(1), (p * np.expm1(-d)).sum(1)])
        self.highest = highest
        self._note_worst(np.where(np.isnan(d), np.inf, np.abs(d)), reference, found, first)

    def _note_top(self, row: int, logits: np.ndarray, first: int) -> None:
        best, ids = self.top
        at = logits.argmax(axis=1)
        value = logits[np.arange(len(at)), at]
        higher = value > best[row]
        best[row][higher] = value[higher]
        ids[row][higher] = at[higher] + first

    def _note_worst(self, size: np.ndarray, reference: np.ndarray, found: np.ndarray, first: int) -> None:
        sizes, tokens = self.worst
        at = size.argmax(axis=1)
        for t, v in enumerate(at.tolist()):
            if size[t, v] > sizes[t]:
                sizes[t] = size[t, v]
                tokens[t] = Token(t, first + v, float(reference[t, v]), float(found[t, v]))

    def result(self) -> LogitDrift:
        p, pd, pe = self.sums
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            # sum p d + log(sum p exp(-d)): small differences of small numbers, not of the logits themselves
            kl = np.maximum(pd / p + np.log1p(pe / p), 0.0)
        kl = np.where(np.isnan(kl), np.inf, kl)
        ids = self.top[1]
        order = np.argsort(-self.worst[0], kind="stable")[: self.WORST]
        worst = tuple(self.worst[1][t] for t in order.tolist())
        return LogitDrift(
            float((ids[0] == ids[1]).mean()), float(kl.mean()), float(kl.max()), self.total.drift(), worst
        )


def _times(found: float, explained: float) -> float:
    """A quotient in which 0 of 0 is none at all, and NaN as bad as can be."""
    if found == 0:
        return 0.0
    quotient = found / explained if explained else math.inf
    return math.inf if math.isnan(quotient) else quotient
