"""AquilaPretrainedModel: how Aquila models are initialized, loaded, saved and resized under PaddleNLP.

Loading builds the model without random numbers, checks every name and shape in the file headers first, then
copies tensor by tensor, converting on the way; at no time more than the weights and one tensor are held. What is
not a plain local safetensors folder (hub names, .pdparams, tensor parallel, quantized on load) is PaddleNLP's.
"""

import logging
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from paddlenlp.generation import GenerationConfig
from paddlenlp.transformers import PretrainedModel
from paddlenlp.transformers.conversion_utils import StateDictNameMapping
from paddlenlp.transformers.model_utils import dtype_guard, no_init_weights

from .configuration import AquilaConfig
from .errors import CheckpointError, report
from .fusion_ops import FusedLinear, fuse, unfuse
from .shards import DEFAULT_SHARD_SIZE, Entry, parse_size, plan_shards, read_layout, tag_of, view, write_shards
from .weight_map import BASE_MODEL_PREFIX, HEAD, weights

log = logging.getLogger("aquila_pd")

PREFIX = f"{BASE_MODEL_PREFIX}."
HALF = ("bfloat16", "float16")
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
# Parameters of a task head: a checkpoint of another task lacks or has them, and that is no mistake.
NEW_HEAD = "score.weight"
OTHER_HEADS = {HEAD.paddle, NEW_HEAD}


class AquilaPretrainedModel(PretrainedModel):
    """What every Aquila model on PaddleNLP shares."""

    config_class = AquilaConfig
    base_model_prefix = BASE_MODEL_PREFIX
    _keys_to_ignore_on_load_unexpected = [r"self_attn\.rotary_emb\.inv_freq"]

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
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, dtype: str | None = None, **kwargs):
        """Load a model.

        Args:
            pretrained_model_name_or_path: a folder with config.json and safetensors (converted by
                convert/torch2paddle.py or saved by save_pretrained), or anything else PaddleNLP loads.
            config: an AquilaConfig to use in place of the folder's.
            dtype: of the parameters. Default is the config's; on a CPU half precision becomes float32, as Paddle
                has no half-precision CPU kernels to compute with, and this is said in the log.
            Other keywords that are config fields change the config.

        Raises:
            CheckpointError: every missing, unexpected or misshapen weight, by name, before anything is loaded.
        """
        folder = Path(pretrained_model_name_or_path)
        if not isinstance(config, AquilaConfig):
            config, kwargs = cls.config_class.from_pretrained(
                config or pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
        if args or not _is_ours(folder, config, kwargs):
            # Not with weights at hand: PaddleNLP would put them aside and read the files again.
            at_hand = kwargs.get("state_dict") is not None or kwargs.get("convert_from_torch")
            kwargs.setdefault("low_cpu_mem_usage", not at_hand)
            return super().from_pretrained(folder.as_posix(), *args, config=config, dtype=dtype, **kwargs)
        config.dtype = _compute_dtype(dtype, config.dtype)
        with ExitStack() as stack:
            stack.enter_context(no_init_weights(_enable=True))
            stack.enter_context(paddle.LazyGuard())
            stack.enter_context(dtype_guard(config.dtype))
            model = cls(config)
        _load(model, folder)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder.as_posix())
        return model

    # -------------------------------------------------------------------------------------------- saving

    def save_pretrained(self, save_dir, *args, safe_serialization: bool = True, **kwargs):
        """Save config, generation config and weights; safetensors with standard BF16 tags by default.

        max_shard_size: "5GB" by default. safe_serialization=False, a variant, a state_dict or a merge of tensor
        parallel parts are PaddleNLP's to do.
        """
        foreign = kwargs.keys() & {"state_dict", "config_to_save"} or kwargs.get("variant")
        if args or foreign or not safe_serialization or self.config.tensor_parallel_degree > 1:
            return super().save_pretrained(save_dir, *args, safe_serialization=safe_serialization, **kwargs)
        if not kwargs.get("is_main_process", True):
            return None
        folder = Path(save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.dtype = str(next(iter(self.parameters())).dtype).removeprefix("paddle.")
        self.config.architectures = [type(self).__name__]
        # In the table's order, whatever order fusing has left the layers in: the same weights give the same bytes.
        state = self.state_dict()
        rows = [_name_in(self, weight.paddle) for weight in weights(self.config.dims)]
        ordered = [name for name in rows if name in state] + [name for name in state if name not in rows]
        entries = [Entry(name, _tag(state[name]), tuple(state[name].shape)) for name in ordered]
        shards = plan_shards(entries, parse_size(kwargs.get("max_shard_size", DEFAULT_SHARD_SIZE)))
        write_shards(folder, shards, lambda entry, region: _copy_out(state[entry.name], region))
        self.config.save_pretrained(folder)
        if self.can_generate():
            self.generation_config.save_pretrained(folder)
        return None

    # -------------------------------------------------------------------- fused projections, never in a file

    def fuse_projections(self) -> None:
        """Store q/k/v and gate/up side by side from now on: fewer, larger matrix products. Names in files stay."""
        for layer in self._fusable():
            fuse(layer)

    def unfuse_projections(self) -> None:
        """Undo fuse_projections(), for example before adding LoRA layers."""
        for layer in self._fusable():
            unfuse(layer)

    def _fusable(self) -> list[nn.Layer]:
        return [layer for layer in self.sublayers() if hasattr(layer, "FUSABLE")]

    def state_dict(self, *args, **kwargs):
        """Parameters by name; fused projections appear as the separate ones they stand for."""
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


def _is_ours(folder: Path, config: AquilaConfig, kwargs: dict) -> bool:
    """Whether this is a plain local safetensors folder and nobody asked for a special way to load it."""
    special = {"convert_from_torch", "state_dict", "subfolder", "variant", "from_hf_hub", "from_aistudio"}
    return (
        any((folder / name).is_file() for name in SAFETENSORS)
        and not any(kwargs.get(key) for key in special)
        and config.tensor_parallel_degree <= 1
        and not config.quantization_config.is_weight_quantize()
    )


def _compute_dtype(asked: str | None, stored: str) -> str:
    stored = str(stored).removeprefix("paddle.")
    on_cpu = paddle.device.get_device() == "cpu"
    if asked is not None:
        if on_cpu and asked in HALF:
            log.warning("%s parameters as asked; Paddle's CPU kernels store but do not compute in it.", asked)
        return asked
    if on_cpu and stored in HALF:
        log.info("Loading the %s checkpoint as float32: Paddle's CPU kernels do not compute in half precision.", stored)
        return "float32"
    return stored


def _load(model: AquilaPretrainedModel, folder: Path) -> None:
    """Check all names and shapes against the headers, then fill the parameters."""
    files = {_name_in(model, name): info for name, info in read_layout(folder).items()}
    parameters = model.state_dict()
    missing = [name for name in parameters if name not in files]
    new = [name for name in missing if name == NEW_HEAD]
    _check(model, folder, files, [name for name in missing if name not in new])
    for name, parameter in parameters.items():
        if name in new:
            log.warning("%s is not in %s: it is new and random, train it.", name, folder.name)
            parameter.initialize()
            model._init_weights(model.score)
        else:
            _fill(parameter, view(files[name]))


def _name_in(model: AquilaPretrainedModel, name: str) -> str:
    """The model's name of a tensor in a file: with or without the prefix of the base model."""
    is_base = model.base_model is model
    if is_base:
        return name.removeprefix(PREFIX)
    return name if name.startswith(PREFIX) or name in OTHER_HEADS else PREFIX + name


def _check(model: AquilaPretrainedModel, folder: Path, files: dict, missing: list[str]) -> None:
    parameters = model.state_dict()
    unexpected = [name for name in files if name not in parameters and name not in OTHER_HEADS]
    findings = [f"missing     {name}" for name in missing]
    findings += [f"unexpected  {name}" for name in unexpected]
    findings += [
        f"shape       {name}: file has {list(files[name].shape)}, config says {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in files and list(files[name].shape) != list(parameter.shape)
    ]
    if not findings:
        return
    torch_names = any("model." in name for name in unexpected)
    advice = (
        "These are Hugging Face's names: convert the folder with convert/torch2paddle.py first."
        if torch_names
        else "Nothing was loaded. Fetch or convert the folder again, or correct config.json."
    )
    headline = f"{folder.name} does not hold the {type(model).__name__} its config.json describes:"
    raise CheckpointError(report(headline, findings, advice))


def _fill(parameter, array: np.ndarray) -> None:
    """Copy one stored tensor into a parameter that has no memory yet, in the parameter's dtype."""
    if array.dtype.name == "bfloat16":
        array = array.view(np.uint16)  # Paddle's numpy spelling of bfloat16
    tensor = paddle.to_tensor(np.ascontiguousarray(array))
    if tensor.dtype != parameter.dtype:
        tensor = tensor.astype(parameter.dtype)
    parameter.get_tensor()._share_data_with(tensor.get_tensor())


def _tag(tensor) -> str:
    """The safetensors tag of a Paddle tensor's dtype."""
    return tag_of(paddle.empty([0], dtype=tensor.dtype).numpy())


def _copy_out(tensor, region: np.ndarray) -> None:
    """Copy a tensor's bits into its mapped place in a file (bfloat16 is uint16 in Paddle's numpy)."""
    region.reshape(-1).view(np.uint8)[:] = tensor.detach().cpu().numpy().reshape(-1).view(np.uint8)
