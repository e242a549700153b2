#!/usr/bin/env python
"""Convert a Paddle checkpoint back into a Hugging Face folder. --help tells the options."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("aquila_pd") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aquila_pd.checkpoint.command import to_torch

if __name__ == "__main__":
    sys.exit(to_torch())
