"""LoraSpec: hyperparameters of a low-rank adapter, with their limits, for recipes and adapter_config.json."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from ..architecture.weight_map import PROJECTIONS
from ..utils.errors import ConfigError
from ..utils.validation import choice, flag, number, settings, several, whole, wrong

ALL = "all"


def _expanded(value: object) -> object:
    return PROJECTIONS if value in (ALL, (ALL,)) else value


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise wrong("a name is there twice")
    return names


TARGETS = several(choice(PROJECTIONS), "projections that get an adapter", least=1)


@settings(ConfigError, "Adapters cannot be made with these settings:", "Correct them.")
class LoraSpec:
    """LoRA, rsLoRA and DoRA. targets: also "all"."""

    r: whole("rank", ge=1) = 8
    alpha: number("the update is scaled by alpha / r", gt=0) = 16.0
    dropout: number("of the adapter's input", ge=0, lt=1) = 0.05
    targets: Annotated[TARGETS, AfterValidator(_different), BeforeValidator(_expanded)] = ("q_proj", "v_proj")
    rslora: flag("scaled by alpha / sqrt(r)") = False
    dora: flag("a learned magnitude for each output beside it") = False
