"""AquilaConfig: the sizes and constants of one model, as PaddleNLP reads and writes them in config.json.

Hugging Face's config.json and ours read alike. Families with other spellings are translated by the converter.
"""

from functools import cache

from .architecture.config_checks import NEUTRAL
from .architecture.config_checks import numbers as not_positive
from .architecture.config_checks import sizes as check_sizes
from .architecture.rope_scaling import RopeScaling
from .architecture.weight_map import Dims
from .runtime.base import PretrainedConfig
from .utils.errors import ConfigError, report

# Published sizes: hidden, intermediate, layers, heads, key/value heads, max positions.
NAMED_SIZES = {
    "7b": (4096, 11008, 32, 32, 32, 2048),
    "34b": (6144, 24576, 60, 48, 8, 4096),
    "70b": (8192, 28672, 80, 64, 8, 4096),
}

# Keys of Hugging Face files that do not change the mathematics.
IGNORED = {"auto_map", "pretraining_tp", "transformers_version", "model_type", "_attn_implementation_autoset"}


@cache
def _known_to_paddlenlp() -> frozenset[str]:
    return frozenset({*PretrainedConfig().to_dict(), "torch_dtype", "num_labels", "name_or_path", "head_dim"})


def _unsupported(keys: dict) -> list[str]:
    """A line for each key that is not read or asks for another architecture; removes the harmless ones."""
    findings = []
    for name, (value, what) in NEUTRAL.items():
        found = keys.pop(name, None)
        if found not in (None, value):
            findings.append(f"{name} is {found!r} ({what}); only {value!r} is known")
    for name in IGNORED & keys.keys():
        del keys[name]
    return findings + [f"unknown key {name}" for name in sorted(keys.keys() - _known_to_paddlenlp())]


class AquilaConfig(PretrainedConfig):
    """Configuration of an Aquila2 decoder.

    Args:
        vocab_size: rows of the embedding and columns of the head.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: D, ff, layers, N.
        num_key_value_heads: K; None means one per query head.
        max_position_embeddings: context length in tokens: the trained one with linear and dynamic scaling (dynamic
            starts beyond it), the stretched one beside a rope_scaling with original_max_position_embeddings.
        rms_norm_eps: epsilon inside the root of RMSNorm. Aquila's checkpoints use 1e-5; the default is upstream's.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None, or {"type": "linear" | "dynamic" | "llama3" | "yarn", "factor": float >= 1} with the keys
            that llama3 and yarn have beside these in Hugging Face's config.json. `rope` is its meaning.
        initializer_range: standard deviation of random weights.
        pad_token_id: its embedding row is used but gets no gradient from the embedding; None means no such row.

    The defaults are the upstream config class's, which no published checkpoint has: read config.json.

    Raises:
        ConfigError: sizes that do not fit each other, an unknown activation or rope_scaling.
    """

    model_type = "aquila"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 100008,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_scaling: dict | None = None,
        use_cache: bool = True,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        if num_key_value_heads is None:
            num_key_value_heads = num_attention_heads
        kwargs["hidden_act"] = hidden_act
        findings = _unsupported(kwargs)
        if not isinstance(tie_word_embeddings, bool):
            findings.append(f"tie_word_embeddings is {tie_word_embeddings!r}, not true or false")
        findings += not_positive(rms_norm_eps=rms_norm_eps, rope_theta=rope_theta, initializer_range=initializer_range)
        if findings:
            raise ConfigError(report("The configuration is not one of an Aquila model:", findings, "Correct it."))
        check_sizes(
            hidden_size,
            num_attention_heads,
            num_key_value_heads,
            vocab_size=vocab_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            max_position_embeddings=max_position_embeddings,
        )
        head_dim = kwargs.pop("head_dim", None)  # newer Hugging Face files spell out what follows from the rest
        if head_dim is not None and head_dim != hidden_size // num_attention_heads:
            raise ConfigError(
                f"head_dim is {head_dim}; hidden_size {hidden_size} over {num_attention_heads} heads makes "
                f"{hidden_size // num_attention_heads}, and the family has no other."
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.rope_scaling = self.rope.to_config()  # one spelling, as config.json keeps it
        super().__init__(
            use_cache=use_cache,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @classmethod
    def named(cls, size: str, **changes) -> "AquilaConfig":
        """The configuration of a published size, "7b", "34b" or "70b", with any field changed by keyword."""
        if size not in NAMED_SIZES:
            raise ConfigError(f"No size is named {size!r}. Known: {', '.join(NAMED_SIZES)}.")
        hidden, intermediate, layers, heads, kv_heads, positions = NAMED_SIZES[size]
        fields = dict(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=positions,
            rms_norm_eps=1e-5,
            bos_token_id=100006,
            eos_token_id=100007,
        )
        return cls(**{**fields, **changes})

    @property
    def head_dim(self) -> int:
        """H, the size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rope(self) -> RopeScaling:
        """How the rotary frequencies are made. Raises ConfigError for a rope_scaling that cannot be used."""
        return RopeScaling.of(vars(self))

    @property
    def dims(self) -> Dims:
        """The sizes the weight table is made of."""
        return Dims(
            vocab=self.vocab_size,
            d=self.hidden_size,
            q=self.num_attention_heads * self.head_dim,
            kv=self.num_key_value_heads * self.head_dim,
            ff=self.intermediate_size,
            layers=self.num_hidden_layers,
            tied=self.tie_word_embeddings,
        )
