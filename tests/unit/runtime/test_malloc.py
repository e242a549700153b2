"""Memory that was freed is not faulted in again."""

import subprocess
import sys

from paths import ROOT

COUNTED = """
import ctypes, resource
from aquila_pd.runtime.malloc import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        block = libc.malloc(64 << 20)
        libc.memset(block, 1, 64 << 20)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

one = (64 << 20) // resource.getpagesize()
assert faults() >= 5 * one or not hasattr(libc, "mallopt"), "the control: each time all pages"
if keep_freed_memory():
    assert faults() < 2 * one, "the first time only"
"""


def test_freed_memory_stays_with_the_process():
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
