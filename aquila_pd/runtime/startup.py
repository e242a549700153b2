"""What has to happen before paddle is loaded, done once by the package's __init__.

A converted folder carries a copy of the package, so it happens there too.
"""

import logging
import warnings

from .auto_classes import register_when_needed
from .mkl import let_threads_sleep, prefer_fast_kernels


def _leave_out_known_noise() -> None:
    """Lines that paddle's and paddlenlp's imports print on every machine and that nobody can act on."""
    for message in ("No ccache found", "Setuptools is replacing distutils"):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("datasets").setLevel(logging.WARNING)  # "PyTorch version ... available."


prefer_fast_kernels()
let_threads_sleep()
_leave_out_known_noise()
register_when_needed()
READY = True
