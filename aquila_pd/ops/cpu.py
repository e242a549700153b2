"""The decoder's operations in forms that Paddle's CPU kernels run fast; their plain twins are in fusion_ops.py.

What they avoid, with the time of it beside that of what is done instead (benchmarks/RESULTS.md):
- Broadcasting along an axis that is not the last: 5 ns a number, against 0.1 ns for two tensors of one shape.
- `where`, and reading slices that are not contiguous: 1 to 5 ns a number.
- New memory for each result: operations in place, and runtime/malloc.py for the rest.
- A second thread for small products, and one thread for the product of one row with a large matrix.

A step of decoding does hundreds of operations on a single row, most of them done sooner than the functions of paddle.*
have looked at their arguments: `_C_ops` are the operations themselves.

Letters in shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head size.
"""

import math
from functools import cache, lru_cache

import numpy as np
import paddle
from paddle import _C_ops
from paddle.autograd import PyLayer
from paddle.incubate.nn.functional import fused_rms_norm

from ..runtime import mkl
from . import threads
from .attention_mask import Mask
from .rope import Angles

SCORES = 1 << 20  # attention scores at a time: they stay in the cache while they become weights
FEW, LARGE = 8, 1 << 22  # rows, and numbers of a weight: measured in benchmarks/RESULTS.md
SMALL = 1 << 18  # numbers: what is done with fewer is done before a second thread is awake
# Paddle's kernel of RMSNorm for CPUs is compiled for AVX-512 and does not ask: without it the process dies (SIGILL).
HAS_KERNEL = mkl.has_avx512()


def rms_norm(x, weight, eps: float):
    """`fusion_ops.rms_norm` in Paddle's kernel where the processor can run it, with a gradient by hand: the kernel has
    none on a CPU."""
    if paddle.is_grad_enabled() and not (x.stop_gradient and weight.stop_gradient):
        return _RMSNorm.apply(x, weight, eps)
    return _normed(x, weight, eps)


def _normed(x, weight, eps: float):
    size = math.prod(x.shape)
    if not HAS_KERNEL and size == weight.shape[0]:  # one row has one number r, and scaling by a number is no broadcast
        r = _C_ops.rsqrt_(_C_ops.scale_(_C_ops.squared_l2_norm(x), 1 / size, eps, True))
        return _C_ops.scale_(_C_ops.multiply(x, weight), r, 0.0, True)
    if size > SMALL:
        return _rows_normed(x, weight, eps)
    with threads.one():
        return _rows_normed(x, weight, eps)


def _rows_normed(x, weight, eps: float):
    if HAS_KERNEL:
        return fused_rms_norm(x, weight, None, eps, begin_norm_axis=x.ndim - 1)[0]
    rows = _C_ops.reshape(x, [-1, weight.shape[0]])
    scale = _C_ops.matmul(_per_row(rows, eps), _C_ops.reshape(weight, [1, -1]), False, False)  # r w
    return _C_ops.reshape(_C_ops.multiply_(scale, rows), x.shape)


def _per_row(rows, eps: float):
    """r = (mean(x^2) + eps)^-1/2 of each row: [R, D] -> [R, 1]."""
    D = rows.shape[1]
    squares = _C_ops.matmul(_C_ops.multiply(rows, rows), _ones(D, rows.dtype), False, False)
    return _C_ops.rsqrt_(_C_ops.scale_(squares, 1 / D, eps, True))


class _RMSNorm(PyLayer):
    """y = r x w with r = (mean(x^2) + eps)^-1/2 of each row; only x is kept for the backward pass.

    dw = sum over rows of r x dy; dx = r w dy - r^3 x mean(x w dy). A number for each row and one for each column, as in
    r w, are multiplied first: a product of rank one takes less time than a broadcast.
    """

    @staticmethod
    def forward(ctx, x, weight, eps: float):
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.wanted = eps, (not x.stop_gradient, not weight.stop_gradient)
        return _normed(x, weight, eps)

    @staticmethod
    def backward(ctx, upstream):
        x, weight = ctx.saved_tensor()
        D = weight.shape[0]
        rows, dy, w = _C_ops.reshape(x, [-1, D]), _C_ops.reshape(upstream, [-1, D]), _C_ops.reshape(weight, [1, D])
        r = _per_row(rows, ctx.eps)
        x_dy = _C_ops.multiply(rows, dy)
        dw = dx = None
        if ctx.wanted[1]:
            dw = _C_ops.reshape(_C_ops.matmul(r, x_dy, True, False), [D])
        if ctx.wanted[0]:
            sums = _C_ops.matmul(x_dy, w, False, True)
            less = _C_ops.scale_(_C_ops.multiply_(sums, r * r * r), 1 / D, 0.0, True)  # [R, 1]
            dx = _C_ops.multiply_(_C_ops.matmul(r, w, False, False), dy)
            dx = _C_ops.subtract_(dx, _C_ops.multiply_(_C_ops.matmul(less, _ones(D), False, True), rows))
            dx = _C_ops.reshape(dx, x.shape)
        return dx, dw


def rope(q, k, angles: Angles):
    """`fusion_ops.rope` in products of equal shapes; halves change places as whole rows of a gather."""
    return _turn(q, angles), _turn(k, angles)


def _turn(x, angles: Angles):
    if x.stop_gradient or not paddle.is_grad_enabled():
        return _rotated(x, *angles.wide(x.shape[2]))
    return _Turn.apply(x, angles)


def _rotated(x, cos, sin, halves, sign: float = 1.0):
    swapped = _C_ops.gather(_C_ops.reshape(x, [-1, x.shape[3] // 2]), halves, 0)
    swapped = _C_ops.multiply_(_C_ops.reshape(swapped, x.shape), sin)
    y = _C_ops.multiply(x, cos)
    return _C_ops.add_(y, swapped) if sign > 0 else _C_ops.subtract_(y, swapped)


class _Turn(PyLayer):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx, x, angles: Angles):
        ctx.angles = angles
        return _rotated(x, *angles.wide(x.shape[2]))

    @staticmethod
    def backward(ctx, upstream):
        return _rotated(upstream, *ctx.angles.wide(upstream.shape[2]), sign=-1.0)


def swiglu(gate, up):
    """`fusion_ops.swiglu`, also backward in products of whole tensors: both passes take 0.6 of the time that they take
    with Paddle's gradient of a product (benchmarks/RESULTS.md)."""
    if paddle.is_grad_enabled() and not (gate.stop_gradient and up.stop_gradient):
        return _SwiGLU.apply(gate, up)
    return _C_ops.multiply_(_C_ops.silu(gate), up)


class _SwiGLU(PyLayer):
    @staticmethod
    def forward(ctx, gate, up):
        silu = _C_ops.silu(gate)
        ctx.save_for_backward(gate, up, silu)
        ctx.wanted = not gate.stop_gradient, not up.stop_gradient
        return _C_ops.multiply(silu, up)

    @staticmethod
    def backward(ctx, upstream):
        gate, up, silu = ctx.saved_tensor()
        d_gate = _C_ops.silu_grad(gate, silu, _C_ops.multiply(upstream, up)) if ctx.wanted[0] else None
        return d_gate, _C_ops.multiply(upstream, silu) if ctx.wanted[1] else None


def attention(q, k, v, mask: Mask | None):
    """`fusion_ops.attention` where no gradient is needed: q [B, T, N, H]; k, v [B, K, S, H] -> [B, T, N, H].

    Scores become their exponentials in place, block by block of queries. Under a causal mask, keys behind a block are
    never looked at, those before it need no mask, and those of the block itself all have the same.
    """
    B, T, N, H = q.shape
    K, S = k.shape[1], k.shape[2]
    q = _C_ops.scale(q, H**-0.5, 0.0, True)
    if T == 1:
        part = k, v, None if mask is None else mask.bias(B, K, N // K)
        q = _C_ops.reshape(q, [B, K, N // K, H])
        if B * K * S * H > SMALL:
            return _C_ops.reshape(_softmax_product(q, [part]), [B, 1, N, H])
        with threads.one():
            return _C_ops.reshape(_softmax_product(q, [part]), [B, 1, N, H])
    rows = min(T, max(16, SCORES // (B * N * S)))
    there, back = row_orders(B, T, K, N // K, rows)
    q = _C_ops.gather(_C_ops.reshape(q, [-1, H]), there, 0)
    blocks = []
    for first in range(0, T, rows):
        t = min(rows, T - first)
        some = _C_ops.reshape(q[first * B * N : (first + t) * B * N], [B, K, N // K * t, H])
        y = _softmax_product(some, _parts_of_keys(some, k, v, mask, T, first, t))
        blocks.append(_C_ops.reshape(y, [-1, H]))
    y = blocks[0] if len(blocks) == 1 else paddle.concat(blocks)
    return _C_ops.reshape(_C_ops.gather(y, back, 0), [B, T, N, H])


@lru_cache(maxsize=16)
def row_orders(B: int, T: int, K: int, G: int, rows: int) -> tuple:
    """int32 [B*T*K*G] each: which rows of H numbers make, of [B, T, K, G], blocks [B, K, G, t] of t queries one after
    the other, and back again. (transpose moves single numbers, and takes eight times as long.)"""
    places = np.arange(B * T * K * G, dtype=np.int32).reshape(B, T, K, G)
    blocks = [places[:, first : first + rows].transpose(0, 2, 3, 1).reshape(-1) for first in range(0, T, rows)]
    there = np.concatenate(blocks)
    back = np.empty_like(there)
    back[there] = np.arange(len(there), dtype=np.int32)
    return paddle.to_tensor(there), paddle.to_tensor(back)


def _parts_of_keys(q, k, v, mask: Mask | None, T: int, first: int, t: int) -> list:
    """The keys that queries [first, first + t) of T may look at, as parts (k, v, bias)."""
    B, K = k.shape[:2]
    G = q.shape[2] // t
    if mask is None:
        return [(k, v, None)]
    if mask.end is None:
        return [(k, v, mask.block_bias(B, K, G, first, first + t))]
    low = mask.end - T + first  # keys before the block's own
    before = [(k[:, :, :low], v[:, :, :low], None)] if low else []
    return [*before, (k[:, :, low : low + t], v[:, :, low : low + t], mask.triangle(B, K, G, t))]


def _softmax_product(q, parts: list):
    """softmax(q k^T + bias) v over all keys of the parts (k, v, bias): q [B, K, R, H] -> [B, K, R, H].

    Divided last, when there are H numbers in a row and no longer S. Sums are products with ones, which are faster than
    Paddle's sum. NaN stays NaN, unlike in Paddle's softmax.
    """
    scores = []
    for k, _, bias in parts:
        part = _C_ops.matmul(q, k, False, True)
        scores.append(part if bias is None else _C_ops.add_(part, bias))
    highest = _C_ops.max(scores[0], [-1], True)
    for part in scores[1:]:
        highest = _C_ops.maximum(highest, _C_ops.max(part, [-1], True))
    y = total = None
    for part, (_, v, _) in zip(scores, parts, strict=True):
        weights = _C_ops.exp_(less_rows_(part, highest))
        some, summed = _C_ops.matmul(weights, v, False, False), _C_ops.matmul(weights, _ones(v.shape[2]), False, False)
        y, total = (some, summed) if y is None else (_C_ops.add_(y, some), _C_ops.add_(total, summed))
    return _C_ops.divide_(y, total)


def less_rows_(x, rows):
    """x [..., S] less one number for each row, rows [..., 1], in place. As a product of rank one added to x it takes a
    fifth of the time that a broadcast takes, and rounds likewise."""
    S = x.shape[-1]
    _C_ops.addmm_(_C_ops.reshape(x, [-1, S]), _C_ops.reshape(rows, [-1, 1]), _less(S), 1.0, 1.0)
    return x


@cache
def _ones(size: int, dtype=paddle.float32):
    return paddle.ones([size, 1], dtype=dtype)


@lru_cache(maxsize=64)
def _less(size: int):
    return paddle.full([1, size], -1.0)


def product(x, weight):
    """x [..., in] @ weight [in, out], for a model that only runs.

    MKL gives one row to one thread, which cannot read memory as fast as two, and with a few rows it copies the weight
    first. Cut in parts along `in`, which costs no copy, it is a batch of products whose results are added.
    """
    in_, out = weight.shape
    *rows, _ = x.shape
    R = math.prod(rows)
    parts = _parts(in_) if R == 1 or (R <= FEW and in_ * out >= LARGE) else 1
    if parts == 1:
        return _C_ops.matmul(x, weight, False, False)
    if R == 1:
        x = _C_ops.reshape(x, [parts, 1, in_ // parts])
    else:
        x = _C_ops.transpose(_C_ops.reshape(x, [R, parts, in_ // parts]), [1, 0, 2])
    y = _C_ops.matmul(x, _C_ops.reshape(weight, [parts, in_ // parts, out]), False, False)
    y = _C_ops.matmul(_ones(parts, y.dtype), _C_ops.reshape(y, [parts, R * out]), True, False)  # their sum
    return _C_ops.reshape(y, [*rows, out])


def _parts(size: int) -> int:
    """As many equal parts as there are threads, a power of two."""
    parts = 1
    while parts * 2 <= threads.count() and size % (parts * 2) == 0:
        parts *= 2
    return parts
