"""Weights between the parameters of a model and a safetensors folder, one tensor at a time.

Loading checks every name and shape in the file headers first and then fills parameters that have no memory yet,
converting on the way. Saving writes in the weight table's order, so that the same weights give the same bytes.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from .errors import AquilaError, CheckpointError, report
from .shards import INDEX, SINGLE, Entry, parse_size, plan_shards, read_layout, tag_of, view, write_shards
from .weight_map import BASE_MODEL_PREFIX, EMBEDDING, HEAD, weights

log = logging.getLogger("aquila_pd")

PREFIX = f"{BASE_MODEL_PREFIX}."
SAFETENSORS = (SINGLE, INDEX)
# Parameters of a task head: a checkpoint of another task lacks or has them, and that is no mistake.
NEW_HEAD = "score.weight"
HEADS = {HEAD.paddle, NEW_HEAD}


def load_weights(
    model: nn.Layer, folder: Path, *, instead: Mapping[str, Callable[[np.ndarray], None]] | None = None
) -> None:
    """Fill a model built without memory (paddle.LazyGuard) from a folder.

    instead: parameters that are not filled, and who takes the stored array in their place.
    Raises CheckpointError with every missing, unexpected or misshapen weight before the first is read.
    """
    files = {name_in(model, name): info for name, info in read_layout(folder).items()}
    parameters = model.state_dict()
    findings = _compare(parameters, files)
    if not findings:
        findings = _compare_tied_head(model, files)
    if findings:
        raise CheckpointError(_message(model, folder, findings))
    for name, parameter in parameters.items():
        if instead and name in instead:
            instead[name](view(files[name]))
        elif name in files:
            _fill(parameter, view(files[name]))
        else:
            log.warning("%s is not in %s: it is new and random, train it.", name, folder.name)
            parameter.initialize()
            model._init_weights(model.score)


def check_plain(model: nn.Layer) -> None:
    """Raise AquilaError for a model whose layers stand for its weights in another form: such a layer says in
    `cannot_save` what it is and what to do, and a folder of the rest would pass for the model."""
    found = sorted({layer.cannot_save for layer in model.sublayers() if hasattr(layer, "cannot_save")})
    if found:
        raise AquilaError(f"This model cannot be saved as it is. It has {'; and '.join(found)}.")


def save_weights(model: nn.Layer, folder: Path, max_shard_size: str | int) -> None:
    """Write all parameters of a model into a folder, under the names of the weight table."""
    state = model.state_dict()
    rows = [name_in(model, weight.paddle) for weight in weights(model.config.dims)]
    known = [name for name in (*rows, NEW_HEAD) if name in state]
    extra = [name for name in state if name not in known]
    if extra and _unmerged_lora(model):
        raise AquilaError("The model has LoRA layers that are not merged: save the LoRAModel, or merge() it first.")
    if [name for name in extra if "lora_" not in name]:
        raise AquilaError(report("The model has parameters no Aquila model has:", extra, "Remove them before saving."))
    entries = [Entry(name, _tag(state[name]), tuple(state[name].shape)) for name in known]
    shards = plan_shards(entries, parse_size(max_shard_size))
    write_shards(folder, shards, lambda entry: state[entry.name].detach().cpu().numpy())


def name_in(model: nn.Layer, name: str) -> str:
    """The model's name of a tensor in a file, where it stands with or without the prefix of the base model."""
    if model.base_model is model:
        return name.removeprefix(PREFIX)
    return name if name.startswith(PREFIX) or name in HEADS else PREFIX + name


def _compare(parameters: dict, files: dict) -> list[str]:
    findings = [f"missing     {name}" for name in parameters if name not in files and name != NEW_HEAD]
    findings += [f"unexpected  {name}" for name in files if name not in parameters and name not in HEADS]
    return findings + [
        f"shape       {name}: file has {list(files[name].shape)}, config says {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in files and list(files[name].shape) != list(parameter.shape)
    ]


def _compare_tied_head(model: nn.Layer, files: dict) -> list[str]:
    """A tied model may come with a head of its own in the file, but only with the embedding's values."""
    is_language_model = hasattr(model, "logits")
    if not (is_language_model and model.config.tie_word_embeddings and HEAD.paddle in files):
        return []
    head, embedding = view(files[HEAD.paddle]), view(files[EMBEDDING.paddle])
    if np.array_equal(head.T if HEAD.transpose else head, embedding):
        return []
    return [f"values      {HEAD.paddle} differs from the embedding, to which config.json ties it"]


def _message(model: nn.Layer, folder: Path, findings: list[str]) -> str:
    torch_names = any("model.layers" in line for line in findings)
    advice = (
        "These are Hugging Face's names: convert the folder with `aquila-pd convert` first."
        if torch_names
        else "Nothing was loaded. Fetch or convert the folder again, or correct config.json."
    )
    return report(f"{folder.name} does not hold the {type(model).__name__} of its config.json:", findings, advice)


def _fill(parameter, array: np.ndarray) -> None:
    """Copy one stored tensor into a parameter that has no memory yet, in the parameter's dtype."""
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)  # Paddle's numpy spelling of bfloat16
    tensor = paddle.to_tensor(np.ascontiguousarray(array))
    if tensor.dtype != parameter.dtype:
        tensor = tensor.astype(parameter.dtype)
    parameter.get_tensor()._share_data_with(tensor.get_tensor())


def _unmerged_lora(model: nn.Layer) -> bool:
    return any(hasattr(layer, "lora_A") and not getattr(layer, "merged", False) for layer in model.sublayers())


def _tag(tensor) -> str:
    """The safetensors tag of a Paddle tensor's dtype."""
    return tag_of(paddle.empty([0], dtype=tensor.dtype).numpy())
