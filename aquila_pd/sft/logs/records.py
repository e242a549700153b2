"""Log records: one for each step, evaluation and stage. Numbers, no output."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StageInfo:
    """A stage as its log needs it.

    step: the one it goes on from, 0 for the beginning. steps: of the whole stage. log_every: steps between two lines
    for people; the file has every record. flops_per_token: of one real token forward and backward, for MFU.
    peak_flops: of one device at the precision in use; None if unknown. facts: shown when the stage begins.
    """

    stage: str
    steps: int
    step: int = 0
    log_every: int = 1
    visualdl: bool = False
    flops_per_token: float | None = None
    peak_flops: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRecord:
    """One step, or the steps since the record before.

    step: the number of the last one, from 1. epoch: how far, 1.5 being half of the second. loss: the mean over labels.
    grad_norm: before clipping. valid_tokens: labels trained on; tokens: real ones; positions: with padding; all three
    over all devices. seconds: of training alone, without evaluation and saving.
    """

    stage: str
    step: int
    steps: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    valid_tokens: int
    tokens: int
    positions: int
    seconds: float
    devices: int = 1

    @property
    def tokens_per_s(self) -> float:
        """Valid tokens a device trains on in a second."""
        return self.valid_tokens / self.devices / max(self.seconds, 1e-9)

    @property
    def padding(self) -> float:
        """The share of positions that hold nothing."""
        return 1 - self.tokens / self.positions if self.positions else 0.0

    def mfu(self, info: StageInfo) -> float | None:
        """Model FLOPs utilization: the arithmetic the real tokens need, over what the devices could have done. None
        where one of the two is not known."""
        if not info.flops_per_token or not info.peak_flops:
            return None
        done = info.flops_per_token * self.tokens / max(self.seconds, 1e-9)
        return done / (info.peak_flops * self.devices)


@dataclass(frozen=True)
class EvalRecord:
    """An evaluation behind a step: the mean loss over `tokens` labels. best: lower than every one before it."""

    stage: str
    step: int
    loss: float
    tokens: int
    seconds: float
    best: bool = False


@dataclass(frozen=True)
class Reported:
    """A step with what only the running process knows.

    left: seconds to the end of the stage, None while there is no rate. memory: MiB by kind (see memory.py).
    """

    record: StepRecord
    mfu: float | None
    left: float | None
    memory: Mapping[str, float]

    def to_json(self) -> dict:
        """The record as one flat object; what is not known is left out."""
        record = self.record
        found = {
            **vars(record),
            "tokens_per_s": record.tokens_per_s,
            "padding": record.padding,
            "mfu": self.mfu,
            "seconds_left": self.left,
            **{f"memory_{kind}_mib": round(value, 1) for kind, value in self.memory.items()},
        }
        return {key: value for key, value in found.items() if value is not None}


class Clock:
    """How long a stage will go on, from a smoothed time per step: recent steps count more, and the first is not
    believed alone (it compiles kernels and fills caches)."""

    SMOOTH = 0.95  # of the average that stays with each step: about the last twenty count

    def __init__(self, step: int):
        self.step = step
        self.total = self.weight = 0.0

    def left(self, record: StepRecord) -> float | None:
        """Seconds to the end of the stage, after this record. None until a second one came."""
        steps, known = record.step - self.step, self.weight > 0
        self.step = record.step
        if steps <= 0:
            return None
        kept = self.SMOOTH**steps
        self.total = kept * self.total + (1 - kept) * record.seconds / steps
        self.weight = kept * self.weight + (1 - kept)
        left = (record.steps - record.step) * self.total / self.weight
        return left if (known or left == 0) and math.isfinite(left) else None
