"""Conversion targets: framework, architecture, tensor names, layout, and config.json of an output.

A target says; plan.py plans with it and convert.py writes. Every one is made of the same table, read to the right for
Paddle and to the left for torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..architecture.families.base import COUNTS, paddle_config
from ..architecture.rope_scaling import RopeScaling
from ..architecture.weight_map import BASE_MODEL_PREFIX, HF_PREFIX, Weight, prefixed
from ..utils.errors import ConfigError

PADDLE, TORCH = "paddle", "torch"
PADDLENLP_LLAMA = "llama"  # the architecture for PaddleNLP's own classes


@dataclass(frozen=True)
class Target:
    """framework: "paddle" or "torch"; architecture: as --architecture names it; prefix: of names, without the dot;
    config: (our fields, dtype name) -> config.json; tag: "format" in the safetensors metadata; bundle: the folder
    carries our code."""

    framework: str
    architecture: str
    prefix: str
    config: Callable[[Mapping, str], dict]
    bundle: bool = False

    @property
    def tag(self) -> str:
        """The framework in the safetensors metadata; safetensors.header_bytes has the reason."""
        return "pt" if self.framework == TORCH else "np"

    def name(self, weight: Weight) -> str:
        return prefixed(weight.hf, self.prefix)

    def transposes(self, weight: Weight) -> bool:
        """Whether this target stores the weight as [in, out], transposed from Hugging Face's layout."""
        return weight.transpose and self.framework == PADDLE

    def shape(self, weight: Weight) -> tuple[int, ...]:
        return weight.hf_shape[::-1] if self.transposes(weight) else weight.hf_shape


def torch_config(model_type: str, architecture: str) -> Callable[[Mapping, str], dict]:
    """The config.json Hugging Face's libraries read."""

    def config(fields: Mapping, dtype: str) -> dict:
        # torch's side has no "dtype" key in the versions vLLM and llama.cpp read
        common = {key: value for key, value in paddle_config(fields, dtype).items() if key != "dtype"}
        return {
            **common,
            "architectures": [architecture],
            "model_type": model_type,
            "rope_scaling": RopeScaling.of(fields).to_hf(),
        }

    return config


def paddlenlp_llama_config(fields: Mapping, dtype: str) -> dict:
    """The config.json of PaddleNLP's own LLaMA, which spells rotary scaling in two keys. Raises ConfigError."""
    scaling = RopeScaling.of(fields)
    if not scaling.runs_on_paddlenlp:
        raise ConfigError(
            f"PaddleNLP's LLaMA does not compute rope_scaling {scaling.type!r} as torch does. "
            f"Use --architecture {BASE_MODEL_PREFIX}."
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: fields[name] for name in COUNTS},
        **{name: fields[name] for name in ("rms_norm_eps", "rope_theta", "initializer_range")},
        **scaling.to_paddlenlp(),
        **{name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")},
        "use_cache": True,
        "dtype": dtype,
    }


TARGETS = (
    Target(PADDLE, "aquila", BASE_MODEL_PREFIX, paddle_config, bundle=True),
    Target(PADDLE, PADDLENLP_LLAMA, "llama", paddlenlp_llama_config),
    Target(TORCH, "llama", HF_PREFIX.rstrip("."), torch_config("llama", "LlamaForCausalLM")),
    Target(TORCH, "aquila", HF_PREFIX.rstrip("."), torch_config("aquila", "AquilaForCausalLM")),
)


def architectures(framework: str) -> list[str]:
    """What --architecture offers, the default first."""
    return [target.architecture for target in TARGETS if target.framework == framework]


def find_target(framework: str, architecture: str | None = None) -> Target:
    """The target of this name, by default the first of its framework. Raises ConfigError."""
    known = architectures(framework)
    asked = known[0] if architecture is None else architecture
    if asked not in known:
        raise ConfigError(f"The architecture {asked!r} is not known. Choose one of {', '.join(known)}.")
    return next(t for t in TARGETS if (t.framework, t.architecture) == (framework, asked))
