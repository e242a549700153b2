"""Who may look at what: the one boolean mask attention takes, and the positions that follow from padding.

Letters in shapes: B batch, T query length, S key length.
"""

import paddle

from .errors import AquilaError


def causal_mask(keep, T: int):
    """The one boolean mask [B, 1, T, S] of T queries that stand at the end of S keys.

    keep: [B, S] bool, False at padding. A query sees the kept keys up to its own place, and always itself, so
    that no row of the softmax is empty (pads included; nobody reads what they compute).

        keys      p p a b c        p: padding
        query p   x . . . .
        query p   . x . . .
        query a   . . x . .
        query b   . . x x .
        query c   . . x x x
    """
    S = keep.shape[1]
    key = paddle.arange(S).unsqueeze(0)  # [1, S]
    query = paddle.arange(S - T, S).unsqueeze(1)  # [T, 1]
    sees = keep.unsqueeze([1, 2]) & (key <= query)  # [B, 1, T, S]
    return sees | (key == query)


def keep_mask(attention_mask, B: int, S: int):
    """The boolean [B, S] (True at real tokens) out of a 2-D mask of 1/0 or booleans, or of None."""
    if attention_mask is None:
        return paddle.ones([B, S], dtype="bool")
    if list(attention_mask.shape) != [B, S]:
        raise AquilaError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected [{B}, {S}], one entry for every key, "
            "cached tokens included, or a mask of what each query may look at, [batch, 1, queries, keys]."
        )
    return attention_mask.astype("bool")


def full_mask(attention_mask, B: int, T: int, S: int):
    """A mask of what each query may look at, [B or 1, 1, T, S] boolean, from a 3-D or 4-D one the caller gave.

    It is taken as final, as PaddleNLP means it: booleans or 1/0 of any dtype say where a query may look; numbers
    below zero make it additive, 0 where it may look and at most -1e4 where not. A query that may look nowhere looks
    everywhere: nobody reads such a row, and no kernel makes NaN of it.
    """
    mask = attention_mask.unsqueeze(1) if attention_mask.ndim == 3 else attention_mask
    shape = list(mask.shape)
    if mask.ndim != 4 or shape[0] not in (1, B) or shape[1] != 1 or shape[2] not in (1, T) or shape[3] != S:
        raise AquilaError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected [{B}, {S}], or with one row for every "
            f"query [{B}, {T}, {S}] or [{B}, 1, {T}, {S}]."
        )
    if mask.is_floating_point():
        mask = _floating_mask(mask)
    mask = mask.astype("bool")
    return mask | ~mask.any(axis=-1, keepdim=True)


def _floating_mask(mask):
    lowest, highest = float(mask.min()), float(mask.max())
    additive = lowest < 0 == highest and bool(((mask == 0) | (mask <= -1e4)).all())
    keep = lowest >= 0 and highest == 1 and bool(((mask == 0) | (mask == 1)).all())
    if not additive and not keep:
        raise AquilaError(
            f"The floating attention_mask has values from {lowest:g} to {highest:g}; expected 1 and 0, or 0 and at "
            "most -1e4. A boolean mask cannot be misread."
        )
    return mask >= 0 if additive else mask


def hide_beyond(mask, C: int):
    """[.., S] -> [.., C], False in the cache's spare room."""
    *rows, S = mask.shape
    return mask if S == C else paddle.concat([mask, paddle.zeros([*rows, C - S], dtype="bool")], axis=-1)


def positions(keep, T: int):
    """Position of each of the last T tokens, [B, T]: padding does not count and itself stands at 1, as upstream."""
    counted = paddle.cumsum(keep.astype("int64"), axis=-1) - 1
    return paddle.where(keep, counted, paddle.ones_like(counted))[:, -T:]
