"""Which matrix kernels Paddle's bundled MKL picks on this processor. Standard library only.

Not here: anything that needs Paddle, and any measuring (aquila_pd.doctor measures).
"""

import logging
import os
import platform
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "MKL_DEBUG_CPU_TYPE"
AVX2 = "5"  # the AVX2 code path, in the numbering of the MKL that Paddle bundles
FIRST_BLOCK = 16_384  # bytes of /proc/cpuinfo: the first processor takes 2 to 4 thousand, a hundred more follow it
CPUINFO = Path("/proc/cpuinfo")

log = logging.getLogger("aquila_pd")


@dataclass(frozen=True)
class Decision:
    """What was done about the matrix kernels. action: "set" or "left alone"; reason: one sentence."""

    action: str
    reason: str


_last: Decision | None = None


def first_block(path: Path = CPUINFO) -> str:
    """The part of /proc/cpuinfo that describes the first processor; "" where there is none."""
    try:
        with path.open("rb") as file:
            text = file.read(FIRST_BLOCK).decode("utf-8", "replace")
    except OSError:
        return ""
    return text.partition("\n\n")[0]


def decide(cpuinfo: str, *, machine: str, chosen: str | None, paddle_loaded: bool) -> Decision:
    """Whether MKL must be told to take its AVX2 path.

    MKL chooses by vendor string first: whatever does not call itself GenuineIntel gets the oldest kernels. So the
    question is the instruction set (avx2 and fma), asked only of processors that MKL will not ask itself.
    cpuinfo: text of one block of /proc/cpuinfo; machine: platform.machine(); chosen: the variable as the user left it.
    """
    if chosen is not None:
        return Decision("left alone", f"{VARIABLE}={chosen!r} was already in the environment.")
    if machine.lower() not in ("x86_64", "amd64"):
        return Decision("left alone", f"The machine is {machine or 'unknown'}; the setting is for x86-64 only.")
    fields = dict(_field(line) for line in cpuinfo.splitlines() if ":" in line)
    vendor, flags = fields.get("vendor_id", ""), set(fields.get("flags", "").split())
    if not vendor:
        return Decision("left alone", "This system has no /proc/cpuinfo to ask for the processor's instruction sets.")
    if vendor == "GenuineIntel":
        return Decision("left alone", "MKL recognises GenuineIntel processors and picks its kernels itself.")
    if not {"avx2", "fma"} <= flags:
        return Decision("left alone", f"The processor ({vendor}) has no AVX2 with FMA.")
    if paddle_loaded:
        advice = f"set {VARIABLE}={AVX2} in the environment, or import aquila_pd before paddle, for faster matrices"
        return Decision("left alone", f"Paddle was loaded first and MKL has chosen its kernels: {advice}.")
    return Decision("set", f"{VARIABLE}={AVX2}: the processor ({vendor}) has AVX2 and FMA, which MKL would not use.")


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()


def prefer_avx2_kernels(environ: MutableMapping[str, str] = os.environ) -> Decision:
    """Tell MKL to use AVX2 on a processor that has it and is not asked; must run before Paddle is loaded.

    Sets MKL_DEBUG_CPU_TYPE in environ at most once, logs the decision at info level, and never raises.
    A second call changes nothing and returns the first decision.
    """
    global _last
    if _last is None:
        _last = decide(
            first_block(),
            machine=platform.machine(),
            chosen=environ.get(VARIABLE),
            paddle_loaded="paddle" in sys.modules,
        )
        if _last.action == "set":
            environ[VARIABLE] = AVX2
        log.info("Matrix kernels %s. %s", _last.action, _last.reason)
    return _last


def last_decision() -> Decision | None:
    """The decision prefer_avx2_kernels took in this process, or None when it has not run."""
    return _last
