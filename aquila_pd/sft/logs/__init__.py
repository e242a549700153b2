"""Training logs: records, JSON Lines, terminal, VisualDL, the loss curve."""

from .records import EvalRecord, StageInfo, StepRecord
from .reporter import Reporter, Silent, open_reporter

__all__ = ["EvalRecord", "Reporter", "Silent", "StageInfo", "StepRecord", "open_reporter"]
