"""A tiny checkpoint beside its Paddle folder, both written without the package under test, and ways to break it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import checkpoint_factory as factory
import numpy as np
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
