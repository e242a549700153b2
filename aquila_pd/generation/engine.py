"""Continuous-batching engine: each step is one forward pass over decode tokens and prompt chunks of many sequences.

A step takes one decode token per running sequence and up to `prefill_chunk` prompt tokens (chunked prefill). Sequences
join and leave between steps; the tokens of one do not depend on the others, up to the rounding of matrix products of
other sizes. Freed slots keep their KV cache for prefix caching. Not thread-safe: one thread owns the engine.

The scheduler plans a step, the model runner computes it, the sampler draws tokens; here are requests and their ends.
"""

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from ..utils.errors import GenerationError
from . import sampler
from .kv_slots import SlotKVCache
from .model_runner import HEAD_ROWS, ModelRunner
from .request_checks import check_prompt, check_sizes
from .sampling_params import SamplingParams
from .scheduler import PromptChunk, Scheduler, StepPlan
from .sequence import (
    CANCELLED,
    ERROR,
    LENGTH,
    STOP,
    Listener,
    Sequence,
    TokenEvent,
    TokenLogprob,
    nonfinite,
)
from .stats import Stats


class Engine:
    """Continuous batching on one model.

    Args:
        model: an AquilaForCausalLM in evaluation mode.
        slots: KV cache slots, the most sequences that run at once; others wait.
        max_length: most tokens of prompt and answer of a sequence; default is the model's context length.
        prefill_chunk: most prompt tokens of one step, so that a long prompt does not delay the others' decode tokens.
        prefix_reuse: prefix caching, whether prompts start from keys and values that a slot holds.

    Memory: 2 * layers * kv_heads * head_dim numbers for each slot and token of the longest sequence so far.
    """

    def __init__(
        self,
        model,
        *,
        slots: int = 8,
        max_length: int | None = None,
        prefill_chunk: int = 512,
        prefix_reuse: bool = True,
    ):
        config = model.config
        self.context_length = context_length(config)
        self.max_length = self.context_length if max_length is None else max_length
        self.vocab_size = config.vocab_size
        self.prefill_chunk, self.prefix_reuse = prefill_chunk, prefix_reuse
        check_sizes(slots=slots, max_length=self.max_length, prefill_chunk=prefill_chunk)
        self.stats = Stats()
        self._runner = ModelRunner(model)
        dtype = model.aquila.embed_tokens.weight.dtype
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        self._cache = SlotKVCache(config.num_hidden_layers, slots, kv_heads, head_dim, dtype, self.max_length)
        self._half_done = False  # a step was left by an exception
        self._plain_rope = config.max_position_embeddings if config.rope.depends_on_length else math.inf
        self._scheduler = Scheduler(
            slots, prefill_chunk=prefill_chunk, prefix_caching=prefix_reuse, max_reusable=self._plain_rope
        )

    # ------------------------------------------------------------------------------------------------ requests

    def add(self, prompt: Iterable[int], params: SamplingParams, listener: Listener | None = None) -> list[Sequence]:
        """Queue a prompt; returns its params.n sequences, which `step` continues.

        listener: called with every TokenEvent of theirs, inside `step`; returning True ends that sequence.
        Raises GenerationError for what the model cannot continue, PromptTooLong when no room is left for an answer.
        """
        prompt = self._checked(prompt, params)
        sequences = [Sequence(i, prompt, params, listener) for i in range(params.n)]
        self._scheduler.add(sequences)
        self._update_gauges()
        return sequences

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now, wherever it is; its slot is free at once. Does nothing to one that has ended."""
        if sequence.finish_reason is None:
            self._finish(sequence, CANCELLED)
            self._update_gauges()

    def step(self) -> bool:
        """One forward pass; False when there was nothing to do. After an exception out of it only `reset` is left."""
        if self._half_done:
            raise GenerationError("The last step was left by an exception: call reset() before the next one.")
        begin = time.perf_counter()
        self._half_done = True
        plan = self._scheduler.schedule()
        if plan:
            self._advance(plan)
        self._half_done = False
        if not plan:
            return False
        self.stats.steps += 1
        self._update_gauges()
        self.stats.step_seconds += time.perf_counter() - begin
        return True

    def reset(self, error: Exception | None = None) -> None:
        """After an exception out of `step`: every sequence ends with it, and no slot holds anything."""
        error = error or GenerationError("Generation was reset.")
        for sequence in self._scheduler.running + self._scheduler.waiting:
            if sequence.finish_reason is None:  # a listener may have cancelled it
                self._finish(sequence, ERROR, error=error)
        self._scheduler.clear_cache()
        for slot in range(self._cache.slots):
            self._cache.clear(slot)
        self._half_done = False
        self._update_gauges()

    def generate(
        self, prompts: Iterable[Iterable[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[list[Sequence]]:
        """Run prompts to their ends; for each its sequences. A sequence that failed has its `error` set."""
        prompts = list(prompts)
        each = list(zip(prompts, params if isinstance(params, list) else [params] * len(prompts), strict=True))
        each = [(self._checked(prompt, p), p) for prompt, p in each]  # all of them before one is queued
        made = [self.add(prompt, p) for prompt, p in each]
        every = [sequence for sequences in made for sequence in sequences]
        with self._cancelled_on_exit(every):
            while any(s.finish_reason is None for s in every):
                self.step()
        return made

    def stream(self, prompt: Iterable[int], params: SamplingParams) -> Iterator[TokenEvent]:
        """The events of one prompt as they come. Closing the iterator cancels it."""
        return self._events(self._checked(prompt, params), params)

    def _events(self, prompt: list[int], params: SamplingParams) -> Iterator[TokenEvent]:
        events: deque[TokenEvent] = deque()
        sequences = self.add(prompt, params, lambda event: events.append(event))
        with self._cancelled_on_exit(sequences):
            while events or any(s.finish_reason is None for s in sequences):
                if not events:
                    self.step()
                while events:
                    yield events.popleft()

    @contextmanager
    def _cancelled_on_exit(self, sequences: list[Sequence]) -> Iterator[None]:
        """On exit cancel what still runs of these sequences, and reset the engine after an exception out of a step."""
        try:
            yield
        finally:
            for sequence in sequences:
                self.cancel(sequence)
            if self._half_done:
                self.reset()

    def _checked(self, prompt: Iterable[int], params: SamplingParams) -> list[int]:
        return check_prompt(prompt, params, vocab_size=self.vocab_size, max_length=self.max_length)

    # ---------------------------------------------------------------------------------------- one forward pass

    def _advance(self, plan: StepPlan) -> None:
        """Carry a plan out: copy prefixes, one forward pass, then a token for each sequence that has its logits."""
        self.stats.reused_tokens += sum(sequence.reused for sequence in plan.admitted)
        for copy in plan.copies:
            self._cache.copy(*copy)
        if self._cache.fit(plan.length):
            self._scheduler.truncate_cache(self._cache.capacity)
        begin = time.perf_counter()
        hidden = self._runner.forward(plan, self._cache)  # [T, D]
        logits = self._next_logits(hidden, plan)  # [R, V]
        self.stats.forward_seconds += time.perf_counter() - begin
        self._end_nonfinite(hidden, logits, plan)
        for chunk in plan.chunks:
            if chunk.sequence.params.prompt_logprobs and chunk.sequence.finish_reason is None:
                self._score_prompt(chunk, hidden[chunk.rows])
            chunk.sequence.computed += chunk.count
            self.stats.prompt_tokens += chunk.count
        for sequence in plan.decoding:
            sequence.computed += 1
        for (sequence, _), row in zip(plan.sampled, logits, strict=True):
            if sequence.finish_reason is None:  # a listener may have cancelled it meanwhile
                self._next_token(sequence, row)

    def _next_logits(self, hidden, plan: StepPlan) -> np.ndarray | list:
        """Logits [R, V] of `plan.sampled` from the hidden states [T, D]."""
        rows = [row for _, row in plan.sampled]
        if not rows:
            return []
        every = len(rows) == hidden.shape[0]
        return self._runner.logits(hidden, None if every else np.array(rows))

    def _end_nonfinite(self, hidden, logits, plan: StepPlan) -> None:
        """End sequences with NaN or infinite values before a listener is called or a prompt starts from their keys."""
        damaged = [s for (s, _), row in zip(plan.sampled, logits, strict=True) if not sampler.finite(row)]
        for chunk in plan.chunks:
            if not self._runner.finite(hidden[chunk.rows]) and chunk.sequence not in damaged:
                damaged.append(chunk.sequence)
        for sequence in damaged:
            sequence.damaged = True
        for sequence in damaged:
            if sequence.finish_reason is None:
                self._fail_nonfinite(sequence)

    def _score_prompt(self, chunk: PromptChunk, hidden) -> None:
        """Append the prompt's log-probabilities that a chunk's hidden states [T, D] predict, each of the next token."""
        sequence, start = chunk.sequence, chunk.start
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)  # nothing is before the first
        top = sequence.params.logprobs or 0
        targets = sequence.prompt[start + 1 : start + 1 + hidden.shape[0]]
        for block in range(0, len(targets), HEAD_ROWS):
            some = targets[block : block + HEAD_ROWS]
            logits = self._runner.logits(hidden[block : block + len(some)])
            if not all(map(sampler.finite, logits)):
                self._fail_nonfinite(sequence)
                return
            sequence.prompt_logprobs += [sampler.logprob_of(row, i, top) for row, i in zip(logits, some, strict=True)]

    # ---------------------------------------------------------------------------------- tokens, finish reasons

    def _next_token(self, sequence: Sequence, logits: np.ndarray) -> None:
        params = sequence.params
        if params.max_new_tokens == 0:
            self._finish(sequence, LENGTH)
            return
        token = sampler.choose(logits, sequence)
        logprob = None
        if params.logprobs is not None:
            logprob = sampler.logprob_of(logits, token, params.logprobs)
            sequence.logprobs.append(logprob)
        sequence.tokens.append(token)
        self.stats.new_tokens += 1
        reason = None
        if token in params.stop_ids:
            reason, sequence.stop_id = STOP, token
        elif len(sequence.tokens) == params.max_new_tokens or sequence.length >= self.max_length:
            reason = LENGTH
        self._deliver(sequence, token, logprob, reason)

    def _deliver(self, sequence: Sequence, token: int, logprob: TokenLogprob | None, reason: str | None) -> None:
        """Call the listener with a token event, which may end the sequence; finish the sequence if `reason` is set."""
        if reason is not None:
            self._finish(sequence, reason, token=token, logprob=logprob)
        elif sequence.listener is not None:
            try:
                enough = sequence.listener(TokenEvent(sequence, token, logprob, None))
            except Exception as error:  # the listener's own fault: its sequence ends with it, the others go on
                self._finish(sequence, ERROR, error=error, tell=False)
                return
            if enough is True and sequence.finish_reason is None:
                self._finish(sequence, STOP, tell=False)

    def _finish(
        self,
        sequence: Sequence,
        reason: str,
        *,
        token: int | None = None,
        logprob: TokenLogprob | None = None,
        error: Exception | None = None,
        tell: bool = True,
    ) -> None:
        sequence.finish_reason, sequence.error = reason, error
        self._release(sequence)
        if tell and sequence.listener is not None:
            try:
                sequence.listener(TokenEvent(sequence, token, logprob, reason))
            except Exception as failure:
                sequence.finish_reason, sequence.error = ERROR, error or failure
        self.stats.finished[sequence.finish_reason] += 1

    def _fail_nonfinite(self, sequence: Sequence) -> None:
        self.stats.nonfinite += 1
        self._finish(sequence, ERROR, error=nonfinite(sequence))

    def _release(self, sequence: Sequence) -> None:
        reusable = not sequence.damaged and sequence.finish_reason != ERROR
        self._scheduler.release(sequence, reusable=reusable)
        if not reusable and sequence.slot is not None:
            self._cache.clear(sequence.slot)

    def _update_gauges(self) -> None:
        self.stats.running, self.stats.waiting = self._scheduler.counts


def context_length(config) -> int:
    """Tokens a model can attend to: its trained positions, as far as its RoPE scaling stretches them."""
    return config.rope.context_length
