"""Generation: a continuous-batching engine from token ids to token ids; text is added by aquila_pd.text."""

from .engine import Engine
from .sampling_params import SamplingParams
from .sequence import NonFiniteLogits, PromptTooLong, Sequence, TokenEvent, TokenLogprob
from .stats import Stats

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
