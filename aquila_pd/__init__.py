"""The Aquila family of language models on PaddlePaddle.

Public names are resolved when first used: importing the package imports neither paddle nor torch. It does prepare
the process (see startup.py): PaddleNLP's Auto classes know Aquila as soon as somebody imports them.
"""

import importlib

from .runtime.startup import READY as _READY  # noqa: F401
from .runtime.versions import VERSION as __version__  # noqa: F401

_WHERE = {
    "AquilaConfig": "configuration",
    "AquilaModel": "modeling",
    "AquilaForCausalLM": "modeling",
    "AquilaForSequenceClassification": "modeling",
    "AquilaPretrainingCriterion": "modeling",
    "AquilaTokenizer": "tokenizer",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'aquila_pd' has no attribute {name!r}")
    from .runtime.versions import require_paddle

    require_paddle()
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
