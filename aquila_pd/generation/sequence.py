"""What goes through the engine: one Sequence for each continuation of a prompt, and the events it gives out."""

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
    """Natural logarithm of a token's probability under the model, and of the likeliest ones, likeliest first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class TokenEvent(NamedTuple):
    """One step of one sequence. `token` is None in a last event that brings none (cancelled, error)."""

    sequence: "Sequence"
    token: int | None
    logprob: TokenLogprob | None
    finish_reason: str | None


Listener = Callable[[TokenEvent], bool | None]


@dataclass(eq=False)
class Sequence:
    """One continuation of a prompt.

    tokens: ids drawn so far, a stop id included. logprobs: one for each of them when asked for; prompt_logprobs: one
    for each token of the prompt but None for the first. finish_reason: None while it runs, then "stop" (stop_id says
    by which id, None when its listener had enough), "length", "cancelled" or "error" (error says what).
    reused: tokens of the prompt whose keys and values were already there.
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
    # the engine's own
    number: int = 0  # in the order of arrival
    slot: int | None = None
    computed: int = 0  # tokens of prompt + answer whose keys and values the slot holds
    damaged: bool = False  # what the slot holds are no numbers
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
        """Ids start..end of prompt and answer as one."""
        P = len(self.prompt)
        return self.prompt[start:end] + self.tokens[max(start - P, 0) : max(end - P, 0)]
