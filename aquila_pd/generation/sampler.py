"""Sampler: one row of logits to one token, in numpy, so that the result depends on neither device nor batch.

Penalties and logit bias, then temperature, top-k, top-p and min-p, then a draw. A vocabulary has 100,000 entries and
every new token reads a row of them, so nothing here sorts a whole row. Candidates stay in the order of their ids: a
draw depends on their probabilities only, and not on the order in which nearly equal ones happen to be sorted.
"""

import numpy as np

from ..utils.errors import GenerationError
from .sampling_params import AQUILA, STANDARD, SamplingParams
from .sequence import Sequence, TokenLogprob

BLOCK = 64  # entries looked at together when the largest are searched
HEAD = 256  # so many of the likeliest tokens usually hold what is asked for
FINE_BITS = 15  # of a float32, which tell apart weights less than a percent from each other
OFTEN = 0.5  # a nucleus of this share is met by drawing from the whole twice
COLDEST = np.float32(1e-30)  # a temperature: differences of logits divided by it are finite, and it is no 0


def choose(logits: np.ndarray, sequence: Sequence) -> int:
    """Sample the next token of a sequence from its logits [V], float32 and finite; the logits are not modified."""
    params = sequence.params
    x = adjusted(logits, sequence) if params.adjusts else logits
    if params.greedy:
        return int(x.argmax())
    if OFTEN <= params.top_p < 1 and not params.top_k and not params.min_p and params.order == STANDARD:
        return draw_in_nucleus(softmax(x, params.temperature), params.top_p, sequence.random)
    ids, weights = candidates(x, params)
    drawn = draw(weights, sequence.random.random())
    return int(drawn if ids is None else ids[drawn])


def adjusted(logits: np.ndarray, sequence: Sequence) -> np.ndarray:
    """Logits [V] after penalties, logit bias and min_new_tokens (stop ids masked)."""
    params, x = sequence.params, logits.copy()
    if params.repetition_penalty != 1.0:
        seen = np.array(sorted({*sequence.prompt, *sequence.tokens}))
        penalty = np.float32(params.repetition_penalty)
        x[seen] = np.where(x[seen] > 0, x[seen] / penalty, x[seen] * penalty)
    if sequence.tokens and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(sequence.tokens, return_counts=True)
        x[ids] -= (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)
    for token, bias in params.logit_bias.items():
        x[token] += np.float32(bias)
    if len(sequence.tokens) < params.min_new_tokens:
        x[list(params.stop_ids)] = -np.inf
        if len(params.stop_ids) >= len(x) and x.max() == -np.inf:
            raise GenerationError("min_new_tokens leaves no token to draw: every token is a stop id.")
    return x


def candidates(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """Tokens left by top-k, top-p, min-p, in the order of their ids (None: all); their weights, the largest about 1."""
    ids = None
    if params.order == AQUILA:
        if params.top_p < 1:
            ids = nucleus(softmax(logits, 1.0), params.top_p)
        if params.top_k:
            ids = _compose(ids, largest(_subset(logits, ids), params.top_k))
        weights = softmax(_subset(logits, ids), params.temperature)
    else:
        if params.top_k:  # before the temperature, which changes no order
            ids = largest(logits, params.top_k)
        weights = softmax(_subset(logits, ids), params.temperature)
        if params.top_p < 1:
            kept = nucleus(weights, params.top_p)
            ids, weights = _compose(ids, kept), weights[kept]
    if params.min_p:
        kept = np.flatnonzero(weights >= params.min_p * weights.max())
        ids, weights = _compose(ids, kept), weights[kept]
    return ids, weights


def _subset(x: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    return x if ids is None else x[ids]


def _compose(ids: np.ndarray | None, kept: np.ndarray) -> np.ndarray:
    return kept if ids is None else ids[kept]


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Unnormalised softmax: logits [V] -> weights [V], float32, the largest 1. No caller needs a sum of 1."""
    x = logits - logits.max()  # before the division: the largest is 0 at any temperature
    if temperature != 1.0:
        x /= max(np.float32(temperature), COLDEST)
    return np.exp(x, out=x)


def largest(x: np.ndarray, k: int) -> np.ndarray:
    """Top-k: indices of the k largest entries of x [V], ties with the last of them included, in ascending order.

    The k largest entries lie in the k blocks with the largest maxima.
    """
    if k >= len(x):
        return np.arange(len(x))
    whole = len(x) // BLOCK * BLOCK
    if k * BLOCK * 2 >= whole:
        return np.flatnonzero(x >= np.partition(x, -k)[-k])
    blocks = x[:whole].reshape(-1, BLOCK)
    best = np.argpartition(blocks.max(axis=1), -k)[-k:]
    found = np.concatenate([blocks[best].ravel(), x[whole:]])
    return np.flatnonzero(x >= np.partition(found, -k)[-k])


def nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Top-p: ascending indices of the fewest largest weights [V], float32, that hold the share top_p of their sum."""
    wanted = top_p * weights.sum(dtype=np.float64)
    head = largest(weights, HEAD)
    if weights[head].sum(dtype=np.float64) >= wanted:  # nearly always
        return np.sort(head[_heaviest(weights[head], wanted)])
    # The bits of positive floats are in the order of the floats: weights are summed in buckets of their upper bits,
    # and only the bucket in which the share is reached is sorted.
    buckets = weights.view(np.int32) >> FINE_BITS
    held = np.cumsum(np.bincount(buckets, weights)[::-1])[::-1]  # by each bucket and those above
    border = max(int(np.count_nonzero(held >= wanted)) - 1, 0)
    above = held[border + 1] if border + 1 < len(held) else 0.0
    inside = np.flatnonzero(buckets == border)
    kept = buckets > border
    kept[inside[_heaviest(weights[inside], wanted - above)]] = True
    return np.flatnonzero(kept)


def _heaviest(weights: np.ndarray, wanted: float) -> np.ndarray:
    """Indices of the fewest largest weights whose sum is at least `wanted`, or of all."""
    order = np.argsort(-weights, kind="stable")
    return order[: int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), wanted)) + 1]


def draw_in_nucleus(weights: np.ndarray, top_p: float, random: np.random.Generator) -> int:
    """Rejection sampling from `nucleus(weights, top_p)`: draw from all weights [V] until the token lies in the nucleus.

    A token does when those before it hold less than the share: the heavier ones, and among equals those with lower
    ids. One try in 1 / top_p does.
    """
    wanted = top_p * weights.sum(dtype=np.float64)
    while True:
        drawn = draw(weights, random.random())
        weight = weights[drawn]
        equals = np.count_nonzero(weights[:drawn] == weight)
        if np.dot(weights, weights > weight) + equals * weight < wanted:
            return drawn


def draw(weights: np.ndarray, u: float) -> int:
    """Inverse-CDF sampling: the index whose share of the summed weights [V] holds u, 0 <= u < 1."""
    starts = np.arange(0, len(weights), BLOCK * 4)
    sums = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    wanted = u * sums[-1]
    block = min(int(np.searchsorted(sums, wanted, side="right")), len(starts) - 1)
    before = sums[block - 1] if block else 0.0
    inside = np.cumsum(weights[starts[block] : starts[block] + BLOCK * 4], dtype=np.float64)
    at = int(np.searchsorted(inside, wanted - before, side="right"))
    if at == len(inside):  # rounding, at the very end of a block
        at = int(np.flatnonzero(inside < inside[-1])[-1]) + 1 if inside[0] < inside[-1] else 0
    return int(starts[block]) + at


def logprob_of(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """The log-probability of a token under logits [V], and those of the `top` likeliest tokens."""
    highest = logits.max()
    normalizer = float(highest) + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
    ids = largest(logits, top) if top else np.empty(0, dtype=np.int64)
    ids = ids[np.argsort(-logits[ids], kind="stable")][:top]
    likeliest = tuple((int(i), float(logits[i]) - normalizer) for i in ids)
    return TokenLogprob(token, float(logits[token]) - normalizer, likeliest)


def finite(logits: np.ndarray) -> bool:
    """Whether all logits [V] are finite: one sum, which NaN and infinities survive, and only then entry by entry."""
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.isfinite(logits.sum()) or np.isfinite(logits).all())
