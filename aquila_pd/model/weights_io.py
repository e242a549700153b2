"""Loading and saving a model's weights as safetensors, one tensor at a time.

Loading checks every name and shape in the file headers first and then gives memory to parameters that have none yet:
on a CPU the mapped file itself where it fits, else memory of their own that is read into, converting on the way.
Saving writes in the weight table's order, so that the same weights give the same bytes.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from ..architecture.weight_map import BASE_MODEL_PREFIX, EMBEDDING, HEAD, weights
from ..formats.mapped import Maps, empty, read_into, touch
from ..formats.safetensors import (
    DTYPES,
    INDEX,
    SINGLE,
    Entry,
    TensorInfo,
    parse_size,
    plan_shards,
    read_layout,
    tag_of,
    view,
    write_shards,
)
from ..utils.errors import AquilaError, CheckpointError, report

log = logging.getLogger("aquila_pd")

PREFIX = f"{BASE_MODEL_PREFIX}."
SAFETENSORS = (SINGLE, INDEX)
# Parameters of a task head: a checkpoint of another task lacks or has them, and that is no mistake.
NEW_HEAD = "score.weight"
HEADS = {HEAD.paddle, NEW_HEAD}
READERS = 2  # threads: one converts while the other waits for the system


def load_weights(
    model: nn.Layer,
    folder: Path,
    *,
    instead: Mapping[str, Callable[[np.ndarray], None]] | None = None,
    into: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Fill a model built without memory (paddle.LazyGuard) from a folder.

    On a CPU a tensor in its parameter's dtype is not copied: the parameter lies in a private map of the file (see
    reading.Maps for what that means for who changes the file), and only what training changes takes memory.
    instead: parameters that are not filled, and who takes the stored array in their place. into: those that are not
    filled either, and the arrays [in, out] that are, such as the columns of a matrix that several share.
    Raises CheckpointError with every missing, unexpected or misshapen weight before the first is read.
    """
    instead, into = instead or {}, into or {}
    files = {name_in(model, name): info for name, info in read_layout(folder).items()}
    parameters = model.state_dict()
    findings = _compare(parameters, files)
    if not findings:
        findings = _compare_tied_head(model, files)
    if findings:
        raise CheckpointError(_message(model, folder, findings))
    for name, take in instead.items():
        take(view(files[name]))
    stored = {name: info for name, info in files.items() if name in parameters and name not in instead}
    if paddle.device.get_device() == "cpu":
        _fill({name: parameters[name] for name in stored}, stored, into)
    else:
        for name, info in stored.items():
            _copy_to_device(parameters[name], view(info))
    if NEW_HEAD in parameters.keys() - files.keys():
        log.warning("%s is not in %s: it is new and random, train it.", NEW_HEAD, folder.name)
        parameters[NEW_HEAD].initialize()
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


def _fill(parameters: dict, stored: dict[str, TensorInfo], into: Mapping[str, np.ndarray]) -> None:
    """Give each parameter its stored tensor in its own dtype, or read it into the array named for it."""
    maps = Maps()

    def read(name: str) -> np.ndarray:
        info, dtype = stored[name], dtype_of(parameters[name])
        if name not in into and maps.fits(info, dtype):
            array = maps.array(info)
            touch(array)
            return array
        array = into[name] if name in into else empty(info.shape, dtype)
        read_into(info, array)
        return array

    with ThreadPoolExecutor(READERS) as readers:
        for name, array in zip(stored, readers.map(read, stored), strict=True):
            if name not in into:
                give(parameters[name], array)


def give(parameter, array: np.ndarray) -> None:
    """Let an array be the memory of a parameter that has none yet, on the CPU. The parameter keeps it alive."""
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)  # Paddle's numpy spelling of bfloat16
    parameter.get_tensor().set(array, paddle.CPUPlace(), True)


def _copy_to_device(parameter, array: np.ndarray) -> None:
    """Copy one stored tensor into a parameter that has no memory yet, in the parameter's dtype."""
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)
    tensor = paddle.to_tensor(np.ascontiguousarray(array))
    if tensor.dtype != parameter.dtype:
        tensor = tensor.astype(parameter.dtype)
    parameter.get_tensor()._share_data_with(tensor.get_tensor())


def _unmerged_lora(model: nn.Layer) -> bool:
    return any(hasattr(layer, "lora_A") and not getattr(layer, "merged", False) for layer in model.sublayers())


def dtype_of(parameter) -> np.dtype:
    """numpy's dtype of a parameter's values, with or without memory; bfloat16 as ml_dtypes.bfloat16."""
    return DTYPES[_tag(parameter)]


def _tag(tensor) -> str:
    """The safetensors tag of a Paddle tensor's dtype."""
    return tag_of(paddle.empty([0], dtype=tensor.dtype).numpy())
