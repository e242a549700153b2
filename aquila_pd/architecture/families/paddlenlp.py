"""PaddleNLP's own LLaMA: what its save_pretrained writes, and what we write with --architecture llama."""

from . import llama
from .base import Family, always

SCALING_TYPE, SCALING_FACTOR = "rope_scaling_type", "rope_scaling_factor"

READ = {
    **{key: field for key, field in llama.READ.items() if key != "rope_scaling"},
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
    """Rotary scaling out of PaddleNLP's two keys; a type it computes otherwise than torch is left for the checks."""
    kind = fields[SCALING_TYPE]
    scaling = None if kind is None else {"type": kind, "factor": fields[SCALING_FACTOR]}
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
