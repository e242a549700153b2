"""Model runner: one forward pass of the decoder over the flat row of tokens of a step."""

import numpy as np
import paddle

from ..ops import threads
from ..ops.rope import Angles
from . import parallel_prefill
from .kv_slots import Chunk, PassKVCache, SlotKVCache
from .scheduler import StepPlan

HEAD_ROWS = 64  # rows of logits at a time: a prompt's would take 0.4 MB for each token
SOFTMAX = 250  # operations of a product that take as long as the softmax of one score, on a CPU


class ModelRunner:
    """An AquilaForCausalLM without its own KV cache: T tokens of many sequences in, hidden states and logits out.

    D hidden, N query heads, K key/value heads, H head size, V vocabulary.
    """

    def __init__(self, model):
        self.model, self.base = model, model.aquila
        config = model.config
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self._of_token = 2 * D * (2 * (N + K) * H + 3 * config.intermediate_size)  # operations of a layer's products
        self._of_key = N * (4 * H + SOFTMAX)

    def forward(self, plan: StepPlan, cache: SlotKVCache):
        """Hidden states [T, D] of a step's decode tokens and prompt chunks; writes their keys and values."""
        chunks = [Chunk(c.sequence.slot, c.start, c.count) for c in plan.chunks]
        slots, lengths = [s.slot for s in plan.decoding], [s.computed for s in plan.decoding]
        ids = [s.tokens[-1] for s in plan.decoding]
        spans = [(s.computed, 1, s.computed + 1) for s in plan.decoding]
        for chunk in plan.chunks:
            prompt = chunk.sequence.prompt
            ids += prompt[chunk.start : chunk.start + chunk.count]
            spans.append((chunk.start, chunk.count, len(prompt)))
        return self.hidden(ids, spans, PassKVCache(cache, slots, lengths, chunks))

    @paddle.no_grad()
    def hidden(self, ids: list[int], spans: list[tuple[int, int, int]], cache: PassKVCache):
        """Hidden states [T, D] after the final norm of the flat row of ids [T].

        spans: (first position, count, key length) of each segment, in order.
        """
        on_cpu = self.base.embed_tokens.weight.place.is_cpu_place()
        count = threads.count() if on_cpu else 1
        parts = [(0, len(ids))] if count == 1 else parallel_prefill.parts(self._costs(spans), cache.B, count)
        if len(parts) == 1:
            return self._layers(ids, spans, cache)

        def work(number: int, begin: int, end: int):
            some = list(parallel_prefill.cuts(spans, begin, end))
            return lambda wavefront: self._layers(ids[begin:end], some, cache.cut(begin, end, wavefront.gate(number)))

        return paddle.concat(parallel_prefill.run([work(number, *part) for number, part in enumerate(parts)]))

    def _costs(self, spans: list[tuple[int, int, int]]) -> np.ndarray:
        """Operations of each token in a layer [T]: its matrix products, and attention over the keys before it."""
        keys = np.concatenate([np.arange(first + 1, first + count + 1) for first, count, _ in spans])
        return self._of_token + self._of_key * keys

    def _layers(self, ids: list[int], spans: list[tuple[int, int, int]], cache: PassKVCache):
        """`hidden` in the calling thread."""
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
        """Whether hidden states [T, D] are finite, and so the keys and values they were computed from."""
        return bool(paddle.isfinite(hidden.astype("float32").sum()))

    def _angles(self, spans: list[tuple[int, int, int]]) -> Angles:
        """RoPE angles of T tokens; with dynamic scaling a function of each segment's own key length."""
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
