"""Aquila2 and AquilaChat2 in Hugging Face's form (and AquilaChat-7B of the first generation as republished there)."""

from . import llama
from .base import Family

# The upstream config class inherits LLaMA's defaults, which no published checkpoint has (eps 1e-6, bos 1, eos 2).
# They hold for keys a config.json leaves out all the same, since that is what the reference computes with.
DEFAULTS = {**llama.DEFAULTS, "pad_token_id": 0}

FAMILY = Family(
    name="aquila",
    recognises=lambda config: config.get("model_type") == "aquila",
    read=llama.READ,
    defaults=DEFAULTS,
    neutral=llama.NEUTRAL,
    ignored=llama.IGNORED,
    complete=llama.complete,
)
