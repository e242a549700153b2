"""What has to happen before paddle is loaded, done once by importing this module.

The package imports it first, and so does modeling.py, for a converted folder that carries only flat modules.
"""

from .processor import prefer_avx2_kernels
from .registration import register_when_needed

prefer_avx2_kernels()
register_when_needed()
READY = True
