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
    """Angles of the rotary embedding: fp32 always, also in a half-precision model.

    Linear scaling divides positions by the factor. Dynamic NTK stretches the base once the keys are longer than
    max_position_embeddings; here it is a function of the key length alone, so a long input leaves no trace.
    """

    def __init__(self, config: AquilaConfig):
        self.head_dim = config.head_dim
        self.base = config.rope_theta
        self.max_positions = config.max_position_embeddings
        scaling = config.rope_scaling or {"type": "none", "factor": 1.0}
        self.type, self.factor = scaling["type"], scaling["factor"]
        self._made = None, None  # the last frequencies and what for, so that a decoding step need not make them

    def __call__(self, position_ids, key_length) -> Angles:
        """position_ids [B, T] -> Angles, which unpack as cos, sin [B, T, 1, H] in fp32.

        key_length: tokens of a row, or int [B, T] of each token's own sample where a row holds several.
        """
        positions = position_ids.astype("float32")
        if self.type == "linear":
            positions = positions / self.factor
        frequencies = self.inverse_frequencies if isinstance(key_length, int) else self.frequencies_of_samples
        angles = positions.unsqueeze(-1) * frequencies(key_length)  # [B, T, H/2]
        angles = paddle.concat([angles, angles], axis=-1).unsqueeze(2)  # [B, T, 1, H]
        return Angles(paddle.cos(angles), paddle.sin(angles))

    def frequencies_of_samples(self, lengths):
        """[B, T] lengths -> [B, T, H/2] where a sample may be long enough to stretch the base, else [H/2]."""
        if self.type != "dynamic" or lengths.shape[1] <= self.max_positions:
            return self.inverse_frequencies(0)
        found, which = np.unique(lengths.numpy(), return_inverse=True)
        table = paddle.stack([self.inverse_frequencies(int(length)) for length in found])
        return table[paddle.to_tensor(which.reshape(lengths.shape))]

    def inverse_frequencies(self, key_length: int):
        """1 / base ** (2i / H), float32 [H/2]."""
        base, d = self.base, self.head_dim
        if self.type == "dynamic" and key_length > self.max_positions:
            stretch = self.factor * key_length / self.max_positions - (self.factor - 1)
            base = base * stretch ** (d / (d - 2))
        what_for = base, paddle.device.get_device()
        made_for, made = self._made
        if made_for != what_for:
            exponents = np.arange(0, d, 2, dtype=np.float32) / np.float32(d)
            # The power in double, rounded once: what a correctly rounded fp32 power gives.
            powers = np.power(base, exponents.astype(np.float64)).astype(np.float32)
            made = paddle.to_tensor(np.float32(1) / powers)
            self._made = what_for, made  # one assignment: threads with other lengths may do the same
        return made
