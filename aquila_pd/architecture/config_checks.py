"""The checks every config passes, whether it comes from a source's config.json or is built in Python.

Sizes and the rotary scaling only. Which keys a file may carry is the business of the families.
"""

import sys
from collections.abc import Mapping

from ..utils.errors import ConfigError, report
from ..utils.files import is_number, is_whole

ROPE_TYPES = ("linear", "dynamic")
UNSCALED = "default"  # transformers' spelling of "no scaling"
ROPE_KEYS = {"type", "rope_type", "factor"}
ORIGINAL = "original_max_position_embeddings"  # says the same as max_position_embeddings for the types known here
MOST_LAYERS = 10_000  # no model has a tenth; beyond, a damaged number would fill the memory with names of tensors
MOST = 2**31 - 1  # of anything else; a damaged number may be too large even to be calculated with

# Keys of config.json that change the mathematics, with the one value that is computed here.
NEUTRAL = {
    "hidden_act": ("silu", "the MLP's activation"),
    "attention_bias": (False, "biases on the attention projections"),
    "mlp_bias": (False, "biases on the MLP projections"),
    "attention_dropout": (0.0, "dropout of attention weights in training"),
    "hidden_dropout": (0.0, "dropout in training"),
    "rope_interleaved": (False, "rotary embedding of neighbouring pairs"),
    "partial_rotary_factor": (1.0, "rotary embedding of a part of each head"),
    "sliding_window": (None, "attention over a window"),
}


def rope_scaling(value: object, *, max_position_embeddings: int | None = None) -> dict | None:
    """rope_scaling of a config.json as {"type": "linear" | "dynamic", "factor": float}, or None when nothing is scaled.

    Reads both spellings of the type ("type", and "rope_type" of newer files). original_max_position_embeddings may be
    there when it equals max_position_embeddings, of which the scalings known here make their use. Raises ConfigError.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _bad_scaling(value, ["it is not a mapping"])
    kinds = {value[key] for key in ("type", "rope_type") if isinstance(value.get(key), str)}
    known = ROPE_KEYS if max_position_embeddings is None else {*ROPE_KEYS, ORIGINAL}
    findings = [f"unknown key {key!r} = {value[key]!r}" for key in sorted(set(value) - known, key=str)]
    if ORIGINAL in known and value.get(ORIGINAL) not in (None, max_position_embeddings):
        findings.append(f"{ORIGINAL} is {value[ORIGINAL]!r}, max_position_embeddings is {max_position_embeddings!r}")
    if not kinds:
        findings.append("it names no type")
    if len(kinds) > 1:
        findings.append(f"type and rope_type differ: {sorted(kinds)}")
    findings += [f"unknown type {kind!r}" for kind in sorted(kinds - {*ROPE_TYPES, UNSCALED})]
    factor = value.get("factor", 1.0 if kinds == {UNSCALED} else None)
    if not is_number(factor) or not 1.0 <= factor <= sys.float_info.max:
        findings.append(f"factor is {factor!r}, not a finite number of at least 1")
    if findings:
        raise _bad_scaling(value, findings)
    (kind,) = kinds
    return None if kind == UNSCALED else {"type": kind, "factor": float(factor)}


def sizes(hidden_size: int, num_attention_heads: int, num_key_value_heads: int, **others: object) -> None:
    """Raise ConfigError with every size that is not a positive whole number or does not divide as it must.

    others: any further counts by their config name (vocab_size, intermediate_size, num_hidden_layers, ...).
    """
    named = {
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        **others,
    }
    findings = [
        f"{name} is {value!r}, not a positive whole number"
        for name, value in named.items()
        if not is_whole(value) or value < 1
    ]
    if not findings:
        findings = too_many(named) + _indivisible(hidden_size, num_attention_heads, num_key_value_heads)
    if findings:
        raise ConfigError(
            report(
                "The sizes of the config do not make a model:",
                findings,
                "Compare config.json with the one published beside the weights.",
            )
        )


def numbers(**named: object) -> list[str]:
    """A line for each value that is not a finite number above zero."""
    return [
        f"{name} is {value!r}, not a positive number"
        for name, value in named.items()
        if not is_number(value) or not 0 < value <= sys.float_info.max
    ]


def too_many(counts: Mapping[str, object]) -> list[str]:
    """A line for each count that is too large for any model; what is no count at all is left to sizes()."""
    most = {name: MOST_LAYERS if name == "num_hidden_layers" else MOST for name in counts}
    return [
        f"{name} is {value}; more than {most[name]} are taken for damage"
        for name, value in counts.items()
        if is_whole(value) and value > most[name]
    ]


def _indivisible(d: int, heads: int, kv_heads: int) -> list[str]:
    findings = []
    if d % heads:
        findings.append(f"hidden_size {d} does not divide into {heads} attention heads (num_attention_heads)")
    elif (d // heads) % 2:
        findings.append(f"the head size {d} / {heads} = {d // heads} is odd; rotary embedding turns pairs")
    if heads % kv_heads:
        findings.append(f"{heads} attention heads cannot share {kv_heads} key/value heads evenly (num_key_value_heads)")
    return findings


def _bad_scaling(value: object, findings: list[str]) -> ConfigError:
    return ConfigError(
        report(
            f"rope_scaling {value!r} cannot be used:",
            findings,
            f'Known are null, {{"type": "linear", "factor": 8.0}} and the same with one of: {", ".join(ROPE_TYPES)}.',
        )
    )
