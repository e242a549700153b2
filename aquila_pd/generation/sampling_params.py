"""SamplingParams: how the next token is chosen and when a sequence ends. No framework."""

from collections.abc import Iterable
from dataclasses import field, fields
from functools import cache
from typing import Annotated, get_args

from pydantic import BeforeValidator, Field

from ..utils.errors import GenerationError
from ..utils.validation import choice, contradiction, flag, number, settings, whole, wrong

STANDARD, AQUILA = "standard", "aquila"
ORDERS = (STANDARD, AQUILA)
MAX_SEED = 2**64 - 1
MOST_SEQUENCES = 4096  # of one prompt
LARGEST = 1e30  # of a number that meets logits: products and sums of a few of them are finite in float32
TOKEN = Annotated[int, Field(strict=True, ge=0)]
BIAS = number(ge=-LARGEST, le=LARGEST)


def _collected(ids: object) -> object:
    return tuple(ids) if isinstance(ids, Iterable) and not isinstance(ids, str | bytes) else ids


@settings(GenerationError, "These sampling parameters have no meaning:", "Correct them.", kw_only=True)
class SamplingParams:
    """How one request is continued. A number with a description is a command-line option too.

    Args:
        prompt_logprobs: logprobs, also for the tokens of the prompt, each given those before it.
        max_new_tokens: at most this many; 0 only with prompt_logprobs, to score a text.
        min_new_tokens: no stop id is drawn before this many.
        top_k: of tokens as likely as the last of the k, all are kept.
        logit_bias: token id -> what is added to its logit.
        stop_ids: a collection; drawing one of them ends the sequence, it is the last of its tokens.
        seed: 0 to 2**64 - 1; the same seed gives the same tokens whatever else runs. None: from the system.
        logprobs: None; 0 for the logarithm of each drawn token's probability; k for the k likeliest tokens' too.
            They are of the model's own distribution, before temperature, penalties and filters.
        n: so many independent continuations.
        order: "standard" is temperature, top_k, top_p, min_p, as everywhere else; "aquila" is top_p, top_k,
            temperature (then min_p), as in BAAI's own predict.

    Raises:
        GenerationError: every value that has no meaning.
    """

    prompt_logprobs: flag() = False  # first: max_new_tokens is judged by it
    max_new_tokens: whole(ge=0) = 256
    min_new_tokens: whole(ge=0) = 0
    temperature: number("logits are divided by it; 0 takes the likeliest token", ge=0, le=LARGEST) = 1.0
    top_k: whole("keep the k likeliest tokens; 0 keeps all", ge=0) = 0
    top_p: number("keep the likeliest tokens that hold this share of the probability; 1 keeps all", ge=1e-9, le=1) = 1.0
    min_p: number("keep tokens at least this many times as likely as the likeliest; 0 keeps all", ge=0, le=1) = 0.0
    repetition_penalty: number(
        "divides positive and multiplies negative logits of tokens seen before, the prompt's too", ge=1e-9, le=LARGEST
    ) = 1.0
    presence_penalty: number("taken off the logits of generated tokens", ge=-LARGEST, le=LARGEST) = 0.0
    frequency_penalty: number("taken off the logits of generated tokens per occurrence", ge=-LARGEST, le=LARGEST) = 0.0
    logit_bias: dict[TOKEN, BIAS] = field(default_factory=dict, hash=False)
    stop_ids: Annotated[tuple[TOKEN, ...], Field(strict=True), BeforeValidator(_collected)] = ()
    seed: whole(ge=0, le=MAX_SEED) | None = None
    logprobs: whole(ge=0) | None = None
    n: whole(ge=1, le=MOST_SEQUENCES) = 1
    order: choice(ORDERS) = STANDARD

    @contradiction("max_new_tokens")
    def _some(value, others):
        if value == 0 and not others.get("prompt_logprobs"):
            raise wrong("it is 0 and must be at least 1; 0 only scores a prompt, with prompt_logprobs")

    @contradiction("min_new_tokens")
    def _no_more_than_max(value, others):
        if value > others.get("max_new_tokens", value):
            raise wrong(f"it is {value}, more than max_new_tokens {others['max_new_tokens']}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen from them."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
        return penalties or bool(self.logit_bias) or self.min_new_tokens > 0


@cache
def described() -> dict[str, tuple[type, str]]:
    """Numbers with a description, for options and requests: name -> (int or float, description)."""
    known = SamplingParams.__pydantic_fields__
    named = {field.name: (get_args(field.type), known[field.name].description) for field in fields(SamplingParams)}
    return {name: (types[0], description) for name, (types, description) in named.items() if description}
