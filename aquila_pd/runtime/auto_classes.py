"""Tells PaddleNLP's Auto classes about Aquila. The one file that touches PaddleNLP's private tables.

PaddleNLP has a public `register` for configs and tokenizers and none for models, so the names below are its
internals; versions.py pins the release they were read in, and a test loads through every Auto class.
Nothing heavy is imported here: `register_when_needed` waits until somebody imports paddlenlp.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import types

PACKAGE = __name__.split(".")[0]  # in a converted folder the package has another name
TRIGGER = "paddlenlp.transformers"
TASKS = ("Model", "ForCausalLM", "ForSequenceClassification")


def register_when_needed() -> None:
    """Register now if PaddleNLP's model library is loaded, otherwise right after somebody loads it."""
    if TRIGGER in sys.modules and hasattr(sys.modules[TRIGGER], "AutoConfig"):
        register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the trigger module as usual, and has `register` run once it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != TRIGGER:
            return None
        sys.meta_path.remove(self)  # before looking further, or we would find ourselves
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module):
                load(module)
                register()

            spec.loader.exec_module = load_and_register
        return spec


def register() -> None:
    """Make AutoConfig, AutoModel, AutoModelForCausalLM, ...SequenceClassification and AutoTokenizer know Aquila.

    By names only: our own modules are imported when an Auto class resolves one, so this may run while one of them
    is itself being imported.
    """
    from paddlenlp.transformers.auto import configuration, modeling, tokenizer

    configuration.CONFIG_MAPPING_NAMES["aquila"] = "AquilaConfig"
    tokenizer.TOKENIZER_MAPPING_NAMES["aquila"] = "AquilaTokenizer"
    tokenizer.TOKENIZER_MAPPING._reverse_config_mapping["AquilaConfig"] = "aquila"

    # AutoModel*: "AquilaForCausalLM" in config.json -> key "Aquila" -> module paddlenlp.transformers.aquila.modeling
    modeling.MAPPING_NAMES["Aquila"] = "aquila"
    for task in TASKS:
        auto_class = getattr(modeling, f"Auto{task}" if task == "Model" else f"AutoModel{task}")
        auto_class._name_mapping["AquilaModel_Import_Class"] = f"Aquila{task}"
        auto_class._name_mapping[f"Aquila{task}"] = "aquila"
    _stand_in_package()


def _stand_in_package() -> None:
    """paddlenlp.transformers.aquila, whose parts are our modules, imported when first asked for.

    Where a converted folder's own modules came first, they stay: two copies of a class would not know each other.
    """
    if "paddlenlp.transformers.aquila" in sys.modules:
        return
    package = _LazyModule("paddlenlp.transformers.aquila", "tokenizer")
    package.__path__ = []  # a package: its submodules are then looked up in sys.modules
    sys.modules[package.__name__] = package
    for part in ("configuration", "modeling", "tokenizer"):
        stand_in = _LazyModule(f"{package.__name__}.{part}", part)
        setattr(package, part, stand_in)
        sys.modules[stand_in.__name__] = stand_in


class _LazyModule(types.ModuleType):
    """Looks like a module of this package, and imports it at the first attribute."""

    def __init__(self, name: str, part: str):
        super().__init__(name)
        self._part = part

    def __getattr__(self, name: str):
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        return getattr(importlib.import_module(f"{PACKAGE}.{self._part}"), name)
