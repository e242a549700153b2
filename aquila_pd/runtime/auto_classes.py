"""Import hook: the base library's Auto classes learn about Aquila as soon as they are loaded, and nothing before."""

import importlib.abc
import importlib.util
import sys

from . import base

PACKAGE = __name__.split(".")[0]  # in a converted folder the package has another name


def register_when_needed() -> None:
    """Register now if the base library's models are loaded, otherwise right after they are imported."""
    if hasattr(sys.modules.get(base.MODELS), "AutoConfig"):
        base.register(PACKAGE)
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finder that leaves loading as it is and runs `register` once the base library's models are loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != base.MODELS:
            return None
        sys.meta_path.remove(self)  # before looking further, or this finder would find itself
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module):
                load(module)
                base.register(PACKAGE)

            spec.loader.exec_module = load_and_register
        return spec
