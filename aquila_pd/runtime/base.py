"""The base library, PaddleNLP: every name this project takes from it, and how its Auto classes learn about Aquila.

The only module that imports paddlenlp; a second base library gets a module beside it with the same names. Names are
resolved when first used, since the library takes seconds to import and each part needs few of them.
"""

import importlib
import sys
import types

LIBRARY = "paddlenlp"
MODELS = f"{LIBRARY}.transformers"  # once this is loaded, the Auto classes are there to register with

_TAKEN = {
    MODELS: ("PretrainedConfig", "PretrainedModel", "PretrainedTokenizer", "register_base_model"),
    f"{MODELS}.model_outputs": (
        "BaseModelOutputWithPast",
        "CausalLMOutputWithCrossAttentions",
        "SequenceClassifierOutputWithPast",
    ),
    f"{MODELS}.model_utils": ("dtype_guard", "no_init_weights"),
    f"{MODELS}.conversion_utils": ("StateDictNameMapping",),
    f"{MODELS}.tokenizer_utils": ("ChatTemplate",),
    f"{MODELS}.tokenizer_utils_base": ("BatchEncoding", "PaddingStrategy", "TruncationStrategy", "to_py_obj"),
    f"{LIBRARY}.generation": ("GenerationConfig", "LogitsProcessor"),
    f"{LIBRARY}.trainer": ("Trainer", "TrainerCallback", "TrainingArguments"),
    f"{LIBRARY}.trainer.trainer": ("TRAINER_STATE_NAME",),
    f"{LIBRARY}.utils.log": ("logger",),
}
_WHERE = {name: module for module, names in _TAKEN.items() for name in names}
__all__ = sorted(_WHERE)

TASKS = ("Model", "ForCausalLM", "ForSequenceClassification")


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def log_warnings_only() -> None:
    """Silence the library's progress messages; warnings stay."""
    importlib.import_module(_WHERE["logger"]).logger.set_level("WARNING")


# -------------------------------------------------------------------------------------------------- Auto classes


def register(package: str) -> None:
    """Make AutoConfig, AutoModel, AutoModelForCausalLM, ...SequenceClassification and AutoTokenizer know Aquila.

    package: the name under which our own modules are imported; in a converted folder it is another. By names only: they
    are imported when an Auto class resolves one, so this may run while one of them is itself being imported.

    PaddleNLP has a public `register` for configs and tokenizers and none for models, so the tables below are its
    internals; versions.py pins the release they were read in, and a test loads through every Auto class.
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
    _add_stand_in_package(package)


def _add_stand_in_package(package: str) -> None:
    """Register paddlenlp.transformers.aquila, whose submodules resolve to ours on first use.

    A converted folder's own modules that came first stay: two copies of a class would not know each other.
    """
    name = f"{MODELS}.aquila"
    if name in sys.modules:
        return
    stand_in = _LazyModule(name, f"{package}.tokenizer")
    stand_in.__path__ = []  # a package: its submodules are then looked up in sys.modules
    sys.modules[name] = stand_in
    for part in ("configuration", "modeling", "tokenizer"):
        submodule = _LazyModule(f"{name}.{part}", f"{package}.{part}")
        setattr(stand_in, part, submodule)
        sys.modules[submodule.__name__] = submodule


class _LazyModule(types.ModuleType):
    """Module under one name that imports another at the first attribute."""

    def __init__(self, name: str, target: str):
        super().__init__(name)
        self._target = target

    def __getattr__(self, name: str):
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)
        return getattr(importlib.import_module(self._target), name)
