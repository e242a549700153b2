"""Fused QKV and gate/up linears for inference, and split-K products of a single row (GEMV) on a CPU.

`state_dict` of a model shows the separate names (see pretrained.py), so a file never knows.
"""

import numpy as np
import paddle
from paddle import nn

from ..utils.errors import AquilaError
from . import cpu


def product(x, weight):
    """x [..., in] @ weight [in, out] -> [..., out]."""
    if not paddle.is_grad_enabled() and weight.place.is_cpu_place():
        return cpu.product(x, weight)
    return paddle.matmul(x, weight)


class FusedLinear(nn.Layer):
    """Bias-free projections of one input, stored side by side: one matrix product instead of several.

    Built from nn.Linear layers by name and split back into them; `state_dict` of a model shows the separate
    names (see pretrained.py), so a file never knows.
    """

    def __init__(self, parts: dict[str, nn.Linear]):
        super().__init__()
        self.names = list(parts)
        self.widths = [linear.weight.shape[1] for linear in parts.values()]
        first = next(iter(parts.values())).weight
        if len(parts) == 1:  # nothing to join: the weight itself
            self.weight = first
            return
        self.weight = self.create_parameter(
            [first.shape[0], sum(self.widths)], dtype=first.dtype, default_initializer=nn.initializer.Constant(0.0)
        )
        with paddle.no_grad():
            paddle.assign(paddle.concat([linear.weight for linear in parts.values()], axis=1), self.weight)
        self.weight.stop_gradient = first.stop_gradient

    def forward(self, x):
        """[..., in] -> one [..., width] per part, in order; a single part is returned as it is."""
        y = product(x, self.weight)
        return y if len(self.widths) == 1 else paddle.split(y, self.widths, axis=-1)

    def split_weight(self) -> dict:
        """The parts' weights [in, width] by name: views, they take no memory of their own."""
        ends = np.cumsum(self.widths).tolist()
        with paddle.no_grad():
            return {
                name: self.weight[:, end - width : end]
                for name, width, end in zip(self.names, self.widths, ends, strict=True)
            }


def fuse(layer: nn.Layer) -> None:
    """Replace the projections that layer.FUSABLE names ({fused: parts}) by one FusedLinear each, in place."""
    for fused, parts in layer.FUSABLE.items():
        if getattr(layer, fused) is None:
            _check_alike(type(layer).__name__, {name: getattr(layer, name) for name in parts})
            setattr(layer, fused, FusedLinear({name: getattr(layer, name) for name in parts}))
            for name in parts:
                delattr(layer, name)


def _check_alike(where: str, parts: dict[str, nn.Layer]) -> None:
    """Joined, parts share everything: refuse adapters, and parts of which some are trained and some are not."""
    others = [f"{name} is a {type(part).__name__}" for name, part in parts.items() if type(part) is not nn.Linear]
    if not others and len({(part.weight.dtype, part.weight.stop_gradient) for part in parts.values()}) > 1:
        others = [f"{name}: dtype {p.weight.dtype}, frozen {p.weight.stop_gradient}" for name, p in parts.items()]
    if others:
        raise AquilaError(
            f"The projections of {where} cannot be fused: {'; '.join(others)}. Merge and remove LoRA layers first, "
            "and freeze all parts or none."
        )


def unfuse(layer: nn.Layer) -> None:
    """The inverse of `fuse`."""
    for fused in layer.FUSABLE:
        joined = getattr(layer, fused)
        if joined is not None:
            for name, weight in joined.split_weight().items():
                linear = nn.Linear(*weight.shape, bias_attr=False)
                linear.to(dtype=weight.dtype)
                linear.weight.set_value(weight.detach())
                linear.weight.stop_gradient = joined.weight.stop_gradient
                setattr(layer, name, linear)
            delattr(layer, fused)
            setattr(layer, fused, None)
