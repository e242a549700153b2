"""Memory in use by this process on its device."""

import os
import sys
from collections.abc import Callable

MIB = 1 << 20


def memory_reader(device: str) -> Callable[[], dict[str, float]]:
    """A function that says how many MiB are held, by kind.

    device: as paddle.get_device() names it. On a GPU {"peak", "reserved"}: the most ever allocated there, and what the
    process keeps from others. Elsewhere {"resident"}: of the process in the machine's memory.
    """
    if not device.startswith("gpu"):
        return lambda: {"resident": resident() / MIB}
    from paddle.device import cuda

    number = int(device.partition(":")[2] or 0)
    return lambda: {
        "peak": cuda.max_memory_allocated(number) / MIB,
        "reserved": cuda.max_memory_reserved(number) / MIB,
    }


def resident() -> int:
    """Bytes of this process in memory now; the most there ever were where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
