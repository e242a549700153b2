"""Verification by logits: transformers and Paddle on the same ids, both in float32.

Nothing is shared on torch's side: transformers reads the weights from the source's files itself, and is given the
sizes in config.json as they stand there (of a GGUF file: our reading of its rope scaling).
"""

import gc
import io
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...architecture.rope_scaling import RopeScaling
from ...utils.errors import ConfigError, InstallationError, VerificationError, report
from ..sources import Source
from .result import Verified

BATCH, LENGTH = 2, 96  # of the ids both models see
BEYOND = 96  # positions past max_position_embeddings, where dynamic scaling begins
AFFORDABLE = 1024  # max_position_embeddings up to which ids of that length are run
# Measured: two correct fp32 implementations differ by 1e-5 to 1e-4 of the logits' spread, a lost transpose by about
# all of it.
TOLERANCE = 1e-3
ADVICE = "Nothing was kept. Convert again with --verify content to see whether values were lost."
INSTEAD = "Use --verify content; `aquila-pd verify --level layerwise` runs both models on any source."
TORCH_EXTRA = 'Install what is missing with pip install "aquila_pd[verify,gguf]", or compare content only.'


def check_logits_possible(source: Source) -> None:
    """Raise before the conversion what would otherwise be found after it."""
    why = None
    if not source.family.runs_as_llama:
        why = f"transformers does not read files of family {source.family.name}"
    elif source.layout.kind != "gguf" and (packed := sorted({t.packed for t in source.tensors.values() if t.packed})):
        why = f"transformers does not unpack {', '.join(packed)} here"
    else:
        check_torch(source)
        if source.layout.kind == "torch_bin" and (wrapped := _wrapped_file(source)):
            why = f'the weights in {wrapped} are wrapped in {{"module": ...}}, where transformers does not find them'
    if why:
        raise ConfigError(f"Logits of {source.path} cannot be compared: {why}.\n{INSTEAD}")


def _wrapped_file(source: Source) -> str | None:
    """The first file that holds its weights in FlagAI's wrapper."""
    from .torch_side import is_wrapped, load_bin

    return next((path.name for path in source.files if is_wrapped(load_bin(path))), None)


def check_torch(source: Source) -> None:
    """Raise InstallationError when torch, or what it needs to read this source, is not there."""
    missing = []
    for name in ("torch", "transformers", *(("gguf",) if source.layout.kind == "gguf" else ())):
        try:
            __import__(name)
        except ImportError as error:
            missing.append(f"{name}: {error}")
    if missing:
        raise InstallationError(report("To run torch beside Paddle something is missing:", missing, TORCH_EXTRA))


def verify_logits(
    source: Source,
    output: Path,
    *,
    rounded_to: str | None = None,
    nonfinite_weights: bool = False,
    ids: np.ndarray | None = None,
    advice: str = ADVICE,
) -> Verified:
    """Run transformers on the source and Paddle on the output, fp32, same ids. Raises VerificationError.

    rounded_to: the dtype the conversion was asked to cast to; the reference's weights are rounded alike.
    nonfinite_weights: the source's weights hold NaN or infinite values, and the user was told which.
    ids: [B, T], by default those of token_ids_for(). advice: what to try when the logits differ.
    """
    ids, about = token_ids_for(source.fields) if ids is None else (ids, f", on {ids.shape[1]} tokens")
    theirs = torch_logits(source, ids, rounded_to=rounded_to)
    gc.collect()  # two fp32 models at once may not fit
    ours = paddle_logits(output, ids)
    found = compare_logits(theirs, ours, ids, nonfinite_weights=nonfinite_weights, advice=advice)
    return replace(found, sentence=found.sentence + about)


def token_ids_for(fields: dict) -> tuple[np.ndarray, str]:
    """Fixed pseudo-random ids [B, T], long enough for rotary embedding to matter, and what to say of their length."""
    positions = fields["max_position_embeddings"]
    length, about = min(LENGTH, positions), ""
    if RopeScaling.of(fields).depends_on_length:  # it does nothing up to max_position_embeddings
        if positions <= AFFORDABLE:
            length = positions + BEYOND
            about = f", on {length} positions, {BEYOND} beyond max_position_embeddings"
        else:
            about = f"; dynamic scaling was not exercised: it begins beyond {positions} positions, {length} were run"
    return np.random.default_rng(20231121).integers(0, fields["vocab_size"], (BATCH, length)), about


def compare_logits(
    theirs: np.ndarray, ours: np.ndarray, ids: np.ndarray, *, nonfinite_weights: bool = False, advice: str = ADVICE
) -> Verified:
    """Compare logits [B, T, V]; raises VerificationError with the worst position.

    The same NaN or infinity on both sides is no difference. Where weights hold NaN, torch's NaN is no reference, since
    Paddle's masked attention may keep fewer of them: such places are left out, and how many is said.
    """
    special = ~np.isfinite(theirs)
    with np.errstate(invalid="ignore"):
        difference = np.abs(theirs.astype(np.float64) - ours)
        same = (theirs == ours) | (np.isnan(theirs) & np.isnan(ours)) | (special & nonfinite_weights)
    difference = np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))
    if special.all() and same.all():
        why = "because of the weights named above" if nonfinite_weights else "though all weights are finite"
        sentence = f"logits cannot be compared: torch's {theirs.size:,} are all NaN or infinite, {why}"
        return Verified("logits", 0, sentence)
    row, position, token = (int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape))
    spread = float(theirs[~special].std()) if not special.all() else 0.0
    worst = float(difference[row, position, token])
    place = f"worst at row {row}, position {position}, vocabulary id {token}"
    values = f"torch {theirs[row, position, token]:.6f}, Paddle {ours[row, position, token]:.6f}"
    if not worst <= TOLERANCE * spread:
        raise VerificationError(
            f"The two models do not compute the same: logits differ by up to {worst:.3g}, allowed is {TOLERANCE:g} of "
            f"their spread {spread:.3g}.{_nonfinite(theirs, ours)}\n"
            f"  {place} (input id {ids[row, position]}): {values}\n"
            f"{advice}"
        )
    sentence = f"logits equal within {worst:.2g} (spread {spread:.3g}, {place}: {values})"
    if special.any():
        sentence += f", {int(special.sum()):,} of {theirs.size:,} are NaN or infinite in torch"
    return Verified("logits", int(theirs.size - special.sum()), sentence, worst, spread)


def _nonfinite(theirs: np.ndarray, ours: np.ndarray) -> str:
    """How many values are NaN or infinite on either side, when any is."""
    counts = [int(np.count_nonzero(~np.isfinite(side))) for side in (theirs, ours)]
    if not any(counts):
        return ""
    return f"\n  NaN or infinite: {counts[0]:,} in torch, {counts[1]:,} in Paddle, of {theirs.size:,}"


def torch_logits(source: Source, ids: np.ndarray, *, rounded_to: str | None = None) -> np.ndarray:
    """Logits [B, T, V] of the source on torch."""
    import torch

    model = torch_model(source)
    if rounded_to:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, rounded_to)).float()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def torch_model(source: Source):
    """transformers' LlamaForCausalLM in fp32, read from the source by transformers itself."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder, extra = _gguf_model(source) if source.layout.kind == "gguf" else _folder_model(source)
    model, loading = transformers.LlamaForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **extra
    )
    if loading["missing_keys"]:  # transformers would compare with random numbers
        raise VerificationError(f"transformers finds no {sorted(loading['missing_keys'])} in {source.path}.")
    return model.eval()


def _folder_model(source: Source) -> tuple[Path, dict]:
    """Where transformers reads weights, and the config it is given: it knows no model_type "aquila"."""
    return source.path, {"config": llama_config(source), "use_safetensors": source.layout.kind == "safetensors"}


def _gguf_model(source: Source) -> tuple[None, dict]:
    """Config and weights as transformers' own GGUF reader has them (from_pretrained would ask for accelerate)."""
    import torch
    from transformers import LlamaForCausalLM, modeling_gguf_pytorch_utils

    config = llama_config(source)
    with redirect_stderr(io.StringIO()):  # its progress bars
        with torch.device("meta"):
            names = LlamaForCausalLM(config)
        path = str(source.path)
        read = modeling_gguf_pytorch_utils.load_gguf_checkpoint(path, return_tensors=True, model_to_load=names)
    return None, {"config": config, "state_dict": read["tensors"]}


def llama_config(source: Source):
    """transformers' LlamaConfig, from the source's own words where transformers understands them."""
    from transformers import LlamaConfig, modeling_gguf_pytorch_utils

    if source.layout.kind == "gguf":
        with redirect_stderr(io.StringIO()):
            config = LlamaConfig(**modeling_gguf_pytorch_utils.load_gguf_checkpoint(str(source.path))["config"])
        config.rope_scaling = RopeScaling.of(source.fields).to_hf()  # which transformers leaves unread
        return config
    if source.family.runs_as_llama:
        foreign = ("model_type", "auto_map", "quantization_config")
        return LlamaConfig(**{key: value for key, value in source.config.items() if key not in foreign})
    return LlamaConfig(**{key: value for key, value in source.fields.items() if key != "dtype"})


def paddle_logits(output: Path, ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of the converted folder."""
    import paddle

    from ...modeling import AquilaForCausalLM
    from ...runtime import base

    base.log_warnings_only()
    model = AquilaForCausalLM.from_pretrained(str(output), dtype="float32")
    model.eval()
    with paddle.no_grad():
        return model(paddle.to_tensor(ids))[0].numpy()
