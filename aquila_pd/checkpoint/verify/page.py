"""Verification report as one self-contained HTML page without scripts, rendered from plain data."""

import math
from collections.abc import Iterable
from html import escape

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 44  # room around the plot, for labels
LOWEST, HIGHEST = 1e-9, 1e3  # drawn in place of zero, which has no logarithm, and of infinity
LINES = (  # class of the line, which numbers, whose, what it is called
    ("ours", "accumulated", "ours", "Paddle, accumulated"),
    ("control", "accumulated", "control", "torch in float32, accumulated"),
    ("ours alone", "isolated", "ours", "Paddle, each layer by itself"),
    ("control alone", "isolated", "control", "torch in float32, each layer by itself"),
)
STREAMS = {
    "ours": "Paddle",
    "control": "torch in float32",
    "stored": "the source's own dtype",
}
STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfa; --ink: #23282c; --quiet: #68717a; --line: #dcdfe0;
  --ours: #1769aa; --control: #b06a12; --good: #2b7a4b; --bad: #b3372f; --wash: #f1f2ef; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191c; --ink: #dfe3e6; --quiet: #98a1a9; --line: #33393e;
  --ours: #6cb2eb; --control: #e0a458; --good: #6cc28f; --bad: #ef8d84; --wash: #1e2226; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.1rem 4rem; max-width: 52rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 .4rem; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 2.4rem 0 .6rem; font-size: 1.1rem; }
.good { color: var(--good); } .bad { color: var(--bad); } .quiet { color: var(--quiet); font-size: .9rem; }
pre { margin: 0; padding: .8rem 1rem; background: var(--wash); border-radius: .4rem; white-space: pre-wrap;
  font: .86rem/1.5 ui-monospace, monospace; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .3rem 1rem; margin: 0; }
dt { color: var(--quiet); } dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .28rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 500; } th:first-child, td:first-child { padding-left: 0; text-align: left; }
td.bad { font-weight: 600; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--quiet); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.curve.alone { stroke-width: 1.5; stroke-dasharray: 2 4; stroke-linecap: round; }
.curve.ours { stroke: var(--ours); } .curve.control { stroke: var(--control); }
@media (max-width: 34rem) { svg text { font-size: 19px; } }
ul.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .4rem 0 0; padding: 0; list-style: none;
  font-size: .86rem; color: var(--quiet); }
ul.legend svg { display: inline-block; width: 2rem; height: .6rem; margin-right: .4rem; }
"""


def page(found: dict) -> str:
    """The page for what evidence.as_data() gives."""
    title = f"{'Proven' if _proven(found) else 'Not proven'}: {_last(found['paddle']['path'])}"
    parts = [_verdict(found), _compared(found)]
    if found.get("places"):
        parts += [_drift(found), _logits(found), _table(found)]
    parts.append(_settings(found))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="generator" content="{escape(found["made_by"])}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _proven(found: dict) -> bool:
    return found["verdict"] == "proven"


def _last(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2] or path


def _verdict(found: dict) -> str:
    kind, said = ("good", "Proven") if _proven(found) else ("bad", "Not proven")
    return (
        f'<h1 class="{kind}">{said}</h1>\n'
        f'<p class="quiet">level {escape(found["level"])}, {escape(found["date"])}</p>\n'
        f"<pre>{escape(found['sentence'])}</pre>"
    )


def _compared(found: dict) -> str:
    torch, paddle = found["torch"], found["paddle"]
    rows = [
        ("torch", f"{torch['path']}"),
        ("", f"{torch['kind']}, family {torch['family']}, {_dtypes(torch)}, {torch['bytes'] / 1e9:.2f} GB"),
        ("Paddle", f"{paddle['path']}"),
        ("", f"{_dtypes(paddle)}, {paddle['bytes'] / 1e9:.2f} GB"),
    ]
    if paddle["rounded_tensors"]:
        rows.append(("rounded", f"{paddle['rounded_tensors']} tensors hold less than the source's dtype"))
    if "tokens" in found:
        rows.append(("tokens", _tokens(found["tokens"])))
    if "weights_read_by" in found:
        rows.append(("torch's weights", f"read by {found['weights_read_by']}"))
    for note in torch["notes"]:
        rows.append(("note", note))
    return f"<h2>What was compared</h2>\n{_list(rows)}"


def _dtypes(side: dict) -> str:
    counts = ", ".join(f"{count} in {tag}" for tag, count in side["dtypes"].items())
    return f"tensors: {counts}" if counts else "not read"


def _tokens(tokens: dict) -> str:
    count = sum(map(len, tokens["ids"]))
    text = f"the prompt {tokens['prompt']!r}" if tokens["prompt"] is not None else "fixed pseudo-random ids"
    seen, of = tokens["embedding_rows"]
    return f"{count}, {text}; {seen:,} of {of:,} rows of the embedding were run"


def _list(rows: Iterable[tuple[str, str]]) -> str:
    return f"<dl>\n{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in rows)}\n</dl>"


# ------------------------------------------------------------------------------------------------- the picture


def _drift(found: dict) -> str:
    return (
        "<h2>Drift over depth</h2>\n"
        '<p class="quiet">rms of the difference from a float64 reference, relative to each value\'s own size and the '
        f"median of its token. Paddle may drift {found['allowed']['factor']:g} times as much as torch's own float32 "
        "layers.</p>\n"
        f"{_picture(found['places'])}\n{_legend()}"
    )


def _picture(places: list[dict]) -> str:
    """Layers from left to right, drift upwards in powers of ten."""
    curves = [(kind, _values(places, numbers, whose)) for kind, numbers, whose, _ in LINES]
    everything = [value for _, values in curves for _, value in values]
    low = math.floor(math.log10(min(everything, default=LOWEST)))
    high = max(math.ceil(math.log10(max(everything, default=1.0))), low + 1)
    layers = max((layer for _, values in curves for layer, _ in values), default=0)

    def x(layer: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (layer / layers if layers else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(value)) / (high - low)

    drawn = [_row_line(power, y(10.0**power)) for power in range(low, high + 1, max(1, (high - low) // 6))]
    drawn += [_layer_label(layer, x(layer)) for layer in _ticks(layers)]
    for kind, values in curves:
        points = " ".join(f"{x(layer):.1f},{y(value):.1f}" for layer, value in values)
        drawn.append(f'<polyline class="curve {kind}" points="{points}"/>')
    label = "Drift of Paddle's and of torch's float32 layers from the reference, by layer, logarithmic"
    body = "\n".join(drawn)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">\n{body}\n</svg>'


def _values(places: list[dict], numbers: str, whose: str) -> list[tuple[int, float]]:
    """(layer, drift) of each decoder layer: of its two halves the larger."""
    found: dict[int, float] = {}
    for place in places:
        if place["layer"] is not None and place[numbers]:
            value = float(place[numbers][whose]["rms"])  # infinity comes as text
            value = min(max(value, LOWEST), HIGHEST) if math.isfinite(value) else HIGHEST
            found[place["layer"]] = max(found.get(place["layer"], 0.0), value)
    return sorted(found.items())


def _ticks(layers: int) -> range:
    return range(0, layers + 1, next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000, 10**9) if layers <= 10 * step))


def _row_line(power: int, y: float) -> str:
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>'


def _layer_label(layer: int, x: float) -> str:
    name = f"layer {layer}" if layer == 0 else f"{layer}"
    return f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 30}" text-anchor="middle">{name}</text>'


def _legend() -> str:
    items = (
        f'<li><svg viewBox="0 0 32 10" aria-hidden="true"><polyline class="curve {kind}" points="1,5 31,5"/></svg>'
        f"{escape(name)}</li>"
        for kind, _, _, name in LINES
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


# -------------------------------------------------------------------------------------------------- the tables


def _logits(found: dict) -> str:
    heads = ("stream", "same top token", "mean KL", "largest KL", "rms", "largest")
    rows = [
        (
            STREAMS[name],
            f"{logits['agreement']:.1%}",
            *(_short(logits[key]) for key in ("mean_kl", "largest_kl")),
            *(_short(logits["drift"][key]) for key in ("rms", "largest")),
        )
        for name, logits in ((name, found["logits"][name]) for name in STREAMS if name in found["logits"])
    ]
    return (
        f'<h2>Logits</h2>\n<p class="quiet">against the reference; KL in nats</p>\n{_rows(heads, rows)}\n'
        f'<p class="quiet">The worst tokens: the largest single differences.</p>\n{_worst_tokens(found)}'
    )


def _worst_tokens(found: dict) -> str:
    ids = found["tokens"]["ids"][0]
    rows = [
        (
            STREAMS[name],
            *(f"{number}" for number in (token["position"], ids[token["position"]], token["vocabulary_id"])),
            *(f"{float(token[side]):.8f}" for side in ("reference", "found")),
            _short(abs(float(token["found"]) - float(token["reference"]))),
        )
        for name in ("ours", "control")
        for token in found["logits"][name]["worst"]
    ]
    return _rows(("stream", "position", "input id", "vocabulary id", "reference", "found", "apart"), rows)


def _table(found: dict) -> str:
    heads = ("place", "Paddle", "torch", "times", "Paddle so far", "torch so far", "dtype alone")
    rows = []
    for place in found["places"]:
        so_far = place["accumulated"]
        numbers = [_short(place["isolated"][whose]["rms"]) for whose in ("ours", "control")]
        times = float(place["ratio"])
        numbers.append(f"{times:.2f}" if times < 100 else f"{times:.2g}")
        numbers += [_short(so_far[whose]["rms"]) for whose in ("ours", "control")] if so_far else ["", ""]
        numbers.append(_short(place["rounding"]["rms"]) if place["rounding"] else "")
        rows.append((place["name"], *numbers))
    if not any(place["rounding"] for place in found["places"]):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    return (
        '<h2>Place by place</h2>\n<p class="quiet">Drift as rms, first of each place by itself, fed with the '
        "reference's values, and how many times what float32 explains it is in Paddle; then so far, fed with what the "
        "same framework computed before.</p>\n" + _rows(heads, rows, _culprits(found["places"]))
    )


ALONE, SO_FAR = {0, 1, 3}, {0, 4}  # cells of a row that say where an error is made


def _culprits(places: list[dict]) -> list[set[int]]:
    """The cells of each row that are marked: of places that fail by themselves, and failing such a place above, of the
    first where the drift so far is too much. What follows an error has it too, and no part in it."""
    marked, made = [], False
    for place in places:
        alone = not place["isolated_proven"]
        first = not (place["proven"] or alone or made)
        marked.append(ALONE if alone else SO_FAR if first else set())
        made = made or alone or first
    return marked


def _rows(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]], marked: list[set[int]] | None = None) -> str:
    """marked: of each row the cells that are bad."""
    rows = list(rows)
    top = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    body = "\n".join(_row(row, bad) for row, bad in zip(rows, marked or [set()] * len(rows), strict=True))
    return f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _row(cells: tuple[str, ...], bad: set[int]) -> str:
    openings = ('<td class="bad">' if i in bad else "<td>" for i in range(len(cells)))
    return "<tr>" + "".join(f"{td}{escape(cell)}</td>" for td, cell in zip(openings, cells, strict=True)) + "</tr>"


def _short(value: float | str) -> str:
    return "0" if value == 0 else f"{float(value):.1e}"


def _settings(found: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    rows = [
        ("time", f"{found['seconds']:.1f} s"),
        *([("memory", f"{found['peak_memory_bytes'] / 1e9:.2f} GB at the most")] if found["peak_memory_bytes"] else []),
        ("machine", found["machine"]),
        ("versions", versions),
        ("sha256", f"torch config.json {found['torch']['config_sha256'] or 'none'}"),
        ("", f"Paddle config.json {found['paddle']['config_sha256'] or 'none'}"),
        *_hashes("torch", found["torch"]["weights_sha256"]),
        *_hashes("Paddle", found["paddle"]["weights_sha256"]),
    ]
    return f"<h2>Where and with what</h2>\n{_list(rows)}"


def _hashes(side: str, files: dict[str, str] | None) -> list[tuple[str, str]]:
    """Of the files with weights, as the folder's manifest has them."""
    if not files:
        return [("", f"{side} weights: absent, as the folder has no manifest")]
    return [("", f"{side} {name} {digest}, by its manifest") for name, digest in files.items()]
