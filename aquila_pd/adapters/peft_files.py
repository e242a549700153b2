"""peft checkpoint format: adapter_config.json, and adapter_model.safetensors under Hugging Face names.

What we write, transformers and peft load onto the torch model; what peft has trained is loaded here. One more file,
which peft does not read, says which projections were packed in NF4 while the adapter was trained. peft's other
methods (biases, ranks by pattern, weights that changed the base) are refused by name: this module has no guess.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..architecture.weight_map import BASE_MODEL_PREFIX, HF_PREFIX, PROJECTIONS, Dims, weights
from ..formats.safetensors import Entry, Shard, TensorInfo, read_header, view, write_shard
from ..runtime.versions import NAME, VERSION
from ..utils.atomic import replacing
from ..utils.errors import CheckpointError, OutputError, report, shown_value
from ..utils.files import read_object, write_json

if TYPE_CHECKING:
    from paddle import nn

    from .spec import LoraSpec

log = logging.getLogger("aquila_pd")

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
NOTES = "aquila_pd_adapter.json"  # ours
PREFIX = "base_model.model."  # peft's, of every name in a file
# our parameter -> the end of its name in a file; of the magnitude there is a newer spelling, too
ENDS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
SPELLINGS = {**{end: kind for kind, end in ENDS.items()}, "lora_magnitude_vector.weight": "magnitude"}
FLOATS = ("F32", "F16", "BF16")

# Keys of an adapter_config.json that are read, and those that only tell where it comes from.
READ = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "base_model_name_or_path"}
TELLING = {"inference_mode", "revision", "task_type", "peft_version", "megatron_core", "qalora_group_size"}
# Others must have one of these values, an empty one (none, false, nothing in it) always being fine.
NEUTRAL = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),  # pissa, olora, corda and loftq change the base
    "ensure_weight_tying": (False,),
}


@dataclass(frozen=True)
class Adapter:
    """An adapter's files, checked against each other. base: the model it names; packed: projections that were NF4 while
    it was trained; tensors: (Hugging Face's name of a projection, "lora_A" | "lora_B" | "magnitude") -> where it lies.
    """

    folder: Path
    spec: "LoraSpec"
    base: str
    packed: tuple[str, ...]
    tensors: Mapping[tuple[str, str], TensorInfo]

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.folder / name for name in (CONFIG, NOTES, TENSORS)) if path.is_file()]

    def has(self, projection: str) -> bool:
        return (projection, "lora_A") in self.tensors

    def values(self, projection: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """lora_A [in, r], lora_B [r, out] and magnitude [out] or None, float32 in Paddle's layout."""
        found = [self.tensors.get((projection, kind)) for kind in ENDS]
        A, B, magnitude = (None if info is None else np.float32(view(info)).T for info in found)
        return A, B, magnitude


# ---------------------------------------------------------------------------------------------------- writing


def save(
    folder: Path | str, model: "nn.Layer", spec: "LoraSpec", *, base: Path | str = "", fsync: bool = False
) -> None:
    """Write the adapters of a model into a folder, made if need be.

    spec: what they were attached with. base: folder or name of the model below. The config is written last, and that
    of an earlier adapter there removed first: a folder with a config is complete. Raises OutputError.
    """
    from ..quantization.nf4 import packed_targets
    from .lora import adapter_state

    folder = Path(folder)
    state = {hf_name(name): value for name, value in adapter_state(model).items()}
    if not state:
        raise OutputError("The model has no adapters to save.")
    entries = [Entry(name, "F32", tuple(value.shape[::-1])) for name, value in state.items()]
    arrays = (np.ascontiguousarray(value.detach().cpu().numpy().T) for value in state.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
        pieces = (array.reshape(-1).view(np.uint8) for array in arrays)
        with replacing(folder / TENSORS, fsync=fsync) as partial:
            write_shard(partial, Shard(TENSORS, tuple(entries)), pieces, framework="pt")
        notes = {"written_by": f"{NAME} {VERSION}", "packed_in_nf4": list(packed_targets(model))}
        write_json(folder / NOTES, notes, fsync=fsync)
        write_json(folder / CONFIG, peft_config(spec, str(base)), fsync=fsync)
    except OSError as error:
        raise OutputError(f"The adapter cannot be written to {folder}: {error.strerror or error}.") from error


def peft_config(spec: "LoraSpec", base: str) -> dict:
    """The content of adapter_config.json; what it does not say is peft's default, and means what ours means."""
    alpha = int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.r,
        "lora_alpha": alpha,
        "lora_dropout": spec.dropout,
        "target_modules": [name for name in PROJECTIONS if name in spec.targets],
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def hf_name(name: str) -> str:
    """Our name of an adapter's parameter as peft has it in files."""
    projection, _, kind = name.rpartition(".")
    return f"{PREFIX}{HF_PREFIX}{projection.removeprefix(f'{BASE_MODEL_PREFIX}.')}.{ENDS[kind]}"


# ---------------------------------------------------------------------------------------------------- reading


def load(model: "nn.Layer", folder: Path | str) -> "LoraSpec":
    """Put the adapter of a folder on a model, in place of the values of one that is attached; return its settings.

    Raises CheckpointError naming everything that is missing, unexpected or of another shape; then the model is as
    before.
    """
    from ..quantization.nf4 import packed_targets
    from .lora import adapted_layers, attach, load_adapter_state

    adapter = open_adapter(folder)
    check_fits(adapter, model.config.dims)
    packed = packed_targets(model)
    if packed != adapter.packed:
        said = [", ".join(names) if names else "no weight" for names in (adapter.packed, packed)]
        log.warning("%s was trained with %s packed in NF4; this model has %s.", adapter.folder.name, *said)
    if not adapted_layers(model):
        attach(model, adapter.spec)
    prefix = "" if model.base_model is model else f"{BASE_MODEL_PREFIX}."
    load_adapter_state(model, _as_ours(adapter, prefix))
    return adapter.spec


def read(folder: Path | str) -> dict[str, np.ndarray]:
    """The values of an adapter under the names of adapter_state(), for load_adapter_state(), in Paddle's layout."""
    return _as_ours(open_adapter(folder), f"{BASE_MODEL_PREFIX}.")


def _as_ours(adapter: Adapter, prefix: str) -> dict[str, np.ndarray]:
    return {
        f"{prefix}{name.removeprefix(HF_PREFIX)}.{kind}": np.float32(view(info)).T
        for (name, kind), info in adapter.tensors.items()
    }


def open_adapter(folder: Path | str) -> Adapter:
    """The adapter in a folder: config and headers read, tensors mapped. Raises CheckpointError with all findings."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no adapter: there is no {CONFIG}. Give the folder of an adapter.")
    config = read_object(folder / CONFIG, CheckpointError)
    findings = _unsupported(config)
    infos, wrong = read_header(folder / TENSORS)
    tensors, strange = _by_projection(infos)
    spec = _spec(config, {hf.rpartition(".")[2] for hf, _ in tensors}, findings)
    findings += wrong + strange
    if findings:
        advice = "Correct or fetch what is named. Other methods of peft can be merged with peft itself, in torch."
        raise CheckpointError(report(f"{folder} is not an adapter that can be used here:", findings, advice))
    base = config.get("base_model_name_or_path")
    return Adapter(folder, spec, base if isinstance(base, str) else "", _packed(folder), tensors)


def _unsupported(config: Mapping) -> list[str]:
    findings = []
    for key in sorted(config.keys() - READ - TELLING):
        value, fine = config[key], NEUTRAL.get(key, ())
        if value and value not in fine:
            only = f"; known: {', '.join(map(repr, fine))}" if fine else ", which is not known here"
            findings.append(f"unsupported {key} = {shown_value(value)}{only}")
    return findings


def _spec(config: Mapping, names: set[str], findings: list[str]) -> "LoraSpec | None":
    """The settings that are read; None, and what is wrong with them among the findings.

    names: of the projections that have tensors: what a pattern, which is peft's to match, has matched.
    """
    from pydantic import TypeAdapter, ValidationError  # takes a third of a second

    from .spec import LoraSpec

    said = config.get("target_modules")
    targets = _targets(said, findings)
    if targets is None and not names:
        findings.append(
            f"bad value   target_modules is {shown_value(said)}, and the file has no tensor of a projection"
        )
    asked = {
        "r": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout", 0.0),
        "targets": tuple(name for name in PROJECTIONS if name in (names if targets is None else targets)),
        "rslora": config.get("use_rslora", False),
        "dora": config.get("use_dora", False),
    }
    try:
        return TypeAdapter(LoraSpec).validate_python(asked)
    except ValidationError as error:
        wrong = {item["loc"][0]: item["input"] for item in error.errors() if item["loc"][0] != "targets"}
        findings += [f"bad value   {key} is {shown_value(value)}" for key, value in wrong.items()]
        return None


def _targets(said: object, findings: list[str]) -> tuple[str, ...] | None:
    """The projections of a list, of which peft compares the ends of names; None for a pattern."""
    if isinstance(said, str) and said not in PROJECTIONS:
        return None
    names = [said] if isinstance(said, str) else said
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        findings.append(f"bad value   target_modules is {shown_value(said)}, no list of names")
        return ()
    ends = {name.rpartition(".")[2] for name in names}
    findings += [f"unsupported target_modules has {shown_value(name)}" for name in sorted(ends - {*PROJECTIONS})]
    return tuple(name for name in PROJECTIONS if name in ends)


def _by_projection(infos: list[TensorInfo]) -> tuple[dict[tuple[str, str], TensorInfo], list[str]]:
    """(projection, kind) -> tensor; a line for each name or dtype that is not an adapter's."""
    found, strange = {}, []
    ends = "|".join(map(re.escape, SPELLINGS))
    pattern = re.compile(
        rf"{re.escape(PREFIX)}({re.escape(HF_PREFIX)}layers\.\d+\.\w+\.(?:{'|'.join(PROJECTIONS)}))\.({ends})"
    )
    for info in infos:
        match = pattern.fullmatch(info.name)
        if match is None:
            strange.append(f"unexpected  {info.name} {list(info.shape)}")
        elif info.dtype not in FLOATS:
            strange.append(f"dtype       {info.name}: {info.dtype}, not one of {', '.join(FLOATS)}")
        else:
            found[match[1], SPELLINGS[match[2]]] = info
    return found, strange


def _packed(folder: Path) -> tuple[str, ...]:
    if not (folder / NOTES).is_file():
        return ()  # peft's own: what its base was is not said
    said = read_object(folder / NOTES, CheckpointError).get("packed_in_nf4")
    if not (isinstance(said, list) and all(name in PROJECTIONS for name in said)):
        raise CheckpointError(f"{folder / NOTES}: packed_in_nf4 is {shown_value(said)}, no list of projections.")
    return tuple(said)


def check_fits(adapter: Adapter, dims: Dims) -> None:
    """Raise CheckpointError with every tensor that the adapter of a model of these sizes lacks, or has otherwise."""
    r, kinds = adapter.spec.r, list(ENDS) if adapter.spec.dora else list(ENDS)[:2]
    wanted = {}
    for weight in weights(dims):
        projection = weight.hf.removesuffix(".weight")
        if projection.rpartition(".")[2] in adapter.spec.targets:
            out, in_ = weight.hf_shape
            shapes = {"lora_A": (r, in_), "lora_B": (out, r), "magnitude": (out,)}
            wanted |= {(projection, kind): shapes[kind] for kind in kinds}
    held = adapter.tensors
    findings = [f"missing     {PREFIX}{name}.{ENDS[kind]}" for name, kind in wanted if (name, kind) not in held]
    findings += [f"unexpected  {info.name} {list(info.shape)}" for key, info in held.items() if key not in wanted]
    findings += [
        f"shape       {held[key].name}: file has {list(held[key].shape)}, the model and r = {r} want {list(shape)}"
        for key, shape in wanted.items()
        if key in held and held[key].shape != shape
    ]
    if findings or not wanted:
        findings = findings or ["it holds no tensor"]
        advice = "Nothing was loaded. Is it an adapter of another model, or has one of its files been replaced?"
        raise CheckpointError(report(f"{adapter.folder} does not fit the model:", findings, advice))
