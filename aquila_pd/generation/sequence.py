"""Per-request state: Sequence, one for each continuation of a prompt; TokenEvent; finish reasons and errors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..utils.errors import GenerationError
from .sampling_params import SamplingParams

STOP, LENGTH, CANCELLED, ERROR = "stop", "length", "cancelled", "error"
FINISHES = (STOP, LENGTH, CANCELLED, ERROR)


class PromptTooLong(GenerationError):
    """A prompt that leaves no room for an answer."""


class NonFiniteLogits(GenerationError):
    """The model computed NaN or infinite logits for a sequence."""


class TokenLogprob(NamedTuple):
    """Log-probability (natural) of a token, and top: those of the likeliest tokens, in descending order."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenEvent(NamedTuple):
    """A new token or the end of a sequence. `token` is None in a last event without one (cancelled, error)."""

    sequence: "Sequence"
    token: int | None
    logprob: TokenLogprob | None
    finish_reason: str | None


Listener = Callable[[TokenEvent], bool | None]


@dataclass(eq=False)
class Sequence:
    """One continuation of a prompt.

    tokens: sampled ids, a stop id included. logprobs: one for each of them if requested; prompt_logprobs: one for each
    prompt token, None for the first. finish_reason: None while it runs, then "stop" (stop_id is the id, None when the
    listener ended it), "length", "cancelled" or "error" (error holds the exception).
    reused: prompt tokens taken from the prefix cache.
    """

    index: int
    prompt: list[int]
    params: SamplingParams
    listener: Listener | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish_reason: str | None = None
    stop_id: int | None = None
    error: Exception | None = None
    reused: int = 0
    # for the scheduler and the engine
    number: int = 0  # order of arrival
    slot: int | None = None
    computed: int = 0  # tokens of prompt + answer whose keys and values the slot holds
    damaged: bool = False  # the slot holds NaN or infinite values
    random: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        seed = self.params.seed
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        # a counter-based generator: two keys never meet, whatever the number of draws
        self.random = np.random.Generator(np.random.Philox(key=np.array([seed, self.index], dtype=np.uint64)))

    @property
    def length(self) -> int:
        """Tokens of prompt and answer together."""
        return len(self.prompt) + len(self.tokens)

    @property
    def prefilling(self) -> bool:
        """Whether tokens of the prompt are still to be computed."""
        return self.computed < len(self.prompt)

    def ids(self, start: int, end: int) -> list[int]:
        """Ids start..end of prompt and answer, concatenated."""
        P = len(self.prompt)
        return self.prompt[start:end] + self.tokens[max(start - P, 0) : max(end - P, 0)]


def nonfinite(sequence: Sequence) -> NonFiniteLogits:
    """The error for NaN or infinite logits of a sequence."""
    where = f"after {len(sequence.tokens)} tokens of an answer" if sequence.tokens else "for a prompt"
    return NonFiniteLogits(
        f"The model gave NaN or infinite logits {where}. A damaged weight or an overflow in half precision does this: "
        "`aquila-pd convert --verify content` finds the first, dtype float32 or bfloat16 cures the second."
    )
