"""load_quantized(): a model folder loaded into NF4 layers without the full-precision weights in memory."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from paddle import nn

from ..configuration import AquilaConfig
from ..model.weights_io import SAFETENSORS
from ..modeling import AquilaForCausalLM
from ..utils.errors import CheckpointError
from .encode import quantize
from .nf4 import NF4Linear
from .projections import ALL, Place, find_projections


def load_quantized(
    folder: Path | str, targets: Iterable[str] | str = ALL, *, dtype: str | None = None
) -> AquilaForCausalLM:
    """Load a converted folder with the named projections packed as NF4, each as soon as it is read.

    Beside the packed model there is one strip of a weight in memory (some 32 MB), and pages of its file that the
    system may take back at any time. dtype: of everything else, see AquilaForCausalLM.from_pretrained. What is packed
    is what the files hold: for files in half precision, or loaded in their own dtype, the very codes of
    quantize_model(). Raises CheckpointError and ConfigError as from_pretrained does.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in SAFETENSORS):
        raise CheckpointError(f"{folder} holds no weights: expected {' or '.join(SAFETENSORS)}.")

    def instead(model: nn.Layer) -> dict:
        places = find_projections(model, targets)
        return {f"{place.name}.weight": _packer(place, model.config.dtype) for place in places}

    config = AquilaConfig.from_pretrained(str(folder))
    return AquilaForCausalLM.from_files(folder, config, dtype=dtype, make_instead=instead)


def _packer(place: Place, dtype: str):
    def pack(stored: np.ndarray) -> None:  # [in, out]
        place.put(NF4Linear(quantize(stored.T, place.name), dtype))

    return pack
