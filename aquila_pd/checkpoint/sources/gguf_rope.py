"""RoPE scaling of a GGUF file in the words of a config.json, where architecture/rope_scaling.py checks it.

yarn stands in the metadata. llama3 does not: llama.cpp's converter writes what it divides each frequency by as a
tensor, rope_freqs.weight, and leaves the parameters out.
"""

import math
from collections.abc import Mapping

import numpy as np

from ...architecture.config_checks import is_number
from ...architecture.rope_scaling import FACTOR, ORIGINAL, TYPES, RopeScaling, mscale
from ...utils.errors import ConfigError

SCALING = "rope.scaling."
OLD_FACTOR = "rope.scale_linear"
CONTEXT, ORIGINAL_CONTEXT = "context_length", SCALING + "original_context_length"
OWN_ATTENTION, ATTENTION, RAMP = (SCALING + key for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"))
YARN = {
    ATTENTION: "attention_factor",
    SCALING + "yarn_beta_fast": "beta_fast",
    SCALING + "yarn_beta_slow": "beta_slow",
}
DIVISORS = "rope_freqs.weight"
# Those of Llama 3.1 and 3.2, tried first.
LOW, HIGH, CONTEXTS, FACTORS = 1.0, 4.0, (8192, *(2**i for i in range(4, 21))), (8.0, 32.0)
EXACT = 1e-5  # relative: divisors are float32, of a difference of float32 numbers


def read_scaling(own: Mapping[str, object]) -> dict | None:
    """rope_scaling out of the metadata. own: without the "llama." before each key. Raises ConfigError."""
    factor = own.get(SCALING + "factor", own.get(OLD_FACTOR))
    kind = own.get(SCALING + "type", "linear" if factor not in (None, 0, 1) else "none")
    if kind == "none":
        return None
    found = {"type": kind, FACTOR: factor}
    return {**found, **_read_yarn(own, factor)} if kind == "yarn" else found


def known_keys(own: Mapping[str, object]) -> set[str]:
    """The keys that read_scaling reads; others that begin with rope.scaling. change the model in an unknown way."""
    known = {SCALING + "type", SCALING + "factor", OLD_FACTOR}
    if own.get(SCALING + "type") == "yarn":
        known |= YARN.keys()
        known |= {OWN_ATTENTION} if ATTENTION not in own else set()
        known |= {RAMP} if own.get(RAMP) == 1 else set()  # the ramp at full strength, the only one in a config.json
    return known


def _read_yarn(own: Mapping[str, object], factor: object) -> dict:
    found = {ours: own[theirs] for theirs, ours in YARN.items() if theirs in own}
    context, original = own.get(CONTEXT), own.get(ORIGINAL_CONTEXT)
    if original not in (None, context):
        _check_contexts(factor, original, context)
        found[ORIGINAL] = original
    extra = own.get(OWN_ATTENTION, 1)
    if extra != 1:  # on top of yarn's own factor
        numbers = is_number(extra) and is_number(factor)
        found["attention_factor"] = _shortest(extra * mscale(factor)) if numbers else extra
    return found


def _check_contexts(factor: object, original: object, context: object) -> None:
    """llama.cpp takes the factor, transformers the ratio of the contexts: one config.json for both needs them equal."""
    numbers = all(map(is_number, (factor, original, context))) and original > 0
    if numbers and not math.isclose(factor, context / original, rel_tol=1e-6):
        raise ConfigError(
            f"The GGUF file's yarn scaling has factor {factor:g}, but its context_length {context} is "
            f"{context / original:g} times its original_context_length {original}. A config.json cannot say that. "
            "Convert the Hugging Face folder the file was made from."
        )


@np.errstate(all="ignore")  # a damaged file may hold any number: none of them fits
def scaling_of_divisors(divisors: np.ndarray, theta: float) -> dict | None:
    """rope_scaling with which the frequencies [H/2] are divided by these numbers; None when all are 1.

    Parameters of llama3 are tried, the published ones first: others with the same divisors make the same model.
    Raises ConfigError when none give them.
    """
    divisors = np.asarray(divisors, np.float64).reshape(-1)
    if _same(divisors, np.ones_like(divisors)):
        return None
    largest = _shortest(divisors.max())
    for context in CONTEXTS:
        for factor in (largest, *FACTORS):
            found = {"type": "llama3", **dict(zip(TYPES["llama3"].needs, (factor, LOW, HIGH, context), strict=True))}
            if 1 <= factor < math.inf and _same(divisors, _divisors(found, theta, len(divisors))):
                return found
    raise ConfigError(
        f"{DIVISORS} divides the rotary frequencies by {divisors.min():g} to {divisors.max():g}, as no llama3 scaling "
        f"with low_freq_factor {LOW:g} and high_freq_factor {HIGH:g} does.\n"
        "Convert the Hugging Face folder the file was made from: its config.json names the scaling."
    )


def _divisors(value: dict, theta: float, pairs: int) -> np.ndarray:
    """Plain over scaled frequencies, float64 [H/2]."""
    model = dict(theta=theta, head_dim=2 * pairs, max_position_embeddings=value[ORIGINAL])
    plain, scaled = (RopeScaling.read(said, **model).inverse_frequencies() for said in (None, value))
    return plain.astype(np.float64) / scaled


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.allclose(a, b, rtol=EXACT, atol=0)


def _shortest(value: float) -> float:
    """The shortest decimal that is this number in float32."""
    return float(str(np.float32(value)))
