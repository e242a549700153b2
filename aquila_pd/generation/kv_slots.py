"""Slot KV cache: keys and values of many sequences, one slot each, and the attention of a flat row of tokens over them.

Per layer one buffer [slots, K, C, H] for keys and one for values (K key/value heads, C capacity, H head size; the
layout of kv_cache.py, for its reason). A forward pass computes one flat row of tokens, [1, T, D]: first the decode
tokens, one for each decoding sequence, then the prompt chunks. Linear layers work on the row as it is; attention has
to keep sequences apart and is computed here, segment by segment:

    flat row   a b c d d d d d e e e      a, b, c: one token each, one batched attention over slots lo..hi
               | decode  | chunk | chunk  d, e: prompt chunks, each over its own slot

Slots lo..hi are a view of the buffer, so no keys are copied; the result of an idle slot in between is dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import _C_ops  # the operations themselves: for a single row, paddle's functions take longer than these

from ..ops.attention_mask import Mask

_ROUND = 128  # capacities are multiples of this
_GROWTH = 1.25
_PATIENCE = 512  # passes a half empty buffer is kept before it shrinks


@dataclass(frozen=True)
class Chunk:
    """Prompt chunk: tokens start..start+count of the sequence in a slot, computed in one pass."""

    slot: int
    start: int
    count: int


class SlotKVCache:
    """The buffers of all layers. How many tokens each slot holds is the scheduler's knowledge."""

    def __init__(self, layers: int, slots: int, kv_heads: int, head_dim: int, dtype, max_length: int):
        self.slots, self.max_length = slots, -(-max_length // _ROUND) * _ROUND
        self.capacity = min(_ROUND * 2, self.max_length)
        self._idle = 0
        shape = [slots, kv_heads, self.capacity, head_dim]
        self.keys = [paddle.zeros(shape, dtype=dtype) for _ in range(layers)]
        self.values = [paddle.zeros(shape, dtype=dtype) for _ in range(layers)]
        self._flatten()

    def fit(self, length: int) -> bool:
        """Make room for sequences of this length; True when the buffers shrank, to what `capacity` says.

        Growing copies them, by a quarter and more, so seldom. They shrink when half would have done for long.
        """
        if length > self.capacity:
            wanted = max(length, int(self.capacity * _GROWTH))
            self._resize(min(-(-wanted // _ROUND) * _ROUND, self.max_length))
        self._idle = self._idle + 1 if length * 2 <= self.capacity and self.capacity > _ROUND * 2 else 0
        if self._idle <= _PATIENCE:
            return False
        self._resize(max(-(-length // _ROUND) * _ROUND, _ROUND * 2))
        return True

    def _resize(self, capacity: int) -> None:
        # All of them are allocated before one replaces an old one: when memory runs out, nothing has changed.
        keys, values = (
            [_resized(buffer, min(capacity, self.capacity), capacity) for buffer in buffers]
            for buffers in (self.keys, self.values)
        )
        self.keys, self.values, self.capacity, self._idle = keys, values, capacity, 0
        self._flatten()

    def _flatten(self) -> None:
        # Views [slots*K*C, H] of the same memory: a scatter of rows takes a tenth of the time of keys[rows, :, places].
        self.key_rows, self.value_rows = (
            [buffer.reshape([-1, buffer.shape[3]]) for buffer in buffers] for buffers in (self.keys, self.values)
        )

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens' keys and values from one slot to another."""
        for buffers in (self.keys, self.values):
            for buffer in buffers:
                buffer[target : target + 1, :, :length] = buffer[source : source + 1, :, :length].clone()

    def clear(self, slot: int) -> None:
        """Zero a slot: masked values are multiplied by 0, and 0 times NaN would be NaN for the next sequence."""
        for buffers in (self.keys, self.values):
            for buffer in buffers:
                buffer[slot : slot + 1] = paddle.zeros_like(buffer[slot : slot + 1])


class PassKVCache:
    """The slot KV cache as the decoder layers see it in one forward pass: the interface of a KVCache.

    decoding: slots of the decode tokens, in ascending order; lengths: tokens each of them holds before the pass.
    keys_written: called with a layer's number when its keys and values are written, before attention reads them.
    """

    def __init__(
        self,
        slots: SlotKVCache,
        decoding: list[int],
        lengths: list[int],
        chunks: list[Chunk],
        keys_written: Callable[[int], None] | None = None,
    ):
        self.slots, self.decoding, self.lengths, self.chunks = slots, decoding, lengths, chunks
        self.keys_written = keys_written
        self.B = len(decoding)
        if decoding:
            self._prepare(np.array(decoding), np.array(lengths))
        self.masks = [Mask.of_chunk(chunk.count, chunk.start + chunk.count, slots.capacity) for chunk in chunks]

    def _prepare(self, decoding: np.ndarray, lengths: np.ndarray) -> None:
        self.lo, self.hi = int(decoding[0]), int(decoding[-1]) + 1
        rows = self.hi - self.lo
        held = np.zeros(rows, dtype=np.int64)
        held[decoding - self.lo] = lengths + 1
        mask = np.arange(self.slots.capacity) < held[:, None]  # [R, C]
        self.mask = Mask(paddle.to_tensor(mask[:, None, None, :]))
        _, K, C, _ = self.slots.keys[0].shape
        heads = (decoding[:, None] * K + np.arange(K)) * C + lengths[:, None]  # [B, K]: rows of key_rows
        self.at = paddle.to_tensor(heads.reshape(-1))
        self.spread = self.collect = None
        if rows != len(decoding):  # idle slots in between
            spread = np.zeros(rows, dtype=np.int64)
            spread[decoding - self.lo] = np.arange(len(decoding))
            self.spread, self.collect = paddle.to_tensor(spread), paddle.to_tensor(decoding - self.lo)

    def cut(self, begin: int, end: int, keys_written: Callable[[int], None]) -> "PassKVCache":
        """The cache for tokens [begin, end) of this pass's flat row, which holds all decode tokens or none of them."""
        pieces, at = [], self.B
        for chunk in self.chunks:
            low, high = max(begin, at), min(end, at + chunk.count)
            if low < high:
                pieces.append(Chunk(chunk.slot, chunk.start + low - at, high - low))
            at += chunk.count
        decodes = self.B if begin == 0 else 0
        return PassKVCache(self.slots, self.decoding[:decodes], self.lengths[:decodes], pieces, keys_written)

    def attend(self, layer: int, q, k, v, mask, attention):
        """Attention: q [1, T, N, H], k and v [1, T, K, H] of the flat row -> [1, T, N, H]. Builds the masks itself."""
        if not self.chunks and self.keys_written is None:
            return self._decode(layer, q, k, v, attention)
        at, places = self.B, []
        for chunk in self.chunks:
            some = slice(at, at + chunk.count)
            self._write(layer, chunk, k[:, some], v[:, some])
            places.append(some)
            at += chunk.count
        if self.keys_written is not None:
            self.keys_written(layer)
        B, keys, values = self.B, self.slots.keys[layer], self.slots.values[layer]
        results = [self._decode(layer, q[:, :B], k[:, :B], v[:, :B], attention)] if B else []
        for chunk, some, seen in zip(self.chunks, places, self.masks, strict=True):
            own = slice(chunk.slot, chunk.slot + 1)
            results.append(attention(q[:, some], keys[own], values[own], seen))
        return results[0] if len(results) == 1 else paddle.concat(results, axis=1)

    def _decode(self, layer: int, q, k, v, attention):
        keys, values = self.slots.keys[layer], self.slots.values[layer]
        _, _, N, H = q.shape
        paddle.scatter_(self.slots.key_rows[layer], self.at, _C_ops.reshape(k, [-1, H]))
        paddle.scatter_(self.slots.value_rows[layer], self.at, _C_ops.reshape(v, [-1, H]))
        q = _C_ops.reshape(q, [-1, 1, N, H])  # [B, 1, N, H]
        if self.spread is not None:
            q = paddle.index_select(q, self.spread)  # [R, 1, N, H]
        if self.hi - self.lo < self.slots.slots:
            keys, values = keys[self.lo : self.hi], values[self.lo : self.hi]
        y = attention(q, keys, values, self.mask)
        if self.collect is not None:
            y = paddle.index_select(y, self.collect)
        return _C_ops.reshape(y, [1, -1, N, H])

    def _write(self, layer: int, chunk: Chunk, k, v) -> None:
        own, places = slice(chunk.slot, chunk.slot + 1), slice(chunk.start, chunk.start + chunk.count)
        self.slots.keys[layer][own, :, places] = k.transpose([0, 2, 1, 3])
        self.slots.values[layer][own, :, places] = v.transpose([0, 2, 1, 3])


def _resized(buffer, kept: int, capacity: int):
    """A buffer [slots, K, capacity, H] with the first `kept` tokens of another."""
    slots, K, _, H = buffer.shape
    made = paddle.zeros([slots, K, capacity, H], dtype=buffer.dtype)
    made[:, :, :kept] = buffer[:, :, :kept]
    return made
