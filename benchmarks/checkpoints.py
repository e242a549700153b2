"""Random Hugging Face folders of a given shape, written shard by shard, for benchmarks.

python benchmarks/checkpoints.py FOLDER SHAPE [DTYPE]
"""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aquila_pd.files import write_json
from aquila_pd.shards import INDEX, TAGS, Entry, bits, index_of, parse_size, plan_shards, write_shard
from aquila_pd.weight_map import Dims, weights

SHAPES = {
    # hidden, intermediate, layers, heads, key/value heads, vocabulary
    "0.4b": (1024, 4096, 12, 16, 4, 100008),
    "0.6b": (2048, 5504, 10, 16, 4, 32000),
    "1.3b": (2048, 5504, 24, 16, 16, 32000),
    "7b": (4096, 11008, 32, 32, 32, 100008),
}


def write_folder(folder: Path, shape: str, *, dtype: str = "bfloat16", model_type: str = "llama") -> Path:
    """A folder transformers, PaddleNLP and our converter read; random values, real sizes. Kept if already there."""
    hidden, intermediate, layers, heads, kv_heads, vocab = SHAPES[shape]
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    dims = Dims(vocab, hidden, hidden, hidden // heads * kv_heads, intermediate, layers)
    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[dtype]
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(1 << 20) * 0.02).astype(np.float32).astype(kind)

    def values(shape: tuple[int, ...]) -> np.ndarray:
        return np.resize(block, int(np.prod(shape))).reshape(shape)

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
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


if __name__ == "__main__":
    write_folder(Path(sys.argv[1]), sys.argv[2], **({"dtype": sys.argv[3]} if len(sys.argv) > 3 else {}))
