"""MKL code path (AVX-512 or AVX2) on non-Intel processors, and OpenMP blocktime. Standard library only.

Not here: anything that needs Paddle, and any measuring (aquila_pd.doctor measures).
"""

import logging
import os
import platform
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VARIABLE = "MKL_DEBUG_CPU_TYPE"
# Code paths in the numbering of the MKL that Paddle bundles. What each was compiled for: the best one that a processor
# can run is taken. AVX-512 against AVX2 on a Zen 4: a product of 1 to 16 rows takes 0.65 to 0.85 of the time, of 512
# rows 0.95 (benchmarks/RESULTS.md).
AVX512, AVX2 = "7", "5"
NEEDS = {AVX512: {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}, AVX2: {"avx2", "fma"}}
FIRST_BLOCK = 16_384  # bytes of /proc/cpuinfo: the first processor takes 2 to 4 thousand, a hundred more follow it
CPUINFO = Path("/proc/cpuinfo")

# Of the OpenMP library that Paddle bundles: milliseconds for which a thread without work looks for some before it
# sleeps. Its own 200 keep a core busy that may be half of the working thread's own, or that others could use: with 1 a
# training step takes 0.92 of the time, and decoding no longer (benchmarks/RESULTS.md).
BLOCKTIME, SHORT = "KMP_BLOCKTIME", "1"
WAIT_POLICY = "OMP_WAIT_POLICY"

log = logging.getLogger("aquila_pd")


@dataclass(frozen=True)
class Decision:
    """What was done about the matrix kernels. action: "set" (to value) or "left alone"; reason: one sentence."""

    action: str
    reason: str
    value: str | None = None


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
    """The decision on MKL's code path: whether to set one, and which.

    MKL chooses by vendor string first: whatever does not call itself GenuineIntel gets the oldest kernels. So the
    question is the instruction set, asked only of processors that MKL will not ask itself.
    cpuinfo: text of one block of /proc/cpuinfo; machine: platform.machine(); chosen: the variable as the user left it.
    """
    if chosen is not None:
        return Decision("left alone", f"{VARIABLE}={chosen!r} was already in the environment.")
    if machine.lower() not in ("x86_64", "amd64"):
        return Decision("left alone", f"The machine is {machine or 'unknown'}; the setting is for x86-64 only.")
    vendor, flags = _described(cpuinfo)
    if not vendor:
        return Decision("left alone", "This system has no /proc/cpuinfo to ask for the processor's instruction sets.")
    if vendor == "GenuineIntel":
        return Decision("left alone", "MKL recognises GenuineIntel processors and picks its kernels itself.")
    path = best_path(flags)
    if path is None:
        return Decision("left alone", f"The processor ({vendor}) has no AVX2 with FMA.")
    if paddle_loaded:
        advice = f"set {VARIABLE}={path} in the environment, or import aquila_pd before paddle, for faster matrices"
        return Decision("left alone", f"Paddle was loaded first and MKL has chosen its kernels: {advice}.")
    name = "AVX-512" if path == AVX512 else "AVX2 and FMA"
    return Decision("set", f"{VARIABLE}={path}: the processor ({vendor}) has {name}, which MKL would not use.", path)


def best_path(flags: set[str]) -> str | None:
    """The fastest known MKL path for a processor with these instruction sets, or None."""
    return next((path for path, needed in NEEDS.items() if needed <= flags), None)


@cache
def has_avx512() -> bool:
    """Whether this processor can run what was compiled for AVX-512; False where the system does not tell."""
    return best_path(_described(first_block())[1]) == AVX512


def _described(cpuinfo: str) -> tuple[str, set[str]]:
    """(vendor, instruction sets) of one block of /proc/cpuinfo; "" and none where it does not say."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    fields = {name.strip(): value.strip() for name, colon, value in lines if colon}
    return fields.get("vendor_id", ""), set(fields.get("flags", "").split())


def prefer_fast_kernels(environ: MutableMapping[str, str] = os.environ) -> Decision:
    """Select MKL's AVX-512 or AVX2 path on a processor that supports it and MKL would not ask; before Paddle is loaded.

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
        if _last.value is not None:
            environ[VARIABLE] = _last.value
        log.info("Matrix kernels %s. %s", _last.action, _last.reason)
    return _last


def let_threads_sleep(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set a short OpenMP blocktime unless the user has set a wait policy; before Paddle computes."""
    if WAIT_POLICY not in environ:
        environ.setdefault(BLOCKTIME, SHORT)
