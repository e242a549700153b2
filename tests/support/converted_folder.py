"""Running code in a converted folder, in a process of its own, where the package is not to be had."""

import functools
import os
import subprocess
import sys
from pathlib import Path

from fork_server import ForkServer

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


@functools.cache
def base_library() -> ForkServer:
    """A process that has loaded PaddleNLP and nothing of ours; for the whole session."""
    return ForkServer(("paddle", "paddlenlp.transformers"))


def run(code: str, folder: Path) -> str:
    """What code prints in the folder, in a process that has loaded PaddleNLP alone."""
    return _printed(base_library().run(["-c", code], cwd=folder, env=_environment()))


def run_in_new_process(code: str, folder: Path) -> str:
    """What code prints in the folder, in a process that has loaded nothing."""
    command = [sys.executable, "-c", code]
    return _printed(subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True))


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}


def _printed(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout
