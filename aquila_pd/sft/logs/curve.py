"""curve.png: training and evaluation loss of a whole run, drawn from log.jsonl."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...utils.atomic import replacing
from .jsonl import read_log

NAME = "curve.png"
SMOOTHED_OVER, FEWEST = 20, 4  # the smoothed line averages over a twentieth of all steps, and not less than four
FEW = 20
SIZE = (9, 5)  # inches, of 120 dots
STEPS, SMOOTH, EVAL, BORDER = "#9db7d5", "#1f4e8c", "#c8501e", "#888888"


@dataclass
class Curve:
    """One stage. begin: steps of the stages before it; steps, evals: step of the whole run -> loss."""

    begin: int
    steps: dict[int, float] = field(default_factory=dict)
    evals: dict[int, float] = field(default_factory=dict)

    @property
    def end(self) -> int:
        return max([self.begin, *self.steps, *self.evals])


def draw_curve(log: Path, picture: Path, *, stages: Sequence[str]) -> bool:
    """Draw the losses of a log; false when there is none in it. Whole or not there.

    Steps are counted through all stages, with a line and a name where a stage begins; lines end with their stage,
    because the next one has other rows.
    """
    curves = read_curves(log, stages)
    if not any(curve.steps for curve in curves.values()):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=SIZE, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = max(len(curve.steps) for curve in curves.values())
    for name, curve in curves.items():
        _draw(axes, curve, kept=1 - 1 / max(longest / SMOOTHED_OVER, FEWEST), name=name if len(curves) > 1 else "")
    axes.set(xlabel="step", ylabel="loss", xlim=(0, 1.01 * max(curve.end for curve in curves.values()) + 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    named = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))  # each once, not once for each stage
    axes.legend(named.values(), named.keys(), frameon=False, loc="upper right")
    _write(figure, picture)
    return True


def _draw(axes, curve: Curve, *, kept: float, name: str) -> None:
    steps, losses = list(curve.steps), list(curve.steps.values())
    few = "." if len(steps) < FEW else None  # a line of one point is none
    axes.plot(steps, losses, color=STEPS, linewidth=0.8, marker=few, label="training, each step", zorder=2)
    axes.plot(steps, smoothed(losses, kept), color=SMOOTH, linewidth=2, label="training, smoothed", zorder=3)
    if curve.evals:
        points = list(curve.evals), list(curve.evals.values())
        axes.plot(*points, "o-", color=EVAL, markersize=5, linewidth=1, label="evaluation", zorder=4)
    if curve.begin:
        axes.axvline(curve.begin, color=BORDER, linewidth=1, linestyle=":", zorder=1)
    if name:
        axes.annotate(
            name,
            (curve.begin, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -4),
            textcoords="offset points",
            va="top",
            color=BORDER,
            fontsize=9,
        )


def smoothed(values: Sequence[float], kept: float) -> list[float]:
    """A running average of which `kept` stays with each value, true from the first one on."""
    total = weight = 0.0
    found = []
    for value in values:
        total, weight = kept * total + (1 - kept) * value, kept * weight + (1 - kept)
        found.append(total / weight)
    return found


def read_curves(log: Path, stages: Sequence[str]) -> dict[str, Curve]:
    """The losses of each stage there is something of, in their order; what is no number has no place in them."""
    curves: dict[str, Curve] = {}
    last = 0
    for record in read_log(log):
        if record.get("stage") not in stages:
            continue
        curve = curves.setdefault(record["stage"], Curve(last))
        if record["kind"] in ("step", "eval") and isinstance(record["loss"], float):
            (curve.steps if record["kind"] == "step" else curve.evals)[curve.begin + record["step"]] = record["loss"]
            last = curve.end
    return curves


def _write(figure, picture: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, format="png")
    with replacing(picture) as partial:
        partial.write_bytes(data.getvalue())
