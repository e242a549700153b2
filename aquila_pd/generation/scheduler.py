"""Scheduler: admission of sequences to KV cache slots, chunked prefill and prefix caching. Plans steps, runs nothing.

    add -> waiting -> admission -> prefill (in chunks) -> decode (a token a step) -> release
              ^           |                                                             |
              |           +-- copies a prefix out of any slot, free or running          v
              +-- held back while another sequence prefills the same prefix     free slot, keeps its ids until evicted

The scheduler counts tokens and never sees a tensor: a StepPlan says which keys and values to copy and which tokens to
compute, and the engine does both before it asks for the next plan.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from .sequence import Sequence

MIN_SHARED = 16  # tokens: computing fewer is cheaper than waiting for them or copying their keys and values


class PromptChunk(NamedTuple):
    """Tokens start..start+count of a sequence's prompt; they are `rows` of the step's flat row of tokens."""

    sequence: Sequence
    start: int
    count: int
    rows: slice

    @property
    def completes_prompt(self) -> bool:
        """Whether the logits of the chunk's last token are those of the sequence's first new token."""
        return self.start + self.count == len(self.sequence.prompt)


class PrefixCopy(NamedTuple):
    """Keys and values of the first `length` tokens: from slot `source` to slot `target`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True)
class StepPlan:
    """One step: the copies in their order, then one forward pass over the flat row of decode tokens and prompt chunks.

    admitted: sequences that got a slot; decoding: sequences that compute their last token, in the order of their
    slots; length: tokens in the fullest slot after the step.
    """

    admitted: list[Sequence]
    copies: list[PrefixCopy]
    decoding: list[Sequence]
    chunks: list[PromptChunk]
    length: int

    def __bool__(self) -> bool:
        return bool(self.decoding or self.chunks)

    @property
    def sampled(self) -> list[tuple[Sequence, int]]:
        """(sequence, row of its logits) of those that draw a token in this step."""
        completed = [(c.sequence, c.rows.stop - 1) for c in self.chunks if c.completes_prompt]
        return [(sequence, row) for row, sequence in enumerate(self.decoding)] + completed


@dataclass
class Slot:
    """A KV cache slot. ids: tokens whose keys and values it still holds while free; freed: its place in LRU order."""

    number: int
    sequence: Sequence | None = None
    ids: list[int] = field(default_factory=list)
    freed: int = 0


class Scheduler:
    """Sequences on a fixed number of slots.

    prefill_chunk: most prompt tokens of one step. prefix_caching: whether prompts start from keys and values that a
    slot holds. max_reusable: the longest prompt whose keys and values others may use; those of longer ones were made
    with RoPE angles that depend on the length.
    """

    def __init__(self, slots: int, *, prefill_chunk: int, prefix_caching: bool = True, max_reusable: float = math.inf):
        self.prefill_chunk, self.prefix_caching, self._max_reusable = prefill_chunk, prefix_caching, max_reusable
        self._slots = [Slot(number) for number in range(slots)]
        self._waiting: deque[Sequence] = deque()
        self._arrived = self._released = 0

    @property
    def running(self) -> list[Sequence]:
        """Sequences that have a slot, in the order of their slots."""
        return [slot.sequence for slot in self._slots if slot.sequence]

    @property
    def waiting(self) -> list[Sequence]:
        """Sequences without a slot, in order of arrival."""
        return list(self._waiting)

    @property
    def counts(self) -> tuple[int, int]:
        """How many sequences run and how many wait; called for each token, so without a list of them."""
        return sum(slot.sequence is not None for slot in self._slots), len(self._waiting)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences behind those that wait."""
        for sequence in sequences:
            sequence.number = self._arrived
            self._arrived += 1
            self._waiting.append(sequence)

    def schedule(self) -> StepPlan:
        """Admit what can be admitted and plan the next step; false when there is nothing to compute."""
        admitted, copies = self._admit()
        decoding = [sequence for sequence in self.running if not sequence.prefilling]
        chunks = self._next_chunks(first_row=len(decoding))
        ends = [s.computed + 1 for s in decoding] + [c.start + c.count for c in chunks]
        length = max([*ends, *(s.computed for s in self.running)], default=0)
        return StepPlan(admitted, copies, decoding, chunks, length)

    def release(self, sequence: Sequence, *, reusable: bool = True) -> None:
        """Free the sequence's slot, or its place in the queue. reusable: whether its keys and values are sound."""
        if sequence.slot is None:
            self._waiting.remove(sequence)
            return
        self._released += 1
        slot = self._slots[sequence.slot]
        slot.sequence, slot.freed = None, self._released
        reusable = reusable and len(sequence.prompt) <= self._max_reusable
        slot.ids = sequence.ids(0, sequence.computed) if reusable else []

    def clear_cache(self) -> None:
        """No free slot holds anything from now on."""
        for slot in self._slots:
            self._evict(slot)

    def truncate_cache(self, length: int) -> None:
        """Free slots hold no more than `length` tokens from now on."""
        for slot in self._slots:
            del slot.ids[length:]

    # ------------------------------------------------------------------------------- admission, prefix caching

    def _admit(self) -> tuple[list[Sequence], list[PrefixCopy]]:
        """Free slots to waiting sequences in order of arrival, except those that gain by waiting a little."""
        free = [slot for slot in self._slots if slot.sequence is None]
        admitted, copies = [], []
        for sequence in self.waiting if free else ():  # a list of its own: admission takes out of the queue
            if not free:
                break
            if self._wait_for_shared_prefix(sequence):
                continue
            slot, donor = self._place(sequence, free)
            if donor is not None and donor is not slot:
                copies.append(PrefixCopy(donor.number, slot.number, sequence.computed))
            free.remove(slot)
            self._waiting.remove(sequence)
            slot.sequence, sequence.slot = sequence, slot.number
            admitted.append(sequence)
        return admitted, copies

    def _wait_for_shared_prefix(self, sequence: Sequence) -> bool:
        """Whether a prompt that is being prefilled shares a prefix with this one that is not computed yet."""
        if not self._may_reuse(sequence):
            return False
        others = [other for other in self.running if other.prefilling and self._may_reuse(other)]
        wanted = sequence.prompt[:-1]
        return any(common_length(other.prompt, wanted) >= other.computed + MIN_SHARED for other in others)

    def _may_reuse(self, sequence: Sequence) -> bool:
        """Not with prompt log-probabilities, which need the hidden states of every token; nor beyond max_reusable."""
        scored = sequence.params.prompt_logprobs
        return self.prefix_caching and not scored and len(sequence.prompt) <= self._max_reusable

    def _place(self, sequence: Sequence, free: list[Slot]) -> tuple[Slot, Slot | None]:
        """(the free slot to use, the slot whose prefix it starts from); sets what need not be computed."""
        oldest = min(free, key=lambda slot: (slot.freed if slot.ids else -1, slot.number))
        donor, length = self._find_donor(sequence)
        # In place where that loses less of what others may come back to.
        in_place = donor in free and len(donor.ids) - length <= len(oldest.ids)
        slot = donor if in_place else oldest
        self._evict(slot)
        sequence.computed = sequence.reused = length
        return slot, donor

    def _find_donor(self, sequence: Sequence) -> tuple[Slot | None, int]:
        """The slot that holds most of the prompt, and how many tokens of it; (None, 0) below MIN_SHARED."""
        if not self._may_reuse(sequence):
            return None, 0
        wanted = sequence.prompt[:-1]  # the last token is computed in any case: its logits are needed
        shared = [common_length(self._reusable_ids(slot), wanted) for slot in self._slots]
        length = max(shared)
        return (self._slots[shared.index(length)], length) if length >= MIN_SHARED else (None, 0)

    def _reusable_ids(self, slot: Slot) -> list[int]:
        """Tokens whose keys and values in the slot others may use, also while its sequence runs."""
        sequence = slot.sequence
        if sequence is None:
            return slot.ids
        return sequence.ids(0, sequence.computed) if len(sequence.prompt) <= self._max_reusable else []

    @staticmethod
    def _evict(slot: Slot) -> None:
        slot.ids = []

    # ----------------------------------------------------------------------------------------- chunked prefill

    def _next_chunks(self, *, first_row: int) -> list[PromptChunk]:
        """Up to prefill_chunk prompt tokens, in order of arrival; the first is row `first_row` of the flat row."""
        prefilling = [sequence for sequence in self.running if sequence.prefilling]
        chunks, budget, row = [], self.prefill_chunk, first_row
        for sequence in sorted(prefilling, key=lambda s: s.number):
            count = min(budget, len(sequence.prompt) - sequence.computed)
            if count:
                chunks.append(PromptChunk(sequence, sequence.computed, count, slice(row, row + count)))
                budget, row = budget - count, row + count
        return chunks


def common_length(a: list[int], b: list[int]) -> int:
    """How many ids two lists begin with in common; slices compare in C, so halving is faster than a loop."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
