"""Weights and configuration of a GGUF file of the LLaMA architecture.

Such files keep q and k in the row order of interleaved rotary embedding; the dialect below says so.
"""

from pathlib import Path

import numpy as np

from ...architecture import config_checks
from ...architecture.families.dialect import Dialect
from ...formats import safetensors
from ...formats.dtypes import DTYPES
from ...formats.gguf import PRE_TOKENIZER, import_gguf, open_gguf, pre_tokenizer_note, read_value
from ...utils.errors import CheckpointError, report
from . import gguf_rope
from .reader import ALL, Stored

ARCHITECTURE = "llama"
DIALECT = Dialect(
    "GGUF",
    names={
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.{i}.attn_q.weight": "model.layers.{i}.self_attn.q_proj.weight",
        "blk.{i}.attn_k.weight": "model.layers.{i}.self_attn.k_proj.weight",
        "blk.{i}.attn_v.weight": "model.layers.{i}.self_attn.v_proj.weight",
        "blk.{i}.attn_output.weight": "model.layers.{i}.self_attn.o_proj.weight",
        "blk.{i}.ffn_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
        "blk.{i}.ffn_up.weight": "model.layers.{i}.mlp.up_proj.weight",
        "blk.{i}.ffn_down.weight": "model.layers.{i}.mlp.down_proj.weight",
        "blk.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
        "blk.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    },
    interleaved={
        "model.layers.{i}.self_attn.q_proj.weight": "q",
        "model.layers.{i}.self_attn.k_proj.weight": "kv",
    },
)

# metadata key (after "llama.") -> key of a LLaMA config.json; the family checks the values
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.dimension_count": "head_dim",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
}
TOKEN_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
IGNORED = {
    "expert_count": 0,  # with this value; any other makes another architecture
    "expert_used_count": 0,
    "attention.causal": True,
}
MEANINGLESS = {"rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout"}
NATIVE = ("F32", "F16", "BF16", "F64")
ROWS_AT_ONCE = 512  # unpacking makes several temporaries of what it is given


class GGUFReader:
    """Maps the file; unpacks quantized tensors to float32 when they are read."""

    dialect: Dialect | None = DIALECT

    def __init__(self, path: Path):
        self._gguf = import_gguf(path)
        self._file = open_gguf(path)
        self._path = path
        self._tensors = {tensor.name: tensor for tensor in self._file.tensors}
        self.config = self._read_config(path)
        self.stored = self._survey(path)
        self.notes = self._read_divisors()
        packed = sorted({stored.packed for stored in self.stored.values() if stored.packed})
        self.notes += [f"quantized tensors ({', '.join(packed)}) are unpacked to float32"] if packed else []
        if "tokenizer.ggml.merges" in self._file.fields:
            note = pre_tokenizer_note(read_value(self._file, PRE_TOKENIZER, path))
            self.notes += [note] if note else []

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        tensor, stored = self._tensors[name], self.stored[name]
        if stored.packed:
            return self._unpack(tensor, stored.shape, rows, columns)
        native = self._mapped(tensor).view(DTYPES[stored.dtype]).reshape(stored.shape)
        return native[rows, columns] if native.ndim == 2 else native[rows]

    def _mapped(self, tensor) -> np.ndarray:
        """The bytes of a tensor, in a map of its own that can be released without taking another thread's pages."""
        return safetensors.map_bytes(self._path, tensor.data_offset, tensor.n_bytes)

    def _unpack(self, tensor, shape: tuple[int, ...], rows: slice, columns: slice) -> np.ndarray:
        """Part of a packed tensor as float32. Each row is a chain of blocks: whole blocks are unpacked, then cut."""
        values, nbytes = self._gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        width = shape[-1]
        packed = self._mapped(tensor).reshape(-1, width // values * nbytes)
        if len(shape) == 1:
            return self._gguf.dequantize(packed, tensor.tensor_type).reshape(shape)[rows]
        begin, end, _ = columns.indices(width)
        first, last = begin // values, -(-end // values)
        packed = packed[rows, first * nbytes : last * nbytes]
        out = np.empty((len(packed), (last - first) * values), np.float32)
        for at in range(0, len(packed), ROWS_AT_ONCE):
            some = slice(at, at + ROWS_AT_ONCE)
            out[some] = self._gguf.dequantize(np.ascontiguousarray(packed[some]), tensor.tensor_type)
        safetensors.release(packed)
        return out[:, begin - first * values : end - first * values]

    def close(self) -> None:
        self._tensors, self._file = {}, None

    def _survey(self, path: Path) -> dict[str, Stored]:
        stored = {}
        findings = []
        for name, tensor in self._tensors.items():
            kind = tensor.tensor_type.name
            shape = tensor.shape[::-1]
            if kind not in NATIVE and not self._can_unpack(tensor.tensor_type):
                findings.append(f"{name} is packed as {kind}")
            native = kind in NATIVE
            stored[name] = Stored(kind if native else "F32", shape, path.name, packed=None if native else kind)
        if findings:
            advice = "The gguf package cannot unpack these kinds. Use a file quantized in another way."
            raise CheckpointError(report(f"{path} holds tensors that cannot be read:", findings, advice))
        return stored

    def _can_unpack(self, kind) -> bool:
        _, size = self._gguf.GGML_QUANT_SIZES[kind]
        try:
            self._gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    def _read_divisors(self) -> list[str]:
        """Make rope_scaling out of rope_freqs.weight, where the file has it; returns a note about it."""
        name, theta, pairs = gguf_rope.DIVISORS, self.config["rope_theta"], self._pairs()
        if name not in self.stored or not pairs or config_checks.numbers(rope_theta=theta):
            return []  # the family says what is wrong with the sizes
        shape, other = self.stored[name].shape, self.config.get("rope_scaling")
        if shape != (pairs,) or other:
            beside = f"beside other rope scaling, {other!r}" if other else f"in a model of {pairs} pairs to a head"
            raise CheckpointError(
                f"{self._path} holds {name} {list(shape)} {beside}.\n"
                "Known is one number for each pair of a head, and no other scaling."
            )
        self.config["rope_scaling"] = scaling = gguf_rope.scaling_of_divisors(self.read(name), theta)
        del self.stored[name]
        return [f"{name} is read as rope_scaling {scaling}"] if scaling else []

    def _pairs(self) -> int | None:
        """Half the size of a head, where the sizes make one."""
        d, heads = self.config.get("hidden_size"), self.config.get("num_attention_heads")
        return d // heads // 2 if all(config_checks.is_whole(n) and n > 0 for n in (d, heads)) else None

    def _value(self, key: str) -> object:
        """Metadata as Python has it; float32 as the shortest decimal that means it (1e-05, not 9.99999e-06)."""
        value = read_value(self._file, key, self._path)
        if isinstance(value, float):
            return float(str(np.float32(value)))
        # one count per layer, as some writers store it, is one number when all layers agree
        return value[0] if isinstance(value, list) and value and len(set(map(str, value))) == 1 else value

    def _read_config(self, path: Path) -> dict:
        fields = self._file.fields
        kind = self._value("general.architecture") if "general.architecture" in fields else None
        if kind != ARCHITECTURE:
            raise CheckpointError(f"{path} holds a model of architecture {kind!r}; only {ARCHITECTURE!r} is known.")
        if "split.count" in fields and self._value("split.count") > 1:
            raise CheckpointError(
                f"{path} is one part of a split GGUF. Merge the parts first: llama-gguf-split --merge."
            )
        config: dict[str, object] = {"model_type": "llama", "tie_word_embeddings": "output.weight" not in self._tensors}
        # which values the writer leaves out when they are LLaMA's own
        config.update(rope_theta=10000.0)
        own = {key.removeprefix("llama."): self._value(key) for key in fields if key.startswith("llama.")}
        config.update(_translate(own))
        for theirs, ours in TOKEN_IDS.items():
            key = f"tokenizer.ggml.{theirs}"
            config[ours] = self._value(key) if key in fields else None
        if "vocab_size" not in config and "tokenizer.ggml.tokens" in fields:
            config["vocab_size"] = len(fields["tokenizer.ggml.tokens"])
        return config


def _translate(own: dict[str, object]) -> dict[str, object]:
    """Metadata in the words of config.json. What is not known keeps its GGUF name, and the family reports it."""
    config: dict[str, object] = {}
    known = MEANINGLESS | gguf_rope.known_keys(own)
    for key, value in own.items():
        if key in known or (key in IGNORED and IGNORED[key] == value):
            continue
        name = CONFIG_KEYS.get(key, f"llama.{key}")
        if config.get(name, value) != value:  # three keys for the size of a head: they must agree
            name = f"llama.{key}"
        config[name] = value
    if scaling := gguf_rope.read_scaling(own):
        config["rope_scaling"] = scaling
    return config
