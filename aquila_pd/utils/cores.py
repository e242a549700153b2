"""CPU cores available to this process."""

import os


def count() -> int:
    """The cores in the process's affinity mask, or all of the machine where the system has no such mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
