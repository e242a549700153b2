"""Memory of a training step on a CPU is about what is estimated before a run, measured in a process of its own."""

import pytest
from fork_server import warm
from paths import ROOT

from aquila_pd.ops import cpu_training
from aquila_pd.sft.estimate.memory import BLOCK, Dims, activations, in_flight, logits

MEASURED = """
import re, sys
from pathlib import Path
import aquila_pd, numpy as np, paddle
from aquila_pd import AquilaConfig, AquilaForCausalLM
from aquila_pd.sft.logs.memory import resident
from aquila_pd.sft.loop.loss import SummedLoss

again, length = sys.argv[1] == "again", int(sys.argv[2])
config = AquilaConfig(vocab_size=2000, hidden_size=256, intermediate_size=700, num_hidden_layers=12,
                      num_attention_heads=4, num_key_value_heads=4)
model = AquilaForCausalLM(config)
model.train()
model.aquila.enable_recompute = again
loss = SummedLoss(model)
ids = paddle.to_tensor(np.arange(length)[None] % 2000)
rows = (ids, ids, paddle.arange(length)[None], paddle.ones([1, length], "int64"))
loss(*(row[:, :16] for row in rows)).backward()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident()
loss(*rows).backward()
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(int(peak) * 1024 - before)
"""


@pytest.mark.parametrize("again", [False, True])
def test_a_process_on_a_cpu_holds_about_what_is_estimated(again):
    """25 %: the allocator rounds up and keeps; gradients are there before the step that is watched."""
    length, dims = 1024, Dims(vocab=2000, d=256, q=256, kv=256, ff=700, layers=12)
    done = warm().run(["-c", MEASURED, "again" if again else "once", length], cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    held = activations(dims, length, half=False, again=again, fused=False)
    held += logits(dims, length, half=False) + in_flight(dims, 4, length)
    assert cpu_training.BLOCK == BLOCK
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(held, rel=0.25)
