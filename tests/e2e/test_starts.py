"""What a process has to start for: doctor's whole report, and the order in which a program imports."""

import json
import subprocess
import sys

from fork_server import warm
from twins import paddle_model, torch_model


def test_doctor_here_is_sound_and_its_json_is_json():
    done = warm().run(["-m", "aquila_pd.cli", "doctor", "--json"], timeout=300)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["sound"], done.stdout + done.stderr
    assert {one["operation"] for one in found["fusions"]} >= {"rms_norm", "rope", "swiglu", "attention"}
    assert all(one["reason"] for one in found["fusions"])
    assert "GFLOP/s" in " ".join(found["machine"])


def test_registration_works_when_paddlenlp_was_there_first(tmp_path):
    """The other order is that of every test: conftest.py imports the package."""
    paddle_model(torch_model()).save_pretrained(tmp_path / "model")
    code = (
        "import paddlenlp.transformers, aquila_pd\n"
        "from paddlenlp.transformers import AutoConfig, AutoModelForCausalLM\n"
        f"print(type(AutoConfig.from_pretrained({str(tmp_path / 'model')!r})).__name__,"
        f" type(AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r})).__module__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split()[-2:] == ["AquilaConfig", "aquila_pd.modeling"], run.stderr
