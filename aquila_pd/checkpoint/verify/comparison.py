"""Comparison of config and tensor headers of source and output, before any value is read.

What both sides hold is compared by the levels of verification, each in its own file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...architecture import families
from ...architecture.weight_map import BASE_MODEL_PREFIX, Weight
from ...formats import safetensors
from ...formats.dtypes import FLOATS
from ...formats.safetensors import DEFAULT_SHARD_SIZE, TensorInfo
from ...utils.errors import CheckpointError, ConfigError, VerificationError, report, shown_value
from ..layout import CONFIG, read_config
from ..plan import TAGS, make_plan
from ..sources import Source
from ..targets import PADDLE, TORCH, find_target

PADDLE_FAMILY = "aquila"
SAVED_BY_PADDLENLP = ("paddlenlp_version", "tensor_parallel_output")  # no part of the model
# PaddleNLP saves this with every model. Where one of its words says something, weights are packed when they are loaded.
QUANTIZATION, PACKING = "quantization_config", ("weight_quantize_algo", "quant_type", "quant_method")
EXACT = {*((tag, tag) for tag in FLOATS), ("F16", "F32"), ("BF16", "F32")}  # casts that keep every value


@dataclass(frozen=True)
class Sides:
    """A source and the Paddle folder that should be it, alike in config and headers.

    config: the Paddle folder's config.json; held: its tensors by Paddle name; weights: the model's, in its order.
    """

    source: Source
    folder: Path
    config: dict
    held: dict[str, TensorInfo]
    weights: list[Weight]

    @cached_property
    def paddle_dtypes(self) -> dict[str, str]:
        """Hugging Face name -> safetensors tag of the tensor in the Paddle folder."""
        return {weight.hf: self.held[weight.paddle].dtype for weight in self.weights}

    @cached_property
    def rounded(self) -> list[str]:
        """Hugging Face names of the tensors the Paddle folder holds in a dtype that loses something."""
        stored = {name: tensor.dtype for name, tensor in self.source.tensors.items()}
        casts = {name: (stored[name], tag) for name, tag in self.paddle_dtypes.items()}
        return [name for name, cast in casts.items() if cast not in EXACT]

    @property
    def rounded_to(self) -> str | None:
        """The one dtype of the Paddle folder when something is rounded to it, as torch spells it."""
        tags = set(self.paddle_dtypes.values())
        return FLOATS.get(tags.pop()) if self.rounded and len(tags) == 1 else None


def compare_folders(source: Source, folder: Path) -> Sides:
    """Config and headers of both. Raises VerificationError with every difference, other errors for unreadable files."""
    if source.framework != TORCH:
        raise ConfigError(f"{source.path} is a Paddle folder. Give the torch checkpoint it was converted from.")
    plan = make_plan(source, find_target(PADDLE), dtype=None, max_shard_size=DEFAULT_SHARD_SIZE)
    config = read_config(folder)
    held = safetensors.read_layout(folder)
    if not any(name.startswith(f"{BASE_MODEL_PREFIX}.") for name in held):
        raise CheckpointError(
            f"{folder} is no converted folder: none of its {len(held)} tensors has a Paddle name, which begins with "
            f"{BASE_MODEL_PREFIX}. Convert the source first."
        )
    findings = config_differences(plan.config, config, folder)
    findings += header_differences({name: weight.paddle_shape for name, weight in plan.moves.items()}, held)
    findings += _dtype_difference(config, held)
    if findings:
        headline = f"{folder} does not describe the model of {source.path}:"
        raise VerificationError(report(headline, findings, "Values were not compared. Convert the source again."))
    return Sides(source, folder, config, held, list(plan.moves.values()))


def config_differences(wanted: dict, found: dict, folder: Path) -> list[str]:
    """A line for each setting of the model that two Paddle configs say differently.

    wanted: what a conversion of the source writes; found: what stands in the folder. Raises ConfigError.
    """
    packing = found.get(QUANTIZATION)
    found = {key: value for key, value in found.items() if key not in (*SAVED_BY_PADDLENLP, QUANTIZATION)}
    if found.get("model_type") != PADDLE_FAMILY:
        return [f"config      model_type: {PADDLE_FAMILY!r} was due, {CONFIG} says {found.get('model_type')!r}"]
    family = families.find_family(wanted, PADDLE_FAMILY)
    try:
        ours = family.fields(found)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    theirs = family.fields(wanted)
    return _packing_difference(packing) + [
        f"config      {name}: the source says {value!r}, {CONFIG} {ours[name]!r}"
        for name, value in theirs.items()
        if name != "dtype" and ours[name] != value  # the dtype may have been chosen
    ]


def header_differences(due: Mapping[str, tuple[int, ...]], held: Mapping[str, TensorInfo]) -> list[str]:
    """A line for each tensor that is missing, unexpected, misshapen or of a dtype no conversion writes.

    due: name in the folder -> shape.
    """
    findings = [f"missing     {name}" for name in due if name not in held]
    findings += [f"unexpected  {name}" for name in held if name not in due]
    for name in [name for name in due if name in held]:
        info = held[name]
        if info.shape != due[name]:
            findings.append(f"shape       {name}: {list(due[name])} was due, the file has {list(info.shape)}")
        if info.dtype not in TAGS.values():
            findings.append(f"dtype       {name}: {info.dtype}; a conversion writes {', '.join(TAGS.values())}")
    return findings


def _packing_difference(packing: object) -> list[str]:
    if packing is None:
        return []
    said = {key: packing.get(key) for key in PACKING} if isinstance(packing, dict) else {QUANTIZATION: packing}
    asked = ", ".join(f"{key} = {shown_value(value)}" for key, value in said.items() if value is not None)
    return [f"config      {QUANTIZATION}: {asked} packs the weights when they are loaded"] if asked else []


def _dtype_difference(config: dict, held: dict[str, TensorInfo]) -> list[str]:
    said = config.get("dtype") or config.get("torch_dtype")
    tags = sorted({info.dtype for info in held.values()})
    if said is None or TAGS.get(said) in tags:
        return []
    return [f"config      dtype: {CONFIG} says {said!r}, the tensors are {', '.join(tags)}"]
