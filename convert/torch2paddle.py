#!/usr/bin/env python
"""Convert a torch checkpoint into a folder that PaddleNLP loads. --help tells the options."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("aquila_pd") is None:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aquila_pd.checkpoint.command import main

if __name__ == "__main__":
    sys.exit(main())
