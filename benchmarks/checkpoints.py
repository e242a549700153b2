"""Random Hugging Face folders of a given shape, written shard by shard, for benchmarks.

python benchmarks/checkpoints.py FOLDER SHAPE [DTYPE]
"""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aquila_pd.architecture.weight_map import Dims, weights
from aquila_pd.formats.dtypes import TAGS
from aquila_pd.formats.safetensors import INDEX, Entry, bits, index_of, plan_shards, write_shard
from aquila_pd.utils.files import write_json
from aquila_pd.utils.units import parse_size

SHAPES = {
    # hidden, intermediate, layers, heads, key/value heads, vocabulary
    "tiny": (64, 160, 2, 4, 2, 512),  # for the tests
    "135m": (576, 1536, 30, 9, 3, 49152),  # SmolLM2-135M
    "0.4b": (1024, 4096, 12, 16, 4, 100008),
    "0.4b-4": (1024, 4096, 4, 16, 4, 100008),  # four layers of it, for training steps
    "0.6b": (2048, 5504, 10, 16, 4, 32000),
    "1.3b": (2048, 5504, 24, 16, 16, 32000),
    "7b": (4096, 11008, 32, 32, 32, 100008),
}
TIED = {"135m"}  # the head is the embedding
BLOCK = 1_048_583  # random values, repeated; a prime, so that no two rows of a matrix are the same


def dims_of(shape: str) -> Dims:
    """The sizes that tensors of a shape are made of."""
    hidden, intermediate, layers, heads, kv_heads, vocab = SHAPES[shape]
    return Dims(vocab, hidden, hidden, hidden // heads * kv_heads, intermediate, layers, tied=shape in TIED)


def bytes_per_token(shape: str, dtype: str = "float32") -> int:
    """Bytes of weights that decoding one token has to read: all but the table of embeddings, of which it reads a row.

    A tied head reads that table after all.
    """
    table = "model.embed_tokens.weight"
    read = [w for w in weights(dims_of(shape)) if w.hf != table or shape in TIED]
    return sum(int(np.prod(w.hf_shape)) for w in read) * (4 if dtype == "float32" else 2)


def write_folder(folder: Path, shape: str, *, dtype: str = "bfloat16", model_type: str = "llama") -> Path:
    """A folder transformers, PaddleNLP and our converter read; random values, real sizes. Kept if already there."""
    hidden, intermediate, layers, heads, kv_heads, vocab = SHAPES[shape]
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    dims = dims_of(shape)
    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[dtype]
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(BLOCK) * 0.02).astype(np.float32)

    def values(shape: tuple[int, ...]) -> np.ndarray:
        around = block + 1 if len(shape) == 1 else block  # norms near 1: else no layer would matter to the logits
        return np.resize(around.astype(kind), int(np.prod(shape))).reshape(shape)

    entries = [Entry(w.hf, TAGS[np.dtype(kind)], w.hf_shape) for w in weights(dims)]
    shards = plan_shards(entries, parse_size("2GB"))
    for shard in shards:
        tensors = (bits(values(entry.shape)) for entry in shard.entries)
        write_shard(folder / shard.file, shard, tensors, framework="pt")
    if len(shards) > 1:
        write_json(folder / INDEX, index_of(shards))
    config = {
        "architectures": ["LlamaForCausalLM" if model_type == "llama" else "AquilaForCausalLM"],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,  # prompts of 4096 and an answer
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": shape in TIED,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


if __name__ == "__main__":
    write_folder(Path(sys.argv[1]), sys.argv[2], **({"dtype": sys.argv[3]} if len(sys.argv) > 3 else {}))
