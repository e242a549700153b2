"""Tiny Hugging Face checkpoints on disk, written without the package under test."""

import hashlib
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

# sizes that differ wherever they may: q 32, kv 16, ff 64, vocab 80; q and o are square, which hides a lost transpose
CONFIG = {
    "architectures": ["AquilaForCausalLM"],
    "model_type": "aquila",
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "initializer_range": 0.02,
    "bos_token_id": 78,
    "eos_token_id": 79,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.32.0",
    "use_cache": True,
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def config(**changes) -> dict:
    return {**CONFIG, **changes}


def weights(config: dict, *, dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face names, norms well away from 1."""
    rng = np.random.default_rng(seed)
    d, ff, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (vocab, d)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes[layer + "self_attn.q_proj.weight"] = (d, d)
        shapes[layer + "self_attn.k_proj.weight"] = (kv, d)
        shapes[layer + "self_attn.v_proj.weight"] = (kv, d)
        shapes[layer + "self_attn.o_proj.weight"] = (d, d)
        shapes[layer + "mlp.gate_proj.weight"] = (ff, d)
        shapes[layer + "mlp.up_proj.weight"] = (ff, d)
        shapes[layer + "mlp.down_proj.weight"] = (d, ff)
        shapes[layer + "input_layernorm.weight"] = (d,)
        shapes[layer + "post_attention_layernorm.weight"] = (d,)
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, d)
    values = {name: rng.normal(scale=0.2, size=shape) + 0.4 * (len(shape) == 1) for name, shape in shapes.items()}
    return {name: value.astype(DTYPES[dtype]) for name, value in values.items()}


def expected(hf: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The Paddle names and arrays of Hugging Face weights, written by hand: the table has no part in it."""
    found = {}
    for name, value in hf.items():
        linear = name.endswith("_proj.weight") or name == "lm_head.weight"
        found["aquila." + name[len("model.") :] if name.startswith("model.") else name] = value.T if linear else value
    return found


def load_folder(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder through the safetensors library."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def write_config(folder: Path, config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def write_safetensors(folder: Path, config: dict, tensors: dict[str, np.ndarray], *, shards: int = 1) -> Path:
    """A folder with config.json and model.safetensors, or shards and an index."""
    write_config(folder, config)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    placed = {}
    for i, names in enumerate(np.array_split(list(tensors), shards), 1):
        file = f"model-{i:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names.tolist()}, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(names.tolist(), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder


def write_bin(folder: Path, config: dict, tensors: dict[str, np.ndarray], **save_options) -> Path:
    """A folder with config.json and one pytorch_model.bin of float32 tensors."""
    import torch

    write_config(folder, config)
    torch.save(
        {n: torch.from_numpy(t.copy()) for n, t in tensors.items()}, folder / "pytorch_model.bin", **save_options
    )
    return folder


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(hf: str) -> str:
    stem = hf.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.weight"
    return f"{GGUF_NAMES[stem]}.weight"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter stores them."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def add_gguf_tokenizer(writer, size: int) -> None:
    """A byte-level BPE of `size` tokens: letters, one merge, and fillers; the last two are control tokens."""
    tokens = ["<pad>", "a", "b", "ab", *(f"filler{i}" for i in range(size - 6)), "[CLS]", "</s>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (size - 2) + [3, 3])
    writer.add_token_merges(["a b"])


def llama3_divisors(config: dict) -> list[float]:
    """What llama3 divides each pair's frequency by, as llama.cpp's converter leaves it in rope_freqs.weight."""
    said, size = config["rope_scaling"], config["hidden_size"] // config["num_attention_heads"]
    low, high, context = (
        said[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    found = []
    for i in range(size // 2):
        wavelength = 2 * math.pi * config["rope_theta"] ** (2 * i / size)
        smooth = min(max((context / wavelength - low) / (high - low), 0), 1)
        found.append(1 / ((1 - smooth) / said["factor"] + smooth))
    return found


def add_gguf_scaling(writer, config: dict) -> None:
    """Rotary scaling as llama.cpp's converter writes it: a tensor for llama3, metadata for the others."""
    import gguf

    said = config["rope_scaling"]
    if not said:
        return
    if said["type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", np.array(llama3_divisors(config), np.float32))
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(said["type"]))
    writer.add_rope_scaling_factor(said["factor"])
    if "original_max_position_embeddings" in said:
        writer.add_rope_scaling_orig_ctx_len(said["original_max_position_embeddings"])
    for key, add in {
        "attention_factor": writer.add_rope_scaling_yarn_attn_factor,
        "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
        "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
    }.items():
        if key in said:
            add(said[key])


def write_gguf(path: Path, config: dict, tensors: dict[str, np.ndarray], *, kind: str = "F16") -> Path:
    """A GGUF file of the LLaMA architecture; matrices stored as `kind`, norms as F32."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    add_gguf_tokenizer(writer, config["vocab_size"])
    add_gguf_scaling(writer, config)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    quantization = gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        part = name.split(".")[-2]
        stored = interleave(tensor, heads[part]) if part in heads else tensor
        if stored.ndim == 1:
            writer.add_tensor(gguf_name(name), stored.astype(np.float32))
        else:
            writer.add_tensor(
                gguf_name(name), gguf.quantize(np.ascontiguousarray(stored), quantization), raw_dtype=quantization
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_byte_tokenizer(folder: Path, *, bos: str, eos: str, pad: str) -> Path:
    """A tokenizer.json of the special tokens (ids 0, 1, 2) and a few letters, with its tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate([pad, bos, eos, *"abcdefgh"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([pad, bos, eos])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """File name -> hash of its bytes and its modification time: equal before and after means untouched."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in files
    }


def digests(folder: Path) -> dict[str, str]:
    """File name -> hash of its bytes."""
    return {name: digest for name, (digest, _) in snapshot(folder).items()}


# ------------------------------------------------------------------------------------------------ every family


def any_bits(tensors: dict[str, np.ndarray], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of the same shapes and dtypes whose bits are random: NaNs with payloads, infinities, subnormals, -0.0."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, value in tensors.items():
        bits = rng.integers(0, 1 << (8 * value.itemsize), value.shape, dtype=f"u{value.itemsize}")
        bits.flat[0] = 1 << (8 * value.itemsize - 1)  # -0.0
        found[name] = bits.view(value.dtype)
    return found


def write_raw(path: Path, tensors: dict[str, np.ndarray], *, tags: dict[str, str]) -> Path:
    """A safetensors file packed here. tags: dtype name -> tag, such as {"bfloat16": "U16"} for Paddle's own files."""
    header, data = {}, b""
    for name, value in tensors.items():
        bits = np.ascontiguousarray(value).tobytes()
        offsets = [len(data), len(data) + len(bits)]
        header[name] = {"dtype": tags[value.dtype.name], "shape": list(value.shape), "data_offsets": offsets}
        data += bits
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _write_aquila(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    said = config(torch_dtype="bfloat16")
    tensors = weights(said, dtype="bfloat16")
    write_safetensors(folder, said, tensors, shards=2)
    return said, tensors


def _write_llama(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    said = config(model_type="llama", architectures=["LlamaForCausalLM"], torch_dtype="float16")
    tensors = weights(said, dtype="float16")
    write_safetensors(folder, said, tensors)
    return said, tensors


V1_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _write_aquila_v1(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """FlagAI's names, rotary rows of neighbouring pairs, the wrapper around the state dict."""
    import torch

    heads = 4
    # 96: two thirds of 4 x 32, in steps of 24
    said = config(num_key_value_heads=heads, intermediate_size=96)
    tensors = weights(said)
    state = {}
    for name, value in tensors.items():
        stored = interleave(value, heads) if "q_proj" in name or "k_proj" in name else value
        spelled = name.removeprefix("model.") if "layers" in name else name
        for ours, theirs in V1_NAMES.items():
            spelled = spelled.replace(ours, theirs)
        state[spelled] = torch.from_numpy(stored.copy())
    sizes = {"dim": 32, "n_heads": heads, "n_layers": 2, "multiple_of": 24, "vocab_size": 80}
    write_config(folder, {**sizes, "norm_eps": 1e-5, "max_seq_len": 96})
    torch.save({"module": state}, folder / "pytorch_model.bin")
    return said, tensors


def _write_paddlenlp_llama(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """What PaddleNLP's own LLaMA saves: bfloat16 tagged U16, matrices as [in, out], its two keys of rotary scaling."""
    said = config(model_type="llama", architectures=["LlamaForCausalLM"], dtype="bfloat16", paddlenlp_version=None)
    scaled = {"rope_scaling_type": "linear", "rope_scaling_factor": 4.0}
    dropped = ("torch_dtype", "transformers_version", "rope_scaling", "hidden_act")
    write_config(folder, {**{key: value for key, value in said.items() if key not in dropped}, **scaled})
    tensors = weights(said, dtype="bfloat16")
    stored = {name.replace("aquila.", "llama."): value for name, value in expected(tensors).items()}
    write_raw(folder / "model.safetensors", stored, tags={"bfloat16": "U16"})
    return {**said, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, tensors


# family -> writes a folder of it and returns config and weights in Hugging Face's form
FAMILY_FOLDERS = {
    "aquila": _write_aquila,
    "llama": _write_llama,
    "aquila_v1": _write_aquila_v1,
    "paddlenlp_llama": _write_paddlenlp_llama,
}
