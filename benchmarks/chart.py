"""A picture of the ratios: a bar for each, whiskers from the least to the greatest round, a line where the bar lies.

python benchmarks/chart.py bench-output/bench.json bench-output/bench.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from ratios import HIGH, LOW, MET, MET_MEDIAN, number

matplotlib.rcParams["svg.fonttype"] = "none"  # words stay words
# Told apart without colours too: dark with a pattern where a bar is missed, plain where it is met, pale without one.
MET_STYLE = {"color": "#7fb7be", "edgecolor": "#33595e"}
MISSED_STYLE = {"color": "#d98e5f", "edgecolor": "#6e3b17", "hatch": "////"}
TOLD_STYLE = {"color": "#e4e4e4", "edgecolor": "#8a8a8a"}
BAR = {"color": "black", "linewidth": 2.2}
WIDTH, ROW = 8.3, 0.27  # inches: a page; a ratio


def draw_ratios(content: dict, path: Path) -> None:
    """Draw what bench.py has in its JSON; the name's ending says whether .png or .svg."""
    rows = {name: row for name, row in content["ratios"].items() if not row["unit"]}
    panels = {best: {n: r for n, r in rows.items() if r["best"] == best} for best in (LOW, HIGH)}
    panels = {best: found for best, found in panels.items() if found}
    sizes = [len(found) + 1.2 for found in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(WIDTH, ROW * sum(sizes) + 1.9),
        gridspec_kw={"height_ratios": sizes},
        squeeze=False,
        layout="constrained",
    )
    for ax, (best, found) in zip(axes[:, 0], panels.items(), strict=True):
        _panel(ax, found, best)
    _legend(figure, rows)
    figure.suptitle(_title(content), fontsize=8, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _title(content: dict) -> str:
    versions = content["versions"]
    names = ("aquila_pd", "paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "torch", "transformers")
    told = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    loads = content["load_average"]
    return (
        f"{content['date']}; {content['machine'].split(', load average')[0]}; load {loads['min']:.1f} to "
        f"{loads['max']:.1f}\n{told}\n{content['dtype']}, {content['threads']} threads, {content['rounds']} rounds, "
        f"MKL_DEBUG_CPU_TYPE={content['MKL_DEBUG_CPU_TYPE'] or 'not set'}"
    )


def _panel(ax, rows: dict[str, dict], best: str) -> None:
    """One ratio below the other. What lies far beyond the largest bar is cut off and told in figures."""
    places = range(len(rows))
    asked = [row["bar"] for row in rows.values() if row["bar"] is not None]
    end = min(max(row["max"] for row in rows.values()), max([1.25, *asked]) * 1.6) * 1.04
    for place, row in zip(places, rows.values(), strict=True):
        shown = min(row["median"], end)
        ax.barh(place, shown, height=0.66, linewidth=0.8, **_style(row))
        if row["median"] > end:  # cut off: a gap in the bar
            ax.plot([end * 0.97, end * 0.98], [place - 0.5, place + 0.5], color="white", linewidth=4.0)
        ax.plot([min(row["min"], end), min(row["max"], end)], [place, place], color="black", linewidth=1.0)
        for edge in (row["min"], row["max"]):
            if edge <= end:
                ax.plot([edge, edge], [place - 0.14, place + 0.14], color="black", linewidth=1.0)
        if row["bar"] is not None:
            ax.plot([row["bar"]] * 2, [place - 0.46, place + 0.46], linestyle=":" if row["aim"] else "-", **BAR)
        asked = "" if row["bar"] is None else f"  (bar {number(row['bar'])})"
        text = f"{number(row['median'])}{asked}"
        ax.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    if best == LOW:
        ax.axvline(1.0, color="#9a9a9a", linewidth=0.8, linestyle="--", zorder=0)
    ax.set_yticks(places, rows, fontsize=8)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, end)
    ax.tick_params(axis="x", labelsize=8)
    told = "less is better: aquila_pd over what is named, time unless memory is" if best == LOW else "more is better"
    ax.set_title(told, fontsize=9, loc="left")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _style(row: dict) -> dict:
    if row["bar"] is None:
        return TOLD_STYLE
    return MET_STYLE if row["verdict"] in (MET, MET_MEDIAN) else MISSED_STYLE


def _legend(figure, rows: dict[str, dict]) -> None:
    marks = [Patch(label="bar met", **_patch(MET_STYLE)), Patch(label="bar missed", **_patch(MISSED_STYLE))]
    marks += [Patch(label="no bar asked", **_patch(TOLD_STYLE))]
    marks += [Line2D([], [], label="bar", **BAR), Line2D([], [], label="aim", **{**BAR, "linestyle": ":"})]
    marks += [Line2D([], [], color="black", linewidth=1.0, label="least to greatest round")]
    figure.legend(handles=marks, loc="outside lower left", ncols=6, fontsize=7.5, frameon=False)


def _patch(style: dict) -> dict:
    return {**{"facecolor" if k == "color" else k: v for k, v in style.items()}, "linewidth": 0.8}


if __name__ == "__main__":
    draw_ratios(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
