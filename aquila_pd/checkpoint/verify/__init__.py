"""Verification of a converted model against its source: by value, by logits, layer by layer."""

from .content import verify_content
from .logits import check_logits_possible, verify_logits
from .result import Verified

__all__ = ["Verified", "check_logits_possible", "verify_content", "verify_logits"]
