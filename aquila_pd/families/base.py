"""What a family is: how its config.json is recognised, read strictly, and said in Paddle's words."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .. import config_checks
from ..errors import ConfigError, report
from ..weight_map import Dims
from .dialect import HUGGING_FACE, Dialect

DTYPES = ("float32", "float16", "bfloat16")


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
        known = {*self.read, *self.neutral, *self.ignored}
        findings = [f"unknown key   {key} = {config[key]!r}" for key in sorted(set(config) - known)]
        fields = dict(self.defaults)
        for key, ours in self.read.items():
            # an explicit null is a value ("no pad token"); where two keys mean one field it does not undo the other
            if key in config and (config[key] is not None or self.defaults.get(ours) is not None or ours not in fields):
                fields[ours] = config[key]
        absent = [key for key, ours in self.read.items() if ours not in fields]
        findings += [f"missing key   {key}" for key in dict.fromkeys(absent)]
        if not absent:
            fields = self.complete(fields)
            findings += self._not_neutral(config, fields)
            findings += _bad_values(fields)
        if findings:
            advice = "A key that changes the model needs code in aquila_pd/families; one that does not, a row there."
            raise ConfigError(report(f"config.json cannot be read as family {self.name}:", findings, advice))
        fields["rope_scaling"] = config_checks.rope_scaling(fields["rope_scaling"])
        check_sizes(fields)
        return fields

    def _not_neutral(self, config: Mapping, fields: dict) -> list[str]:
        if not _whole_sizes(fields):
            return []
        wanted = {key: neutral(fields) for key, (neutral, _) in self.neutral.items() if key in config}
        return [
            f"unsupported   {key} = {config[key]!r}: {self.neutral[key][1]}; only {value!r} is known"
            for key, value in wanted.items()
            if config[key] not in (None, value)
        ]


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
        wrong.append(f"tie_word_embeddings is {fields['tie_word_embeddings']!r}, not true or false")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = fields[name]
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if not all(i is None or (isinstance(i, int) and not isinstance(i, bool)) for i in ids):
            wrong.append(f"{name} is {value!r}, not a token id")
    if fields["dtype"] not in (None, *DTYPES):
        wrong.append(f"the dtype is {fields['dtype']!r}; known are {', '.join(DTYPES)}")
    return [f"bad value     {line}" for line in wrong]
