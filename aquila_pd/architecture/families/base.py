"""Family: how a config.json is recognised, read strictly, and written as Paddle's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ...utils.errors import ConfigError, report
from ...utils.files import shown, shown_value
from .. import config_checks
from ..rope_scaling import UNSCALED, RopeScaling
from ..weight_map import Dims
from .dialect import HUGGING_FACE, Dialect

DTYPES = ("float32", "float16", "bfloat16", "float64")  # the last is written as float32

# The next step by the first word of a finding.
ADVICE = {
    "unknown": "A key that changes the model needs code in aquila_pd/families. One without influence needs a row "
    "there, or remove it from a copy of config.json.",
    "unsupported": "Another model than the known one needs code in aquila_pd/families.",
    "missing": "Fetch config.json again, or add the key with the value the weights were trained with.",
    "bad": "Correct bad values in a copy of config.json; compare it with the one published beside the weights.",
}


def always(value: object) -> Callable[[Mapping], object]:
    """The neutral value of a key that does not depend on the rest of the config."""
    return lambda fields: value


@dataclass(frozen=True)
class Family:
    """One family of decoder models, described by its config.json.

    read: key of its config.json -> our field. Fields without a default must be there.
    defaults: fields that may be absent, with the value the family's own code takes then.
    neutral: keys that must have the one value our model computes (from the fields), and what another would change.
    ignored: keys without influence on the model, and why.
    complete: derives the fields the config.json leaves to arithmetic.
    runs_as_llama: transformers' LLaMA computes this family's source files as they are.
    """

    name: str
    recognises: Callable[[Mapping], bool]
    read: Mapping[str, str]
    defaults: Mapping[str, object]
    neutral: Mapping[str, tuple[Callable[[Mapping], object], str]] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    complete: Callable[[dict], dict] = dict
    dialect: Dialect = HUGGING_FACE
    runs_as_llama: bool = True

    def fields(self, config: Mapping) -> dict:
        """Our fields from a config.json, all set and checked. Raises ConfigError with all findings."""
        findings: list[str] = []
        if ROPE_PARAMETERS in config and set(_OLD_ROPE) <= set(self.read):
            config, findings = without_rope_parameters(config)
        known = {*self.read, *self.neutral, *self.ignored}
        findings += [f"unknown key   {shown(key)} = {shown_value(config[key])}" for key in sorted(set(config) - known)]
        fields = dict(self.defaults)
        for key, ours in self.read.items():
            # an explicit null is a value ("no pad token"); where two keys mean one field it does not undo the other
            if key in config and (config[key] is not None or self.defaults.get(ours) is not None or ours not in fields):
                fields[ours] = config[key]
        absent = [key for key, ours in self.read.items() if ours not in fields]
        findings += [f"missing key   {key}" for key in dict.fromkeys(absent)]
        damaged = config_checks.too_many({name: fields[name] for name in COUNTS if name in fields})
        findings += [f"bad value     {line}" for line in damaged]
        if not absent and not damaged:
            fields = self.complete(fields)
            findings += self._not_neutral(config, fields)
            findings += _bad_values(fields)
        if findings:
            advice = "\n".join(text for kind, text in ADVICE.items() if any(f.startswith(kind) for f in findings))
            raise ConfigError(report(f"config.json cannot be read as family {self.name}:", findings, advice))
        check_sizes(fields)
        return {**fields, "rope_scaling": RopeScaling.of(fields).to_config()}

    def _not_neutral(self, config: Mapping, fields: dict) -> list[str]:
        if not _whole_sizes(fields):
            return []
        wanted = {key: neutral(fields) for key, (neutral, _) in self.neutral.items() if key in config}
        return [
            f"unsupported   {key} = {shown_value(config[key])}: {self.neutral[key][1]}; only {value!r} is known"
            for key, value in wanted.items()
            if config[key] not in (None, value)
        ]


ROPE_PARAMETERS = "rope_parameters"
_OLD_ROPE = ("rope_theta", "rope_scaling")
_MOVED_UP = ("rope_theta", "partial_rotary_factor")


def without_rope_parameters(config: Mapping) -> tuple[dict, list[str]]:
    """transformers 5 writes the rotary settings into one key, rope_parameters; here they are under the older keys.

    Returns the config and a finding for each setting that an older key in the same file contradicts.
    """
    config = dict(config)
    new = config.pop(ROPE_PARAMETERS)
    if new is None:
        return config, []
    if not isinstance(new, dict):
        return config, [f"bad value     {ROPE_PARAMETERS} is {shown_value(new)}, not a mapping"]
    moved = {key: new[key] for key in _MOVED_UP if new.get(key) is not None}
    scaling = {key: value for key, value in new.items() if key not in _MOVED_UP}
    if scaling:
        unscaled = scaling.get("rope_type", scaling.get("type")) == UNSCALED
        moved["rope_scaling"] = None if unscaled and len(scaling) == 1 else scaling
    differing = [key for key, value in moved.items() if config.get(key) is not None and not _same(config[key], value)]
    findings = [
        f"bad value     {key} is {shown_value(config[key])}, but {ROPE_PARAMETERS} says {shown_value(moved[key])}"
        for key in differing
    ]
    return {**config, **moved}, findings


def _same(old: object, new: object) -> bool:
    """Whether two settings mean the same: a scaling has two spellings of its type and two of its absence."""
    if isinstance(old, dict) and isinstance(new, (dict, type(None))):
        spelled = [{("rope_type" if k == "type" else k): v for k, v in (value or {}).items()} for value in (old, new)]
        return spelled[0] == spelled[1] or all(s.get("rope_type", "default") == "default" for s in spelled)
    return old == new


COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def _whole_sizes(fields: Mapping) -> bool:
    """Whether the sizes can be calculated with at all; check_sizes says what is wrong with them."""
    return all(isinstance(fields.get(name), int) and fields[name] > 0 for name in COUNTS)


def check_sizes(fields: Mapping) -> None:
    """Raise ConfigError when the counts do not make a model."""
    config_checks.sizes(**{name: fields[name] for name in COUNTS})


def dims(fields: Mapping) -> Dims:
    """The sizes of the weight table."""
    head = fields["hidden_size"] // fields["num_attention_heads"]
    return Dims(
        vocab=fields["vocab_size"],
        d=fields["hidden_size"],
        q=fields["num_attention_heads"] * head,
        kv=fields["num_key_value_heads"] * head,
        ff=fields["intermediate_size"],
        layers=fields["num_hidden_layers"],
        tied=fields["tie_word_embeddings"],
    )


def paddle_config(fields: Mapping, dtype: str) -> dict:
    """The config.json of the Paddle model. dtype: of its tensors, such as "bfloat16"."""
    return {
        "architectures": ["AquilaForCausalLM"],
        "model_type": "aquila",
        **{name: fields[name] for name in COUNTS},
        "hidden_act": "silu",
        "rms_norm_eps": fields["rms_norm_eps"],
        "rope_theta": fields["rope_theta"],
        "rope_scaling": fields["rope_scaling"],
        "initializer_range": fields["initializer_range"],
        "bos_token_id": fields["bos_token_id"],
        "eos_token_id": fields["eos_token_id"],
        "pad_token_id": fields["pad_token_id"],
        "tie_word_embeddings": fields["tie_word_embeddings"],
        "use_cache": True,
        "dtype": dtype,  # what PaddleNLP reads
        "torch_dtype": dtype,  # what everything else reads
    }


def _bad_values(fields: Mapping) -> list[str]:
    """Fields of the wrong kind; counts and rope_scaling have their own checks."""
    wrong = config_checks.numbers(
        **{name: fields[name] for name in ("rms_norm_eps", "rope_theta", "initializer_range")}
    )
    if not isinstance(fields["tie_word_embeddings"], bool):
        wrong.append(f"tie_word_embeddings is {shown_value(fields['tie_word_embeddings'])}, not true or false")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = fields[name]
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not (ids and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)):
            wrong.append(f"{name} is {shown_value(value)}, not a token id")
    if fields["dtype"] not in (None, *DTYPES):
        wrong.append(f"the dtype is {shown_value(fields['dtype'])}; known are {', '.join(DTYPES)}")
    return [f"bad value     {line}" for line in wrong]
