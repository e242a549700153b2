"""Generation: ids in, ids out. Requests join and leave a running batch between any two steps; no text is known here."""

from .engine import Engine, Stats
from .sampling_params import SamplingParams
from .sequence import NonFiniteLogits, PromptTooLong, Sequence, TokenEvent, TokenLogprob

__all__ = [
    "Engine",
    "NonFiniteLogits",
    "PromptTooLong",
    "SamplingParams",
    "Sequence",
    "Stats",
    "TokenEvent",
    "TokenLogprob",
]
