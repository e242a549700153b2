"""Config validation: sizes, counts and unsupported features, of a config.json or of one built in Python.

Sizes and numbers only: rope_scaling is read in rope_scaling.py, and which keys a file may carry is the business of the
families.
"""

import sys
from collections.abc import Mapping

from ..utils.errors import ConfigError, report
from ..utils.files import is_number, is_whole

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
