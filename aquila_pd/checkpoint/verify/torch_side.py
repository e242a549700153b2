"""torch side of the layer-by-layer verification: torch's own readers, a float64 decoder, transformers' layers.

The float64 decoder is written out here because transformers' layers compute norms, softmax and angles in float32
whatever they are given. Where it misread the config, transformers' layers would be far from it, which is checked.
Nothing here goes through this project's reading of config.json, its table of weights or its model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from ...formats.dtypes import FLOATS
from ..sources import Source

BLOCK = 8 << 20  # values of a matrix in memory at a time where it is used in slices: 64 MB of float64
ALL = slice(None)
LAYER = "model.layers.{i}."
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
WRAPPER = "module"  # FlagAI saves {"module": state_dict}
DTYPES = {tag: getattr(torch, name) for tag, name in FLOATS.items()}


class Weights:
    """The source's weights in parts, mapped from the files where possible and to be used up at once.

    dtypes: Hugging Face name -> safetensors tag of the Paddle folder, to which values are rounded where asked for.
    how: who reads the files.
    """

    def __init__(self, source: Source, dtypes: Mapping[str, str]):
        self._source, self._dtypes = source, dtypes
        self._open: tuple[str, dict] = ("", {})  # the .bin file at hand
        kind = source.layout.kind if _as_it_stands(source) else "ours"
        self._read, self.how = {
            "safetensors": (self._safetensors, "the safetensors library, as torch tensors"),
            "torch_bin": (self._torch_bin, "torch.load"),
        }.get(kind, (self._ours, f"this project's own reader of {source.layout.kind} files, as the conversion"))

    @property
    def independent(self) -> bool:
        """Whether no code of the conversion reads the values."""
        return self._read != self._ours

    def rows(self, name: str) -> int:
        return self._source.tensors[name].shape[0]

    def part(self, name: str, rows: slice = ALL, *, rounded: bool = True) -> torch.Tensor:
        """These rows of a tensor in the dtype it is stored in, or rounded to that of the Paddle folder."""
        tensor = self._read(name, rows)
        return tensor.to(DTYPES[self._dtypes[name]]) if rounded else tensor

    def let_go(self) -> None:
        """Unmap the file at hand: pages that were read count as ours until then."""
        self._open = ("", {})

    def _safetensors(self, name: str, rows: slice) -> torch.Tensor:
        path = self._source.path / self._source.tensors[name].file
        with safe_open(path, framework="pt") as file:  # opened anew, so that nothing stays mapped
            return file.get_slice(name)[rows]

    def _torch_bin(self, name: str, rows: slice) -> torch.Tensor:
        file = self._source.tensors[name].file
        if self._open[0] != file:
            self.let_go()
            content = load_bin(self._source.path / file)
            self._open = (file, content[WRAPPER] if is_wrapped(content) else content)
        return self._open[1][name].detach()[rows]

    def _ours(self, name: str, rows: slice) -> torch.Tensor:
        values = np.ascontiguousarray(self._source.read(name, rows))
        if values.dtype.name == "bfloat16":  # torch knows numpy's only through its bits
            return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(values.copy())


def _as_it_stands(source: Source) -> bool:
    """Whether the files hold the weights under Hugging Face names, row by row as Hugging Face has them."""
    packed = any(tensor.packed for tensor in source.tensors.values())
    return source.family.runs_as_llama and not packed and not source.config.get("quantization_config")


def load_bin(path: Path) -> dict:
    """What torch.load makes of a file, its tensors mapped where the format allows."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # torch's format from before 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def is_wrapped(content: dict) -> bool:
    return isinstance(content.get(WRAPPER), dict)


# ------------------------------------------------------------------------------------------ the float64 decoder


class Reference:
    """LLaMA's decoder in float64, its matrices read in blocks of rows. rounded: weights as the Paddle folder has them.

    Shapes: T positions, D hidden, N query heads, K key/value heads, H head size. x is [T, D], float64.
    """

    def __init__(self, config: LlamaConfig, weights: Weights, *, rounded: bool):
        self.config, self._weights, self._rounded = config, weights, rounded

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """ids [T] -> [T, D]"""
        rows = [self._weights.part(EMBEDDING, slice(i, i + 1), rounded=self._rounded) for i in ids.tolist()]
        return torch.cat(rows).double().numpy()

    @contextmanager
    def layer(self, i: int) -> Iterator["ReferenceLayer"]:
        yield ReferenceLayer(self, LAYER.format(i=i))

    def norm(self, x: np.ndarray) -> np.ndarray:
        return self.rms_norm(torch.from_numpy(x), FINAL_NORM).numpy()

    def embedding(self, rows: slice) -> np.ndarray:
        """These rows of the embedding in float32, which holds all that is stored in a Paddle folder."""
        return self._weights.part(EMBEDDING, rows, rounded=self._rounded).float().numpy()

    def head(self, x: np.ndarray, rows: slice) -> np.ndarray:
        """[T, D] -> logits [T, v] of these rows of the vocabulary."""
        name = EMBEDDING if self.config.tie_word_embeddings else HEAD
        return (torch.from_numpy(x) @ self._weights.part(name, rows, rounded=self._rounded).double().T).numpy()

    def rms_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self._weights.part(name, rounded=self._rounded).double()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps) * weight

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """[T, in] -> [T, out]"""
        step = max(1, BLOCK // x.shape[1])
        blocks = (slice(r, r + step) for r in range(0, self._weights.rows(name), step))
        return torch.cat([x @ self._weights.part(name, b, rounded=self._rounded).double().T for b in blocks], dim=1)

    def turns(self, length: int) -> torch.Tensor:
        """complex [T, H/2], of every position what each pair is multiplied by; frequencies as transformers has them."""
        init = LlamaRotaryEmbedding(self.config).rope_init_fn
        frequencies, attention_factor = init(self.config, None, seq_len=length)
        angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies.double()
        return torch.polar(torch.full_like(angles, attention_factor), angles)


class ReferenceLayer:
    """One decoder layer of a Reference; prefix: of its weights' names."""

    def __init__(self, reference: Reference, prefix: str):
        self._reference, self._prefix = reference, prefix

    def forward(self, x: np.ndarray) -> np.ndarray:
        return self.mlp(self.attention(x))

    def attention(self, x: np.ndarray) -> np.ndarray:
        """x + attention(norm(x))"""
        config, T = self._reference.config, len(x)
        N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        x = torch.from_numpy(x)
        h = self._reference.rms_norm(x, self._prefix + "input_layernorm.weight")
        q, k, v = (self._linear(h, f"self_attn.{name}_proj").view(T, -1, H).transpose(0, 1) for name in "qkv")
        turns = self._reference.turns(T)
        q, k = _turn(q, turns), _turn(k, turns)  # [N, T, H], [K, T, H]
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        heads = []
        for n in range(N):  # one at a time: the scores of all take N T T numbers
            scores = (q[n] @ k[n * K // N].T) / H**0.5  # [T, T]
            heads.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[n * K // N])
        return (x + self._linear(torch.cat(heads, dim=1), "self_attn.o_proj")).numpy()

    def mlp(self, x: np.ndarray) -> np.ndarray:
        """x + mlp(norm(x))"""
        x = torch.from_numpy(x)
        h = self._reference.rms_norm(x, self._prefix + "post_attention_layernorm.weight")
        gate, up = self._linear(h, "mlp.gate_proj"), self._linear(h, "mlp.up_proj")
        return (x + self._linear(gate / (1 + torch.exp(-gate)) * up, "mlp.down_proj")).numpy()

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self._reference.linear(x, f"{self._prefix}{name}.weight")


def _turn(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + H/2) of x [heads, T, H], taken for complex numbers, by turns [T, H/2]."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * turns
    return torch.cat([turned.real, turned.imag], dim=-1)


# ------------------------------------------------------------------------------------------ transformers' layers


class Control:
    """transformers' own LLaMA layers in float32, one in memory at a time."""

    def __init__(self, config: LlamaConfig, weights: Weights, length: int):
        transformers.utils.logging.set_verbosity_error()
        config._attn_implementation = "eager"
        self.config, self._weights = config, weights
        positions = torch.arange(length)[None]
        with torch.inference_mode():
            self._angles = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)  # cos, sin [1, T, H], float32
        lowest = torch.finfo(torch.float32).min
        self._mask = torch.full((1, 1, length, length), lowest).triu(1)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """ids [T] -> [T, D]"""
        return torch.cat([self._weights.part(EMBEDDING, slice(i, i + 1)) for i in ids.tolist()]).float().numpy()

    @contextmanager
    def layer(self, i: int) -> Iterator["ControlLayer"]:
        with torch.device("meta"):
            layer = LlamaDecoderLayer(self.config, i)
        layer = layer.float().to_empty(device="cpu").eval()
        for name, parameter in layer.named_parameters():
            self._fill(parameter, LAYER.format(i=i) + name)
        yield ControlLayer(layer, self._angles, self._mask)

    def _fill(self, parameter: torch.nn.Parameter, name: str) -> None:
        """Copy a weight in blocks of rows, so that it is never in memory twice."""
        step = max(1, BLOCK // (parameter[0].numel() or 1))
        for r in range(0, len(parameter), step):
            parameter.data[r : r + step] = self._weights.part(name, slice(r, r + step))

    def norm(self, x: np.ndarray) -> np.ndarray:
        norm = LlamaRMSNorm(x.shape[-1], eps=self.config.rms_norm_eps)
        self._fill(norm.weight, FINAL_NORM)
        return _run(norm, x)

    def head(self, x: np.ndarray, rows: slice) -> np.ndarray:
        """[T, D] -> logits [T, v] of these rows of the vocabulary."""
        weight = self._weights.part(EMBEDDING if self.config.tie_word_embeddings else HEAD, rows).float()
        return _run(lambda x: torch.nn.functional.linear(x, weight), x)


class ControlLayer:
    """One filled LlamaDecoderLayer, whole and in its two halves."""

    def __init__(self, layer: LlamaDecoderLayer, angles: tuple, mask: torch.Tensor):
        self._layer, self._how = layer, {"position_embeddings": angles, "attention_mask": mask}

    def forward(self, x: np.ndarray) -> np.ndarray:
        return _run(lambda x: self._layer(x, **self._how), x)

    def attention(self, x: np.ndarray) -> np.ndarray:
        layer = self._layer
        return _run(lambda x: x + layer.self_attn(layer.input_layernorm(x), **self._how)[0], x)

    def mlp(self, x: np.ndarray) -> np.ndarray:
        layer = self._layer
        return _run(lambda x: x + layer.mlp(layer.post_attention_layernorm(x)), x)


def _run(function: Callable, x: np.ndarray) -> np.ndarray:
    """[T, D] float32 through something that wants [1, T, D]."""
    with torch.inference_mode():
        return function(torch.from_numpy(x)[None])[0].numpy()
