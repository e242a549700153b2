"""Aquila-7B and AquilaChat-7B of the first generation in FlagAI's own format."""

from . import llama
from .base import Family
from .dialect import Dialect

DIALECT = Dialect(
    "FlagAI",
    names={
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "layers.{i}.attention.wq.weight": "model.layers.{i}.self_attn.q_proj.weight",
        "layers.{i}.attention.wk.weight": "model.layers.{i}.self_attn.k_proj.weight",
        "layers.{i}.attention.wv.weight": "model.layers.{i}.self_attn.v_proj.weight",
        "layers.{i}.attention.wo.weight": "model.layers.{i}.self_attn.o_proj.weight",
        "layers.{i}.feed_forward.w1.weight": "model.layers.{i}.mlp.gate_proj.weight",
        "layers.{i}.feed_forward.w3.weight": "model.layers.{i}.mlp.up_proj.weight",
        "layers.{i}.feed_forward.w2.weight": "model.layers.{i}.mlp.down_proj.weight",
        "layers.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
        "layers.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    },
    interleaved={
        "model.layers.{i}.self_attn.q_proj.weight": "q",
        "model.layers.{i}.self_attn.k_proj.weight": "kv",
    },
)

# the special tokens of the 100008-row vocabulary; FlagAI keeps them in code, not in config.json
IDS = {"bos_token_id": 100006, "eos_token_id": 100007, "pad_token_id": 0}


def complete(fields: dict) -> dict:
    """The MLP's width as LLaMA's first code has it: two thirds of 4 D, rounded up to multiple_of."""
    d, multiple = fields["hidden_size"], fields["multiple_of"]
    if isinstance(d, int) and isinstance(multiple, int) and multiple > 0:
        fields = {**fields, "intermediate_size": -(-int(2 * 4 * d / 3) // multiple) * multiple}
    vocab = fields["vocab_size"]
    ids = IDS if isinstance(vocab, int) and vocab > IDS["eos_token_id"] else dict.fromkeys(IDS)
    return {**fields, **ids, "num_key_value_heads": fields["num_attention_heads"]}


FAMILY = Family(
    name="aquila_v1",
    recognises=lambda config: {"dim", "n_heads", "n_layers"} <= set(config),
    read={
        "vocab_size": "vocab_size",
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "multiple_of": "multiple_of",
        "norm_eps": "rms_norm_eps",
        "max_seq_len": "max_position_embeddings",
        "initializer_range": "initializer_range",
    },
    defaults={**llama.DEFAULTS, "rms_norm_eps": 1e-5, "intermediate_size": None},
    ignored={
        "flash_atten": "chooses a kernel",
        "use_cache": "is a default of generate()",
        "model_type": "names the family",
        "architectures": "names the family",
    },
    complete=complete,
    dialect=DIALECT,
    runs_as_llama=False,
)
