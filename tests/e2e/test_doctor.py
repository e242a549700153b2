"""doctor's whole report of this installation."""

import json

from fork_server import warm


def test_doctor_here_is_sound_and_its_json_is_json():
    done = warm().run(["-m", "aquila_pd.cli", "doctor", "--json"], timeout=300)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["sound"], done.stdout + done.stderr
    assert {one["operation"] for one in found["fusions"]} >= {"rms_norm", "rope", "swiglu", "attention"}
    assert all(one["reason"] for one in found["fusions"])
    assert "GFLOP/s" in " ".join(found["machine"])
