"""Outputs of forward(): the tuple form, and whether a loss keeps a cache beside it."""

from ..runtime.base import BaseModelOutputWithPast


def as_tuple(output: BaseModelOutputWithPast) -> tuple:
    """The output in tuple form, without what is None."""
    # By hand: ModelOutput.to_tuple() would walk into the cache.
    values = (output.last_hidden_state, output.past_key_values, output.hidden_states, output.attentions)
    return tuple(v for v in values if v is not None)


def cache_beside_loss(use_cache: bool | None, labels) -> bool | None:
    """No cache by default beside a loss: the Trainer's evaluation gathers all outputs and cannot gather a cache."""
    return False if use_cache is None and labels is not None else use_cache
