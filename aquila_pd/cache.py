"""Key/value cache of one batch: preallocated per layer, appended in place.

Layout [B, K, C, H] (B batch, K key/value heads, C capacity, H head size): each head's keys are contiguous, so a
step reads them as one matrix. Reading PaddleNLP's [B, S, K, H] instead transposes all of it at every step, which
at 2048 tokens costs a hundred times as much.
"""

import paddle

_ROUND = 128  # capacities are multiples of this, so that short prompts do not grow at every step


class KVCache:
    """Keys and values of all layers, after rotary embedding, heads not repeated.

    Reads like PaddleNLP's tuple cache: `len(cache)` layers, `cache[i]` a pair (k, v) of [B, S, K, H].
    """

    def __init__(self, num_layers: int):
        self._keys: list = [None] * num_layers
        self._values: list = [None] * num_layers
        self._lengths = [0] * num_layers

    @property
    def length(self) -> int:
        """Tokens held by every layer (S)."""
        return self._lengths[-1]

    def append(self, layer: int, k, v):
        """Add k, v [B, K, T, H]; returns everything held, [B, K, S, H] each."""
        start, end = self._lengths[layer], self._lengths[layer] + k.shape[2]
        self._keys[layer] = _reserve(self._keys[layer], k, end)
        self._values[layer] = _reserve(self._values[layer], v, end)
        self._keys[layer][:, :, start:end] = k
        self._values[layer][:, :, start:end] = v
        self._lengths[layer] = end
        return self._held(layer)

    def reorder(self, index) -> None:
        """Row b becomes the old row index[b]: what beam search does after each step."""
        self._keys = [paddle.index_select(k, index, axis=0) for k in self._keys]
        self._values = [paddle.index_select(v, index, axis=0) for v in self._values]

    @classmethod
    def from_tuple(cls, pairs) -> "KVCache":
        """From PaddleNLP's tuple of (k, v), each [B, S, K, H]."""
        cache = cls(len(pairs))
        for layer, (k, v) in enumerate(pairs):
            cache.append(layer, k.transpose([0, 2, 1, 3]), v.transpose([0, 2, 1, 3]))
        return cache

    def to_tuple(self) -> tuple:
        """As PaddleNLP's tuple of (k, v), each [B, S, K, H]."""
        return tuple(self)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, layer: int) -> tuple:
        k, v = self._held(layer)
        return k.transpose([0, 2, 1, 3]), v.transpose([0, 2, 1, 3])

    def __iter__(self):
        return (self[layer] for layer in range(len(self)))

    def _held(self, layer: int):
        end = self._lengths[layer]
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]


def _reserve(buffer, new, length: int):
    """A buffer of at least this length that begins with what the old one held. Doubling keeps copies rare."""
    if buffer is not None and buffer.shape[2] >= length:
        return buffer
    B, K, _, H = new.shape
    held = 0 if buffer is None else buffer.shape[2]
    capacity = -(-max(length, 2 * held) // _ROUND) * _ROUND
    grown = paddle.zeros([B, K, capacity, H], dtype=new.dtype)
    if buffer is not None:
        grown[:, :, :held] = buffer
    return grown
