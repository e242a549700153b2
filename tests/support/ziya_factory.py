"""A folder of Ziya2's shape: LLaMA's configuration, and a SentencePiece tokenizer trained here."""

import json
from pathlib import Path

import checkpoint_factory as factory

SENTENCES = [
    "今天天气很好，我们去公园散步。",
    "A language model predicts the next token.",
    "北京是中国的首都。",
    "🙂 hello 世界\n",
]


def write_ziya(folder: Path) -> Path:
    """A folder of Ziya2's shape, tiny but for its vocabulary, with a SentencePiece model trained here."""
    import sentencepiece

    config = factory.config(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=39424,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        torch_dtype="bfloat16",
    )
    factory.write_safetensors(folder, config, factory.weights(config, dtype="bfloat16"), shards=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "add_bos_token": True}))
    return folder


REAL = {
    # hidden, intermediate, layers, heads, key/value heads: bytes of bfloat16 weights by hand
    "34b": (6144, 24576, 60, 48, 8),
    "70b": (8192, 28672, 80, 64, 8),
}


def write_real_config(folder: Path, size: str) -> dict:
    """The config.json of a published size, without weights."""
    hidden, intermediate, layers, heads, kv_heads = REAL[size]
    config = factory.config(
        vocab_size=100008,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        bos_token_id=100006,
        eos_token_id=100007,
        torch_dtype="bfloat16",
    )
    factory.write_config(folder, config)
    return config
