"""Sizes, counts and durations: parsed from options, formatted for messages."""

import re

from .errors import ConfigError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
LARGEST = 10**15  # bytes; beyond is a slip of the finger


def parse_size(text: str | int) -> int:
    """Bytes of "5GB" (decimal, as Hugging Face counts), "500MB", "2GiB" or a plain number. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMGT]?i?B)?)\s*", str(text), re.IGNORECASE)
    unit = (match[2].upper() or "B") if match else ""
    if unit not in UNITS or not 1 <= float(match[1]) * UNITS[unit] <= LARGEST:
        raise ConfigError(f"The size {text!r} cannot be read. Write a number and a unit, such as 5GB, 500MB or 2GiB.")
    return int(float(match[1]) * UNITS[unit])


def counted(number: int, what: str) -> str:
    """A number and its noun: 1 tensor, 1,234 tensors."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def megabytes(nbytes: int) -> str:
    """Bytes in decimal units: 2.69 GB, 12.3 MB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds in the largest two units: 8 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
