"""Running code in a converted folder, in a process of its own, where the package is not to be had."""

import os
import subprocess
import sys
from pathlib import Path

WITHOUT_THE_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "aquila_pd":
            raise ModuleNotFoundError("No module named 'aquila_pd'", name="aquila_pd")
sys.meta_path.insert(0, Absent())
sys.path.insert(0, "")
path = "."
"""


def run(code: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
