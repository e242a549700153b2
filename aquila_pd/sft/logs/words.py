"""Log records as text, for a line or a bar."""

import math

from ...utils.units import duration
from .records import EvalRecord, Reported, StageInfo

GIB = 1024  # MiB
MEMORY = {"resident": "RAM", "peak": "GPU"}


def step_words(reported: Reported) -> list[str]:
    """Details of a step beside its number and loss, the important first: lr, gradient, speed, and so on."""
    record = reported.record
    words = [
        f"lr {record.lr:.2e}",
        f"grad {number(record.grad_norm)}",
        f"{rate(record.tokens_per_s)} tok/s" + (" each" if record.devices > 1 else ""),
        f"pad {percent(record.padding)}",
    ]
    if reported.mfu is not None:
        words.append(f"MFU {percent(reported.mfu)}")
    return [*words, memory_words(reported)]


def memory_words(reported: Reported) -> str:
    """The first kind of memory there is; the others are in the file."""
    kind, mib = next(iter(reported.memory.items()))
    amount = f"{mib / GIB:.1f} GiB" if mib >= GIB else f"{mib:.0f} MiB"
    return f"{MEMORY[kind]} {amount}"


def left_words(reported: Reported) -> str:
    return f"{duration(reported.left)} left" if reported.left else ""


def step_line(reported: Reported) -> str:
    """One line about a step."""
    record = reported.record
    counted = f"{record.step:>{len(str(record.steps))}}/{record.steps}"
    words = [f"epoch {record.epoch:.2f}", f"loss {record.loss:.4f}", *step_words(reported), left_words(reported)]
    return "  ".join([record.stage, counted, *(word for word in words if word)])


def eval_line(record: EvalRecord) -> str:
    best = ", the best so far" if record.best else ""
    return f"{record.stage}  step {record.step}: evaluation loss {record.loss:.4f}{best} ({duration(record.seconds)})"


def stage_lines(info: StageInfo) -> list[str]:
    """What a stage is, when it begins."""
    begin = f"goes on from step {info.step:,} of {info.steps:,}" if info.step else f"{info.steps:,} steps"
    width = max(map(len, info.facts), default=0)
    return [f"Stage {info.stage}: {begin}", *(f"  {key.ljust(width)}  {value}" for key, value in info.facts.items())]


def number(value: float) -> str:
    """Three digits that count: 0.00123, 1.23, 12.3, 1234."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.{min(max(2 - math.floor(math.log10(abs(value))), 0), 6)}f}"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
