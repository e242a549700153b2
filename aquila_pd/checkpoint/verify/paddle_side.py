"""Paddle side of the layer-by-layer verification: this project's layers, loaded from the output one by one."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import paddle

from ...architecture.weight_map import EMBEDDING, FINAL_NORM, HEAD, L, Row
from ...configuration import AquilaConfig
from ...formats import safetensors
from ...formats.safetensors import TensorInfo
from ...fusion_ops import select
from ...modeling import DecoderLayer, RMSNorm
from ...ops import threads
from ...ops.attention_mask import Mask
from ...ops.rope import Angles, RotaryEmbedding
from ...runtime import base
from ..io.pipeline import count_workers


class Ours:
    """The Paddle model in float32, one layer in memory at a time. held: the folder's tensors by Paddle name."""

    def __init__(self, folder: Path, held: Mapping[str, TensorInfo], length: int):
        threads.use(count_workers(None))
        base.log_warnings_only()
        self.config = AquilaConfig.from_pretrained(str(folder))
        self._held, self._ops = held, select()
        self._mask = Mask.of_chunk(length, length, length)
        self._angles = RotaryEmbedding(self.config)(paddle.arange(length)[None], length)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """ids [T] -> [T, D]"""
        return self.embedding(ids)

    def embedding(self, rows: slice | np.ndarray) -> np.ndarray:
        """These rows of the embedding in float32."""
        stored = self._view(EMBEDDING)
        found = stored[rows].astype(np.float32)
        safetensors.release(stored)
        return found

    @contextmanager
    def layer(self, i: int) -> Iterator["OurLayer"]:
        with paddle.LazyGuard():
            layer = DecoderLayer(self.config, i, self._ops)
        prefix = Row(L, ()).paddle.format(i=i)
        for name, parameter in layer.named_parameters():
            _fill(parameter, safetensors.view(self._held[prefix + name]))
        layer.eval()
        yield OurLayer(layer, self._angles, self._mask)

    def norm(self, x: np.ndarray) -> np.ndarray:
        with paddle.LazyGuard():
            norm = RMSNorm(self.config, self._ops)
        _fill(norm.weight, self._view(FINAL_NORM))
        return _run(norm, x)

    def head(self, x: np.ndarray, rows: slice) -> np.ndarray:
        """[T, D] -> logits [T, v] of this part of the vocabulary."""
        if self.config.tie_word_embeddings:
            weight = _tensor(self._view(EMBEDDING), rows)
            return _run(lambda x: paddle.matmul(x, weight, transpose_y=True), x)
        weight = _tensor(self._view(HEAD), (slice(None), rows))
        return _run(lambda x: paddle.matmul(x, weight), x)

    def _view(self, row: Row) -> np.ndarray:
        return safetensors.view(self._held[row.paddle])


class OurLayer:
    """One filled DecoderLayer, whole and in its two halves."""

    def __init__(self, layer: DecoderLayer, angles: Angles, mask: Mask):
        self._layer, self._how = layer, (angles, mask)

    def forward(self, x: np.ndarray) -> np.ndarray:
        return _run(lambda x: self._layer(x, *self._how), x)

    def attention(self, x: np.ndarray) -> np.ndarray:
        layer = self._layer
        return _run(lambda x: x + layer.self_attn(layer.input_layernorm(x), *self._how)[0], x)

    def mlp(self, x: np.ndarray) -> np.ndarray:
        layer = self._layer
        return _run(lambda x: x + layer.mlp(layer.post_attention_layernorm(x)), x)


def _fill(parameter, stored: np.ndarray) -> None:
    """Give memory with a stored tensor's values, in float32, to a parameter that has none yet."""
    values = _tensor(stored)  # a name of its own: get_tensor() does not keep its owner alive
    parameter.get_tensor()._share_data_with(values.get_tensor())


def _tensor(stored: np.ndarray, part: slice | tuple[slice, ...] = slice(None)):
    """Part of a mapped tensor in memory of its own; the file's pages are given back."""
    values = paddle.to_tensor(stored[part].astype(np.float32))
    safetensors.release(stored)
    return values


def _run(function: Callable, x: np.ndarray) -> np.ndarray:
    """[T, D] float32 through something that wants [1, T, D]."""
    with paddle.no_grad():
        return function(paddle.to_tensor(x)[None])[0].numpy()
