"""Independent second decoder of stored values (names, row order, packing), for a sample of each tensor.

Where Source.read unpacks weights or puts rows in another order, comparing with Source.read would not notice that it
does so wrongly. Here names, order and packing are written down once more from the definitions of the formats, in
Python's integers and one value at a time. Shared with the conversion are only the readers of stored tensors, the gguf
package and the sizes in config.json; which of two versions of GPTQ a mislabelled file has is decided by the same rule.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import cached_property
from pathlib import Path

import numpy as np

from ...formats import safetensors
from ...formats.gguf import import_gguf, open_gguf
from ...formats.safetensors import TensorInfo
from ...utils.errors import VerificationError, report
from ..layout import CONFIG, read_json
from ..sources import Source

ROWS, COLUMNS = 32, 16  # of each tensor; every pair of them is a value that is worked out
SEED = 20231121
WORD, MASK = 32, 2**32 - 1
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each value of a word, the lowest first
NF4_STATE = "weight.quant_state.bitsandbytes__nf4"
PACKING_FILES = (CONFIG, "quantize_config.json", "quant_config.json")
LAYER = "model.layers."
# part of a Hugging Face name -> of a GGUF file's, of FlagAI's
NAMES = {
    "model.embed_tokens": ("token_embd", "tok_embeddings"),
    "model.norm": ("output_norm", "norm"),
    "lm_head": ("output", "output"),
    "self_attn.q_proj": ("attn_q", "attention.wq"),
    "self_attn.k_proj": ("attn_k", "attention.wk"),
    "self_attn.v_proj": ("attn_v", "attention.wv"),
    "self_attn.o_proj": ("attn_output", "attention.wo"),
    "mlp.gate_proj": ("ffn_gate", "feed_forward.w1"),
    "mlp.up_proj": ("ffn_up", "feed_forward.w3"),
    "mlp.down_proj": ("ffn_down", "feed_forward.w2"),
    "input_layernorm": ("attn_norm", "attention_norm"),
    "post_attention_layernorm": ("ffn_norm", "ffn_norm"),
}


def is_interpreted(source: Source) -> bool:
    """Whether Source.read does more than hand out stored values."""
    return any(stored.packed or source.dialect.heads_of(name) for name, stored in source.tensors.items())


def recomputed(source: Source, held: Mapping[str, tuple[TensorInfo, bool]]) -> str:
    """What to say of the sample in a sentence; nothing where stored values are only handed out.

    held: as recompute() has it. Raises VerificationError naming every tensor that is not what its file means.
    """
    if not is_interpreted(source):
        return ""
    count, findings = recompute(source, held)
    if findings:
        headline = f"The output equals what the converter reads in {source.path}, but it reads wrongly:"
        raise VerificationError(report(headline, findings, "Converting again will not mend it. Please report it."))
    return f"; {count:,} of them worked out anew from the stored numbers, without the converter's own unpacking"


def recompute(source: Source, held: Mapping[str, tuple[TensorInfo, bool]]) -> tuple[int, list[str]]:
    """How many values of the output were worked out anew, and a line for each tensor where any is another.

    held: Hugging Face name -> where it lies in the output, and whether [out, in] is turned there.
    """
    rng, count, findings = np.random.default_rng(SEED), 0, []
    with closing(_GGUF(source) if source.layout.kind == "gguf" else _Folder(source)) as meaning:
        for name, (info, turned) in held.items():
            stored = safetensors.view(info)
            there = (stored.T if turned else stored).reshape(info.shape[::-1] if turned else (info.shape[0], -1))
            rows, columns = (_some(rng, n, most) for n, most in zip(there.shape, (ROWS, COLUMNS), strict=True))
            values = np.array([meaning.row(name, row, columns, there.shape[1]) for row in rows])
            with np.errstate(over="ignore", invalid="ignore"):
                wanted = values.astype(there.dtype)
            found = there[np.ix_(rows, columns)]
            bits = f"u{there.itemsize}"  # NaN is like itself then
            differing = np.argwhere(wanted.view(bits) != found.view(bits))
            count += wanted.size
            if len(differing):
                r, c = differing[0]
                findings.append(
                    f"recomputed  {name}: {len(differing)} of {wanted.size}; at [{rows[r]}, {columns[c]}] "
                    f"the stored numbers mean {wanted[r, c]}, the output says {found[r, c]}"
                )
            safetensors.release(stored)
    return count, findings


def _some(rng: np.random.Generator, count: int, most: int) -> list[int]:
    return sorted(rng.choice(count, min(count, most), replace=False).tolist())


def _spelled(name: str, which: int) -> str:
    """A Hugging Face name without its end as GGUF (0) or FlagAI (1) has it."""
    name = name.removesuffix(".weight")
    if not name.startswith(LAYER):
        return NAMES[name][which]
    layer, part = name.removeprefix(LAYER).split(".", 1)
    return f"{('blk', 'layers')[which]}.{layer}.{NAMES[part][which]}"


def _interleaved(name: str, row: int, head: int) -> int:
    """Where a row of q or k lies when each head keeps neighbours (0, 1), (2, 3) ... that Hugging Face has in halves."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return row
    place, half = row % head, head // 2
    return row - place + 2 * (place % half) + place // half


class _GGUF:
    """Rows as the gguf package unpacks them, each by itself."""

    def __init__(self, source: Source):
        self._gguf = import_gguf(source.path)
        self._tensors = {tensor.name: tensor for tensor in open_gguf(source.path).tensors}
        self._head = source.fields["hidden_size"] // source.fields["num_attention_heads"]

    def row(self, name: str, row: int, columns: list[int], width: int) -> list:
        """These values of a row of [out, in]; width: of the whole row."""
        tensor = self._tensors[f"{_spelled(name, 0)}.weight"]
        if len(tensor.shape) == 1:
            return [self._unpack(tensor.data, tensor.tensor_type)[row]]
        values = self._unpack(tensor.data[_interleaved(name, row, self._head)], tensor.tensor_type)
        return [values[column] for column in columns]

    def _unpack(self, data: np.ndarray, kind) -> np.ndarray:
        plain = data.dtype == np.float64  # which the package has no need to unpack, and does not
        return data if plain else self._gguf.dequantize(data[None], kind).reshape(-1)

    def close(self) -> None:
        self._tensors = {}


class _Folder:
    """Values of a folder's stored tensors: GPTQ's, AWQ's, NF4's and plain ones, under names of either spelling."""

    def __init__(self, source: Source):
        if source.layout.kind == "torch_bin":
            from ..sources.torch_bin import TorchBinReader as reader
        else:
            from ..sources.safetensors import SafetensorsReader as reader
        self._reader = reader(source.path)
        self._said = _packing(source.path)
        self._flagai = source.family.name == "aquila_v1"
        self._head = source.fields["hidden_size"] // source.fields["num_attention_heads"]
        self._at_hand: tuple[str, dict[str, np.ndarray]] = ("", {})

    def row(self, name: str, row: int, columns: list[int], width: int) -> list:
        """These values of a row of [out, in]; width: of the whole row."""
        module = name.removesuffix(".weight")
        if self._flagai:
            row, theirs = _interleaved(name, row, self._head), _spelled(name, 1)
            here = any(f"{theirs}.{end}" in self._reader.stored for end in ("weight", "qweight"))
            module = theirs if here else module
        value = self._value(self._members(module), row, width)
        return [value(column) for column in columns]

    def _value(self, members: dict[str, np.ndarray], row: int, width: int) -> Callable[[int], np.generic]:
        """What gives one value of this row by its column."""
        if "qweight" in members:
            unpack = self._awq if len(members["qweight"]) == width else self._gptq
            return lambda column: unpack(members, row, column, width)
        if NF4_STATE in members:
            return lambda column: _nf4(members, row * width + column)
        weight = members["weight"].reshape(-1, width)
        return lambda column: weight[row, column]

    def _members(self, module: str) -> dict[str, np.ndarray]:
        """The stored tensors of a module by the ends of their names, mapped and not read."""
        if self._at_hand[0] != module:
            names = [name for name in self._reader.stored if name.startswith(f"{module}.")]
            self._at_hand = (module, {name.removeprefix(f"{module}."): self._reader.read(name) for name in names})
        return self._at_hand[1]

    def _gptq(self, members: dict[str, np.ndarray], row: int, column: int, width: int) -> np.float32:
        """scale * (q - zero): q down a column of words, zero along a row of them, both one long stream of bits."""
        bits = len(members["qweight"]) * WORD // width
        group = self._group(members, column, width)
        q = _from_stream(members["qweight"][:, row], column, bits)
        zero = _from_stream(members["qzeros"][group], row, bits)
        zero = (zero + self._less) % 2**bits
        return np.float32(q - zero) * np.float32(members["scales"][group, row])

    def _awq(self, members: dict[str, np.ndarray], row: int, column: int, width: int) -> np.float32:
        group, shift = self._group(members, column, width), 4 * AWQ_ORDER.index(row % 8)
        q = int(members["qweight"][column, row // 8]) >> shift & 15
        zero = int(members["qzeros"][group, row // 8]) >> shift & 15
        return np.float32(q - zero) * np.float32(members["scales"][group, row])

    def _group(self, members: dict[str, np.ndarray], column: int, width: int) -> int:
        size = self._said.get("group_size") or -1
        order = members.get("g_idx")
        if order is not None and (order.any() or len(members["scales"]) == 1):
            return int(order[column])
        return column // (width if size == -1 else size)

    @cached_property
    def _less(self) -> int:
        """What GPTQ took off its zero points: by the label, unless all are what a symmetric model has the other way."""
        label = self._said.get("checkpoint_format") or self._said.get("format") or "gptq"
        less, half = int(label.lower() == "gptq"), 2 ** (self._said["bits"] - 1)
        other = _one_value(half if less else half - 1, self._said["bits"])
        if self._said.get("sym") is False:
            return less
        names = [name for name in self._reader.stored if name.endswith(".qzeros")]
        flipped = all((self._reader.read(n).reshape(-1, len(other)) == other).all() for n in names)
        return 1 - less if flipped else less

    def close(self) -> None:
        self._at_hand = ("", {})
        self._reader.close()


def _packing(folder: Path) -> dict:
    """Packing settings, from config.json or an older file beside it."""
    older = {"w_bit": "bits", "q_group_size": "group_size"}
    for file in [folder / name for name in PACKING_FILES if (folder / name).is_file()]:
        said = read_json(file)
        said = said.get("quantization_config") if file.name == CONFIG else said
        if said:
            return {older.get(key, key): value for key, value in said.items()}
    return {}


def _from_stream(words: np.ndarray, place: int, bits: int) -> int:
    """The value at this place of a stream of bits, the first lowest, that runs through int32 words."""
    word, shift = divmod(place * bits, WORD)
    number = int(words[word]) & MASK
    if shift + bits > WORD:
        number |= (int(words[word + 1]) & MASK) << WORD
    return number >> shift & 2**bits - 1


def _one_value(value: int, bits: int) -> np.ndarray:
    """The int32 words of 32 times the same value."""
    number = sum(value << bits * place for place in range(WORD))
    return np.array([number >> WORD * i & MASK for i in range(bits)], np.uint32).view(np.int32)


def _nf4(members: dict[str, np.ndarray], place: int) -> np.float32:
    """Value `place` of the flat weight: its code's entry in the table, times the magnitude of its block."""
    state = json.loads(members[NF4_STATE].tobytes())
    byte, block = int(members["weight"].reshape(-1)[place // 2]), place // state["blocksize"]
    code = byte & 15 if place % 2 else byte >> 4
    magnitude = members["weight.absmax"][block]
    if "weight.nested_absmax" in members:
        outer = members["weight.nested_absmax"][block // state["nested_blocksize"]]
        magnitude = members["weight.nested_quant_map"][magnitude] * outer + np.float32(state["nested_offset"])
    return members["weight.quant_map"][code] * magnitude
