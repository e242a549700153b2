"""Packed (block-diagonal) attention for training on a CPU, with a hand-written gradient: no scores are kept.

What autograd keeps of attention in plain operations are four copies of the scores; at 4096 tokens and 16 heads a layer
that is 2 GB. Here scores are made again for a block of queries at a time, from what the layer keeps anyway and one
number for each query. The plain twin is fusion_ops.packed_attention. float32 on a CPU; a GPU has flash attention.

Letters in shapes: B batch, T length, N query heads, K key/value heads, G query heads of one of them, H head size,
X = B * K, t queries of a block and s keys of another: what they have with each other is a tile.
"""

from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import paddle
from paddle.autograd import PyLayer

from . import threads
from .attention_mask import LOWEST, PackedMask
from .cpu import less_rows_, row_orders

BLOCK = 128  # tokens; with fewer, products are slower; with more, a larger share of the scores is hidden


def packed_attention(q, k, v, mask: PackedMask):
    """`fusion_ops.packed_attention`: q [B, T, N, H]; k, v [B, K, T, H] -> [B, T, N, H]. Differentiable once."""
    return _PackedAttention.apply(q, k, v, _tiles(mask, q.shape[2], k.shape[1]))


@dataclass(frozen=True)
class _Tile:
    """keys: the number of the block of keys. bias: what is added to scores, 0 or, where a key is masked, the
    lowest number, [X, G * t, s], as a broadcast over heads is slow; None where all are seen by all."""

    keys: int
    bias: paddle.Tensor | None


_made: WeakKeyDictionary = WeakKeyDictionary()  # PackedMask -> tiles: all layers of a pass use the same


def _tiles(mask: PackedMask, N: int, K: int) -> list[list[_Tile]]:
    """For each block of queries, the key tiles that are not fully masked."""
    if mask not in _made:
        starts = mask.starts.numpy()  # [B, T]
        _made[mask] = [_tiles_of(first, starts, N, K) for first in range(0, starts.shape[1], BLOCK)]
    return _made[mask]


def _tiles_of(first: int, starts: np.ndarray, N: int, K: int) -> list[_Tile]:
    some = starts[:, first : first + BLOCK, None]  # [B, t, 1]
    B, t, _ = some.shape
    queries, tiles = np.arange(first, first + t)[:, None], []
    for number in range(some.min() // BLOCK, first // BLOCK + 1):
        keys = np.arange(number * BLOCK, min((number + 1) * BLOCK, first + t))
        allowed = (keys >= some) & (keys <= queries)  # [B, t, s]
        bias = None
        if not allowed.all():
            bias = np.where(allowed, np.float32(0), np.float32(LOWEST))[:, None]
            bias = paddle.to_tensor(bias.repeat(N, axis=1).reshape(B * K, N // K * t, len(keys)))
        tiles.append(_Tile(number, bias))
    return tiles


class _PackedAttention(PyLayer):
    """With P = softmax(q k^T): y = P v, dv = P^T dy, dS = P * (dy v^T - rowsum(dy * y)), dq = dS k, dk = dS^T q.

    Key heads have nothing to do with each other: every core takes some of them.
    """

    @staticmethod
    def forward(ctx, q, k, v, tiles: list[list[_Tile]]):
        ctx.wanted = [not x.stop_gradient for x in (q, k, v)]  # with adapters on some projections, not of all
        rows = _Rows(q, k)
        queries, keys, values = rows.of_queries(q).scale_(rows.scale), rows.of_keys(k), rows.of_keys(v)
        given = [rows.blocks(x) for x in (queries, keys, values)]
        found = threads.together([partial(_attended, tiles, *given, heads) for heads in threads.shares(rows.X)])
        outputs, ctx.logs = (_in_order(shares) for shares in zip(*found, strict=True))
        ctx.tiles, y = tiles, rows.to_queries(outputs)
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    def backward(ctx, upstream):
        q, k, v, y = ctx.saved_tensor()
        rows = _Rows(q, k)
        queries, keys, values = rows.of_queries(q).scale_(rows.scale), rows.of_keys(k), rows.of_keys(v)
        ups, ones = rows.of_queries(upstream), paddle.ones([len(keys), 1])
        meets = paddle.matmul(ups * rows.of_queries(y), paddle.ones([rows.H, 1]))  # [B * T * N, 1]
        # What is subtracted from each row of a product is one more column of its factors, which costs next to nothing.
        pairs = [(queries, -ctx.logs), (ups, -meets), (keys, ones), (values, ones)]
        more = [paddle.concat(pair, axis=1) for pair in pairs]
        given = [rows.blocks(x) for x in (queries, ups, keys, *more)]
        found = threads.together([partial(_gradients, ctx.tiles, *given, heads) for heads in threads.shares(rows.X)])
        dq, dk, dv = (_in_order(shares) for shares in zip(*found, strict=True))
        gradients = rows.to_queries(dq).scale_(rows.scale), rows.to_keys(dk), rows.to_keys(dv)
        return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, ctx.wanted, strict=True))


def _attended(tiles: list[list[_Tile]], queries: list, keys: list, values: list, heads: slice) -> tuple[list, list]:
    """Of some heads and each block of scaled queries [X, G * t, H]: outputs [.., H], and the logarithms of the sums of
    their softmax [.., 1]. keys, values: blocks of [X, s, H]."""
    outputs, logs = [], []
    for row, own in zip(tiles, queries, strict=True):
        scores = [_scores(own, keys[tile.keys], tile, heads) for tile in row]
        highest = scores[0].max(axis=-1, keepdim=True)
        for more in scores[1:]:
            highest = paddle.maximum(highest, more.max(axis=-1, keepdim=True))
        y = sums = None
        for weights, tile in zip(scores, row, strict=True):
            less_rows_(weights, highest).exp_()
            y = _plus(y, paddle.matmul(weights, values[tile.keys][heads]))
            sums = _plus(sums, paddle.matmul(weights, paddle.ones([weights.shape[-1], 1])))
        outputs.append(y.divide_(sums))
        logs.append(sums.log().add_(highest))
    return outputs, logs


def _gradients(tiles, queries, ups, keys, queries_less, ups_less, keys_one, values_one, heads: slice) -> tuple:
    """Of some heads, the gradients of each block of scaled queries, of keys and of values. Blocks as for _attended;
    *_less with what is subtracted from their products as one more column, *_one with ones."""
    dq, dk, dv = [None] * len(queries), [None] * len(keys), [None] * len(keys)
    for block, row in enumerate(tiles):
        own, up, up_less = (x[block][heads] for x in (queries, ups, ups_less))
        for tile in row:
            j = tile.keys
            weights = _scores(queries_less[block], keys_one[j], tile, heads).exp_()  # the softmax
            dv[j] = _plus(dv[j], paddle.matmul(weights, up, transpose_x=True))
            ds = paddle.matmul(up_less, values_one[j][heads], transpose_y=True).multiply_(weights)
            dq[block] = _plus(dq[block], paddle.matmul(ds, keys[j][heads]))
            dk[j] = _plus(dk[j], paddle.matmul(ds, own, transpose_x=True))
    return dq, dk, dv


def _scores(queries, keys, tile: _Tile, heads: slice):
    """[heads, G * t, s] of scaled queries, with the lowest number where they may not look."""
    scores = paddle.matmul(queries[heads], keys[heads], transpose_y=True)
    return scores if tile.bias is None else scores.add_(tile.bias[heads])


def _plus(total, x):
    """The sum so far, None at first, with x; in place."""
    return x if total is None else total.add_(x)


def _in_order(shares):
    """Rows [.., H] of all blocks, one block after the other, from each share of the heads' list of blocks."""
    return paddle.concat([x.reshape([-1, x.shape[-1]]) for block in zip(*shares, strict=True) for x in block])


class _Rows:
    """Heads of tokens as rows of H numbers in the order of blocks, and back: a gather of rows takes a tenth of the
    time in which a transposed tensor is copied."""

    def __init__(self, q, k):
        self.B, self.T, self.N, self.H = q.shape
        self.K = k.shape[1]
        self.X, self.scale = self.B * self.K, self.H**-0.5
        self._queries = row_orders(self.B, self.T, self.K, self.N // self.K, BLOCK)
        self._keys = row_orders(self.B, self.T, self.K, 1, BLOCK)

    def of_queries(self, x):
        """[B, T, N, H] -> [B * T * N, H], block after block of [B, K, G, t]"""
        return paddle.gather(x.reshape([-1, self.H]), self._queries[0])

    def to_queries(self, rows):
        """And back, [B, T, N, H]"""
        return paddle.gather(rows, self._queries[1]).reshape([self.B, self.T, self.N, self.H])

    def of_keys(self, x):
        """[B, K, T, H], which the model makes by transposing [B, T, K, H], -> [B * T * K, H]"""
        return paddle.gather(x.transpose([0, 2, 1, 3]).reshape([-1, self.H]), self._keys[0])

    def to_keys(self, rows):
        """And back, [B, K, T, H]"""
        tokens = paddle.gather(rows, self._keys[1]).reshape([self.B, self.T, self.K, self.H])
        return tokens.transpose([0, 2, 1, 3])

    def blocks(self, rows) -> list:
        """Each block's [X, G * t, W] of rows [B * T * N, W], or [X, s, W] of [B * T * K, W]; in the same memory"""
        each, width = len(rows) // self.T * BLOCK, rows.shape[1]
        return [rows[begin : begin + each].reshape([self.X, -1, width]) for begin in range(0, len(rows), each)]
