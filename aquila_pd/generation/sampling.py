"""From one row of logits to one token, in numpy: the same numbers on every device and whatever else is in the batch.

A vocabulary has 100,000 entries and a row is looked at for every token, so nothing here sorts a whole row where a
few blocks of it will do. Candidates are kept in the order of their ids: a draw then depends on their probabilities
only, and not on the order in which nearly equal ones happen to be sorted.
"""

import numpy as np

from .params import AQUILA, SamplingParams
from .sequences import Sequence, TokenLogprob

BLOCK = 64  # entries looked at together when the largest are searched
HEADS = (256, 4096)  # so many of the likeliest tokens are sorted before the whole row is


def choose(logits: np.ndarray, sequence: Sequence) -> int:
    """Draw the next token of a sequence from its logits [V], float32 and finite, which are left as they are."""
    params = sequence.params
    x = adjusted(logits, sequence) if params.adjusts else logits
    if params.greedy:
        return int(x.argmax())
    ids, weights = candidates(x, params)
    drawn = draw(weights, sequence.random.random())
    return int(drawn if ids is None else ids[drawn])


def adjusted(logits: np.ndarray, sequence: Sequence) -> np.ndarray:
    """Logits [V] with bias, penalties and the ban on early ends."""
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
    return x


def candidates(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray | None, np.ndarray]:
    """The tokens that may be drawn, in the order of their ids (None: all), and their weights, largest about 1."""
    ids = None
    if params.order == AQUILA:
        if params.top_p < 1:
            ids = nucleus(softmax(logits, 1.0), params.top_p)
        if params.top_k:
            ids = _among(ids, largest(_taken(logits, ids), params.top_k))
        weights = softmax(_taken(logits, ids), params.temperature)
    else:
        if params.top_k:  # before the temperature, which changes no order
            ids = largest(logits, params.top_k)
        weights = softmax(_taken(logits, ids), params.temperature)
        if params.top_p < 1:
            kept = nucleus(weights, params.top_p)
            ids, weights = _among(ids, kept), weights[kept]
    if params.min_p:
        kept = np.flatnonzero(weights >= params.min_p * weights.max())
        ids, weights = _among(ids, kept), weights[kept]
    return ids, weights


def _taken(x: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
    return x if ids is None else x[ids]


def _among(ids: np.ndarray | None, kept: np.ndarray) -> np.ndarray:
    return kept if ids is None else ids[kept]


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """[V] -> weights [V], the largest 1: nobody here needs them to sum to 1."""
    x = logits - logits.max()
    if temperature != 1.0:
        x = x.astype(np.float64) / temperature  # the difference first: no temperature makes a NaN of it
    return np.exp(x)


def largest(x: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest entries of x [V], and of those that equal the last of them, in order of index.

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
    """Indices, in order, of the fewest largest weights [V] that hold the share top_p of their sum; at least one."""
    wanted = top_p * weights.sum(dtype=np.float64)
    for size in (*HEADS, len(weights)):
        head = largest(weights, size)
        order = head[np.argsort(weights[head], kind="stable")[::-1]]
        held = np.cumsum(weights[order], dtype=np.float64)
        if held[-1] >= wanted:
            break
    count = int(np.searchsorted(held, wanted)) + 1
    return np.sort(order[:count])


def draw(weights: np.ndarray, u: float) -> int:
    """The index whose share of the summed weights [V] holds u, 0 <= u < 1."""
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
    """Whether every logit [V] is a number: one sum, which NaN and infinities survive, and on suspicion each."""
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.isfinite(logits.sum()) or np.isfinite(logits).all())
