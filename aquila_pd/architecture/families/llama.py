"""LLaMA in Hugging Face's form: Ziya, Ziya2, SmolLM2, and every GGUF file of the LLaMA architecture."""

from collections.abc import Mapping

from .. import config_checks
from .base import Family, always

READ = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "torch_dtype": "dtype",
    "dtype": "dtype",
}

# of transformers' LlamaConfig; sizes have none here, because a config.json without them describes no model
DEFAULTS = {
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "dtype": None,
}

NEUTRAL = {
    **{key: (always(value), what) for key, (value, what) in config_checks.NEUTRAL.items()},
    "head_dim": (lambda fields: fields["hidden_size"] // fields["num_attention_heads"], "the size of a head"),
    "quantization_config": (always(None), "weights stored in fewer bits"),
    "is_encoder_decoder": (always(False), "another architecture"),
    "add_cross_attention": (always(False), "another architecture"),
}

PROVENANCE = "says who wrote the file"
OUTPUT_FORM = "is about the form of outputs in transformers"
SAMPLING = "is a default of generate(); generation_config.json is the place for it"
IGNORED = {
    "architectures": "names the family",
    "model_type": "names the family",
    "_name_or_path": PROVENANCE,
    "transformers_version": PROVENANCE,
    "paddlenlp_version": PROVENANCE,
    "auto_map": "names Python files of the source",
    "custom_pipelines": "names Python files of the source",
    "is_llama_config": PROVENANCE,
    "transformers.js_config": "is about another runtime",
    "pretraining_tp": "cuts the same products into slices",
    "max_sequence_length": "repeats max_position_embeddings in early LLaMA configs",
    "use_cache": "is a default of generate()",
    "unk_token_id": "is the tokenizer's business",
    "_attn_implementation": "chooses a kernel",
    "_attn_implementation_autoset": "chooses a kernel",
    "_flash_attn_2_enabled": "chooses a kernel",
    "return_dict": OUTPUT_FORM,
    "output_attentions": OUTPUT_FORM,
    "output_hidden_states": OUTPUT_FORM,
    **dict.fromkeys(
        ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "max_length", "max_new_tokens"), SAMPLING
    ),
}


def complete(fields: dict) -> dict:
    """One key/value head per query head when the config does not say."""
    kv_heads = fields["num_key_value_heads"]
    return {**fields, "num_key_value_heads": fields["num_attention_heads"] if kv_heads is None else kv_heads}


def is_paddlenlp(config: Mapping) -> bool:
    """Whether PaddleNLP's own LLaMA, which has other keys, wrote this config.json."""
    return "paddlenlp_version" in config or "rope_scaling_type" in config


FAMILY = Family(
    name="llama",
    recognises=lambda config: config.get("model_type") == "llama" and not is_paddlenlp(config),
    read=READ,
    defaults=DEFAULTS,
    neutral=NEUTRAL,
    ignored=IGNORED,
    complete=complete,
)
