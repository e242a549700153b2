"""AquilaPretrainedModel: how Aquila models are initialized, loaded, saved and resized under PaddleNLP.

A plain local safetensors folder is loaded and saved by model/weights_io.py, without random numbers and without holding
more than the weights. Anything else (hub names, .pdparams, tensor parallel, quantized on load) is
PaddleNLP's to do.
"""

import copy
import logging
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from ..architecture.weight_map import BASE_MODEL_PREFIX, weights
from ..configuration import AquilaConfig
from ..formats.mapped import empty
from ..formats.safetensors import DEFAULT_SHARD_SIZE
from ..ops.fused_linear import FusedLinear, fuse, unfuse
from ..runtime.base import (
    GenerationConfig,
    PretrainedConfig,
    PretrainedModel,
    StateDictNameMapping,
    dtype_guard,
    no_init_weights,
)
from ..utils.errors import CheckpointError, ConfigError, OutputError, report
from .weights_io import NEW_HEAD, PREFIX, SAFETENSORS, check_plain, dtype_of, give, load_weights, save_weights

log = logging.getLogger("aquila_pd")

HALF = ("bfloat16", "float16")
DTYPES = ("float32", *HALF)
# Keywords of PaddleNLP's from_pretrained, as against config fields; and those that also say where the config is.
CONFIG_OPTIONS = {"cache_dir", "subfolder", "from_hf_hub", "from_aistudio", "force_download"}
LOADING_OPTIONS = CONFIG_OPTIONS | {
    "variant",
    "state_dict",
    "use_safetensors",
    "low_cpu_mem_usage",
    "convert_from_torch",
    "ignore_mismatched_sizes",
}


class AquilaPretrainedModel(PretrainedModel):
    """Base class of the Aquila models on PaddleNLP."""

    config_class = AquilaConfig
    base_model_prefix = BASE_MODEL_PREFIX

    # ------------------------------------------------------------------------------------ initialization

    def _init_weights(self, layer: nn.Layer) -> None:
        if isinstance(layer, nn.Linear | nn.Embedding):
            std = self.config.initializer_range
            layer.weight.set_value(paddle.normal(0.0, std, layer.weight.shape).astype(layer.weight.dtype))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embed_tokens = value

    def recompute_disable(self) -> None:
        """Undo recompute_enable() (PaddleNLP's own method of this name enables it)."""
        self.base_model.enable_recompute = False

    # ------------------------------------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, dtype=None, fused=False, **kwargs):
        """Load a model.

        On a CPU the weights of a safetensors folder in the dtype asked for are not copied: the model lies in a private
        map of the files, which several processes share. Training and saving never touch a file that is mapped, and
        files that are replaced or removed do no harm; do not rewrite them in place (`cp` over them) while the model
        runs.

        Args:
            pretrained_model_name_or_path: a folder with config.json and safetensors (converted by `aquila-pd convert`
                or saved by save_pretrained), or anything else PaddleNLP loads.
            config: an AquilaConfig to use in place of the folder's; it is not changed.
            dtype (or torch_dtype): "float32", "bfloat16" or "float16". Default is the config's; on a CPU half
                precision then becomes float32, as Paddle has no such kernels to compute with, and the log says so.
            fused: as fuse_projections() would leave it, without ever holding the separate parts beside it.
            subfolder and PaddleNLP's other loading options, by keyword.
            Other keywords are config fields.

        Raises:
            CheckpointError: every missing, unexpected or misshapen weight, by name.
            ConfigError: a keyword that is neither an option nor a config field.
        """
        options = {name: kwargs.pop(name) for name in LOADING_OPTIONS & kwargs.keys()}
        dtype = _dtype_name(dtype if dtype is not None else kwargs.pop("torch_dtype", None))
        folder = Path(pretrained_model_name_or_path) / (options.get("subfolder") or "")
        config = cls._config(pretrained_model_name_or_path if config is None else config, options, kwargs)
        if args or not _is_plain(folder, config, options):
            if folder.is_dir() and not _holds_weights(folder):
                raise CheckpointError(f"{folder} holds no weights: expected {' or '.join(SAFETENSORS)}.")
            # Not with weights at hand: PaddleNLP would put them aside and read the files again.
            at_hand = options.get("state_dict") is not None or options.get("convert_from_torch")
            options.setdefault("low_cpu_mem_usage", not at_hand)
            name = str(pretrained_model_name_or_path)
            model = super().from_pretrained(name, *args, config=config, dtype=dtype, **options)
            if fused:
                model.fuse_projections()
            return model
        return cls.from_files(folder, config, dtype=dtype, fused=fused)

    @classmethod
    def from_files(
        cls,
        folder: Path,
        config: AquilaConfig,
        *,
        dtype: str | None,
        fused: bool = False,
        make_instead=lambda model: {},
    ):
        """The model of a folder with safetensors. config: its own; the dtype is changed in it.

        fused: see from_pretrained. make_instead: called with the model while it is empty, for load_weights()'s
        `instead`.
        """
        config.dtype = _compute_dtype(dtype, config.dtype)
        with ExitStack() as stack:
            stack.enter_context(no_init_weights(_enable=True))
            stack.enter_context(paddle.LazyGuard())
            stack.enter_context(dtype_guard(config.dtype))
            model = cls(config)
        # Elsewhere the parts are joined on the device, where that is quick and the host need not hold them.
        on_cpu = paddle.device.get_device() == "cpu"
        instead = make_instead(model) if make_instead else None
        load_weights(model, folder, instead=instead, into=_join_empty(model) if fused and on_cpu else None)
        if fused:
            model.fuse_projections()
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder.as_posix())
        return model

    @classmethod
    def _config(cls, given, options: dict, fields: dict) -> AquilaConfig:
        """The config to build with: the given one copied, or read from where `given` says; fields changed."""
        if isinstance(given, AquilaConfig):
            config = copy.deepcopy(given)
        elif isinstance(given, PretrainedConfig) and given.model_type == AquilaConfig.model_type:
            config = AquilaConfig.from_dict(given.to_dict())  # of another copy of this module, in a converted folder
        else:
            where = {name: options[name] for name in CONFIG_OPTIONS & options.keys()}
            config = cls.config_class.from_pretrained(str(given), **where)
        unknown = [name for name in fields if not hasattr(config, name)]
        if unknown:
            raise ConfigError(f"from_pretrained() knows no {', '.join(sorted(unknown))}. Check the spelling.")
        for name, value in fields.items():
            setattr(config, name, value)
        # Through the constructor once more: a field by keyword is checked like one in the file.
        return AquilaConfig.from_dict(config.to_dict()) if fields else config

    @classmethod
    def _load_pretrained_model(cls, *args, **kwargs):
        """PaddleNLP's own loading, where a missing weight is an error and not a warning."""
        result = super()._load_pretrained_model(*args, **kwargs)
        missing = [name for name in result[1] if not name.endswith(NEW_HEAD)]
        if missing:
            findings = [f"missing     {name}" for name in sorted(missing)]
            raise CheckpointError(report(f"The weights do not make a {cls.__name__}:", findings, "Fetch them again."))
        return result

    # -------------------------------------------------------------------------------------------- saving

    def save_pretrained(self, save_dir, *args, safe_serialization: bool = True, **kwargs):
        """Save config, generation config and weights; safetensors with standard BF16 tags by default.

        max_shard_size: "5GB" by default. safe_serialization=False gives PaddleNLP's .pdparams. So do calls of its
        Trainer, whose plain checkpoints it can read in no other form (unified_checkpoint=True writes safetensors);
        a state_dict, a variant and parts of tensor parallelism are PaddleNLP's to save, too.
        Raises AquilaError for a model with adapters or with quantized layers.
        """
        check_plain(self)
        theirs = kwargs.keys() & {"state_dict", "config_to_save", "save_function", "merge_tensor_parallel"}
        if args or theirs or kwargs.get("variant") or not safe_serialization or self.config.tensor_parallel_degree > 1:
            safe = safe_serialization and not theirs
            return super().save_pretrained(save_dir, *args, safe_serialization=safe, **kwargs)
        max_shard_size = kwargs.pop("max_shard_size", DEFAULT_SHARD_SIZE)
        if not kwargs.pop("is_main_process", True):
            return None
        if kwargs:
            raise ConfigError(f"save_pretrained() knows no {', '.join(sorted(kwargs))}. Check the spelling.")
        folder = Path(save_dir)
        if folder.is_file():
            raise OutputError(f"{folder} is a file. Give the name of a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self, folder, max_shard_size)
        self.config.dtype = _dtype_name(next(iter(self.parameters())).dtype)
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        if self.can_generate():
            self.generation_config.save_pretrained(folder)
        return None

    # -------------------------------------------------------------------- fused projections, never in a file

    def fuse_projections(self) -> None:
        """Store q/k/v and gate/up side by side from now on: fewer, larger matrix products. Names in files stay.

        For running a model; unfuse it before adding LoRA layers or handing it to PaddleNLP's Trainer, which look
        for the separate projections. Raises AquilaError when LoRA layers or differently trained parts are there.
        """
        for layer in self._fusable():
            fuse(layer)

    def unfuse_projections(self) -> None:
        """Undo fuse_projections()."""
        for layer in self._fusable():
            unfuse(layer)

    def _fusable(self) -> list[nn.Layer]:
        return [layer for layer in self.sublayers() if hasattr(layer, "FUSABLE")]

    def state_dict(self, *args, **kwargs):
        """Parameters by name; fused projections appear as views of the separate ones they stand for.

        To change weights of a fused model, use set_state_dict or unfuse it first.
        """
        state = super().state_dict(*args, **kwargs)
        for name, layer in self.named_sublayers():
            if isinstance(layer, FusedLinear):
                state.pop(f"{name}.weight")
                parent = name.rpartition(".")[0]
                state.update({f"{parent}.{part}.weight": w for part, w in layer.split_weight().items()})
        return state

    def set_state_dict(self, state_dict, *args, **kwargs):
        """PaddleNLP's; fused projections are taken apart for it and joined again."""
        fused = any(isinstance(layer, FusedLinear) for layer in self.sublayers())
        if not fused:
            return super().set_state_dict(state_dict, *args, **kwargs)
        self.unfuse_projections()
        result = super().set_state_dict(state_dict, *args, **kwargs)
        self.fuse_projections()
        return result

    # ------------------------------------------------------------------------------------------ vocabulary

    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> nn.Embedding:
        """Give the embedding, and the head with it, this many rows; new ones are random, old ones are kept."""
        old = self.get_input_embeddings()
        if not new_num_tokens or new_num_tokens == old.weight.shape[0]:
            return old
        embedding = nn.Embedding(new_num_tokens, old.weight.shape[1])
        self._refill(embedding, old.weight, axis=0)
        self.set_input_embeddings(embedding)
        head = self.get_output_embeddings()
        if head is not None:
            resized = nn.Linear(head.weight.shape[0], new_num_tokens, bias_attr=False)
            self._refill(resized, head.weight, axis=1)
            self.lm_head = resized
        self.config.vocab_size = new_num_tokens
        return embedding

    def get_output_embeddings(self):
        return None

    def _refill(self, layer: nn.Layer, old, axis: int) -> None:
        """Random weights like a new model's, then the old ones along the vocabulary axis as far as they go."""
        layer.to(dtype=old.dtype)
        self._init_weights(layer)
        layer.weight.stop_gradient = old.stop_gradient
        n = min(old.shape[axis], layer.weight.shape[axis])
        kept = paddle.slice(old, [axis], [0], [n])
        rest = paddle.slice(layer.weight, [axis], [n], [layer.weight.shape[axis]])
        with paddle.no_grad():
            layer.weight.set_value(paddle.concat([kept, rest], axis=axis) if rest.shape[axis] else kept)

    # ---------------------------------------------------------------------------------- PaddleNLP's own hook

    @classmethod
    def _get_name_mappings(cls, config: AquilaConfig) -> list[StateDictNameMapping]:
        """Names and transpositions for PaddleNLP's convert_from_torch, out of the weight table."""
        strip = len(PREFIX) if config.architectures == ["AquilaModel"] else 0
        rows = [w for w in weights(config.dims) if not strip or w.paddle.startswith(PREFIX)]
        return [
            StateDictNameMapping(w.hf, w.paddle[strip:], "transpose" if w.transpose else None, index=i)
            for i, w in enumerate(rows)
        ]


def _join_empty(model: nn.Layer) -> dict[str, np.ndarray]:
    """Fuse what can be joined of a model without memory; the memory its parts [in, out] are to be read into, by name.

    A part is some columns of its FusedLinear's matrix. What stands alone is left for fuse_projections().
    """
    columns = {}
    for name, layer in model.named_sublayers():
        for fused, parts in getattr(layer, "FUSABLE", {}).items():
            if len(parts) == 1:
                continue
            joined = _empty_fused({part: getattr(layer, part) for part in parts})
            matrix = empty(tuple(joined.weight.shape), dtype_of(joined.weight))
            give(joined.weight, matrix)
            ends = np.cumsum(joined.widths)[:-1]
            for part, some in zip(parts, np.split(matrix, ends, axis=1), strict=True):
                columns[f"{name}.{part}.weight"] = some
                delattr(layer, part)
            setattr(layer, fused, joined)
    return columns


def _empty_fused(parts: dict[str, nn.Linear]) -> FusedLinear:
    """A FusedLinear of layers without memory. Its constructor joins weights that are there."""
    layer = FusedLinear.__new__(FusedLinear)
    nn.Layer.__init__(layer)
    layer.names = list(parts)
    layer.widths = [linear.weight.shape[1] for linear in parts.values()]
    first = next(iter(parts.values())).weight
    with paddle.LazyGuard():
        layer.weight = layer.create_parameter([first.shape[0], sum(layer.widths)], dtype=first.dtype)
    return layer


def _holds_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.pdparams")) or any(folder.glob("*.bin"))


def _is_plain(folder: Path, config: AquilaConfig, options: dict) -> bool:
    """Whether this is a local safetensors folder, to be loaded without special options."""
    return (
        any((folder / name).is_file() for name in SAFETENSORS)
        and not any(
            options.get(name) for name in LOADING_OPTIONS - {"subfolder", "low_cpu_mem_usage", "use_safetensors"}
        )
        and config.tensor_parallel_degree <= 1
        and not config.quantization_config.is_weight_quantize()
    )


def _dtype_name(dtype) -> str | None:
    """ "float32" of "float32" or paddle.float32. Raises ConfigError for what is no dtype of parameters."""
    name = None if dtype is None else str(dtype).removeprefix("paddle.")
    if name not in (None, *DTYPES):
        raise ConfigError(f"The dtype {name!r} is not known. Choose one of {', '.join(DTYPES)}.")
    return name


def _compute_dtype(asked: str | None, stored) -> str:
    stored = _dtype_name(stored)
    on_cpu = paddle.device.get_device() == "cpu"
    if asked is not None:
        if on_cpu and asked in HALF:
            log.warning("%s parameters as asked; Paddle's CPU kernels store but do not compute in it.", asked)
        return asked
    if on_cpu and stored in HALF:
        log.info("Loading the %s checkpoint as float32: Paddle's CPU kernels do not compute in half precision.", stored)
        return "float32"
    return stored
