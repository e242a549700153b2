"""Attention masks: causal, padded, packed (block-diagonal); and the positions that follow from padding or packing.

Letters in shapes: B batch, T query length, S key length.
"""

import numpy as np
import paddle

from ..utils.errors import AquilaError

LOWEST = float(np.finfo(np.float32).min)


class Mask:
    """Attention mask [B or 1, 1, T or 1, S] in the forms that kernels take it in, each made once.

    allowed: boolean, or a function that makes it: not every kernel asks. end: where nothing but causality masks keys,
    the number of keys; query t of T then attends to the keys [0, end - T + t], and the buffer behind is spare room.
    """

    def __init__(self, allowed, *, end: int | None = None):
        self._allowed, self.end = allowed, end
        self._made: dict = {}

    @property
    def allowed(self):
        """Boolean [B or 1, 1, T or 1, S], True where a query attends to a key."""
        if callable(self._allowed):
            self._allowed = self._allowed()
        return self._allowed

    @classmethod
    def of_chunk(cls, T: int, end: int, S: int) -> "Mask":
        """Of the last T of `end` tokens, over a buffer of S keys."""
        return cls(lambda: paddle.arange(S) <= paddle.arange(end - T, end).reshape([1, 1, T, 1]), end=end)

    def bias(self, B: int, K: int, G: int):
        """Additive mask for scores [B, K, G, S] of a single query: 0, or the lowest finite number.

        Not -inf: a row that is masked entirely gives a flat row, never NaN.
        """
        return self._once(("bias", B, K, G), lambda: _spread(_bias(self.allowed), B, K, G))

    def block_bias(self, B: int, K: int, G: int, first: int, last: int):
        """Likewise for scores [B, K, G*(last-first), S] of the queries [first, last). Not kept: it is large."""
        rows = (
            self.allowed[:, :, first:last]
            if self.allowed.shape[2] > 1
            else self.allowed.expand([-1, -1, last - first, -1])
        )
        return _spread(_bias(rows), B, K, G)

    def triangle(self, B: int, K: int, G: int, T: int):
        """Likewise for scores [B, K, G*T, T] of T queries over the keys they stand at."""
        key = "triangle", B, K, G, T
        return self._once(key, lambda: _spread(_bias(paddle.ones([1, 1, T, T]).tril() > 0), B, K, G))

    def _once(self, key, make):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _bias(allowed):
    return paddle.where(allowed, paddle.zeros([]), paddle.full([], LOWEST))


def _spread(bias, B: int, K: int, G: int):
    """[B or 1, 1, T, S] -> [B, K, G*T, S], in memory of its own: adding two tensors of one shape is far faster."""
    T, S = bias.shape[2:]
    return bias.unsqueeze(2).expand([B, K, G, T, S]).reshape([B, K, G * T, S])


def causal_mask(keep, T: int):
    """Causal and padding mask, boolean [B, 1, T, S], of T queries that stand at the end of S keys.

    keep: [B, S] bool, False at padding. A query attends to the kept keys up to its own place, and always to itself, so
    that no row of the softmax is empty (pads included; their outputs are not read).

        keys      p p a b c        p: padding
        query p   x . . . .
        query p   . x . . .
        query a   . . x . .
        query b   . . x x .
        query c   . . x x x
    """
    S = keep.shape[1]
    key = paddle.arange(S).unsqueeze(0)  # [1, S]
    query = paddle.arange(S - T, S).unsqueeze(1)  # [T, 1]
    allowed = keep.unsqueeze([1, 2]) & (key <= query)  # [B, 1, T, S]
    return allowed | (key == query)


def keep_mask(attention_mask, B: int, S: int):
    """The boolean [B, S] (True at real tokens) out of a 2-D mask of 1/0 or booleans, or of None."""
    if attention_mask is None:
        return paddle.ones([B, S], dtype="bool")
    if list(attention_mask.shape) != [B, S]:
        raise AquilaError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected [{B}, {S}], one entry for every key, "
            "cached tokens included, or a mask of what each query may look at, [batch, 1, queries, keys]."
        )
    return attention_mask.astype("bool")


def full_mask(attention_mask, B: int, T: int, S: int):
    """Boolean mask [B or 1, 1, T, S] from a caller's 3-D or 4-D one.

    It is taken as final, as PaddleNLP means it: booleans or 1/0 of any dtype say where a query attends; numbers
    below zero make it additive, 0 where it attends and at most -1e4 where not. A row that is masked entirely attends
    everywhere: such a row is not read, and no kernel makes NaN of it.
    """
    mask = attention_mask.unsqueeze(1) if attention_mask.ndim == 3 else attention_mask
    shape = list(mask.shape)
    if mask.ndim != 4 or shape[0] not in (1, B) or shape[1] != 1 or shape[2] not in (1, T) or shape[3] != S:
        raise AquilaError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected [{B}, {S}], or with one row for every "
            f"query [{B}, {T}, {S}] or [{B}, 1, {T}, {S}]."
        )
    if mask.is_floating_point():
        mask = _floating_mask(mask)
    mask = mask.astype("bool")
    return mask | ~mask.any(axis=-1, keepdim=True)


def _floating_mask(mask):
    lowest, highest = float(mask.min()), float(mask.max())
    additive = lowest < 0 == highest and bool(((mask == 0) | (mask <= -1e4)).all())
    keep = lowest >= 0 and highest == 1 and bool(((mask == 0) | (mask == 1)).all())
    if not additive and not keep:
        raise AquilaError(
            f"The floating attention_mask has values from {lowest:g} to {highest:g}; expected 1 and 0, or 0 and at "
            "most -1e4. A boolean mask cannot be misread."
        )
    return mask >= 0 if additive else mask


def hide_beyond(mask, C: int):
    """[.., S] -> [.., C], False in the cache's spare room."""
    *rows, S = mask.shape
    return mask if S == C else paddle.concat([mask, paddle.zeros([*rows, C - S], dtype="bool")], axis=-1)


def positions(keep, T: int):
    """Position of each of the last T tokens, [B, T]: padding does not count and itself stands at 1, as upstream."""
    counted = paddle.cumsum(keep.astype("int64"), axis=-1) - 1
    return paddle.where(keep, counted, paddle.ones_like(counted))[:, -T:]


class PackedMask:
    """Block-diagonal causal mask of rows that hold several samples one after another, without a T x T mask.

    segment_ids: int [B, T], another number at each border; padding counts as a sample.

        segments  1 1 1 2 2 0        starts  0 0 0 3 3 5
        query 1   x . . . . .        ends    3 3 3 5 5 6
        query 1   x x . . . .        positions 0 1 2 0 1 0
        query 1   x x x . . .
        query 2   . . . x . .
        query 2   . . . x x .
        query 0   . . . . . x

    starts, ends: int64 [B, T], the first place of each place's sample, and the one behind its last.
    """

    def __init__(self, segment_ids):
        B, T = segment_ids.shape
        places = paddle.arange(T, dtype="int64").unsqueeze(0).expand([B, T])
        border = segment_ids[:, 1:] != segment_ids[:, :-1]  # [B, T - 1]
        edge = paddle.ones([B, 1], dtype="bool")
        begins = paddle.concat([edge, border], axis=1)
        self.starts = paddle.cummax(paddle.where(begins, places, paddle.zeros_like(places)), axis=1)[0]
        last = paddle.concat([border, edge], axis=1)
        behind = paddle.where(last, places + 1, paddle.full_like(places, T))
        self.ends = paddle.cummin(behind.flip(1), axis=1)[0].flip(1)
        self._lowest = None

    @property
    def positions(self):
        """Each token's place in its own sample, int64 [B, T]."""
        return paddle.arange(self.starts.shape[1], dtype="int64").unsqueeze(0) - self.starts

    @property
    def lengths(self):
        """The length of each token's sample, int64 [B, T]."""
        return self.ends - self.starts

    def block(self, first: int, last: int):
        """(low, mask) of the queries [first, last): no key before `low` is attended to, nor any from `last` on.

        mask: boolean [B, 1, last - first, last - low].
        """
        if self._lowest is None:  # read back once: a kernel that takes `ends` never asks
            self._lowest = self.starts.min(axis=0).numpy()
        low = int(self._lowest[first])
        key = paddle.arange(low, last).reshape([1, 1, 1, -1])
        query = paddle.arange(first, last).reshape([1, 1, -1, 1])
        return low, (key >= self.starts[:, first:last].unsqueeze([1, 3])) & (key <= query)

    def full(self):
        """The boolean mask [B, 1, T, T]."""
        T = self.starts.shape[1]
        key, query = paddle.arange(T).reshape([1, 1, 1, T]), paddle.arange(T).reshape([1, 1, T, 1])
        return (key >= self.starts.unsqueeze([1, 3])) & (key <= query)
