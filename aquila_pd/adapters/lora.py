"""LoRA, rsLoRA and DoRA layers on the projections of a decoder: attach, read, fill, merge.

Why not paddlenlp.peft: its LoRAModel wraps a list of layer classes, among them no plain Paddle layer of NF4 weights,
so QLoRA runs on its CUDA kernels only; after merging it leaves the adapter's parameters in the state dict; and it has
no DoRA. Ours is held to the numbers of peft, torch's library, forward, backward and over steps of training.

Files are in adapters/peft_files.py. Letters in shapes: r rank, in and out the sizes of a projection.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..formats.safetensors import read_layout, view
from ..model.weights_io import name_in
from ..quantization.projections import ALL, Place, find_projections
from ..utils.errors import AquilaError, CheckpointError, report
from .lora_math import merge_weight, scaling_of

if TYPE_CHECKING:
    from .spec import LoraSpec

PARAMETERS = ("lora_A", "lora_B", "magnitude")


class LoRALinear(nn.Layer):
    """A frozen projection and its adapter: base(x) + scaling * dropout(x) @ lora_A @ lora_B.

    lora_A [in, r] and lora_B [r, out] are float32 also beside a half-precision base, as small steps would be lost in
    half; they compute in the input's dtype. DoRA adds magnitude [out]: each output column of base + adapter keeps its
    direction and takes this length, and its own length counts as constant in the gradient, as in the paper.

    A plain weight keeps its name, `...q_proj.weight`, so that base weights load and save under their table names.
    """

    cannot_save = "adapters that are not merged: merge() them into the weights first, or save the adapter alone"

    def __init__(self, base: nn.Layer, spec: "LoraSpec"):
        super().__init__()
        self.r, self.scaling, self.rate = spec.r, scaling_of(spec), spec.dropout
        if isinstance(base, nn.Linear):
            self.weight, self.bias = base.weight, base.bias
            self.__dict__["base"] = base  # not a sublayer, which would put "base." into the weight's name
        else:
            self.base = base
        in_, out = base.weight.shape if isinstance(base, nn.Linear) else base.shape
        bound = 1 / math.sqrt(in_)  # Kaiming's uniform for a = sqrt(5), the default of torch's Linear and of peft
        self.lora_A = self._parameter(paddle.uniform([in_, spec.r], "float32", min=-bound, max=bound))
        self.lora_B = self._parameter(paddle.zeros([spec.r, out], "float32"))
        self.magnitude = None
        if spec.dora:
            squares = (dense_weight(base) ** 2).sum(axis=0)  # [out]
            self.register_buffer("squares", squares, persistable=False)  # follows from the base
            self.magnitude = self._parameter(squares.sqrt())

    def _parameter(self, value):
        assign = nn.initializer.Assign(value)
        return self.create_parameter(value.shape, dtype="float32", default_initializer=assign)

    def forward(self, x):
        """x [..., in] -> [..., out]."""
        y = self.base(x)
        dropped = F.dropout(x, self.rate, training=self.training) if self.rate else x
        A, B = self.lora_A.astype(x.dtype), self.lora_B.astype(x.dtype)
        update = paddle.matmul(paddle.matmul(dropped, A), B) * self.scaling
        if self.magnitude is None:
            return y + update
        stretch = (self.magnitude / self._lengths()).astype(y.dtype)  # [out]
        if self.rate and self.training:  # peft's way: what is dropped is dropped for the difference to the base only
            return y + (stretch - 1) * self.base(dropped) + stretch * update
        return stretch * (y + update)

    @paddle.no_grad()
    def _lengths(self):
        """Lengths of the columns of W + s A B, [out], without making that matrix: three terms of the square."""
        A, B = self.lora_A, self.lora_B
        of_base = self.base(A.T.astype(self._base_dtype())).astype("float32")  # A^T W [r, out]
        mixed = (of_base * B).sum(axis=0) * (2 * self.scaling)
        own = (paddle.matmul(paddle.matmul(A, A, transpose_x=True), B) * B).sum(axis=0) * self.scaling**2
        return (self.squares + mixed + own).sqrt()

    def _base_dtype(self):
        return self.weight.dtype if isinstance(self.base, nn.Linear) else paddle.float32

    def extra_repr(self) -> str:
        kind = "DoRA" if self.magnitude is not None else "LoRA"
        return f"{kind}, r={self.r}, scaling={self.scaling:g}, dropout={self.rate:g}"


def dense_weight(layer: nn.Layer):
    """The weight of a linear layer as one float32 tensor [in, out]; what is packed is unpacked."""
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.dense_weight()
    return weight.detach().astype("float32")


# ------------------------------------------------------------------------------------------------ putting on


def attach(model: nn.Layer, spec: "LoraSpec") -> list[str]:
    """Put an adapter on every projection that spec.targets names, and freeze everything else; return their names.

    The model must have its weights: DoRA's magnitudes begin as the lengths of their columns. lora_A is drawn from
    Paddle's seeded generator in model order, lora_B is zero, so that nothing changes before the first step.
    Raises AquilaError for a model with fused projections or with adapters.
    """
    places = find_projections(model, spec.targets)
    _check_bases(places)
    for parameter in model.parameters():
        parameter.stop_gradient = True
    for place in places:
        place.put(_adapted(place.layer, spec))
    return [place.name for place in places]


def _check_bases(places: list[Place]) -> None:
    if any(isinstance(place.layer, LoRALinear) for place in places):
        raise AquilaError("The model has adapters already. Merge them first, or load the base model again.")
    others = [
        f"{place.name} is a {type(place.layer).__name__}"
        for place in places
        if not (isinstance(place.layer, nn.Linear) or hasattr(place.layer, "dense_weight"))
    ]
    if others:
        advice = "An adapter goes on paddle.nn.Linear or NF4Linear."
        raise AquilaError(report("Adapters cannot be put on these layers:", others, advice))


def _adapted(layer: nn.Layer, spec: "LoraSpec") -> LoRALinear:
    adapted = LoRALinear(layer, spec)
    adapted.training = layer.training
    return adapted


def adapted_layers(model: nn.Layer) -> dict[str, LoRALinear]:
    """The layers with adapters by their name, in model order."""
    return {name: layer for name, layer in model.named_sublayers() if isinstance(layer, LoRALinear)}


# ------------------------------------------------------------------------------------------------ values


def adapter_state(model: nn.Layer) -> dict[str, paddle.Tensor]:
    """The adapters' parameters by name, such as `aquila.layers.0.self_attn.q_proj.lora_A`: themselves, no copies."""
    return {
        f"{name}.{kind}": getattr(layer, kind)
        for name, layer in adapted_layers(model).items()
        for kind in PARAMETERS
        if getattr(layer, kind) is not None
    }


def load_adapter_state(model: nn.Layer, state: Mapping) -> None:
    """Fill the adapters of a model from tensors or arrays under the names of adapter_state().

    Raises CheckpointError with every missing, unexpected and misshapen one before anything is changed.
    """
    own = adapter_state(model)
    findings = [f"missing     {name}" for name in own if name not in state]
    findings += [f"unexpected  {name} {list(state[name].shape)}" for name in state if name not in own]
    findings += [
        f"shape       {name}: given {list(state[name].shape)}, the model has {parameter.shape}"
        for name, parameter in own.items()
        if name in state and list(state[name].shape) != parameter.shape
    ]
    if findings:
        advice = "Nothing was loaded. Attach adapters with the rank and the targets this adapter was made with."
        raise CheckpointError(report("The adapter does not fit the adapters of the model:", findings, advice))
    for name, parameter in own.items():
        value = state[name]
        value = value.astype("float32").numpy() if isinstance(value, paddle.Tensor) else np.float32(value)
        parameter.set_value(value)


# ------------------------------------------------------------------------------------------------ merging


def merge(model: nn.Layer, *, onto: Path | str | None = None) -> list[str]:
    """Put the adapters into the weights: afterwards the model is a plain one again; return the names of those layers.

    Computed in float32 and rounded once to the weight's dtype. Packed weights, also of layers without an adapter,
    become full ones: with the values they had while the adapter was trained, which is the function that was trained,
    or with those of the base model's folder `onto`. Everything stays frozen.
    Raises AquilaError for a model without adapters, CheckpointError for a folder that lacks a weight.
    """
    if not adapted_layers(model):
        raise AquilaError("The model has no adapters to merge.")
    places = [place for place in find_projections(model, ALL) if type(place.layer) is not nn.Linear]
    stored = {} if onto is None else _stored_weights(model, Path(onto), places)
    merged = [place.name for place in places if isinstance(place.layer, LoRALinear)]
    while places:  # nothing may hold a packed weight that has become a full one
        place = places.pop(0)
        place.put(_plain(place.layer, stored.get(place.name)))
    return merged


def _plain(layer: nn.Layer, stored: np.ndarray | None) -> nn.Linear:
    """The plain layer of a layer with an adapter, or of a packed one; stored: the weight to use in its place."""
    base = layer.base if isinstance(layer, LoRALinear) else layer
    values = dense_weight(base).numpy() if stored is None else np.float32(stored)
    if isinstance(layer, LoRALinear):
        magnitude = None if layer.magnitude is None else layer.magnitude.numpy()
        values = merge_weight(values, layer.lora_A.numpy(), layer.lora_B.numpy(), layer.scaling, magnitude)
    if not isinstance(base, nn.Linear):
        return base.to_linear(values)
    base.weight.set_value(paddle.to_tensor(values).astype(base.weight.dtype))
    return base


def _stored_weights(model: nn.Layer, folder: Path, places: list[Place]) -> dict[str, np.ndarray]:
    """Name of each packed projection -> its weight [in, out] in the folder, mapped from the file."""
    packed = [place for place in places if not isinstance(getattr(place.layer, "base", place.layer), nn.Linear)]
    files = {name_in(model, name): info for name, info in read_layout(folder).items()}
    shapes = {name: list(info.shape) for name, info in files.items()}
    wanted = {f"{p.name}.weight": list(getattr(p.layer, "base", p.layer).shape) for p in packed}
    findings = [
        f"{name}: wanted {shape}, found {shapes.get(name, 'none')}"
        for name, shape in wanted.items()
        if shapes.get(name) != shape
    ]
    if findings:
        advice = "Nothing was merged. Give the folder of the model that was packed."
        raise CheckpointError(
            report(f"{folder} does not hold the weights the adapter is merged into:", findings, advice)
        )
    return {place.name: view(files[f"{place.name}.weight"]) for place in packed}
