"""Attention of packed rows with its gradient by hand: between the two passes it keeps no scores.

What autograd keeps of attention in plain operations are four copies of the scores; at 4096 tokens and 16 heads a layer
that is 2 GB. Here scores are made again for a block of queries at a time, from what the layer keeps anyway and one
number for each query. The plain twin is fusion_ops.packed_attention. float32 on a CPU; a GPU has flash attention.

Letters in shapes: B batch, T length, N query heads, K key/value heads, G query heads of one of them, H head size,
t queries of a block, s keys that they meet.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import paddle
from paddle.autograd import PyLayer

from .masks import PackedMask

QUERY_BLOCK = 256


def packed_attention(q, k, v, mask: PackedMask):
    """`fusion_ops.packed_attention`: q [B, T, N, H]; k, v [B, K, T, H] -> [B, T, N, H]. Differentiable once."""
    return _PackedAttention.apply(q, k, v, _blocks(mask, q.shape[1], q.shape[2], k.shape[1]))


@dataclass(frozen=True)
class _Part:
    """Keys [begin, end) that a block of queries meets. bias: 0 where it may look and the lowest number elsewhere,
    [B, K, G, t, s] or, where that would be large, [B, 1, 1, t, s]; None where all are seen by all."""

    begin: int
    end: int
    bias: paddle.Tensor | None


@dataclass(frozen=True)
class _Block:
    """Queries [first, last): keys before the block, of which often all are seen, and its own."""

    first: int
    last: int
    parts: list[_Part]


_made: WeakKeyDictionary = WeakKeyDictionary()  # PackedMask -> blocks: all layers of a pass use the same


def _blocks(mask: PackedMask, T: int, N: int, K: int) -> list[_Block]:
    if mask not in _made:
        latest = mask.starts.max(axis=0).numpy()
        _made[mask] = [
            _block(mask, first, min(first + QUERY_BLOCK, T), N, K, latest) for first in range(0, T, QUERY_BLOCK)
        ]
    return _made[mask]


def _block(mask: PackedMask, first: int, last: int, N: int, K: int, latest) -> _Block:
    low, sees = mask.block(first, last)  # [B, 1, t, last - low]
    bias = paddle.where(sees, paddle.zeros([]), paddle.full([], paddle.finfo(paddle.float32).min)).unsqueeze(1)
    own = bias[..., first - low :]  # [B, 1, 1, t, t]
    own = own.expand([own.shape[0], K, N // K, *own.shape[3:]]).contiguous()  # a broadcast over heads is slow
    parts = [_Part(first, last, own)]
    if low < first:
        all_seen = latest[first:last].max() <= low
        parts.append(_Part(low, first, None if all_seen else bias[..., : first - low]))
    return _Block(first, last, parts)


class _PackedAttention(PyLayer):
    @staticmethod
    def forward(ctx, q, k, v, blocks: list[_Block]):
        heads = _by_key_head(q * q.shape[-1] ** -0.5, k.shape[1])  # [B, K, G, T, H]
        ctx.wanted = [not x.stop_gradient for x in (q, k, v)]  # with adapters on some projections, not of all
        ctx.blocks, ctx.logs, outputs = blocks, [], []
        for block in blocks:
            y, logs = _attended(_rows(heads, block), k, v, block)
            outputs.append(_unrows(y, block))
            ctx.logs.append(logs)
        y = _by_token(outputs, q.shape)
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    def backward(ctx, upstream):
        q, k, v, y = ctx.saved_tensor()
        K, scale = k.shape[1], q.shape[-1] ** -0.5
        dq, dk, dv = [], paddle.zeros_like(k), paddle.zeros_like(v)
        heads, ups = _by_key_head(q * scale, K), _by_key_head(upstream, K)
        meets = _by_key_head((upstream * y).sum(axis=-1, keepdim=True), K)  # [B, K, G, T, 1]
        for block, logs in zip(ctx.blocks, ctx.logs, strict=True):
            rows, up, meet, of_block = _rows(heads, block), _rows(ups, block), _rows(meets, block), 0.0
            for part in block.parts:
                keys = slice(part.begin, part.end)
                weights = _scores(rows, k, part).subtract_(logs).exp_()  # the softmax
                dv[:, :, keys] = dv[:, :, keys] + paddle.matmul(weights, up, transpose_x=True)
                ds = paddle.matmul(up, v[:, :, keys], transpose_y=True).subtract_(meet).multiply_(weights)
                of_block = paddle.matmul(ds, k[:, :, keys]) + of_block
                dk[:, :, keys] = dk[:, :, keys] + paddle.matmul(ds, rows, transpose_x=True)
            dq.append(_unrows(of_block, block))
        gradients = _by_token(dq, q.shape).scale_(scale), dk, dv
        return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, ctx.wanted, strict=True))


def _attended(rows, k, v, block: _Block):
    """Of scaled queries [B, K, G * t, H]: their outputs, and the logarithm of their softmax's sum [B, K, G * t, 1]."""
    scores = [_scores(rows, k, part) for part in block.parts]
    highest = scores[0].max(axis=-1, keepdim=True)
    for more in scores[1:]:
        highest = paddle.maximum(highest, more.max(axis=-1, keepdim=True))
    y = sums = 0.0
    for weights, part in zip(scores, block.parts, strict=True):
        weights.subtract_(highest).exp_()
        y = paddle.matmul(weights, v[:, :, part.begin : part.end]) + y
        sums = paddle.matmul(weights, paddle.ones([weights.shape[-1], 1])) + sums
    return y / sums, sums.log() + highest


def _scores(rows, k, part: _Part):
    """[B, K, G * t, s] of scaled queries, with the lowest number where they may not look."""
    scores = paddle.matmul(rows, k[:, :, part.begin : part.end], transpose_y=True)
    if part.bias is None:
        return scores
    B, K, R, s = scores.shape
    t = part.bias.shape[3]
    return scores.reshape([B, K, R // t, t, s]).add_(part.bias).reshape([B, K, R, s])


def _by_key_head(x, K: int):
    """[B, T, N, H] -> [B, K, G, T, H]"""
    B, T, N, H = x.shape
    return x.reshape([B, T, K, N // K, H]).transpose([0, 2, 3, 1, 4])


def _rows(heads, block: _Block):
    """[B, K, G, T, H] -> the block's [B, K, G * t, H]"""
    B, K, G, _, H = heads.shape
    return heads[:, :, :, block.first : block.last].reshape([B, K, G * (block.last - block.first), H])


def _unrows(rows, block: _Block):
    """[B, K, G * t, H] -> [B, K, G, t, H]"""
    B, K, R, H = rows.shape
    t = block.last - block.first
    return rows.reshape([B, K, R // t, t, H])


def _by_token(parts: list, shape: list[int]):
    """Blocks of [B, K, G, t, H] -> [B, T, N, H]"""
    whole = parts[0] if len(parts) == 1 else paddle.concat(parts, axis=3)
    return whole.transpose([0, 3, 1, 2, 4]).reshape(shape)
