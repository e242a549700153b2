"""Settings that must precede the import of paddle: MKL path, OpenMP, warnings, Auto classes.

Imported once by the package's __init__, also by the copy in a converted folder.
"""

import logging
import warnings

from .auto_classes import register_when_needed
from .mkl import let_threads_sleep, prefer_fast_kernels


def _leave_out_known_noise() -> None:
    """Lines that paddle's and paddlenlp's imports print on every machine and that call for no action."""
    for message in ("No ccache found", "Setuptools is replacing distutils"):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("datasets").setLevel(logging.WARNING)  # "PyTorch version ... available."


prefer_fast_kernels()
let_threads_sleep()
_leave_out_known_noise()
register_when_needed()
READY = True
