"""Training memory of one device by part: weights, gradients, optimizer states, activations, logits. From sizes alone.

Bytes for each weight that is trained in bfloat16: 2 (weight) + 4 (float32 gradient, summed over micro-batches) +
4 (float32 weight) + 8 (two moments) = 18; in float32: 4 + 4 + 8 = 16. A frozen weight takes 2 or 4, in NF4 0.516.
"""

from dataclasses import dataclass

from ...architecture.weight_map import Dims
from ..recipe.load import Stage
from .flops import adapter_parameters, parameters, projections

GB = 1e9
NF4_BYTES = 0.5 + 1 / 64 + 4 / 16384  # codes, magnitudes of blocks of 64, magnitudes of those
GRADIENT, MOMENTS, MASTER = 4, 8, 4
LOGITS_AT_ONCE = 256 * 2**20  # bytes of them in float32 (ops/linear_cross_entropy.py)
LOGIT_BYTES = {True: 8, False: 4}  # half precision or not: logits, which become gradients; cast from and to half
UNPACKED = 3 * 2**26  # bytes: a strip of an NF4 weight while it is made
BLOCK = 128  # ops/cpu_training.py's, which is not imported: it brings Paddle
CONTEXT = 1.5 * GB  # of the driver, libraries and workspaces on a GPU: an assumption


@dataclass(frozen=True)
class Memory:
    """Bytes on one device by part; parts that are nothing are left out."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Rows:
    """What is trained on, as far as sizes depend on it.

    labels: share of tokens with a label. keys: places that a token attends to, in the mean: (n + 1) / 2 for samples of
    n tokens.
    """

    labels: float
    keys: float


def memory(stage: Stage, dims: Dims, rows: Rows, *, heads: int, devices: int, half: bool, gpu: bool) -> Memory:
    """What one device holds at the peak of a step.

    heads: of attention. half: computes in bfloat16. gpu: with fused kernels; without, plain operations keep more of
    what they computed.
    """
    tokens = stage.micro_batch * stage.length
    parts = {
        **_weights(stage, dims, devices, half),
        "activations": activations(dims, tokens, half=half, again=stage.recompute, fused=gpu),
        "logits": logits(dims, tokens * rows.labels, half=half, summed=stage.method == "full"),
        "in flight": 0 if gpu else in_flight(dims, heads, tokens),
    }
    if stage.method != "full":
        parts["activations"] += _of_adapters(stage, dims, tokens, half)
    if stage.method == "qlora":
        parts["unpacking NF4"] = UNPACKED
    if gpu:
        parts["context (assumed)"] = CONTEXT
    return Memory({name: size for name, size in parts.items() if size})


def _weights(stage: Stage, dims: Dims, devices: int, half: bool) -> dict[str, float]:
    size = 2 if half else 4
    everything = parameters(dims)
    packed = dims.layers * sum(out * in_ for out, in_ in projections(dims)) if stage.method == "qlora" else 0
    trained = everything if stage.method == "full" else adapter_parameters(dims, stage.lora)
    own = 0 if stage.method == "full" else trained
    return {
        "weights": (everything - packed + own) * size,
        "weights in NF4": packed * NF4_BYTES,
        "gradients": trained * GRADIENT,
        "optimizer": trained * (MOMENTS + (MASTER if half else 0)) / (devices if stage.sharding == "stage1" else 1),
    }


def activations(dims: Dims, tokens: int, *, half: bool, again: bool, fused: bool = True) -> float:
    """Bytes of what the forward pass keeps for the backward pass. Scores of attention are made again there.

    again: with recompute, the input of each layer, and all of one layer. fused: with fused kernels, which keep less.
    """
    size = 2 if half else 4
    layer = tokens * layer_values(dims, fused=fused) * size
    inputs = dims.layers * tokens * dims.d * size
    return inputs + layer if again else dims.layers * layer


def in_flight(dims: Dims, heads: int, tokens: int) -> float:
    """Bytes of what a backward pass on a CPU holds while it runs: the scores of a block of queries, where a layer is
    computed again; queries, keys and values with their gradients in the order of blocks, some with a column more; the
    gradients of the MLP's gate and of what it opens for."""
    return 4 * tokens * (heads * BLOCK + 6 * (dims.q + dims.kv) + 2 * dims.ff)


def layer_values(dims: Dims, *, fused: bool) -> float:
    """Values that one layer keeps for one token: inputs of norms and of products, of rotation and of the MLP's gate."""
    norms = 2 * 2 * dims.d
    attention = 2 * dims.q + 3 * dims.kv
    mlp = 3 * dims.ff
    plain = 0 if fused else 2 * (dims.q + dims.kv) + dims.ff
    return norms + attention + mlp + plain


def _of_adapters(stage: Stage, dims: Dims, tokens: int, half: bool) -> float:
    """The dropped-out input of each adapter, with its mask, and what lies between its two matrices."""
    size = 2 if half else 4
    dropped = size + 1 if stage.lora.dropout else 0
    each = (in_ * dropped + stage.lora.r * size for _, in_ in projections(dims, stage.lora.targets))
    return tokens * sum(each) * (1 if stage.recompute else dims.layers)


def logits(dims: Dims, rows: float, *, half: bool, summed: bool = False) -> float:
    """Bytes of the logits of so many labels, of which there is one block at a time (ops/linear_cross_entropy.py).

    summed: the gradient of the head too, while it is summed over blocks; in float32 it is the gradient that stays.
    """
    head = dims.vocab * dims.d * (4 + 2) if half and summed else 0
    return min(rows, LOGITS_AT_ONCE // (4 * dims.vocab)) * dims.vocab * LOGIT_BYTES[half] + head
