"""Validation of requests and engine sizes: ids inside the vocabulary, a prompt with room for an answer."""

from collections.abc import Iterable

import numpy as np

from ..utils.errors import GenerationError, shown_value
from .sampling_params import SamplingParams
from .sequence import PromptTooLong


def check_prompt(prompt: Iterable[int], params: SamplingParams, *, vocab_size: int, max_length: int) -> list[int]:
    """The prompt's ids. Raises GenerationError for what the engine cannot run, PromptTooLong for want of room."""
    prompt = list(prompt) if isinstance(prompt, Iterable) else [prompt]
    strange = [i for i in prompt if not isinstance(i, int | np.integer) or isinstance(i, bool)]
    if strange:
        raise GenerationError(f"A prompt is a list of token ids; {shown_value(strange[0])} is none.")
    if not prompt:
        raise GenerationError("The prompt is empty: there is no token to continue.")
    _check_vocabulary(prompt, params, vocab_size)
    answer = 1 if params.max_new_tokens else 0
    if len(prompt) + answer > max_length:
        behind = " with one for an answer" if answer else ""
        raise PromptTooLong(f"The prompt has {len(prompt):,} tokens; at most {max_length:,} fit{behind}. Shorten it.")
    return [int(i) for i in prompt]


def _check_vocabulary(prompt: list[int], params: SamplingParams, vocab_size: int) -> None:
    wrong = [i for i in {*prompt, *params.stop_ids, *params.logit_bias} if not 0 <= i < vocab_size]
    if wrong:
        raise GenerationError(
            f"The model has no token {', '.join(map(str, sorted(wrong)[:5]))}: its ids are 0 to "
            f"{vocab_size - 1}. The tokenizer is another model's."
        )
    if params.min_new_tokens and len(set(params.stop_ids)) == vocab_size:
        raise GenerationError("min_new_tokens leaves no token to draw: every token is a stop id.")


def check_sizes(**sizes: int) -> None:
    """Raise GenerationError for engine sizes that are no whole numbers from 1, all of them at once."""
    wrong = [
        f"{name} is {value}"
        for name, value in sizes.items()
        if not isinstance(value, int) or value is True or value < 1
    ]
    if wrong:
        raise GenerationError(f"The engine cannot be built: {'; '.join(wrong)}. Each is a whole number from 1.")
