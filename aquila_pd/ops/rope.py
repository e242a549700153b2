"""Rotary embedding (RoPE): cos and sin for positions, with scaling; q and k are rotated in fusion_ops.py.

Letters in shapes: B batch, T query length, H head size.
"""

import numpy as np
import paddle

from ..configuration import AquilaConfig


class Angles:
    """cos and sin of a pass, fp32 [B, T, 1, H], and the forms that layers take them in, each made once."""

    def __init__(self, cos, sin):
        self.cos, self.sin = cos, sin
        self._made: dict = {}

    def __iter__(self):
        return iter((self.cos, self.sin))

    def cast(self, dtype) -> tuple:
        """cos, sin in this dtype."""
        if dtype == self.cos.dtype:
            return self.cos, self.sin
        return self._once(dtype, lambda: (self.cos.astype(dtype), self.sin.astype(dtype)))

    def wide(self, heads: int) -> tuple:
        """For tensors x [B, T, heads, H]: cos of that shape; sin likewise, its first half negative; and int32
        [2*B*T*heads], which takes rows of H/2 numbers from one half to the other. Then x cos + swapped(x) sin is the
        rotation, in products of equal shapes."""
        return self._once(heads, lambda: self._wide(heads))

    def _wide(self, heads: int) -> tuple:
        B, T, _, H = self.cos.shape
        first, second = self.sin.chunk(2, axis=-1)
        sin = paddle.concat([-first, second], axis=-1)
        cos, sin = (x.expand([B, T, heads, H]).contiguous() for x in (self.cos, sin))
        halves = np.arange(2 * B * T * heads, dtype=np.int32).reshape(-1, 2)[:, ::-1].reshape(-1)
        return cos, sin, paddle.to_tensor(np.ascontiguousarray(halves))

    def _once(self, key, make):
        if key not in self._made:
            with paddle.no_grad():
                self._made[key] = make()
        return self._made[key]


class RotaryEmbedding:
    """cos and sin of positions: fp32 always, also in a half-precision model. RopeScaling has the frequencies."""

    def __init__(self, config: AquilaConfig):
        self.scaling = config.rope
        self._made = None, None  # the last frequencies and what for, so that a decoding step need not make them

    def __call__(self, position_ids, key_length) -> Angles:
        """position_ids [B, T] -> Angles, which unpack as cos, sin [B, T, 1, H] in fp32.

        key_length: tokens of a row, or int [B, T] of each token's own sample where a row holds several.
        """
        frequencies = self._frequencies if isinstance(key_length, int) else self._frequencies_of_samples
        angles = position_ids.astype("float32").unsqueeze(-1) * frequencies(key_length)  # [B, T, H/2]
        angles = paddle.concat([angles, angles], axis=-1).unsqueeze(2)  # [B, T, 1, H]
        cos, sin, factor = paddle.cos(angles), paddle.sin(angles), self.scaling.attention_factor
        return Angles(cos, sin) if factor == 1 else Angles(cos * factor, sin * factor)

    def is_stretched(self, key_length: int) -> bool:
        """Whether sequences of this length have frequencies of their own."""
        return self.scaling.depends_on_length and key_length > self.scaling.max_position_embeddings

    def _frequencies_of_samples(self, lengths):
        """[B, T] lengths -> [B, T, H/2] where a sample may be long enough to stretch the base, else [H/2]."""
        if not self.is_stretched(lengths.shape[1]):
            return self._frequencies(0)
        found, which = np.unique(lengths.numpy(), return_inverse=True)
        table = paddle.stack([self._frequencies(int(length)) for length in found])
        return table[paddle.to_tensor(which.reshape(lengths.shape))]

    def _frequencies(self, key_length: int):
        """float32 [H/2] on the device."""
        what_for = key_length if self.is_stretched(key_length) else 0, paddle.device.get_device()
        made_for, made = self._made
        if made_for != what_for:
            made = paddle.to_tensor(self.scaling.inverse_frequencies(key_length))
            self._made = what_for, made  # one assignment: threads with other lengths may do the same
        return made
