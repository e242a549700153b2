"""Key/value cache of one batch: preallocated per layer, appended in place.

Layout [B, K, C, H] (B batch, K key/value heads, C capacity, H head size): each head's keys are contiguous, so a
step reads them as one matrix. Reading PaddleNLP's [B, S, K, H] instead transposes all of it at every step, and
reading only the first S of C keys copies them: attention is given whole buffers, and a mask for what is not there.
"""

import paddle

from ..utils.errors import AquilaError

_ROUND = 128  # capacities are multiples of this
_GROWTH = 1.25  # room beyond what is asked for, so that copies stay rare and the masked rest small


class KVCache:
    """Keys and values of all layers, after rotary embedding, heads not repeated.

    Reads like PaddleNLP's tuple cache: `len(cache)` layers, `cache[i]` a pair (k, v) of [B, S, K, H].
    """

    def __init__(self, num_layers: int):
        self.capacity = 0
        self._keys: list = [None] * num_layers
        self._values: list = [None] * num_layers
        self._lengths = [0] * num_layers

    @property
    def length(self) -> int:
        """Cached tokens of every layer (S)."""
        return self._lengths[-1]

    def reserve(self, more: int) -> int:
        """Make room for this many more tokens; returns the capacity C the buffers will have."""
        needed = self.length + more
        if needed > self.capacity:
            wanted = needed if not self.length else max(needed, int(self.capacity * _GROWTH))
            self.capacity = -(-wanted // _ROUND) * _ROUND
        return self.capacity

    def append(self, layer: int, k, v):
        """Add k, v [B, T, K, H]; returns the layer's buffers [B, K, C, H], zero beyond the cached tokens."""
        start, end = self._lengths[layer], self._lengths[layer] + k.shape[1]
        if end > self.capacity:
            self.reserve(k.shape[1])
        k, v = k.transpose([0, 2, 1, 3]), v.transpose([0, 2, 1, 3])
        self._keys[layer] = _grown(self._keys[layer], k, self.capacity)
        self._values[layer] = _grown(self._values[layer], v, self.capacity)
        self._keys[layer][:, :, start:end] = k
        self._values[layer][:, :, start:end] = v
        self._lengths[layer] = end
        return self._keys[layer], self._values[layer]

    def attend(self, layer: int, q, k, v, mask, attention):
        """Append k, v [B, T, K, H], then attention of q [B, T, N, H] over all cached tokens -> [B, T, N, H].

        The decoder asks its cache to attend, so that one of many sequences (generation/slots.py) can stand here.
        """
        return attention(q, *self.append(layer, k, v), mask)

    def reorder(self, index) -> None:
        """Reorder rows for beam search: row b becomes the old row index[b]."""
        if self.length:
            self._keys = [paddle.index_select(k, index, axis=0) for k in self._keys]
            self._values = [paddle.index_select(v, index, axis=0) for v in self._values]

    @classmethod
    def from_tuple(cls, pairs, num_layers: int) -> "KVCache":
        """From PaddleNLP's tuple of (k, v), each [B, S, K, H], one pair for each layer."""
        if len(pairs) not in (0, num_layers) or any(len(pair) != 2 or pair[0] is None for pair in pairs):
            raise AquilaError(
                f"past_key_values has {len(pairs)} entries; expected {num_layers} pairs of (keys, values), one a layer."
            )
        cache = cls(num_layers)
        for layer, (k, v) in enumerate(pairs):
            cache.append(layer, k, v)
        return cache

    def to_tuple(self) -> tuple:
        """As PaddleNLP's tuple of (k, v), each [B, S, K, H]; empty without cached tokens."""
        return tuple(self) if self.length else ()

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, layer: int) -> tuple:
        held = [buffer[layer][:, :, : self._lengths[layer]] for buffer in (self._keys, self._values)]
        return tuple(x.transpose([0, 2, 1, 3]) for x in held)

    def __iter__(self):
        return (self[layer] for layer in range(len(self)))


def _grown(buffer, new, capacity: int):
    """A buffer of this capacity that begins with what the old one held."""
    if buffer is not None and buffer.shape[2] >= capacity:
        return buffer
    B, K, _, H = new.shape
    grown = paddle.zeros([B, K, capacity, H], dtype=new.dtype)
    if buffer is not None:
        grown[:, :, : buffer.shape[2]] = buffer
    return grown
