"""Engine: many sequences on one model, one forward pass at a time.

Each step takes one token for every sequence that is answering and up to `prefill_chunk` tokens of prompts that are
not read yet, all in one pass. Sequences join and leave between steps; what one is given does not depend on the others
(up to the rounding of products of other sizes). Not for several threads: one owns the engine.

A slot that falls free keeps its tokens' keys and values until somebody needs it. A prompt that begins like them, the
next turn of a chat for example, starts where they part.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from ..utils.errors import GenerationError, shown_value
from . import sampler
from .kv_slots import Chunk, Pass, Slots
from .model_runner import HEAD_ROWS, Runner
from .sampling_params import SamplingParams
from .sequence import (
    CANCELLED,
    ERROR,
    LENGTH,
    STOP,
    Listener,
    NonFiniteLogits,
    PromptTooLong,
    Sequence,
    TokenEvent,
    TokenLogprob,
)

WORTH_REUSING = 16  # tokens: computing fewer is cheaper than waiting for them or copying them


@dataclass
class Stats:
    """Counts since the engine was made; `running` and `waiting` are of this moment. Seconds are of the wall clock."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    prompt_tokens: int = 0  # computed, without those reused
    reused_tokens: int = 0
    new_tokens: int = 0
    finished: Counter = field(default_factory=Counter)  # by reason
    nonfinite: int = 0
    forward_seconds: float = 0.0  # in the model
    step_seconds: float = 0.0  # in all


@dataclass
class Slot:
    """Whose tokens a slot holds. `ids` are those of the last sequence that has left it."""

    number: int
    sequence: Sequence | None = None
    ids: list[int] = field(default_factory=list)
    left: int = 0  # the step at which it fell free


class Engine:
    """Generation on one model.

    Args:
        model: an AquilaForCausalLM in evaluation mode.
        slots: so many sequences run at once; others wait.
        max_length: most tokens of prompt and answer of a sequence; default is the model's context length.
        prefill_chunk: most prompt tokens of one step, so that a long prompt does not stop the others' answers.
        prefix_reuse: whether prompts may start from what a slot holds.

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
        _check_sizes(slots=slots, max_length=self.max_length, prefill_chunk=prefill_chunk)
        self.stats = Stats()
        self._runner = Runner(model)
        dtype = model.aquila.embed_tokens.weight.dtype
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        self._cache = Slots(config.num_hidden_layers, slots, kv_heads, head_dim, dtype, self.max_length)
        self._slots = [Slot(number) for number in range(slots)]
        self._waiting: deque[Sequence] = deque()
        self._added = 0
        self._half_done = False  # a step was left by an exception
        self._plain_rope = config.max_position_embeddings if config.rope.depends_on_length else math.inf

    # ----------------------------------------------------------------------------------------- what callers do

    def add(self, prompt: Iterable[int], params: SamplingParams, listener: Listener | None = None) -> list[Sequence]:
        """Queue a prompt; returns its params.n sequences, which `step` continues.

        listener: called with every TokenEvent of theirs, inside `step`; returning True ends that sequence.
        Raises GenerationError for what the model cannot continue, PromptTooLong when no room is left for an answer.
        """
        prompt = self._checked(prompt, params)
        numbers = range(self._added, self._added + params.n)
        sequences = [Sequence(i, prompt, params, listener, number=number) for i, number in enumerate(numbers)]
        self._added += params.n
        self._waiting.extend(sequences)
        self._count()
        return sequences

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now, wherever it is; its slot is free at once. Does nothing to one that has ended."""
        if sequence.finish_reason is None:
            self._finish(sequence, CANCELLED)
            self._count()

    def step(self) -> bool:
        """One forward pass; False when there was nothing to do. After an exception out of it only `reset` is left."""
        if self._half_done:
            raise GenerationError("The last step was left by an exception: call reset() before the next one.")
        begin = time.perf_counter()
        self._half_done = True
        self._admit()
        decoding = [s.sequence for s in self._slots if s.sequence and not s.sequence.prefilling]
        chunks = self._next_chunks()
        if decoding or chunks:
            self._advance(decoding, chunks)
        self._half_done = False
        if not decoding and not chunks:
            return False
        self.stats.steps += 1
        self._count()
        self.stats.step_seconds += time.perf_counter() - begin
        return True

    def reset(self, error: Exception | None = None) -> None:
        """After an exception out of `step`: every sequence ends with it, and no slot holds anything."""
        error = error or GenerationError("Generation was reset.")
        sequences = [slot.sequence for slot in self._slots if slot.sequence] + list(self._waiting)
        for sequence in sequences:
            if sequence.finish_reason is None:  # a listener may have cancelled it
                self._finish(sequence, ERROR, error=error)
        for slot in self._slots:
            slot.ids = []
            self._cache.clear(slot.number)
        self._half_done = False
        self._count()

    def generate(
        self, prompts: Iterable[Iterable[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[list[Sequence]]:
        """Run prompts to their ends; for each its sequences. A sequence that failed has its `error` set."""
        prompts = list(prompts)
        each = list(zip(prompts, params if isinstance(params, list) else [params] * len(prompts), strict=True))
        each = [(self._checked(prompt, p), p) for prompt, p in each]  # all of them before one is queued
        made = [self.add(prompt, p) for prompt, p in each]
        every = [sequence for sequences in made for sequence in sequences]
        with self._left_in_order(every):
            while any(s.finish_reason is None for s in every):
                self.step()
        return made

    def stream(self, prompt: Iterable[int], params: SamplingParams) -> Iterator[TokenEvent]:
        """The events of one prompt as they come. Closing the iterator cancels it."""
        return self._events(self._checked(prompt, params), params)

    def _events(self, prompt: list[int], params: SamplingParams) -> Iterator[TokenEvent]:
        events: deque[TokenEvent] = deque()
        sequences = self.add(prompt, params, lambda event: events.append(event))
        with self._left_in_order(sequences):
            while events or any(s.finish_reason is None for s in sequences):
                if not events:
                    self.step()
                while events:
                    yield events.popleft()

    @contextmanager
    def _left_in_order(self, sequences: list[Sequence]) -> Iterator[None]:
        """Nothing of these sequences goes on after the block, and no step was left half done."""
        try:
            yield
        finally:
            for sequence in sequences:
                self.cancel(sequence)
            if self._half_done:
                self.reset()

    # ------------------------------------------------------------------------------------------- joining slots

    def _checked(self, prompt: Iterable[int], params: SamplingParams) -> list[int]:
        """The prompt's ids; raises GenerationError for what the engine cannot run."""
        prompt = list(prompt) if isinstance(prompt, Iterable) else [prompt]
        strange = [i for i in prompt if not isinstance(i, int | np.integer) or isinstance(i, bool)]
        if strange:
            raise GenerationError(f"A prompt is a list of token ids; {shown_value(strange[0])} is none.")
        if not prompt:
            raise GenerationError("The prompt is empty: there is no token to continue.")
        wrong = [i for i in {*prompt, *params.stop_ids, *params.logit_bias} if not 0 <= i < self.vocab_size]
        if wrong:
            raise GenerationError(
                f"The model has no token {', '.join(map(str, sorted(wrong)[:5]))}: its ids are 0 to "
                f"{self.vocab_size - 1}. The tokenizer is another model's."
            )
        if params.min_new_tokens and len(set(params.stop_ids)) == self.vocab_size:
            raise GenerationError("min_new_tokens leaves no token to draw: every token is a stop id.")
        answer = 1 if params.max_new_tokens else 0
        if len(prompt) + answer > self.max_length:
            behind = " with one for an answer" if answer else ""
            raise PromptTooLong(
                f"The prompt has {len(prompt):,} tokens; at most {self.max_length:,} fit{behind}. Shorten it."
            )
        return [int(i) for i in prompt]

    def _admit(self) -> None:
        """Give waiting sequences the free slots, in their order, except those that gain from waiting a little."""
        free = [slot for slot in self._slots if slot.sequence is None]
        for sequence in list(self._waiting) if free else ():
            if not free:
                break
            if self._soon_shared(sequence):
                continue
            slot = self._place(sequence, free)
            free.remove(slot)
            self._waiting.remove(sequence)
            slot.sequence, sequence.slot = sequence, slot.number

    def _soon_shared(self, sequence: Sequence) -> bool:
        """Whether a prompt being read right now begins like this one: its keys and values are worth waiting for."""
        if not self._may_reuse(sequence):
            return False
        busy = [s.sequence for s in self._slots if s.sequence and s.sequence.prefilling and self._may_reuse(s.sequence)]
        return any(
            common_length(other.prompt, sequence.prompt[:-1]) >= max(other.computed, 0) + WORTH_REUSING
            for other in busy
        )

    def _may_reuse(self, sequence: Sequence) -> bool:
        """Not for scores of every token, which have to be computed; nor where the rotary base depends on the length."""
        scored = sequence.params.prompt_logprobs
        return self.prefix_reuse and not scored and len(sequence.prompt) <= self._plain_rope

    def _place(self, sequence: Sequence, free: list[Slot]) -> Slot:
        """The free slot to use, holding as much of the prompt as any slot has; sets what need not be computed."""
        oldest = min(free, key=lambda slot: (slot.left if slot.ids else -1, slot.number))
        if not self._may_reuse(sequence):
            return self._taken(oldest)
        wanted = sequence.prompt[:-1]  # the last token is computed in any case: its logits are
        shared = {slot.number: common_length(self._held(slot), wanted) for slot in self._slots}
        donor = max(self._slots, key=lambda slot: shared[slot.number])
        length = shared[donor.number]
        if length < WORTH_REUSING:
            return self._taken(oldest)
        # In place where that loses less of what others may come back to.
        slot = donor if donor in free and len(donor.ids) - length <= len(oldest.ids) else oldest
        self._taken(slot)  # before it is written to
        if slot is not donor:
            self._cache.copy(donor.number, slot.number, length)
        sequence.computed = sequence.reused = length
        self.stats.reused_tokens += length
        return slot

    def _held(self, slot: Slot) -> list[int]:
        """Ids whose keys and values are here for others to use: none made with a stretched rotary base."""
        if slot.sequence is None:
            return slot.ids
        return slot.sequence.ids(0, slot.sequence.computed) if len(slot.sequence.prompt) <= self._plain_rope else []

    @staticmethod
    def _taken(slot: Slot) -> Slot:
        slot.ids = []
        return slot

    # -------------------------------------------------------------------------------------------- one forward pass

    def _next_chunks(self) -> list[tuple[Sequence, int]]:
        """(sequence, number of its prompt's tokens) for this step, those that came first first."""
        reading = [s.sequence for s in self._slots if s.sequence and s.sequence.prefilling]
        chunks, left = [], self.prefill_chunk
        for sequence in sorted(reading, key=lambda s: s.number):
            count = min(left, len(sequence.prompt) - sequence.computed)
            if count:
                chunks.append((sequence, count))
                left -= count
        return chunks

    def _advance(self, decoding: list[Sequence], chunks: list[tuple[Sequence, int]]) -> None:
        ends = [s.computed + 1 for s in decoding] + [s.computed + count for s, count in chunks]
        held = [slot.sequence.computed for slot in self._slots if slot.sequence]
        if self._cache.fit(max(ends + held)):
            self._forget_beyond(self._cache.capacity)
        begin = time.perf_counter()
        hidden = self._hidden(decoding, chunks)
        logits, rows = self._last_logits(hidden, decoding, chunks)
        self.stats.forward_seconds += time.perf_counter() - begin
        self._end_damaged(hidden, logits, rows, decoding, chunks)
        at = len(decoding)
        for sequence, count in chunks:
            if sequence.params.prompt_logprobs and sequence.finish_reason is None:
                self._score_prompt(sequence, hidden[at : at + count])
            sequence.computed += count
            self.stats.prompt_tokens += count
            at += count
        for sequence in decoding:
            sequence.computed += 1
        for sequence, row in zip(rows, logits, strict=True):
            if sequence.finish_reason is None:  # a listener may have cancelled it meanwhile
                self._next_token(sequence, row)

    def _end_damaged(self, hidden, logits, rows: list[Sequence], decoding: list[Sequence], chunks) -> None:
        """End the sequences whose numbers are none, before a listener is called or a prompt starts from theirs."""
        damaged = [sequence for sequence, row in zip(rows, logits, strict=True) if not sampler.finite(row)]
        at = len(decoding)
        for sequence, count in chunks:
            if not self._runner.finite(hidden[at : at + count]) and sequence not in damaged:
                damaged.append(sequence)
            at += count
        for sequence in damaged:
            sequence.damaged = True
        for sequence in damaged:
            if sequence.finish_reason is None:
                self._fail_nonfinite(sequence)

    def _hidden(self, decoding: list[Sequence], chunks: list[tuple[Sequence, int]]):
        """Hidden states [T, D] of the flat row: one token of each decoding sequence, then the chunks."""
        cache = Pass(
            self._cache,
            [s.slot for s in decoding],
            [s.computed for s in decoding],
            [Chunk(s.slot, s.computed, count) for s, count in chunks],
        )
        ids = [s.tokens[-1] for s in decoding]
        spans = [(s.computed, 1, s.computed + 1) for s in decoding]
        for sequence, count in chunks:
            start = sequence.computed
            ids += sequence.prompt[start : start + count]
            spans.append((start, count, len(sequence.prompt)))
        return self._runner.hidden(ids, spans, cache)

    def _last_logits(self, hidden, decoding: list[Sequence], chunks: list[tuple[Sequence, int]]):
        """Logits [R, V] for the sequences that get a token now, and those sequences."""
        rows, at, sequences = list(range(len(decoding))), len(decoding), list(decoding)
        for sequence, count in chunks:
            at += count
            if sequence.computed + count == len(sequence.prompt):
                rows.append(at - 1)
                sequences.append(sequence)
        if not rows:
            return [], []
        every = len(rows) == hidden.shape[0]
        return self._runner.logits(hidden, None if every else np.array(rows)), sequences

    def _score_prompt(self, sequence: Sequence, hidden) -> None:
        """Log-probabilities of the prompt's next tokens from the hidden states [T, D] of a chunk of it."""
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)  # nothing is before the first
        top, start = sequence.params.logprobs or 0, sequence.computed
        targets = sequence.prompt[start + 1 : start + 1 + hidden.shape[0]]
        for block in range(0, len(targets), HEAD_ROWS):
            some = targets[block : block + HEAD_ROWS]
            logits = self._runner.logits(hidden[block : block + len(some)])
            if not all(map(sampler.finite, logits)):
                self._fail_nonfinite(sequence)
                return
            sequence.prompt_logprobs += [sampler.logprob_of(row, i, top) for row, i in zip(logits, some, strict=True)]

    # ------------------------------------------------------------------------------------------- tokens and ends

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
        """Give a token to the listener, whose word may end the sequence, and end it if this was the last."""
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
        if sequence.slot is None:
            self._waiting.remove(sequence)
            return
        slot = self._slots[sequence.slot]
        slot.sequence, slot.left = None, self.stats.steps
        slot.ids = sequence.ids(0, sequence.computed)
        if len(sequence.prompt) > self._plain_rope:
            slot.ids = []  # made with another rotary base
        if sequence.damaged or sequence.finish_reason == ERROR:
            slot.ids = []
            self._cache.clear(slot.number)

    def _forget_beyond(self, length: int) -> None:
        for slot in self._slots:
            del slot.ids[length:]

    def _count(self) -> None:
        self.stats.running = sum(slot.sequence is not None for slot in self._slots)
        self.stats.waiting = len(self._waiting)


def context_length(config) -> int:
    """Tokens a model can look at: its trained positions, as far as its RoPE scaling stretches them."""
    return config.rope.context_length


def common_length(a: list[int], b: list[int]) -> int:
    """How many ids two lists begin with in common; slices compare in C, so halving is faster than a loop."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def nonfinite(sequence: Sequence) -> NonFiniteLogits:
    """The error for logits that are not numbers."""
    where = f"after {len(sequence.tokens)} tokens of an answer" if sequence.tokens else "for a prompt"
    return NonFiniteLogits(
        f"The model gave NaN or infinite logits {where}. A damaged weight or an overflow in half precision does this: "
        "`aquila-pd convert --verify content` finds the first, dtype float32 or bfloat16 cures the second."
    )


def _check_sizes(**sizes: int) -> None:
    wrong = [
        f"{name} is {value}"
        for name, value in sizes.items()
        if not isinstance(value, int) or value is True or value < 1
    ]
    if wrong:
        raise GenerationError(f"The engine cannot be built: {'; '.join(wrong)}. Each is a whole number from 1.")
