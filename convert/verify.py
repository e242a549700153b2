#!/usr/bin/env python
"""Prove that a converted folder is the torch checkpoint it was made from. --help tells the options."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("aquila_pd") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aquila_pd.checkpoint.verify.command import main

if __name__ == "__main__":
    sys.exit(main())
