"""Data set statistics: rows per rule, turns, characters, tokens, and the distribution of sample lengths."""

import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..utils.atomic import replacing
from .counters import Counters
from .pipeline import Conversation
from .truncation import Fitted

SOURCES = 10  # that are shown; the others are added up
KNOWN = 10_000  # sources counted by name
BAR = 40  # characters of the longest bar
QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass
class Amount:
    """What a part of the rows holds. Tokens and what is learned of them stay 0 without a tokenizer.

    lengths: tokens of a sample, without a tokenizer characters of a row -> how many have that length.
    """

    rows: int = 0
    turns: int = 0
    characters: int = 0
    answers: int = 0  # characters of them
    samples: int = 0
    tokens: int = 0
    learned: int = 0  # labels
    lengths: Counter = field(default_factory=Counter)

    def add(self, conversation: Conversation, fitted: Fitted | None) -> None:
        """fitted: its samples, None without a tokenizer."""
        sizes = [(message["role"], len(message["content"])) for message in conversation.messages]
        characters = sum(size for _, size in sizes)
        self.rows += 1
        self.turns += sum(role == "user" for role, _ in sizes)
        self.characters += characters
        self.answers += sum(size for role, size in sizes if role == "assistant")
        if fitted is None:
            self.lengths[characters] += 1
            return
        for _, sample in fitted.parts:
            self.samples += 1
            self.tokens += len(sample.ids)
            self.learned += sample.labels
            self.lengths[len(sample.ids)] += 1


@dataclass
class Stats:
    """Everything that `aquila-pd data stats` says. unit: of lengths, "tokens" or "characters"."""

    unit: str
    counters: Counters = field(default_factory=Counters)
    parts: dict[str, Amount] = field(default_factory=dict)
    sources: Counter = field(default_factory=Counter)

    def add(self, conversation: Conversation, fitted: Fitted | None) -> None:
        part = "held out" if conversation.held_out else "train"
        self.parts.setdefault(part, Amount()).add(conversation, fitted)
        known = conversation.source in self.sources or len(self.sources) < KNOWN
        self.sources[conversation.source if known else "others"] += 1
        for rule in fitted.rules if fitted else ():
            self.counters.count(rule)

    @property
    def lengths(self) -> Counter:
        return sum((amount.lengths for amount in self.parts.values()), Counter())

    def table(self) -> list[tuple[str, ...]]:
        """A head, and a row for each part."""
        in_tokens = self.unit == "tokens"
        head = ("", "rows", "turns", "characters", "of them answers")
        rows = [head + (("samples", "tokens", "of them learned") if in_tokens else ())]
        for part, amount in self.parts.items():
            row = part, f"{amount.rows:,}", f"{amount.turns:,}", f"{amount.characters:,}"
            row += (share(amount.answers, amount.characters),)
            tokens = f"{amount.samples:,}", f"{amount.tokens:,}", share(amount.learned, amount.tokens)
            rows.append(row + (tokens if in_tokens else ()))
        return rows

    def largest_sources(self) -> list[tuple[str, int]]:
        """The sources with most rows; nothing where no row names one."""
        if set(self.sources) <= {""}:
            return []
        named = sorted(self.sources.items(), key=lambda pair: (-pair[1], pair[0]))
        found = [(name or "(none)", rows) for name, rows in named[:SOURCES]]
        rest = sum(rows for _, rows in named[SOURCES:])
        return found + ([(f"{len(named) - SOURCES:,} more", rest)] if rest else [])


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def quantile(lengths: Counter, of: float) -> int:
    """The length that a share `of` of all do not exceed."""
    wanted, seen = math.ceil(of * lengths.total()), 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= wanted:
            return length
    return 0


def bins_of(lengths: Counter) -> list[tuple[int, int, int]]:
    """[(first length, last length, how many)] from the shortest to the longest; each bin is about half as wide again
    as the one before: 32-47, 48-63, 64-95, ..."""
    if not lengths:
        return []
    edges = [0, *(edge for power in range(2, 40) for edge in (1 << power, 3 << power - 1))]
    counts: Counter = Counter()
    for length, count in lengths.items():
        counts[max(i for i, edge in enumerate(edges) if edge <= length)] += count
    return [(edges[i], edges[i + 1] - 1, counts[i]) for i in range(min(counts), max(counts) + 1)]


def histogram(lengths: Counter) -> Iterator[str]:
    """Lines of a picture in characters."""
    bins = bins_of(lengths)
    most = max((count for _, _, count in bins), default=1)
    names = [f"{first:,}-{last:,}" for first, last, _ in bins]
    width, digits = max(map(len, names), default=0), max((len(f"{count:,}") for _, _, count in bins), default=0)
    for name, (_, _, count) in zip(names, bins, strict=True):
        bar = "█" * round(BAR * count / most) or ("▏" if count else "")
        yield f"{name:>{width}}  {count:>{digits},}  {bar}"


def draw_lengths(stats: Stats, picture: Path, *, limit: int | None) -> None:
    """A PNG of how long samples are, and of how many tokens are in samples of each length. Whole or not there.

    limit: a length to mark.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    lengths = stats.lengths
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bins = [(max(first, 1), last + 1) for first, last, _ in bins_of(lengths)]
    within = [[n for n in lengths if low <= max(n, 1) < high] for low, high in bins]
    what = "samples" if stats.unit == "tokens" else "rows"
    named = (what, f"{stats.unit} in {what}")
    for offset, weigh, name, colour in ((0, False, named[0], "#1f4e8c"), (1, True, named[1], "#c8501e")):
        heights = [sum(lengths[n] * (n if weigh else 1) for n in inside) for inside in within]
        _draw_bars(axes, bins, _shares(heights), offset=offset, label=f"{name} of this length", color=colour)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set(xlabel=f"{stats.unit} of a {what[:-1]}", ylabel="share of all")
    if limit is not None:
        axes.axvline(limit, color="#888888", linestyle="--", label=f"length {limit:,}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _write(figure, picture)


def _shares(heights: Iterable[int]) -> list[float]:
    heights = list(heights)
    return [height / max(sum(heights), 1) for height in heights]


def _draw_bars(axes, bins: list[tuple[int, int]], heights: list[float], *, offset: int, **look: str) -> None:
    """Two bars a bin, side by side also where the scale is a logarithm."""
    middles = [math.sqrt(low * high) for low, high in bins]
    lefts = [middle if offset else low for (low, _), middle in zip(bins, middles, strict=True)]
    rights = [high if offset else middle for (_, high), middle in zip(bins, middles, strict=True)]
    widths = [right - left for left, right in zip(lefts, rights, strict=True)]
    axes.bar(lefts, heights, width=widths, align="edge", edgecolor="white", linewidth=0.5, **look)


def _write(figure, picture: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    with replacing(picture) as partial:
        partial.write_bytes(drawn.getvalue())
