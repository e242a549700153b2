"""Layer-by-layer verification: Paddle and torch run side by side, one decoder layer in memory at a time.

A model far larger than the memory can be proven so: never more than one layer of one framework is there, rows of the
embedding are gathered, and the head is applied in slices of the vocabulary. Rows of the embedding that no token asks
for are compared as they are, so that every value of the Paddle folder has a part in the proof. Where torch's weights
had to be read by this project's own reader, a sample of them is worked out anew by independent.py.

    reference   the decoder in float64, weights as the Paddle folder should hold them
    control     transformers' layers in float32 on the same weights: what float32 alone costs
    ours        this project's layers in float32, filled from the Paddle folder

Where the Paddle folder's dtype holds less than the source's, `stored` runs too: the reference on the weights as the
source has them. What it differs by is the price of that dtype, reported and not judged.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np

from ...utils.errors import VerificationError, report
from ...utils.progress import Bar, Timer
from ...utils.units import duration
from .comparison import Sides
from .drift import FACTOR, UNSOUND, Drift, DriftTotal, LogitDrift, LogitTotal, Pair, Place, drift, floor_for
from .independent import recomputed
from .logits import llama_config
from .result import Verified

SLICE = 16 << 20  # values of the head in memory at a time
FLOAT32 = ("ours", "control")  # the streams that are judged and that judge
LISTED = 12  # places named in a message


@dataclass
class Proof:
    """Result of a run. how: the reader of torch's weights; logits: of ours, control and (when rounded) stored.

    anew: what to say of weights that were worked out a second time.
    """

    ids: np.ndarray
    how: str
    independent: bool
    places: list[Place] = field(default_factory=list)
    logits: dict[str, LogitDrift] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of each layer
    anew: str = ""

    @property
    def proven(self) -> bool:
        return all(place.proven for place in self.places)

    @property
    def worst(self) -> Place:
        return max(self.places, key=lambda place: place.isolated.ratio)

    def verified(self) -> Verified:
        """What to say of it. Raises VerificationError that names the places where the models part."""
        unsound = [place for place in self.places if not place.isolated.control.rms < UNSOUND]
        if unsound:
            raise VerificationError(_unsound(unsound))
        if not self.proven:
            raise VerificationError(_parted(self))
        ours, control = self.logits["ours"], self.logits["control"]
        sentence = (
            f"{len(self.seconds)} layers equal on {len(self.ids)} tokens (worst at {self.worst.name}: "
            f"{self.worst.isolated.ratio:.1f} times the drift that float32 explains, allowed {FACTOR:g}); logits: "
            f"same most likely token at {ours.agreement:.1%} (torch {control.agreement:.1%}), "
            f"KL at most {ours.largest_kl:.1e} (torch {control.largest_kl:.1e}){self._reading()}"
        )
        return Verified("layerwise", len(self.places), sentence, ours.drift.largest)

    def _reading(self) -> str:
        return "" if self.independent else f"; torch's weights were read by {self.how}{self.anew}"


@dataclass
class _Streams:
    """The runners, and for each what it has computed so far [T, D]."""

    runners: dict
    x: dict[str, np.ndarray]

    def pair(self, found: dict[str, Drift]) -> Pair:
        return Pair(found["ours"], found["control"], floor_for(self.x["reference"].shape[1]))


def run_layerwise(sides: Sides, ids: np.ndarray, *, say: Callable[[str], None] = print) -> Proof:
    """Run token ids [T] through both, layer by layer. Judging is Proof.verified()'s business."""
    from .paddle_side import Ours
    from .torch_side import Control, Reference, Weights

    config, length = llama_config(sides.source), len(ids)
    weights = Weights(sides.source, sides.paddle_dtypes)
    runners = {
        "reference": Reference(config, weights, rounded=True),
        "control": Control(config, weights, length),
        "ours": Ours(sides.folder, sides.held, length),
    }
    if sides.rounded:
        runners["stored"] = Reference(config, weights, rounded=False)
    proof = Proof(ids, weights.how, weights.independent)
    streams = _Streams(runners, {name: runner.embed(ids) for name, runner in runners.items()})
    if not weights.independent:
        places = {weight.hf: (sides.held[weight.paddle], weight.transpose) for weight in sides.weights}
        proof.anew = recomputed(sides.source, places)
    proof.places.append(_embedding(streams, sides.source.dims.vocab))
    with closing(_with_progress(config.num_hidden_layers, proof.seconds, say)) as layers:
        for i in layers:
            proof.places += _run_layer(streams, i)
            weights.let_go()
    proof.places.append(_run_norm(streams))
    vocabulary = sides.source.dims.vocab
    proof.places.append(_run_head(streams, vocabulary, proof.logits))
    return proof


def _embedding(streams: _Streams, vocabulary: int) -> Place:
    """Rows are copied, so whatever differs is not the arithmetic's doing: no drift is allowed, in no row."""
    found = _against(streams.x, streams.x["reference"])
    everywhere = _embedding_rows(streams, vocabulary)
    seen = Pair(found["ours"], found["control"], floor=0.0)
    return Place("embedding", None, replace(seen, ours=everywhere or seen.ours), seen, found.get("stored"))


def _embedding_rows(streams: _Streams, vocabulary: int) -> Drift | None:
    """The drift of those blocks of rows in which any value differs; None when none does."""
    step = max(1, SLICE // streams.x["reference"].shape[1])
    total = DriftTotal()
    for first in range(0, vocabulary, step):
        rows = slice(first, min(first + step, vocabulary))
        reference, ours = (streams.runners[name].embedding(rows) for name in ("reference", "ours"))
        if not np.array_equal(reference, ours, equal_nan=True):
            total.add(ours, reference.astype(np.float64))
    return total.drift() if total.count else None


def _run_layer(streams: _Streams, i: int) -> list[Place]:
    """Two places, the layer's halves; what is accumulated stands with the second."""
    x = streams.x
    with streams.runners["reference"].layer(i) as layer:
        middle = layer.attention(x["reference"])
        end = layer.mlp(middle)
    first, second = {}, {}
    for name in FLOAT32:
        with streams.runners[name].layer(i) as layer:
            attention = layer.attention(x["reference"].astype(np.float32))
            mlp = layer.mlp(middle.astype(np.float32))
            x[name] = layer.forward(x[name])
        del layer  # before the other framework's is made
        first[name], second[name] = drift(attention, middle), drift(mlp, end)
    if "stored" in x:
        with streams.runners["stored"].layer(i) as layer:
            x["stored"] = layer.forward(x["stored"])
    x["reference"] = end
    so_far = _against(x, end)
    return [
        Place(f"layer {i}, attention", i, streams.pair(first)),
        Place(f"layer {i}, MLP", i, streams.pair(second), streams.pair(so_far), so_far.get("stored")),
    ]


def _run_norm(streams: _Streams) -> Place:
    x, runners = streams.x, streams.runners
    before = x["reference"].astype(np.float32)
    reference = runners["reference"].norm(x["reference"])
    found = {name: drift(runners[name].norm(before), reference) for name in FLOAT32}
    streams.x = {name: runners[name].norm(x[name]) for name in x}
    so_far = _against(streams.x, reference)
    return Place("final norm", None, streams.pair(found), streams.pair(so_far), so_far.get("stored"))


def _run_head(streams: _Streams, vocabulary: int, logits: dict[str, LogitDrift]) -> Place:
    """The head in slices; fills in the statistics of the logits of each stream."""
    x, runners = streams.x, streams.runners
    T, D = x["reference"].shape
    before = x["reference"].astype(np.float32)
    compared = [name for name in x if name != "reference"]
    totals = {name: LogitTotal(T) for name in compared}
    isolated = {name: LogitTotal(T) for name in FLOAT32}
    for first in range(0, vocabulary, max(1, SLICE // D)):
        rows = slice(first, min(first + max(1, SLICE // D), vocabulary))
        reference = runners["reference"].head(x["reference"], rows)
        for name in compared:
            totals[name].add(runners[name].head(x[name], rows), reference, first)
        for name in FLOAT32:
            isolated[name].add(runners[name].head(before, rows), reference, first)
    logits |= {name: total.result() for name, total in totals.items()}
    alone = {name: total.total.drift() for name, total in isolated.items()}
    so_far = {name: found.drift for name, found in logits.items()}
    return Place("head", None, streams.pair(alone), streams.pair(so_far), so_far.get("stored"))


def _against(x: dict[str, np.ndarray], reference: np.ndarray) -> dict[str, Drift]:
    return {name: drift(found, reference) for name, found in x.items() if name != "reference"}


def _with_progress(layers: int, seconds: list[float], say: Callable[[str], None]) -> Iterator[int]:
    """The numbers of the layers; appends the seconds of each and reports progress in between."""
    timer, bar = Timer(), Bar("layers", layers)
    try:
        for i in range(layers):
            start = time.monotonic()
            yield i
            seconds.append(time.monotonic() - start)
            left = timer.seconds / (i + 1) * (layers - i - 1)
            words = f"layer {i + 1} of {layers}, {seconds[-1]:.1f} s each, about {duration(left)} left"
            bar.update(words, i + 1)
            if not bar.is_drawn and timer.due() and i + 1 < layers:
                say(f"  {words}")
    finally:
        bar.close()


# ------------------------------------------------------------------------------------------------- messages


def _unsound(places: list[Place]) -> str:
    findings = [f"{place.name}: torch in float32 is {place.isolated.control.rms:.2g} away" for place in places[:LISTED]]
    advice = "The source holds NaN, infinite or huge values, or its config.json is one transformers reads otherwise."
    return report("There is no reference: torch's own layers do not agree with it.", findings, advice)


def _parted(proof: Proof) -> str:
    """Places where an error is made, worst first; failing that, where it shows."""
    made = sorted((p for p in proof.places if not p.isolated.proven), key=lambda place: -place.isolated.ratio)
    shown = [place for place in proof.places if not place.proven]
    findings = [_line(place.name, place.isolated) for place in made[:LISTED]]
    if len(made) > LISTED:
        findings.append(f"and {len(made) - LISTED} more places")
    if not made:
        findings = [_line(f"up to {place.name}", place.accumulated) for place in shown[:LISTED]]
    worst = proof.logits["ours"].worst[0]
    findings.append(
        f"logits: worst at position {worst.position} (input id {proof.ids[worst.position]}), vocabulary id "
        f"{worst.vocabulary_id}: torch {worst.reference:.6f}, Paddle {worst.found:.6f}; "
        f"same most likely token at {proof.logits['ours'].agreement:.1%}"
    )
    advice = "Compare with --level content whether values differ. If none does, the Paddle layer itself is at fault."
    return report("The two models do not compute the same (worst first):", findings, advice)


def _line(name: str, pair: Pair) -> str:
    drifts = f"drift {pair.ours.rms:.2g}, torch's own {pair.control.rms:.2g}"
    return f"{name}: {drifts} relative; {pair.ratio:.3g} times what float32 explains"
