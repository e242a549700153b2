"""From figures of rounds to ratios with their spread, and whether a bar is met. Arithmetic and tables only.

Figures are measured[case][side] = one dict for each round, e.g. {"seconds": 0.041, "cpu": 0.08, "peak_mb": 2200.0}, or
None where that side failed in that round, so that rounds stay side by side.
"""

import math
import statistics
from dataclasses import dataclass

Measured = dict[str, dict[str, list[dict | None]]]
LOW, HIGH = "low", "high"
MET, MET_MEDIAN, MISSED_MEDIAN, MISSED = "met", "met by the median", "missed by the median", "missed"


@dataclass(frozen=True)
class Of:
    """One figure of one side."""

    case: str
    side: str
    figure: str = "seconds"

    def values(self, measured: Measured) -> list[float | None]:
        """One for each round; None where it is not there."""
        rounds = measured.get(self.case, {}).get(self.side, [])
        return [None if found is None else found.get(self.figure) for found in rounds]


@dataclass(frozen=True)
class Ratio:
    """`over` divided by `under` in the same round; `over` itself when there is no `under`.

    bar: what issue 6 asks for, None where a figure is only told; best: LOW when smaller is better. aim: not asked for
    but aimed at. unit: for what is no ratio.
    """

    name: str
    over: Of
    under: Of | None
    bar: float | None = None
    best: str = LOW
    aim: bool = False
    unit: str = ""

    @property
    def cases(self) -> set[str]:
        return {self.over.case} | ({self.under.case} if self.under else set())

    def values(self, measured: Measured) -> list[float]:
        """One for each round in which both were measured."""
        over = self.over.values(measured)
        under = self.under.values(measured) if self.under else [1.0] * len(over)
        pairs = zip(over, under, strict=False)  # an interrupted run has a round more of one
        return [a / b for a, b in pairs if a is not None and b]


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of the rounds."""

    median: float
    min: float
    max: float
    rounds: int

    def __str__(self) -> str:
        if self.min == self.max:
            return number(self.median)
        return f"{number(self.median)} ({number(self.min)} to {number(self.max)})"


def number(value: float) -> str:
    """With the digits a noisy figure deserves."""
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def spread(values: list[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def verdict(found: Spread, bar: float, best: str) -> str:
    """MET or MISSED when all rounds agree, else what the median says. A value on the bar meets it."""
    sign = 1 if best == LOW else -1
    worst, least = (found.max, found.min) if best == LOW else (found.min, found.max)
    if sign * worst <= sign * bar:
        return MET
    if sign * found.median <= sign * bar:
        return MET_MEDIAN
    return MISSED_MEDIAN if sign * least <= sign * bar else MISSED


def summary(ratios: tuple[Ratio, ...], measured: Measured) -> dict[str, dict]:
    """{name: median, min, max, rounds, bar, best, verdict, ...} of the ratios that were measured, in order."""
    found = {}
    for ratio in ratios:
        values = ratio.values(measured)
        if not values:
            continue
        of = spread(values)
        row = {"median": of.median, "min": of.min, "max": of.max, "rounds": of.rounds}
        row |= {"bar": ratio.bar, "best": ratio.best, "aim": ratio.aim, "unit": ratio.unit}
        row["verdict"] = None if ratio.bar is None else verdict(of, ratio.bar, ratio.best)
        found[ratio.name] = row
    return found


# ------------------------------------------------------------------------------------------------ tables


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown whose columns also stand in line on a terminal."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines)


def bars_table(rows: dict[str, dict]) -> str:
    """Every ratio with its bar and whether it is met."""
    cells = []
    for name, row in rows.items():
        of = Spread(row["median"], row["min"], row["max"], row["rounds"])
        sign = "at most" if row["best"] == LOW else "at least"
        bar = "" if row["bar"] is None else f"{sign} {number(row['bar'])}{' (aim)' if row['aim'] else ''}"
        cells.append([name, f"{of}{row['unit']}", bar, row["verdict"] or ""])
    return table(["ratio, median (min to max)", "found", "bar", ""], cells)


def case_table(case: str, sides: dict[str, list[dict | None]], base: str) -> str:
    """All sides of one case: time and processor time beside the base's, and memory in use."""
    cells = []
    for side, rounds in sides.items():
        ratios = [Ratio("", Of(case, side, figure), Of(case, base, figure)) for figure in ("seconds", "cpu")]
        wall, cpu = (ratio.values({case: sides}) for ratio in ratios)
        none = "" if any(rounds) else "failed"
        row = [side, str(spread(wall)) if wall else none, str(spread(cpu)) if cpu else ""]
        for figure in ("peak_mb", "extra_mb"):
            values = [found[figure] for found in rounds if found and figure in found]
            row.append(f"{statistics.median(values):.0f}" if values else "")
        cells.append(row)
    head = [case, f"time, ratio to {base}", "cpu, ratio", "peak MB", "of it for the prompt"]
    used = [i for i in range(len(head)) if any(row[i] for row in cells)]
    return table([head[i] for i in used], [[row[i] for i in used] for row in cells])
