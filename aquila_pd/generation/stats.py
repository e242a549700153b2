"""Engine counters and gauges, as /metrics and benchmarks read them."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Stats:
    """Counters since the engine was created; `running` and `waiting` are gauges. Seconds are wall-clock time."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    prompt_tokens: int = 0  # computed, without those reused
    reused_tokens: int = 0  # prompt tokens from the prefix cache
    new_tokens: int = 0
    finished: Counter = field(default_factory=Counter)  # by finish reason
    nonfinite: int = 0
    forward_seconds: float = 0.0  # in the model
    step_seconds: float = 0.0  # in all
