"""Map request parameters to SamplingParams, checked against the vocabulary and the context length."""

from ..generation import SamplingParams
from ..generation.sampling_params import described
from ..utils.errors import GenerationError
from .errors import context_length, invalid
from .protocol import Asked

DEFAULT_MAX_TOKENS = 16  # of the completions endpoint, as OpenAI has it


def sampling_params(
    asked: Asked,
    *,
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
    vocab_size: int,
    logprobs: int | None,
    prompt_logprobs: bool = False,
) -> SamplingParams:
    """The engine's parameters; null means the default. Raises ApiError for values without meaning for this model."""
    check_ids(asked.stop_token_ids or (), vocab_size, param="stop_token_ids")
    try:
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=asked.min_tokens or 0,
            logit_bias=biases(asked.logit_bias or {}, vocab_size),
            stop_ids=(*stop_ids, *(asked.stop_token_ids or ())),
            seed=None if asked.seed is None else asked.seed % 2**64,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            n=asked.n or 1,
            **_under_their_own_names(asked),
        )
    except GenerationError as error:
        raise invalid(str(error)) from error


def _under_their_own_names(asked: Asked) -> dict[str, float]:
    """The numbers that are called the same in a request; null is as good as left out."""
    found = {name: value for name in described() if (value := getattr(asked, name)) is not None}
    if "top_k" in found:
        found["top_k"] = max(found["top_k"], 0)  # -1 keeps all, as in vLLM
    if "top_p" in found:
        found["top_p"] = max(found["top_p"], 1e-9)  # 0 leaves the likeliest token, as a very small share does
    return found


def biases(asked: dict[str, float], vocab_size: int) -> dict[int, float]:
    """logit_bias with its ids as numbers."""
    wrong = [key for key in asked if not (key.isascii() and key.isdecimal() and len(key) < 11)]
    if wrong:
        raise invalid(f"`logit_bias`: {wrong[0][:40]!r} is not a token id in digits.", param="logit_bias")
    found = {int(key): bias for key, bias in asked.items()}
    check_ids(found, vocab_size, param="logit_bias")
    return found


def check_ids(ids, vocab_size: int, *, param: str) -> None:
    """Raise ApiError for ids that the model does not have."""
    unknown = [i for i in ids if i >= vocab_size]
    if unknown:
        raise invalid(
            f"`{param}`: the model has no token {unknown[0]}; its ids are 0 to {vocab_size - 1}.", param=param
        )


def room(asked: int | None, default: int | None, longest: int, limit: int, *, param: str) -> int:
    """How many tokens an answer may have after a prompt of `longest`, in a context of `limit`.

    asked: the client's number, which has to fit. default: None for as many as fit.
    """
    left = limit - longest
    if asked is not None:
        if asked > left:
            raise context_length(longest, asked, limit, param=param)
        return asked
    if left < 1:
        raise context_length(longest, 0, limit, param=param)
    return left if default is None else min(default, left)


def require_stream(asked: Asked) -> None:
    if asked.stream_options is not None and not asked.stream:
        raise invalid("`stream_options` is for streams: set stream to true.", param="stream_options")


def at_most(count: int, limit: int) -> None:
    """Raise ApiError when a single request asks for more answers than the server ever takes."""
    if count > limit:
        raise invalid(
            f"This request asks for {count:,} answers at once; the server takes {limit:,}, running and waiting "
            "together. Send fewer prompts in a request, or a smaller n.",
            param="n",
        )
