"""One forward pass of the decoder over a flat row of many sequences' tokens."""

import numpy as np
import paddle

from ..ops import threads
from ..ops.rope import Angles
from . import parallel_prefill
from .kv_slots import Pass

HEAD_ROWS = 64  # rows of logits at a time: a prompt's would take 0.4 MB for each token
SOFTMAX = 250  # operations of a product that take as long as the softmax of one score, on a CPU


class Runner:
    """A model's layers, run on what a Pass describes. The model is an AquilaForCausalLM."""

    def __init__(self, model):
        self.model, self.base = model, model.aquila
        config = model.config
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self._of_token = 2 * D * (2 * (N + K) * H + 3 * config.intermediate_size)  # operations of a layer's products
        self._of_key = N * (4 * H + SOFTMAX)

    @paddle.no_grad()
    def hidden(self, ids: list[int], spans: list[tuple[int, int, int]], cache: Pass):
        """Hidden states [T, D] after the final norm of the flat row of ids [T].

        spans: (first position, count, key length) of each segment, in order.
        """
        on_cpu = self.base.embed_tokens.weight.place.is_cpu_place()
        count = threads.count() if on_cpu else 1
        parts = [(0, len(ids))] if count == 1 else parallel_prefill.parts(self._costs(spans), cache.B, count)
        if len(parts) == 1:
            return self._through(ids, spans, cache)

        def work(number: int, begin: int, end: int):
            some = list(parallel_prefill.cuts(spans, begin, end))
            return lambda order: self._through(ids[begin:end], some, cache.cut(begin, end, order.gate(number)))

        return paddle.concat(parallel_prefill.run([work(number, *part) for number, part in enumerate(parts)]))

    def _costs(self, spans: list[tuple[int, int, int]]) -> np.ndarray:
        """How long each token of a flat row takes in a layer [T]: a share for itself, and one for each key it sees."""
        keys = np.concatenate([np.arange(first + 1, first + count + 1) for first, count, _ in spans])
        return self._of_token + self._of_key * keys

    def _through(self, ids: list[int], spans: list[tuple[int, int, int]], cache: Pass):
        """`hidden`, all in this thread."""
        x = self.base.embed_tokens(paddle.to_tensor(ids, dtype="int64").unsqueeze(0))  # [1, T, D]
        angles = self._angles(spans)
        for layer in self.base.layers:
            x = layer(x, angles, None, cache)
        return self.base.norm(x)[0]

    @paddle.no_grad()
    def logits(self, hidden, rows: np.ndarray | None = None) -> np.ndarray:
        """Logits [R, V] in fp32 of some rows of hidden states [T, D], or of all."""
        x = hidden if rows is None else paddle.index_select(hidden, paddle.to_tensor(rows))
        return self.model.logits(x).numpy()

    @staticmethod
    def finite(hidden) -> bool:
        """Whether hidden states [T, D] are numbers, and so the keys and values they were made with."""
        return bool(paddle.isfinite(hidden.astype("float32").sum()))

    def _angles(self, spans: list[tuple[int, int, int]]) -> Angles:
        """Angles of T tokens; with dynamic scaling a function of each segment's own key length."""
        rotary = self.base.rotary
        stretched = any(rotary.is_stretched(keys) for _, _, keys in spans)
        groups = [[span] for span in spans] if stretched else [spans]
        made = []
        for group in groups:
            positions = np.concatenate([np.arange(first, first + count) for first, count, _ in group])
            made.append(rotary(paddle.to_tensor(positions[None]), max(keys for _, _, keys in group)))
        if len(made) == 1:
            return made[0]
        return Angles(*(paddle.concat(parts, axis=1) for parts in zip(*made, strict=True)))
