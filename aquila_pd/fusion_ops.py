"""Each operation of the decoder as a plain and a fused twin of one signature, and the choice between them.

The plain twin is the definition. The fused one is taken only where a probe on the device at hand, forward and
backward, gives the plain twin's numbers; otherwise the reason is kept and `aquila-pd doctor` prints it. A model
asks once, when it is built (`select`), and a checkpoint looks the same whichever twin was chosen.

Letters in shapes: B batch, T query length, S key length, D hidden, N query heads, K key/value heads, H head size.
"""

import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import paddle
import paddle.nn.functional as F

from .ops import cpu
from .ops.attention_mask import Mask, PackedMask, causal_mask
from .ops.rope import Angles
from .utils.errors import only_in_the_package

QUERY_BLOCK = 256  # queries at a time in plain attention: its scores take N * 256 * S numbers, not N * T * S

# --------------------------------------------------------------------------------------------- the twins


def rms_norm(x, weight, eps: float):
    """x [..., D], weight [D] -> [..., D] in x's dtype.

    Aquila's order: variance, scaling and weight in fp32, one cast at the end. LLaMA casts before the weight,
    which changes about a quarter of all half-precision values by one unit in the last place.
    """
    h = x.astype("float32")
    # h * h and not pow(2): Paddle's CPU pow is seven times slower
    h = h * paddle.rsqrt((h * h).mean(axis=-1, keepdim=True) + eps)
    return (h * weight.astype("float32")).astype(x.dtype)


def fused_rms_norm(x, weight, eps: float):
    """`rms_norm` in one kernel."""
    from paddle.incubate.nn.functional import fused_rms_norm as kernel

    return kernel(x, weight, None, eps, begin_norm_axis=x.ndim - 1)[0]


def rope(q, k, angles: Angles):
    """Rotate q [B, T, N, H] and k [B, T, K, H], halves paired (i, i + H/2)."""
    cos, sin = angles.cast(q.dtype)  # half precision, or mixed: then the layer's input is fp32 and q is not
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _rotate_half(x):
    first, second = x.chunk(2, axis=-1)
    return paddle.concat([-second, first], axis=-1)


def fused_rope(q, k, angles: Angles):
    """`rope` in one kernel for each of q and k. The kernel wants one row of angles, so B and T become one axis."""
    from paddle.incubate.nn.functional import fused_rotary_position_embedding as kernel

    cos, sin = angles.cast(q.dtype)
    B, T, _, H = cos.shape
    flat_cos, flat_sin = cos.reshape([1, B * T, 1, H]), sin.reshape([1, B * T, 1, H])

    def rotate(x):
        flat = x.reshape([1, B * T, x.shape[2], H])
        rotated = kernel(flat, None, None, sin=flat_sin, cos=flat_cos, use_neox_rotary_style=False)[0]
        return rotated.reshape(x.shape)

    return rotate(q), rotate(k)


def swiglu(gate, up):
    """silu(gate) * up, both [..., ff]."""
    return F.silu(gate) * up


def fused_swiglu(gate, up):
    """`swiglu` in one kernel."""
    return F.swiglu(gate, up)


def attention(q, k, v, mask: Mask | None):
    """Grouped-query attention without repeating a key or value.

    q [B, T, N, H]; k, v [B, K, S, H], the cache's layout; mask: None when every query attends everywhere.
    Returns [B, T, N, H]. Softmax is in fp32.
    """
    T, allowed = q.shape[1], None if mask is None else mask.allowed
    if T <= QUERY_BLOCK:
        return attention_with_weights(q, k, v, allowed)[0]
    blocks = []
    for t in range(0, T, QUERY_BLOCK):
        some = slice(t, t + QUERY_BLOCK)
        rows = allowed if allowed is None or allowed.shape[2] == 1 else allowed[:, :, some]
        blocks.append(attention_with_weights(q[:, some], k, v, rows)[0])
    return paddle.concat(blocks, axis=1)


def attention_with_weights(q, k, v, mask):
    """`attention`, and the attention weights [B, N, T, S] beside it; mask: boolean [B or 1, 1, T or 1, S] or None."""
    B, T, N, H = q.shape
    K, S = k.shape[1], k.shape[2]
    G = N // K  # query heads that share a key head; they are neighbours
    q = q.reshape([B, T, K, G, H]).transpose([0, 2, 3, 1, 4])  # [B, K, G, T, H]
    scores = paddle.matmul(q.reshape([B, K, G * T, H]), k, transpose_y=True) * (H**-0.5)  # [B, K, G*T, S]
    scores = scores.reshape([B, N, T, S])
    scores = scores if scores.dtype == paddle.float64 else scores.astype("float32")  # float64: the probe asks
    # Paddle's CPU softmax makes ordinary numbers of NaN; this zero is NaN then, and is added to the result.
    zero = scores.detach().sum(axis=-1).reshape([B, K, G * T, 1]) * 0 if scores.place.is_cpu_place() else 0.0
    if mask is not None:
        # The lowest finite number and not -inf: a row with nothing to see gives a flat row, never NaN.
        scores = paddle.where(mask, scores, paddle.full([], paddle.finfo(paddle.float32).min, scores.dtype))
    weights = F.softmax(scores, axis=-1).astype(v.dtype)
    y = paddle.matmul(weights.reshape([B, K, G * T, S]), v) + zero  # [B, K, G*T, H]
    y = y.reshape([B, K, G, T, H]).transpose([0, 3, 1, 2, 4])  # [B, T, K, G, H]
    return y.reshape([B, T, N, H]), weights


def fused_attention(q, k, v, mask: Mask | None):
    """`attention` through Paddle's scaled_dot_product_attention (flash or memory-efficient kernels on a GPU)."""
    k, v = k.transpose([0, 2, 1, 3]), v.transpose([0, 2, 1, 3])  # [B, S, K, H]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.allowed)


def packed_attention(q, k, v, mask: PackedMask):
    """`attention` among the samples of packed rows: q [B, T, N, H]; k, v [B, K, T, H]. Returns [B, T, N, H].

    A block of queries meets only the keys that one of them may see, so what lies in other samples costs nothing.
    """
    blocks = []
    for first in range(0, q.shape[1], QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, q.shape[1])
        low, rows = mask.block(first, last)
        blocks.append(attention_with_weights(q[:, first:last], k[:, :, low:last], v[:, :, low:last], rows)[0])
    return blocks[0] if len(blocks) == 1 else paddle.concat(blocks, axis=1)


def fused_packed_attention(q, k, v, mask: PackedMask):
    """`packed_attention` through FlashMask, which knows for each key the row from which on it is hidden.

    The kernel exists in half precision only; float32 goes the plain way.
    """
    if q.dtype == paddle.float32:
        return packed_attention(q, k, v, mask)
    k, v = k.transpose([0, 2, 1, 3]), v.transpose([0, 2, 1, 3])  # [B, T, K, H]
    hidden_from = mask.ends.astype("int32").unsqueeze([1, 3])  # [B, 1, T, 1]
    return F.flashmask_attention(q, k, v, startend_row_indices=hidden_from, causal=True)


def packed_attention_on_cpu(q, k, v, mask: PackedMask):
    """`packed_attention` in training on a CPU; a converted folder's copy of the code has not got it."""
    with only_in_the_package("Fast training on a CPU"):
        from .ops import cpu_training
    return cpu_training.packed_attention(q, k, v, mask)


# ---------------------------------------------------------------------------------- choosing a twin


@dataclass(frozen=True)
class Ops:
    """The operations a model was built with."""

    rms_norm: Callable = rms_norm
    rope: Callable = rope
    swiglu: Callable = swiglu
    attention: Callable = attention
    packed_attention: Callable = packed_attention


@dataclass(frozen=True)
class Choice:
    """Which twin of an operation runs on this device, and why."""

    name: str
    chosen: str  # "plain" or "fused"
    reason: str


@dataclass(frozen=True)
class _Twins:
    name: str
    plain: Callable
    fused: Callable
    samples: Callable[[str], list[tuple]]  # dtype -> lists of arguments for the probe, each of another shape
    differentiated: int  # so many of the arguments get gradients
    equal_share: float = 0.0  # of half-precision values that must be the plain twin's to the last bit
    half_only: bool = False  # the kernel computes in half precision, so a device that does not has no use for it
    on_cpu: Callable | None = None  # what a CPU takes in place of `fused`
    no_backward_on: tuple[str, ...] = ()  # device types where the fused twin is for a model that only runs

    def on(self, device_type: str) -> "_Twins":
        """The twins as they are on this type of device."""
        if self.on_cpu is None or device_type != "cpu":
            return self
        return replace(self, fused=self.on_cpu, half_only=False)


def _rms_norm_samples(dtype: str) -> list[tuple]:
    return [(_random([3, 5, 96], dtype), _random([96], dtype), 1e-5)]


def _rope_samples(dtype: str) -> list[tuple]:
    angles = paddle.arange(2 * 5 * 16, dtype="float32").reshape([2, 5, 1, 16]) * 0.37
    angles = paddle.concat([angles, angles], axis=-1)
    angles = Angles(paddle.cos(angles), paddle.sin(angles))
    return [(_random([2, 5, 4, 32], dtype), _random([2, 5, 2, 32], dtype), angles)]


def _swiglu_samples(dtype: str) -> list[tuple]:
    return [(_random([3, 5, 96], dtype), _random([3, 5, 96], dtype))]


def _attention_samples(dtype: str) -> list[tuple]:
    """A padded prompt, a chunk over a cache, a single step; key lengths kernels like (multiples of 8) and not.
    Then without padding: a prompt, and a chunk over a cache with room to spare."""

    def sample(T: int, S: int, pads: int = 0, end: int | None = None) -> tuple:
        keep = paddle.arange(S).unsqueeze(0) >= paddle.to_tensor([[0], [pads]])
        mask = Mask(causal_mask(keep, T)) if end is None else Mask.of_chunk(T, end, S)
        return _random([2, T, 4, 32], dtype), _random([2, 2, S, 32], dtype), _random([2, 2, S, 32], dtype), mask

    step = sample(1, 16)
    padded = [sample(5, 5, 2), sample(8, 8, 3), sample(3, 16, 4), step, (*step[:3], None)]
    return [*padded, sample(8, 8, end=8), sample(3, 16, end=13)]


def _packed_samples(dtype: str) -> list[tuple]:
    """Samples of several lengths, one token long too, a row that is one sample, and padding; on a GPU in heads of the
    size that models have, since kernels are written for it."""
    D = 32 if paddle.device.get_device() == "cpu" else 128
    lengths = ((1, 24), (2, 1), (3, 40), (4, 16), (0, 47))
    segments = [[segment for segment, length in lengths for _ in range(length)], [1] * 128]
    q, k, v = _random([2, 128, 4, D], dtype), _random([2, 2, 128, D], dtype), _random([2, 2, 128, D], dtype)
    return [(q, k, v, PackedMask(paddle.to_tensor(segments)))]


def _random(shape: list[int], dtype: str):
    # Drawn by hand: a probe must not disturb the generator a user has seeded.
    values = np.sin(np.arange(np.prod(shape), dtype=np.float32) * 12.9898) * 1.7
    return paddle.to_tensor(values.astype(np.float32).reshape(shape)).astype(dtype)


TWINS = (
    # LLaMA's order of rounding would differ in a quarter of all values and still be close
    _Twins(
        "rms_norm",
        rms_norm,
        fused_rms_norm,
        _rms_norm_samples,
        differentiated=2,
        equal_share=0.98,
        on_cpu=cpu.rms_norm,
    ),
    _Twins("rope", rope, fused_rope, _rope_samples, differentiated=2, on_cpu=cpu.rope),
    _Twins(
        "swiglu",
        swiglu,
        fused_swiglu,
        _swiglu_samples,
        differentiated=2,
        on_cpu=cpu.swiglu,
    ),
    _Twins(
        "attention",
        attention,
        fused_attention,
        _attention_samples,
        differentiated=3,
        on_cpu=cpu.attention,
        no_backward_on=("cpu",),
    ),
    _Twins(
        "packed_attention",
        packed_attention,
        fused_packed_attention,
        _packed_samples,
        differentiated=3,
        half_only=True,
        on_cpu=packed_attention_on_cpu,
    ),
)
PROJECTIONS = Choice("projections", "plain", "model.fuse_projections() joins q/k/v and gate/up in a running model")

_mode = "auto"
_chosen: dict[str, tuple[Ops, list[Choice]]] = {}


def select() -> Ops:
    """The operations for models built on the current device."""
    return _select()[0]


def choices() -> list[Choice]:
    """The choice of `select` for the current device, with the reasons."""
    return [*_select()[1], PROJECTIONS]


@contextmanager
def using(mode: str):
    """Models built inside use the "plain" twins, the "fused" ones without asking the probe, or "auto"."""
    if mode not in ("auto", "plain", "fused"):
        raise ValueError(f'fusion mode {mode!r} is none of "auto", "plain" and "fused".')
    global _mode
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def _select() -> tuple[Ops, list[Choice]]:
    device = paddle.device.get_device()
    key = f"{_mode}@{device}"
    if key not in _chosen:
        here = [twins.on(device.split(":")[0]) for twins in TWINS]
        made = [_choose(twins, device) for twins in here]
        functions = {twins.name: _function(twins, choice, device) for twins, choice in zip(here, made, strict=True)}
        _chosen[key] = Ops(**functions), made
    return _chosen[key]


def _function(twins: _Twins, choice: Choice, device: str) -> Callable:
    if choice.chosen == "plain":
        return twins.plain
    if device.split(":")[0] not in twins.no_backward_on:
        return twins.fused

    def fused_unless_differentiated(*arguments):
        return (twins.plain if paddle.is_grad_enabled() else twins.fused)(*arguments)

    return fused_unless_differentiated


def _choose(twins: _Twins, device: str) -> Choice:
    if _mode != "auto":
        return Choice(twins.name, _mode, "asked for")
    device_type = device.split(":")[0]
    backward = device_type not in twins.no_backward_on
    # One verdict for all dtypes, since a model may compute in several (mixed precision).
    probed = []
    for dtype in ("float32", "bfloat16", "float16"):
        if dtype != "float32" and not _computes(twins, dtype):
            continue
        if dtype == "float32" and twins.half_only:
            continue
        probed.append(dtype)
        problem = _probe(twins, dtype, backward=backward)
        if problem:
            return Choice(twins.name, "plain", f"{device}, {dtype}: {problem}")
    if not probed:
        return Choice(twins.name, "plain", f"{device}: its kernel computes in half precision only, the device does not")
    what = "forward and backward equal" if backward else "for a model that only runs: equals"
    return Choice(twins.name, "fused", f"{device}: {what} the plain twin in {', '.join(probed)}")


def _computes(twins: _Twins, dtype: str) -> bool:
    """Whether this device computes in this dtype at all: Paddle's CPU does not in half precision."""
    try:
        with _native_stderr_closed():
            # RMSNorm computes in fp32 inside, so it runs anywhere; the decoder around it does not
            paddle.matmul(_random([2, 2], dtype), _random([2, 2], dtype))
            _run(twins, twins.plain, twins.samples(dtype)[0])
    except Exception:  # whatever a missing kernel raises
        return False
    return True


# A unit in the last place, relative to the largest value of a tensor.
_UNIT = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def _probe(twins: _Twins, dtype: str, *, backward: bool = True) -> str | None:
    """The fault of the fused twin on this device, or None. backward: whether it must have gradients.

    Both twins are held against the plain one in float64 on the same inputs; the fused one may be four times as far from
    it as the plain one, and a few units of rounding: kernels round at other places, and often less.
    """
    for sample in twins.samples(dtype):
        exact = _run(twins, twins.plain, _as_float64(sample), backward)
        plain = _run(twins, twins.plain, sample, backward)
        try:
            with _native_stderr_closed():
                fused = _run(twins, twins.fused, sample, backward)
        except Exception as error:  # any failure of a foreign kernel means: do not use it; the reason is kept
            return f"the fused kernel fails ({_first_line(error)})"
        outputs = len(exact) - (twins.differentiated if backward else 0)
        for i, (right, a, b) in enumerate(zip(exact, plain, fused, strict=True)):
            what = "values" if i < outputs else "gradients"
            allowed = 4 * _distance(a, right) + 8 * _UNIT[dtype] * float(right.abs().max())
            if not _distance(b, right) <= allowed:  # also true for NaN
                return f"its {what} are off by {_distance(b, right):.1e} ({allowed:.1e} allowed)"
            equal = float((a == b).astype("float32").mean())
            if dtype != "float32" and i < outputs and equal < twins.equal_share:
                return f"only {equal:.0%} of its values are the plain twin's: it rounds in another order"
    return None


def _distance(a, b) -> float:
    return float((a.astype("float64") - b.astype("float64")).abs().max())


def _as_float64(arguments: tuple) -> tuple:
    return tuple(a.astype("float64") if _floating(a) else a for a in arguments)


def _floating(argument) -> bool:
    return isinstance(argument, paddle.Tensor) and argument.is_floating_point()


def _run(twins: _Twins, function: Callable, arguments: tuple, backward: bool = True) -> list:
    """Outputs of the function, then the gradients of its first arguments for a fixed upstream gradient."""
    arguments = tuple(a.detach() if isinstance(a, paddle.Tensor) else a for a in arguments)
    if not backward:
        with paddle.no_grad():
            outputs = function(*arguments)
        return list(outputs) if isinstance(outputs, tuple) else [outputs]
    with paddle.enable_grad():
        wanted = list(arguments[: twins.differentiated])
        for tensor in wanted:
            tensor.stop_gradient = False
        outputs = function(*arguments)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        upstream = [_random(y.shape, "float32").astype(y.dtype) for y in outputs]
        return outputs + list(paddle.grad(outputs, wanted, upstream))


@contextmanager
def _native_stderr_closed():
    """Paddle's C++ side writes a warning for a missing kernel; the probe expects one and keeps the reason itself."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = next((line for line in lines if "Error" in line or "not registered" in line), lines[0] if lines else "")
    return (telling or type(error).__name__).removeprefix("(NotFound) ")[:160].rstrip(".")
