"""Model families that the converter reads, one module each: a module with a FAMILY is found by itself."""

import importlib
import pkgutil
from collections.abc import Mapping

from ...utils.errors import ConfigError
from .base import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    if hasattr(module, "FAMILY")
}
AUTO = "auto"


def find_family(config: Mapping, name: str = AUTO) -> Family:
    """The family called `name`, or with "auto" the one that recognises this config.json. Raises ConfigError."""
    if name != AUTO:
        if name not in FAMILIES:
            raise ConfigError(f"No family is called {name!r}. Known: {AUTO}, {', '.join(FAMILIES)}.")
        return FAMILIES[name]
    found = [family for family in FAMILIES.values() if family.recognises(config)]
    if len(found) == 1:
        return found[0]
    if found:
        which = f"is recognised by several families, {', '.join(family.name for family in found)}"
    else:
        which = f"is of an unknown kind: model_type {config.get('model_type')!r}"
    raise ConfigError(
        f"config.json {which}, architectures {config.get('architectures')!r}.\n"
        f"Known families: {', '.join(FAMILIES)}. When the model computes as one of them, say which with --family."
    )
