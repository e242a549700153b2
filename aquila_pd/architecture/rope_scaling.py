"""RoPE scaling: inverse frequencies, context length and attention factor of every scaling type.

The only reader of a config.json's rope_scaling. Another type is a function for its frequencies and a row of TYPES.
The reference is what transformers 4.55 computes (modeling_rope_utils), operation by operation in float32: at position
100,000 one more rounding of a frequency moves an angle by 0.006.

Letters: H head size. A pair is two of the H numbers that are rotated together; there are H/2.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..utils.errors import ConfigError, report
from ..utils.files import is_number, is_whole
from .config_checks import MOST

UNSCALED = "default"  # transformers' spelling of "no scaling"
SPELLINGS = ("type", "rope_type")  # of the key that names the type; transformers reads both, older programs the first
PADDLENLP_DICT = "llama3"  # the type that PaddleNLP's own LLaMA reads from rope_scaling, and no other
FACTOR, ORIGINAL = "factor", "original_max_position_embeddings"


@dataclass(frozen=True)
class RopeScaling:
    """How a model makes its rotary frequencies, scaled or not.

    theta: base of the frequencies (rope_theta). type: a key of TYPES. parameters: what rope_scaling says beside the
    type, numbers as floats; optional keys it leaves out are not in it. To be made by `read` or `of`, which check.
    """

    theta: float
    head_dim: int
    max_position_embeddings: int
    type: str = UNSCALED
    parameters: Mapping[str, float | int | bool] = field(default_factory=dict, hash=False)

    @classmethod
    def read(cls, value: object, *, theta: float, head_dim: int, max_position_embeddings: int) -> "RopeScaling":
        """From rope_scaling as a config.json has it. Raises ConfigError with all findings.

        Both spellings of the type are read. original_max_position_embeddings may stand in any scaling; in those that
        make no use of it, it must equal max_position_embeddings.
        """
        model = cls(theta, head_dim, max_position_embeddings)
        if value is None:
            return model
        if not isinstance(value, dict):
            raise _unusable(value, ["it is not a mapping"])
        findings, kind = _read_type(value)
        keys = TYPES[kind].keys if kind else (FACTOR,)
        findings = _unknown_keys(value, keys, model) + findings + _bad_values(value, keys, kind)
        if findings:
            raise _unusable(value, findings)
        said = {key: VALUES[key].convert(value[key]) for key in keys if value.get(key) is not None}
        if kind == UNSCALED:
            return model
        made = cls(theta, head_dim, max_position_embeddings, kind, said)
        if findings := TYPES[kind].check(made):
            raise _unusable(value, findings)
        return made

    @classmethod
    def of(cls, fields: Mapping) -> "RopeScaling":
        """From a family's fields, or the attributes of a config."""
        return cls.read(
            fields["rope_scaling"],
            theta=fields["rope_theta"],
            head_dim=fields["hidden_size"] // fields["num_attention_heads"],
            max_position_embeddings=fields["max_position_embeddings"],
        )

    def inverse_frequencies(self, length: int = 0) -> np.ndarray:
        """Angle of each pair at position 1, float32 [H/2]. length: keys that attention looks at."""
        return TYPES[self.type].frequencies(self, length)

    @property
    def depends_on_length(self) -> bool:
        """Whether sequences longer than max_position_embeddings have frequencies of their own (dynamic NTK): keys made
        at one such length may not be used at another."""
        return TYPES[self.type].by_length

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by."""
        return TYPES[self.type].attention_factor(self)

    @property
    def factor(self) -> float:
        """By how much the context is stretched. Of yarn with an original context: the ratio of the two contexts."""
        if self.type == "yarn" and ORIGINAL in self.parameters:
            return self.max_position_embeddings / self.original_positions
        return self.parameters.get(FACTOR, 1.0)

    @property
    def original_positions(self) -> int:
        """Positions of the context before it was stretched."""
        return self.parameters.get(ORIGINAL, self.max_position_embeddings)

    @property
    def context_length(self) -> int:
        """Positions the model can use. Beside an original context, max_position_embeddings is the stretched one."""
        if ORIGINAL in self.parameters:
            return self.max_position_embeddings
        return int(self.max_position_embeddings * self.factor)

    @property
    def description(self) -> str:
        """For a plan: "scaling linear x8"."""
        if self.type == UNSCALED:
            return "no scaling"
        said = self.parameters[FACTOR]
        unused = "" if math.isclose(said, self.factor, rel_tol=1e-6) else f" (not by its factor, {said:g})"
        return f"scaling {self.type} x{self.factor:g}{unused}"

    def to_config(self) -> dict | None:
        """rope_scaling in a config.json of ours."""
        return None if self.type == UNSCALED else {"type": self.type, **self.parameters}

    def to_hf(self) -> dict | None:
        """rope_scaling in a config.json for torch: both spellings of the type are read somewhere."""
        said = self.to_config()
        return said and {**said, "rope_type": self.type}

    @property
    def runs_on_paddlenlp(self) -> bool:
        """Whether PaddleNLP's own LLaMA computes this type as torch does."""
        return self.type in (UNSCALED, "linear", PADDLENLP_DICT)

    def to_paddlenlp(self) -> dict:
        """The keys that PaddleNLP's own LLaMA reads, of a type that it computes: two, or a dict for llama3."""
        if self.type == PADDLENLP_DICT:
            return {"rope_scaling_type": None, "rope_scaling_factor": 1.0, "rope_scaling": self.to_hf()}
        kind = None if self.type == UNSCALED else self.type
        return {"rope_scaling_type": kind, "rope_scaling_factor": self.factor}


def scaling_type(fields: Mapping) -> str:
    """The type alone, of fields that need not be complete."""
    value = fields.get("rope_scaling") or {}
    return next((value[key] for key in SPELLINGS if key in value), UNSCALED)


# --------------------------------------------------------------------------------------------- frequencies by type


def _powers(scaling: RopeScaling, base: float) -> np.ndarray:
    """base ** (2i / H), float32 [H/2]."""
    exponents = np.arange(0, scaling.head_dim, 2, dtype=np.float32) / np.float32(scaling.head_dim)
    # The power in double, rounded once: what a correctly rounded fp32 power gives.
    return np.power(base, exponents.astype(np.float64)).astype(np.float32)


def _plain(scaling: RopeScaling, length: int) -> np.ndarray:
    return np.float32(1) / _powers(scaling, scaling.theta)


def _linear(scaling: RopeScaling, length: int) -> np.ndarray:
    """Position interpolation: every pair turns more slowly by the factor."""
    return _plain(scaling, length) / np.float32(scaling.factor)


def _dynamic(scaling: RopeScaling, length: int) -> np.ndarray:
    """Dynamic NTK: beyond max_position_embeddings the base grows with the length, and with nothing else, so that a long
    input leaves no trace in the next."""
    d, most, base = scaling.head_dim, scaling.max_position_embeddings, scaling.theta
    if length > most:
        base *= (scaling.factor * length / most - (scaling.factor - 1)) ** (d / (d - 2))
    return np.float32(1) / _powers(scaling, base)


def _llama3(scaling: RopeScaling, length: int) -> np.ndarray:
    """Llama 3.1: pairs with wavelengths over original / low_freq_factor are divided by the factor, those under
    original / high_freq_factor stay, and between the two lies a blend."""
    plain, factor = _plain(scaling, length), np.float32(scaling.factor)
    low, high = scaling.parameters["low_freq_factor"], scaling.parameters["high_freq_factor"]
    original = scaling.original_positions
    wavelengths = np.float32(2 * math.pi) * (np.float32(1) / plain)
    smooth = (np.float32(original) * (np.float32(1) / wavelengths) - np.float32(low)) / np.float32(high - low)
    blend = (1 - smooth) * plain / factor + smooth * plain
    longest, shortest = np.float32(original / low), np.float32(original / high)
    return np.where(wavelengths > longest, plain / factor, np.where(wavelengths < shortest, plain, blend))


def _yarn(scaling: RopeScaling, length: int) -> np.ndarray:
    """YaRN: pairs that turn more than beta_fast times within the original context stay, those that turn less than
    beta_slow times are divided by the factor, and between the two lies a ramp over the pairs."""
    powers = _powers(scaling, scaling.theta)
    stays = 1 - _ramp(scaling)
    slow, fast = np.float32(1) / (np.float32(scaling.factor) * powers), np.float32(1) / powers
    return slow * (1 - stays) + fast * stays


def _ramp(scaling: RopeScaling) -> np.ndarray:
    """0 for the pairs that stay, 1 for those that are divided, float32 [H/2]."""
    said, d = scaling.parameters, scaling.head_dim
    low, high = (_pair_turning(scaling, said.get(key, default)) for key, default in YARN_BETAS.items())
    if said.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    width = (high - low) or 0.001  # a step in place of a division by zero
    return np.clip((np.arange(d // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)


def _pair_turning(scaling: RopeScaling, rotations: float) -> float:
    """The pair that turns this often within the original context, as a fraction."""
    share = math.log(scaling.original_positions / (rotations * 2 * math.pi)) / math.log(scaling.theta)
    return scaling.head_dim * share / 2


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    said, factor = scaling.parameters, scaling.factor
    if "attention_factor" in said:
        return said["attention_factor"]
    if said.get("mscale") and said.get("mscale_all_dim"):
        return mscale(factor, said["mscale"]) / mscale(factor, said["mscale_all_dim"])
    return mscale(factor)


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's attention factor of a context stretched by `factor`."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


# --------------------------------------------------------------------------------------------- what a file may say


@dataclass(frozen=True)
class _Value:
    """What a key may hold. wanted: in words."""

    fits: Callable[[object], bool]
    wanted: str
    convert: Callable = float


def _finite(value: object, least: float) -> bool:
    return is_number(value) and least <= value <= sys.float_info.max


_ABOVE_ZERO = _Value(lambda value: _finite(value, 0) and value > 0, "a finite number above 0")
_FROM_ZERO = _Value(lambda value: _finite(value, 0), "a finite number of at least 0")
VALUES = {
    FACTOR: _Value(lambda value: _finite(value, 1), "a finite number of at least 1"),
    ORIGINAL: _Value(lambda value: is_whole(value) and 0 < value <= MOST, "a positive whole number", int),
    "low_freq_factor": _ABOVE_ZERO,
    "high_freq_factor": _ABOVE_ZERO,
    "beta_fast": _ABOVE_ZERO,
    "beta_slow": _ABOVE_ZERO,
    "attention_factor": _ABOVE_ZERO,
    "mscale": _FROM_ZERO,  # zero, like a missing one of the two, means the default
    "mscale_all_dim": _FROM_ZERO,
    "truncate": _Value(lambda value: isinstance(value, bool), "true or false", bool),
}
YARN_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # with their defaults


def _check_llama3(scaling: RopeScaling) -> list[str]:
    low, high = scaling.parameters["low_freq_factor"], scaling.parameters["high_freq_factor"]
    return [] if low < high else [f"high_freq_factor is {high!r}, not above low_freq_factor {low!r}"]


def _check_yarn(scaling: RopeScaling) -> list[str]:
    fast, slow = (scaling.parameters.get(key, default) for key, default in YARN_BETAS.items())
    original, most = scaling.original_positions, scaling.max_position_embeddings
    findings = []
    if fast < slow:
        findings.append(f"beta_fast is {fast!r}, below beta_slow {slow!r}")
    if original > most:
        findings.append(f"{ORIGINAL} is {original!r}, above max_position_embeddings {most!r}")
    if scaling.theta <= 1:
        findings.append(f"rope_theta is {scaling.theta!r}; yarn needs a base above 1")
    return findings


@dataclass(frozen=True)
class ScalingType:
    """frequencies: (scaling, length of the keys) -> float32 [H/2]. needs, may_have: keys beside the type, in the order
    in which they are written. check: findings about values that do not fit each other."""

    frequencies: Callable[[RopeScaling, int], np.ndarray]
    needs: tuple[str, ...] = (FACTOR,)
    may_have: tuple[str, ...] = ()
    check: Callable[[RopeScaling], list[str]] = lambda scaling: []
    attention_factor: Callable[[RopeScaling], float] = lambda scaling: 1.0
    by_length: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.needs, *self.may_have)


TYPES = {
    UNSCALED: ScalingType(_plain, needs=(), may_have=(FACTOR,)),
    "linear": ScalingType(_linear),
    "dynamic": ScalingType(_dynamic, by_length=True),
    "llama3": ScalingType(
        _llama3, needs=(FACTOR, "low_freq_factor", "high_freq_factor", ORIGINAL), check=_check_llama3
    ),
    "yarn": ScalingType(
        _yarn,
        may_have=(ORIGINAL, "attention_factor", *YARN_BETAS, "mscale", "mscale_all_dim", "truncate"),
        check=_check_yarn,
        attention_factor=_yarn_attention_factor,
    ),
}
KNOWN = tuple(kind for kind in TYPES if kind != UNSCALED)


def _read_type(value: dict) -> tuple[list[str], str | None]:
    """Findings about the type, and the type where there are none."""
    kinds = {value[key] for key in SPELLINGS if isinstance(value.get(key), str)}
    findings = [] if kinds else ["it names no type"]
    if len(kinds) > 1:
        findings.append(f"type and rope_type differ: {sorted(kinds)}")
    findings += [f"unknown type {kind!r}" for kind in sorted(kinds - TYPES.keys())]
    return findings, None if findings else kinds.pop()


def _unknown_keys(value: dict, keys: tuple[str, ...], model: RopeScaling) -> list[str]:
    unknown = set(value) - {*SPELLINGS, *keys, ORIGINAL}
    findings = [f"unknown key {key!r} = {value[key]!r}" for key in sorted(unknown, key=str)]
    most = model.max_position_embeddings
    if ORIGINAL not in keys and value.get(ORIGINAL) not in (None, most):
        findings.append(f"{ORIGINAL} is {value[ORIGINAL]!r}, max_position_embeddings is {most!r}")
    return findings


def _bad_values(value: dict, keys: tuple[str, ...], kind: str | None) -> list[str]:
    """null is as good as a missing key, except where the type needs a value."""
    needed = TYPES[kind].needs if kind else keys
    return [
        f"{key} is {value.get(key)!r}, not {VALUES[key].wanted}"
        for key in keys
        if (key in needed or value.get(key) is not None) and not VALUES[key].fits(value.get(key))
    ]


def _unusable(value: object, findings: list[str]) -> ConfigError:
    return ConfigError(
        report(
            f"rope_scaling {value!r} cannot be used:",
            findings,
            f'Known are null, {{"type": "linear", "factor": 8.0}} and the same with one of: {", ".join(KNOWN)}. '
            f"llama3 also needs {', '.join(TYPES['llama3'].needs[1:])}.",
        )
    )
