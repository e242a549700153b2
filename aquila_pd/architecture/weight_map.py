"""THE table: every parameter of the family once, with its Hugging Face name, Paddle name, shape and operation.

Conversion, verification, loading, PaddleNLP's name hooks and the tests all read these rows. The reverse
conversion reads the same rows from right to left. How a source *file* spells a name (GGUF, FlagAI's v1 format)
is that source's business: it hands out Hugging Face names.
"""

import re
from dataclasses import dataclass
from functools import cache

BASE_MODEL_PREFIX = "aquila"  # of Paddle names
HF_PREFIX = "model."


@dataclass(frozen=True)
class Dims:
    """The sizes every tensor shape is made of.

    vocab: rows of the embedding; d: hidden size; q and kv: width of the query and the key/value projections;
    ff: intermediate size; layers: decoder layers; tied: the head reuses the embedding.
    """

    vocab: int
    d: int
    q: int
    kv: int
    ff: int
    layers: int
    tied: bool = False


@dataclass(frozen=True)
class Row:
    """One parameter (or one per layer, with {i} in the name).

    hf: name in a Hugging Face checkpoint. shape: its Hugging Face shape in named dims.
    transpose: Paddle stores it as [in, out] where torch has [out, in]; the operation is its own inverse.
    """

    hf: str
    shape: tuple[str, ...]
    transpose: bool = False

    @property
    def paddle(self) -> str:
        return prefixed(self.hf, BASE_MODEL_PREFIX)


def prefixed(hf: str, prefix: str) -> str:
    """A Hugging Face name as a model with another base_model_prefix has it; the head has none in any."""
    return f"{prefix}.{hf.removeprefix(HF_PREFIX)}" if hf.startswith(HF_PREFIX) else hf


@dataclass(frozen=True)
class Dropped:
    """A tensor some checkpoints carry that has no place in the Paddle model, and why."""

    pattern: str
    reason: str


def linear(hf: str, out: str, in_: str) -> Row:
    """A projection: torch [out, in], Paddle [in, out]."""
    return Row(hf, (out, in_), transpose=True)


L = "model.layers.{i}."
EMBEDDING = Row("model.embed_tokens.weight", ("vocab", "d"))
LAYER = (
    Row(L + "input_layernorm.weight", ("d",)),
    linear(L + "self_attn.q_proj.weight", "q", "d"),
    linear(L + "self_attn.k_proj.weight", "kv", "d"),
    linear(L + "self_attn.v_proj.weight", "kv", "d"),
    linear(L + "self_attn.o_proj.weight", "d", "q"),
    Row(L + "post_attention_layernorm.weight", ("d",)),
    linear(L + "mlp.gate_proj.weight", "ff", "d"),
    linear(L + "mlp.up_proj.weight", "ff", "d"),
    linear(L + "mlp.down_proj.weight", "d", "ff"),
)
PROJECTIONS = tuple(row.hf.split(".")[-2] for row in LAYER if row.transpose)  # q_proj to down_proj
FINAL_NORM = Row("model.norm.weight", ("d",))
HEAD = linear("lm_head.weight", "vocab", "d")

DROPPED = (
    Dropped(
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        "rotary frequencies follow from rope_theta; the stored ones are often rounded to half precision",
    ),
)


@dataclass(frozen=True)
class Weight:
    """A row written out for one layer of one model, with real sizes."""

    hf: str
    paddle: str
    hf_shape: tuple[int, ...]
    transpose: bool

    @property
    def paddle_shape(self) -> tuple[int, ...]:
        return self.hf_shape[::-1] if self.transpose else self.hf_shape


def weights(dims: Dims) -> list[Weight]:
    """Every parameter of a causal language model of these sizes, in model order; no head when it is tied."""

    def write_out(row: Row, layer: int | None = None) -> Weight:
        shape = tuple(getattr(dims, name) for name in row.shape)
        return Weight(row.hf.format(i=layer), row.paddle.format(i=layer), shape, row.transpose)

    found = [write_out(EMBEDDING)]
    found += [write_out(row, layer) for layer in range(dims.layers) for row in LAYER]
    found.append(write_out(FINAL_NORM))
    if not dims.tied:
        found.append(write_out(HEAD))
    return found


@cache
def _transposed_patterns() -> list[re.Pattern]:
    rows = [row for row in (EMBEDDING, *LAYER, FINAL_NORM, HEAD) if row.transpose]
    return [re.compile(re.escape(row.hf).replace(r"\{i\}", r"\d+")) for row in rows]


def is_transposed(hf_name: str) -> bool:
    """Whether Paddle stores this parameter as [in, out] where torch has [out, in]; false for names of no row."""
    return any(pattern.fullmatch(hf_name) for pattern in _transposed_patterns())


def why_dropped(hf_name: str) -> str | None:
    """The reason this tensor is left out on purpose, or None when it is not."""
    return next((row.reason for row in DROPPED if re.fullmatch(row.pattern, hf_name)), None)
