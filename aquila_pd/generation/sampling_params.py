"""SamplingParams: how the next token is chosen and when a sequence ends. Data and its checks; no framework."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..utils.errors import GenerationError, report, shown_value

STANDARD, AQUILA = "standard", "aquila"
ORDERS = (STANDARD, AQUILA)
MAX_SEED = 2**64 - 1
MOST_SEQUENCES = 4096  # of one prompt
LARGEST = 1e30  # of a number that meets logits: products and sums of a few of them are finite in float32


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued.

    Args:
        max_new_tokens: at most this many; 0 only with prompt_logprobs, to score a text.
        min_new_tokens: no stop id is drawn before this many.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens (ties with the last one too); 0 keeps all.
        top_p: keep the likeliest tokens until they hold this share of the probability; 1 keeps all.
        min_p: keep tokens at least this many times as likely as the likeliest; 0 keeps all.
        repetition_penalty: positive logits of tokens seen before (prompt too) are divided by it, negative multiplied.
        presence_penalty, frequency_penalty: taken off the logits of generated tokens, once and for each occurrence.
        logit_bias: token id -> what is added to its logit.
        stop_ids: a collection; drawing one of them ends the sequence, it is the last of its tokens.
        seed: 0 to 2**64 - 1; the same seed gives the same tokens whatever else runs. None: from the system.
        logprobs: None; 0 for the logarithm of each drawn token's probability; k for the k likeliest tokens' too.
            They are of the model's own distribution, before temperature, penalties and filters.
        prompt_logprobs: the same for the tokens of the prompt, each given those before it.
        n: so many independent continuations.
        order: "standard" is temperature, top_k, top_p, min_p, as everywhere else; "aquila" is top_p, top_k,
            temperature (then min_p), as in BAAI's own predict.

    Raises:
        GenerationError: every value that has no meaning.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    stop_ids: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False
    n: int = 1
    order: str = STANDARD

    def __post_init__(self) -> None:
        if isinstance(self.stop_ids, Iterable) and not isinstance(self.stop_ids, str | bytes):
            object.__setattr__(self, "stop_ids", tuple(self.stop_ids))  # before a generator is used up
        findings = [line for check in (self._counts, self._numbers, self._others) for line in check()]
        if findings:
            raise GenerationError(report("These sampling parameters have no meaning:", findings, "Correct them."))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))  # what was checked does not change any more

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen from them."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
        return penalties or bool(self.logit_bias) or self.min_new_tokens > 0

    def _counts(self) -> list[str]:
        limits = {
            "max_new_tokens": (0 if self.prompt_logprobs is True else 1, None),
            "min_new_tokens": (0, None),
            "top_k": (0, None),
            "n": (1, MOST_SEQUENCES),
            **({} if self.logprobs is None else {"logprobs": (0, None)}),
            **({} if self.seed is None else {"seed": (0, MAX_SEED)}),
        }
        wrong = {name for name, (low, high) in limits.items() if not _is_whole(getattr(self, name), low, high)}
        findings = [
            f"{name} is {shown_value(getattr(self, name))}; a whole number from {low}{f' to {high}' if high else ''}"
            for name, (low, high) in limits.items()
            if name in wrong
        ]
        if not wrong & {"min_new_tokens", "max_new_tokens"} and self.min_new_tokens > self.max_new_tokens:
            findings.append(f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens {self.max_new_tokens}")
        return findings

    def _numbers(self) -> list[str]:
        limits = {
            "temperature": (0.0, LARGEST, "0 (greedy) or more"),
            "top_p": (1e-9, 1.0, "from 1e-9 to 1"),
            "min_p": (0.0, 1.0, "from 0 to 1"),
            "repetition_penalty": (1e-9, LARGEST, "from 1e-9; 1 changes nothing"),
            "presence_penalty": (-LARGEST, LARGEST, "a finite number"),
            "frequency_penalty": (-LARGEST, LARGEST, "a finite number"),
        }
        return [
            f"{name} is {shown_value(getattr(self, name))}; {words}"
            for name, (low, high, words) in limits.items()
            if not _is_number(getattr(self, name), low, high)
        ]

    def _others(self) -> list[str]:
        findings = []
        if not isinstance(self.prompt_logprobs, bool):
            findings.append(f"prompt_logprobs is {shown_value(self.prompt_logprobs)}; true or false")
        if self.order not in ORDERS:
            findings.append(f"order is {shown_value(self.order)}; one of {', '.join(ORDERS)}")
        if not isinstance(self.stop_ids, tuple):
            findings.append(f"stop_ids is {shown_value(self.stop_ids)}; a collection of token ids")
        else:
            wrong = [i for i in self.stop_ids if not _is_whole(i, 0, None)]
            findings += [f"stop id {shown_value(i)} is not a token id" for i in wrong]
        if not isinstance(self.logit_bias, Mapping):
            return [*findings, f"logit_bias is {shown_value(self.logit_bias)}; token id: finite number"]
        return findings + [
            f"logit_bias has {shown_value(token)}: {shown_value(bias)}; token id: finite number"
            for token, bias in self.logit_bias.items()
            if not (_is_whole(token, 0, None) and _is_number(bias, -LARGEST, LARGEST))
        ]


def _is_whole(value: object, low: int, high: int | None) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and value >= low and (high is None or value <= high)


def _is_number(value: object, low: float, high: float) -> bool:
    """Of Python's kinds; NaN lies between no limits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
