"""curve.png: the loss of a whole run in one picture, drawn from log.jsonl."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

from .jsonl import read_log

NAME = "curve.png"
SMOOTHED_OVER = 40  # the smoothed line averages over about this part of all steps
SIZE = (9, 5)  # inches, of 120 dots
STEPS, SMOOTH, EVAL, BORDER = "#9db7d5", "#1f4e8c", "#c8501e", "#888888"


def draw_curve(log: Path, picture: Path, *, stages: Sequence[str]) -> bool:
    """Draw the losses of a log; false when there is none in it. Whole or not there.

    Steps are counted through all stages, with a line and a name where a stage begins.
    """
    steps, losses, evals, borders = _read(log, stages)
    if not losses:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color=STEPS, linewidth=0.8, label="training, each step", zorder=2)
    axes.plot(steps, smoothed(losses), color=SMOOTH, linewidth=2, label="training, smoothed", zorder=3)
    if evals:
        axes.plot(*zip(*evals, strict=True), "o-", color=EVAL, markersize=5, linewidth=1, label="evaluation", zorder=4)
    for name, begin in borders:
        if begin:
            axes.axvline(begin, color=BORDER, linewidth=1, linestyle=":", zorder=1)
        if len(borders) > 1:
            axes.annotate(
                name,
                (begin, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -4),
                textcoords="offset points",
                va="top",
                color=BORDER,
                fontsize=9,
            )
    axes.set(xlabel="step", ylabel="loss", xlim=(0, max(steps[-1], 2)))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    _write(figure, picture)
    return True


def smoothed(values: Sequence[float]) -> list[float]:
    """A running average in which recent values count more, true from the first one on."""
    kept = 1 - 1 / max(len(values) / SMOOTHED_OVER, 1)
    total = weight = 0.0
    found = []
    for value in values:
        total, weight = kept * total + (1 - kept) * value, kept * weight + (1 - kept)
        found.append(total / weight)
    return found


def _read(log: Path, stages: Sequence[str]) -> tuple[list[int], list[float], list[tuple[int, float]], list]:
    """Steps counted through all stages, their losses, (step, loss) of evaluations, (name, step before) of stages."""
    steps: dict[int, float] = {}
    evals: dict[int, float] = {}
    begins: dict[str, int] = {}
    last = 0
    for record in read_log(log):
        stage = record.get("stage")
        if stage not in stages:
            continue
        begin = begins.setdefault(stage, last)
        if record["kind"] in ("step", "eval") and isinstance(record["loss"], float) and math.isfinite(record["loss"]):
            (steps if record["kind"] == "step" else evals)[begin + record["step"]] = record["loss"]
            last = max(last, begin + record["step"])
    return list(steps), list(steps.values()), list(evals.items()), list(begins.items())


def _write(figure, picture: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    partial = picture.with_name(f".{picture.name}.partial")
    partial.write_bytes(data.getvalue())
    os.replace(partial, picture)
