"""A tiny Aquila chat model on disk, loadable by Paddle: random weights, Aquila's tokenizer layout, a chat template."""

import json
import shutil
from pathlib import Path

import checkpoint_factory as factory
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

VOCAB = 320  # <|endoftext|> and the tokens of the BPE, then Aquila's eight special tokens; rows of the embedding
BPE = VOCAB - 8
CLS, EOS = VOCAB - 2, VOCAB - 1
SENTENCEPIECE = 310  # tokens of the SentencePiece model

# Text to learn merges from: words, Chinese, and emoji of which a token holds a part.
TEXTS = [
    "Hello, please introduce yourself. The quick brown fox jumps over the lazy dog, please.",
    "A chat between a curious human and an artificial intelligence assistant.",
    "你好，请介绍一下北京。北京是中国的首都。今天天气很好。",
    "🙂🙃 👨‍👩‍👧 👋🏽 🇨🇳",
]

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=CLS,
    eos_token_id=EOS,
)


def write_aquila_tokenizer(folder: Path) -> Path:
    """vocab.json, merges.txt and the two published JSON files; the special tokens follow the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=BPE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    assert tokenizer.get_vocab_size() == BPE, "TEXTS are too short for so many merges"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(
        '{"add_prefix_space": false, "bos_token": "[CLS]", "clean_up_tokenization_spaces": true, "eos_token": "</s>", '
        '"model_max_length": 2048, "tokenizer_class": "GPT2Tokenizer", "unk_token": "<|endoftext|>"}'
    )
    names = {"bos_token": "[CLS]", "eos_token": "</s>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return folder


def tiny_torch_folder(path: Path, *, seed: int = 0, **config) -> Path:
    """The same model as a torch checkpoint: config.json, model.safetensors, tokenizer files."""
    said = factory.config(**{**SIZES, **config})
    factory.write_safetensors(path, said, factory.weights(said, seed=seed))
    return write_aquila_tokenizer(path)


def tiny_chat_folder(path: Path, template: str | None = "aquila-v1", *, seed: int = 0, **config) -> Path:
    """The folder that `aquila-pd convert` makes of the tiny model, with the named chat template (None: with none)."""
    path = Path(path)
    return converted(tiny_torch_folder(path.with_name(f"{path.name}-torch"), seed=seed, **config), path, template)


def tiny_ziya_folder(path: Path, *, seed: int = 0) -> Path:
    """A folder like Ziya2's: LLaMA's architecture, SentencePiece, the template "ziya"."""
    path = Path(path)
    sizes = dict(vocab_size=SENTENCEPIECE, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    said = factory.config(**{**SIZES, **sizes, "architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    source = factory.write_safetensors(path.with_name(f"{path.name}-torch"), said, factory.weights(said, seed=seed))
    return converted(write_sentencepiece_tokenizer(source), path, "ziya")


def converted(source: Path, path: Path, template: str | None) -> Path:
    """The converted folder of a torch folder, which is removed."""
    from aquila_pd.checkpoint.convert import convert

    convert(source, path, verify="none", chat_template=template or "auto", say=lambda line: None)
    shutil.rmtree(source)
    return path


def write_sentencepiece_tokenizer(folder: Path) -> Path:
    """tokenizer.model with byte fallback, and a tokenizer_config.json as Ziya's folders have it."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Hello world, how are you?", "今天天气很好，你好，世界。", "a b c hello world"] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=SENTENCEPIECE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, "add_bos_token": True}))
    return folder
