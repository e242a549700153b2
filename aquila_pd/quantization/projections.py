"""The linear projections of a decoder layer by name: finding and replacing them in a model."""

import difflib
from collections.abc import Iterable
from typing import NamedTuple

from paddle import nn

from ..architecture.weight_map import PROJECTIONS
from ..ops.fused_linear import FusedLinear
from ..utils.errors import AquilaError, ConfigError

ALL = "all"


class Place(NamedTuple):
    """Where a projection is: its name in the model, the layer that has it as an attribute, and itself."""

    name: str
    parent: nn.Layer
    layer: nn.Layer

    def put(self, layer: nn.Layer) -> None:
        """Let another layer stand in this place."""
        setattr(self.parent, self.name.rpartition(".")[2], layer)


def check_targets(targets: Iterable[str] | str) -> tuple[str, ...]:
    """Names of projections in the weight table's order; "all", alone or in a list, means every one.

    Raises ConfigError naming each unknown name and the nearest right one.
    """
    asked = (targets,) if isinstance(targets, str) else tuple(targets)
    if not asked:
        raise ConfigError(f"No projection is named. Choose from {', '.join(PROJECTIONS)}, or {ALL}.")
    unknown = [name for name in asked if name not in (*PROJECTIONS, ALL)]
    if unknown:
        raise ConfigError(
            f"No projection is called {', '.join(map(_with_nearest, unknown))}. "
            f"Choose from {', '.join(PROJECTIONS)}, or {ALL}."
        )
    return tuple(name for name in PROJECTIONS if ALL in asked or name in asked)


def _with_nearest(name: str) -> str:
    nearest = difflib.get_close_matches(name, (*PROJECTIONS, ALL), n=1, cutoff=0.5)
    return f"{name!r} (did you mean {nearest[0]!r}?)" if nearest else repr(name)


def find_projections(model: nn.Layer, targets: Iterable[str] | str) -> list[Place]:
    """The named projections of every decoder layer, in model order.

    Raises ConfigError for unknown names, AquilaError where projections are fused or the model has none of them.
    """
    names = check_targets(targets)
    layers = dict(model.named_sublayers(include_self=True))
    fused = next((name for name, layer in layers.items() if isinstance(layer, FusedLinear)), None)
    if fused is not None:
        raise AquilaError(
            f"The projections of this model are fused ({fused} stands for several). "
            "Call model.unfuse_projections() first; fusing is for a model that only runs."
        )
    found = [
        Place(name, layers[name.rpartition(".")[0]], layer)
        for name, layer in layers.items()
        if name.rpartition(".")[2] in names
    ]
    if not found:
        raise AquilaError(f"This {type(model).__name__} has no {' or '.join(names)}: it is no decoder of this family.")
    return found
