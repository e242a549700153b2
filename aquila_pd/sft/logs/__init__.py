"""What a training run says about itself: records, a JSON Lines file, the terminal, VisualDL, a curve."""

from .records import EvalRecord, StageInfo, StepRecord
from .reporter import Reporter, Silent, open_reporter

__all__ = ["EvalRecord", "Reporter", "Silent", "StageInfo", "StepRecord", "open_reporter"]
