"""A tiny checkpoint beside its Paddle folder, both written without the package under test, and ways to break it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import checkpoint_factory as factory
import numpy as np
import packers
from safetensors.numpy import save_file

HEADS = {"q_proj": 4, "k_proj": 2, "v_proj": 2}
LAYERS = 3


def config(**changes) -> dict:
    return factory.config(**{"num_hidden_layers": LAYERS, **changes})


def paddle_folder(folder: Path, config: dict, tensors: dict[str, np.ndarray], *, dtype: str | None = None) -> Path:
    """A converted folder. tensors: under Paddle names, [in, out]; dtype: what to round them to."""
    name = dtype or config["torch_dtype"]
    factory.write_config(folder, {**config, "dtype": name, "torch_dtype": name})
    cast = {key: np.ascontiguousarray(value.astype(factory.DTYPES[name])) for key, value in tensors.items()}
    save_file(cast, folder / "model.safetensors", {"format": "np"})
    return folder


def both(root: Path, *, dtype: str | None = None, seed: int = 0, **changes) -> tuple[Path, Path]:
    """The torch folder and the Paddle folder of one model."""
    said = config(**changes)
    weights = factory.weights(said, dtype=said["torch_dtype"], seed=seed)
    source = factory.write_safetensors(root / "torch", said, weights, shards=2)
    return source, paddle_folder(root / "paddle", said, factory.expected(weights), dtype=dtype)


# ------------------------------------------------------------------------------------------- packed sources

PACKED = ("gptq", "awq", "nf4", "nf4 double", "gguf", "aquila_v1")
SIZES = {"num_key_value_heads": 4, "torch_dtype": "float16"}  # 32 wide at least, so that 3-bit zero points fill words


def packed_source(root: Path, kind: str, **options) -> Path:
    """A source whose projections are packed by the definition of the format; options: of gptq_source()."""
    if kind == "gguf":
        said = config()
        return factory.write_gguf(root / "tiny.gguf", said, factory.weights(said), kind="Q8_0")
    if kind == "aquila_v1":
        factory.FAMILY_FOLDERS[kind](root / kind)
        return root / kind
    writers = {"gptq": gptq_source, "awq": awq_source, "nf4": nf4_source, "nf4 double": nf4_source}
    more = {"double": True} if kind == "nf4 double" else options
    return writers[kind](root / kind, **more)


def _with_packed(folder: Path, said: dict, pack: Callable[[np.random.Generator, int, int], dict]) -> Path:
    """A model whose projections are what `pack` makes of (out, in): end of a name -> array."""
    model, rng = config(**SIZES), np.random.default_rng(5)
    tensors = factory.weights(model, dtype="float16")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        members = pack(rng, *tensors.pop(name).shape)
        tensors |= {f"{name.removesuffix('.weight')}.{kind}": value for kind, value in members.items()}
    return factory.write_safetensors(folder, {**model, "quantization_config": said}, tensors, shards=2)


def gptq_source(
    folder: Path, *, bits: int = 4, size: int = 16, order: str = "given", less: int = 1, label: str = "gptq", sym=False
) -> Path:
    """order: of the inputs' groups, "given", "shuffled", "zeros" in the file, or "absent" from it."""

    def pack(rng: np.random.Generator, out: int, in_: int) -> dict:
        groups = [0 if size == -1 else i // size for i in range(in_)]
        if order == "shuffled":
            rng.shuffle(groups)
        zeros = [[2 ** (bits - 1)] * out] * (max(groups) + 1)
        if not sym:
            zeros = rng.integers(1, 2**bits, (max(groups) + 1, out)).tolist()
        members = packers.gptq(packers.random_integers(rng, in_, out, bits), zeros, bits, less=less)
        index = {"g_idx": np.array([0] * in_ if order == "zeros" else groups, np.int32)}
        scales = packers.random_scales(rng, max(groups) + 1, out)
        return {**members, "scales": scales, **({} if order == "absent" else index)}

    said = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": order == "shuffled", "sym": sym}
    return _with_packed(folder, {**said, "checkpoint_format": label}, pack)


def awq_source(folder: Path) -> Path:
    def pack(rng: np.random.Generator, out: int, in_: int) -> dict:
        zeros = packers.random_integers(rng, in_ // 16, out, 4)
        scales = packers.random_scales(rng, in_ // 16, out)
        return {**packers.awq(packers.random_integers(rng, in_, out, 4), zeros), "scales": scales}

    said = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
    return _with_packed(folder, said, pack)


def nf4_source(folder: Path, *, double: bool = False) -> Path:
    def pack(rng: np.random.Generator, out: int, in_: int) -> dict:
        blocks = out * in_ // 64
        state = {"quant_type": "nf4", "blocksize": 64, "shape": [out, in_], "dtype": "float16"}
        absmax = {"weight.absmax": rng.random(blocks, np.float32) + 0.1}
        if double:
            state |= {"nested_blocksize": 256, "nested_offset": 0.25, "nested_dtype": "float32"}
            absmax = {
                "weight.absmax": rng.integers(0, 256, blocks, np.uint8),
                "weight.nested_absmax": rng.random(-(-blocks // 256), np.float32) + 0.5,
                "weight.nested_quant_map": np.linspace(-1, 1, 256, dtype=np.float32),
            }
        return {
            "weight": rng.integers(0, 256, (out * in_ // 2, 1), np.uint8),
            "weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
            "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8).copy(),
            **absmax,
        }

    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}
    return _with_packed(folder, said, pack)


def write_wrapped_bin(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    """A .bin in FlagAI's wrapper under Hugging Face's names."""
    import torch

    factory.write_config(folder, config)
    state = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    torch.save({"module": state}, folder / "pytorch_model.bin")
    return folder


# ------------------------------------------------------------------------------------------------- mutations


@dataclass(frozen=True)
class Mutation:
    """One thing done wrong in a Paddle folder. places: where it is made; content: whether values differ in the files.

    settings: what is said differently in config.json.
    """

    name: str
    places: tuple[str, ...]
    tensors: Callable[[dict], None] | None = None
    settings: tuple[tuple[str, object], ...] = ()

    def apply(self, folder: Path) -> None:
        tensors = {name: value.copy() for name, value in factory.load_folder(folder).items()}
        said = {**json.loads((folder / "config.json").read_text()), **dict(self.settings)}
        if self.tensors:
            self.tensors(tensors)
        paddle_folder(folder, said, tensors)


def altered(name: str, place: str) -> Mutation:
    """One value of one tensor, by a tenth of the usual size of a weight."""

    def change(tensors: dict) -> None:
        value = tensors[name]
        value[(5,) * value.ndim] += 0.02

    return Mutation(f"one value of {name}", (place,), change)


def transposed(name: str, place: str) -> Mutation:
    def change(tensors: dict) -> None:
        tensors[name] = tensors[name].T

    return Mutation(f"{name} transposed", (place,), change)


def interleaved(i: int) -> Mutation:
    """Columns of q and k as for a rotary embedding of neighbours."""

    def change(tensors: dict) -> None:
        for part in ("q_proj", "k_proj"):
            name = f"aquila.layers.{i}.self_attn.{part}.weight"
            tensors[name] = factory.interleave(tensors[name].T, HEADS[part]).T

    return Mutation("rotary rows interleaved", (f"layer {i}, attention",), change)


def heads_permuted(i: int) -> Mutation:
    def change(tensors: dict) -> None:
        for part in ("k_proj", "v_proj"):
            name = f"aquila.layers.{i}.self_attn.{part}.weight"
            tensors[name] = np.roll(tensors[name], tensors[name].shape[1] // HEADS[part], axis=1)

    return Mutation("key/value heads permuted", (f"layer {i}, attention",), change)


def layers_moved(name: str, order: list[int]) -> Mutation:
    """Layer i of the folder is layer order[i] of the model."""

    def change(tensors: dict) -> None:
        old = dict(tensors)
        for i, source in enumerate(order):
            prefix = f"aquila.layers.{i}."
            for key in [key for key in old if key.startswith(prefix)]:
                tensors[key] = old[key.replace(prefix, f"aquila.layers.{source}.")]

    moved = [i for i, source in enumerate(order) if i != source]
    return Mutation(name, tuple(f"layer {i}, {half}" for i in moved for half in ("attention", "MLP")), change)


def setting(name: str, value: object, *places: str) -> Mutation:
    return Mutation(f"{name} is {value}", places, None, ((name, value),))


ATTENTION = tuple(f"layer {i}, attention" for i in range(LAYERS))
MLP = tuple(f"layer {i}, MLP" for i in range(LAYERS))
MUTATIONS = (
    *(altered(f"aquila.layers.1.self_attn.{p}_proj.weight", "layer 1, attention") for p in "qkvo"),
    *(altered(f"aquila.layers.2.mlp.{p}_proj.weight", "layer 2, MLP") for p in ("gate", "up", "down")),
    altered("aquila.layers.0.input_layernorm.weight", "layer 0, attention"),
    altered("aquila.layers.0.post_attention_layernorm.weight", "layer 0, MLP"),
    altered("aquila.norm.weight", "final norm"),
    altered("aquila.embed_tokens.weight", "embedding"),
    altered("lm_head.weight", "head"),
    transposed("aquila.layers.1.self_attn.q_proj.weight", "layer 1, attention"),
    transposed("aquila.layers.1.self_attn.o_proj.weight", "layer 1, attention"),
    interleaved(2),
    heads_permuted(0),
    layers_moved("two layers swapped", [0, 2, 1]),
    layers_moved("layers off by one", [1, 2, 0]),
    setting("rms_norm_eps", 1.1e-5, *ATTENTION, *MLP, "final norm"),
    setting("rope_theta", 10010.0, *ATTENTION),
    setting("rope_scaling", {"type": "linear", "factor": 1.01}, *ATTENTION),
    setting("tie_word_embeddings", True, "head"),
)
