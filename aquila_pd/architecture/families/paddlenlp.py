"""PaddleNLP's own LLaMA: what its save_pretrained writes, and what we write with --architecture llama."""

from ...utils.errors import ConfigError
from ...utils.files import shown_value
from ..rope_scaling import PADDLENLP_DICT
from . import llama
from .base import Family, always

SCALING_TYPE, SCALING_FACTOR = "rope_scaling_type", "rope_scaling_factor"

READ = {
    **llama.READ,
    SCALING_TYPE: SCALING_TYPE,
    SCALING_FACTOR: SCALING_FACTOR,
}
DEFAULTS = {**llama.DEFAULTS, "pad_token_id": 0, SCALING_TYPE: None, SCALING_FACTOR: 1.0}
NEUTRAL = {
    **llama.NEUTRAL,
    "alibi": (always(False), "biases by distance in place of rotary embedding"),
    "fuse_attention_qkv": (always(False), "q, k and v stored as one matrix"),
    "fuse_attention_ffn": (always(False), "gate and up stored as one matrix"),
    "use_long_sequence_strategies": (always(False), "another rotary embedding"),
    "long_sequence_strategy_name": (always(None), "another rotary embedding"),
    "long_sequence_strategy_type": (always(None), "another rotary embedding"),
    "long_sequence_init_args": (always({}), "another rotary embedding"),
    "tensor_parallel_degree": (always(1), "weights cut over several devices"),
    "num_experts": (always(0), "a mixture of experts"),
}
TRAINING = "is about training or speed, not about the function"
IGNORED = {
    **llama.IGNORED,
    "seq_length": "is the length trained with",
    "immediate_clear_past_key_value": TRAINING,
    "use_last_token_for_generation": TRAINING,
    "use_flash_attention_for_generation": TRAINING,
    "use_flash_attention": TRAINING,
    "use_fused_rms_norm": TRAINING,
    "use_fused_rope": TRAINING,
    "use_fused_linear": TRAINING,
    "use_recompute": TRAINING,
    "recompute": TRAINING,
    "recompute_granularity": TRAINING,
    "sequence_parallel": TRAINING,
    "tensor_parallel_output": TRAINING,
    "dpo_config": TRAINING,
    "paddlenlp_version": llama.PROVENANCE,
}


def complete(fields: dict) -> dict:
    """Rotary scaling out of PaddleNLP's two keys, or of its dict for llama3; other types it computes otherwise than
    torch are left for the checks. Raises ConfigError for a dict that PaddleNLP would not look at."""
    kind, scaling = fields[SCALING_TYPE], fields["rope_scaling"]
    if scaling is None:
        scaling = None if kind is None else {"type": kind, "factor": fields[SCALING_FACTOR]}
    elif kind is not None or not isinstance(scaling, dict) or scaling.get("rope_type") != PADDLENLP_DICT:
        raise ConfigError(
            f"rope_scaling is {shown_value(scaling)} and {SCALING_TYPE} {shown_value(kind)}. PaddleNLP's LLaMA "
            f"reads rope_scaling with rope_type {PADDLENLP_DICT!r} only, and {SCALING_TYPE} for other types: keep one."
        )
    return {**llama.complete(fields), "rope_scaling": scaling}


FAMILY = Family(
    name="paddlenlp_llama",
    recognises=lambda config: config.get("model_type") == "llama" and llama.is_paddlenlp(config),
    read=READ,
    defaults=DEFAULTS,
    neutral=NEUTRAL,
    ignored=IGNORED,
    complete=complete,
)
