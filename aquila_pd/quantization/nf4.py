"""NF4Linear: a frozen linear with NF4 weights, as a plain Paddle layer without custom kernels.

The weight is unpacked in strips when it is needed, in the dtype of the input, and again in the backward pass: neither
direction holds more of it than one strip, and nothing is kept between the two. The codec is formats/nf4.py.

34B: the projections take 17 GB in place of 66 in bfloat16; embeddings, head and norms stay as they are.
"""

from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.autograd import PyLayer

from ..formats.nf4 import BLOCK, LEVELS, NESTED_BLOCK, NF4, nested_levels, strip_height
from ..utils.errors import AquilaError
from .encode import quantize
from .projections import ALL, PROJECTIONS, Place, find_projections

STRIP = 2**24  # values unpacked at once: 64 MB of float32, and as much again while it is made
BUFFERS = ("codes", "absmax", "nested", "offset")


class NF4Linear(nn.Layer):
    """x @ W without bias, W [in, out] frozen in NF4 with double quantization.

    codes uint8 [ceil(out * in / 2)], absmax uint8 [blocks], nested float32 [blocks of blocks], offset float32 [1]:
    buffers under these names in the state dict. They follow from the weight, so that a checkpoint may leave them out.
    shape: (in, out). dtype: what the weight was stored in, and what to_linear() gives back.
    """

    cannot_save = (
        "weights in NF4, of which the full ones cannot be made again: save the adapter alone, or call "
        "dequantize_model() if the rounded weights are meant"
    )

    def __init__(self, packed: NF4, dtype: str):
        super().__init__()
        self.shape, self.dtype = (packed.shape[1], packed.shape[0]), dtype
        for name in BUFFERS:
            self.register_buffer(name, paddle.to_tensor(np.atleast_1d(getattr(packed, name))))

    @classmethod
    def from_linear(cls, linear: nn.Linear, name: str) -> "NF4Linear":
        """The layer of a plain one's weight. Raises AquilaError for a layer with a bias."""
        if linear.bias is not None:
            raise AquilaError(f"{name} has a bias, which no projection of this family has; NF4Linear knows none.")
        return cls(quantize(as_array(linear.weight).T, name), dtype_name(linear.weight.dtype))

    def forward(self, x):
        """x [..., in] -> [..., out]."""
        return _Product.apply(x, self)

    def strips(self, dtype) -> Iterator[tuple[slice, paddle.Tensor]]:
        """The weight in torch's layout, some outputs at a time: (which, [outputs, in] in dtype)."""
        in_, out = self.shape
        absmax = self._magnitudes()
        height = strip_height(in_, STRIP)
        for begin in range(0, out, height):
            which = slice(begin, min(begin + height, out))
            yield which, self._unpack(which, absmax).astype(dtype)

    def _magnitudes(self):
        """The largest magnitude of each block, float32 [blocks]."""
        levels = _constant("levels", self.codes.place)
        factors = self.nested.repeat_interleave(NESTED_BLOCK)[: len(self.absmax)]
        return levels[self.absmax.astype("int32")] * factors + self.offset

    def _unpack(self, which: slice, absmax):
        """Some rows of the weight in torch's layout, float32 [rows, in]; they begin with a block."""
        rows, in_ = which.stop - which.start, self.shape[0]
        first, blocks = which.start * in_ // BLOCK, -(-rows * in_ // BLOCK)
        codes = self.codes[first * BLOCK // 2 : (first + blocks) * BLOCK // 2]
        lacking = blocks * BLOCK // 2 - len(codes)  # a last block may be short
        if lacking:
            codes = paddle.concat([codes, paddle.zeros([lacking], "uint8")])
        values = F.embedding(codes.astype("int32"), _constant("pairs", codes.place))  # [bytes, 2]
        values = values.reshape([blocks, BLOCK]) * absmax[first : first + blocks].unsqueeze(-1)
        return values.reshape([-1])[: rows * in_].reshape([rows, in_])

    @paddle.no_grad()
    def dense_weight(self):
        """The whole weight unpacked, float32 [in, out]."""
        return paddle.concat([strip for _, strip in self.strips("float32")]).T

    def to_linear(self, values: np.ndarray | None = None) -> nn.Linear:
        """A frozen plain layer in the dtype the weight was stored in; values: [in, out] in place of its own."""
        weight = self.dense_weight() if values is None else paddle.to_tensor(values)
        linear = nn.Linear(1, 1, bias_attr=False)
        linear.weight = linear.create_parameter(
            list(self.shape), dtype=self.dtype, default_initializer=nn.initializer.Assign(weight.astype(self.dtype))
        )
        linear.weight.stop_gradient = True
        linear.training = self.training
        return linear

    def _apply(self, func, device, dtype, blocking, include_sublayers=True):
        # Paddle's to(dtype=...) and amp.decorate() would cast the codes; only the place may change
        super()._apply(func, device, None, blocking, include_sublayers)

    def extra_repr(self) -> str:
        return f"in={self.shape[0]}, out={self.shape[1]}, stored as {self.dtype}"


class _Product(PyLayer):
    """x @ W of an NF4Linear, and the gradient of x. W is constant, so nothing has to be kept for it."""

    @staticmethod
    def forward(ctx, x, layer: NF4Linear):
        ctx.layer, ctx.dtype = layer, x.dtype
        return paddle.concat([paddle.matmul(x, w, transpose_y=True) for _, w in layer.strips(x.dtype)], axis=-1)

    @staticmethod
    def backward(ctx, gradient):
        total = None
        for which, w in ctx.layer.strips(gradient.dtype):
            part = paddle.matmul(gradient[..., which], w)
            total = part if total is None else total + part
        return total.astype(ctx.dtype)  # mixed precision: the product may have been taken in half


_made: dict[tuple[str, str], paddle.Tensor] = {}


def _constant(name: str, place) -> paddle.Tensor:
    """ "levels" of magnitudes [256], or "pairs" of values by byte [256, 2], where the codes lie."""
    key = name, str(place)
    if key not in _made:
        pairs = np.stack([np.repeat(LEVELS, len(LEVELS)), np.tile(LEVELS, len(LEVELS))], axis=1)
        _made[key] = paddle.to_tensor(nested_levels() if name == "levels" else pairs, place=place)
    return _made[key]


def as_array(tensor) -> np.ndarray:
    """A Paddle tensor in numpy, bfloat16 as ml_dtypes has it."""
    array = tensor.detach().cpu().numpy()
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array


def dtype_name(dtype) -> str:
    """ "bfloat16" of paddle.bfloat16."""
    return str(dtype).removeprefix("paddle.")


# ------------------------------------------------------------------------------------------------ whole models


def quantize_model(model: nn.Layer, targets: Iterable[str] | str = ALL) -> list[str]:
    """Pack the named projections of a loaded model, one after the other; return their names in it.

    The memory of each full weight is free before the next is packed. The same weights give the same codes on every
    machine. Raises ConfigError for unknown names; AquilaError for a model with fused projections or with adapters,
    which come after; CheckpointError for weights with NaN or infinite values.
    """
    places = [place for place in find_projections(model, targets) if not isinstance(place.layer, NF4Linear)]
    others = next((place for place in places if type(place.layer) is not nn.Linear), None)
    if others is not None:
        raise AquilaError(
            f"{others.name} is a {type(others.layer).__name__}: pack the weights first, then put adapters on."
        )
    names = [place.name for place in places]
    while places:  # nothing may hold a place that is done, nor its weight with it
        place = places.pop(0)
        place.put(NF4Linear.from_linear(place.layer, place.name))
    return names


def dequantize_model(model: nn.Layer) -> list[str]:
    """Give every packed projection of a model a full weight again, with the values it computed with."""
    parents = dict(model.named_sublayers(include_self=True))
    names = [name for name, layer in parents.items() if isinstance(layer, NF4Linear)]
    for name in names:
        layer = parents.pop(name)
        Place(name, parents[name.rpartition(".")[0]], layer).put(layer.to_linear())
    return names


def packed_targets(model: nn.Layer) -> tuple[str, ...]:
    """Which projections of a model are packed, by their last name, in the weight table's order."""
    names = {name.removesuffix(".base") for name, layer in model.named_sublayers() if isinstance(layer, NF4Linear)}
    ends = {name.rpartition(".")[2] for name in names}
    return tuple(name for name in PROJECTIONS if name in ends)
