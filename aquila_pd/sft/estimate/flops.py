"""Training FLOPs per token, for MFU and for run time. No framework."""

from collections.abc import Iterable
from dataclasses import dataclass

from ...architecture import weight_map
from ...architecture.weight_map import Dims
from ..recipe.load import LoraSpec, Stage


def projections(dims: Dims, targets: Iterable[str] | None = None) -> list[tuple[int, int]]:
    """(out, in) of the linear layers of one decoder layer; targets: only those with these names."""
    rows = [row for row in weight_map.LAYER if row.transpose]
    chosen = [row for row in rows if targets is None or row.hf.split(".")[-2] in targets]
    return [tuple(getattr(dims, name) for name in row.shape) for row in chosen]


def parameters(dims: Dims) -> int:
    """All weights of the model."""
    return sum(_size(weight.hf_shape) for weight in weight_map.weights(dims))


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def adapter_parameters(dims: Dims, lora: LoraSpec) -> int:
    """Weights of the adapters: r * (in + out) for each target, with DoRA a magnitude for each output."""
    each = (lora.r * (out + in_) + (out if lora.dora else 0) for out, in_ in projections(dims, lora.targets))
    return dims.layers * sum(each)


def trained_parameters(dims: Dims, stage: Stage) -> int:
    """Weights that a stage changes."""
    return parameters(dims) if stage.method == "full" else adapter_parameters(dims, stage.lora)


@dataclass(frozen=True)
class Work:
    """FLOPs of one real token.

    needed: forward and backward as mathematics asks for. again: what recompute does a second time.
    """

    needed: float
    again: float

    @property
    def done(self) -> float:
        return self.needed + self.again


def work(dims: Dims, stage: Stage, *, keys: float, labels: float) -> Work:
    """The arithmetic of a token in training.

    keys: how many places a token attends to, in the mean: (n + 1) / 2 for samples of n tokens. labels: the share of
    tokens with a label; the head is computed for those alone.

        forward           2 a weight used, and 4 * q * keys in each layer for scores and values
        backward          the same again for gradients of activations (twice for attention, which has two inputs a side)
        weight gradients  2 a weight that is trained: none for what is frozen under adapters

    So 6 a weight when all are trained, 4 when nearly none is.
    """
    layer = 2 * sum(out * in_ for out, in_ in projections(dims))
    scores = 4 * dims.q * keys
    head = 2 * dims.vocab * dims.d * labels
    adapters = 0 if stage.method == "full" else 2 * adapter_parameters(dims, stage.lora)
    linear = dims.layers * layer + head
    forward = linear + adapters + dims.layers * scores
    backward = linear + adapters + 2 * dims.layers * scores
    of_weights = linear if stage.method == "full" else adapters
    again = dims.layers * (layer + scores) + adapters + head if stage.recompute else 0.0
    return Work(forward + backward + of_weights, again)
