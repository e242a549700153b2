"""Several processes on this machine (gloo): the same curve as one, and resumed after SIGKILL to the last digit.

Ranks are forks of a process that has loaded paddle; those of the last test are started as the command starts them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fork_server import Forked, warm
from paths import SUPPORT
from sft_factory import random_samples, stage
from sft_factory import run as run_here
from twins import assert_close

from aquila_pd.sft.run import launch
from aquila_pd.sft.run.launch import run_together

RANK = SUPPORT / "sft_rank.py"
ROUNDING = 5e-6  # float32 sums in another order; losses near 4.6


def warm_rank(command: list[str], *, env, stdout, stderr, start_new_session: bool, **unused) -> Forked:
    """A rank as launch starts it, forked from a warm process. Unused: its parent's death, the run folder's lock."""
    errors = stdout if stderr == subprocess.STDOUT else stderr
    return warm().start(command[1:], env=env, stdout=stdout, stderr=errors, start_new_session=start_new_session)


def run_ranks(command: list[str], processes: int, *, logs: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "subprocess", SimpleNamespace(Popen=warm_rank, STDOUT=subprocess.STDOUT))
        return run_together(command, processes, on_gpus=False, logs=logs)


def run_two(folder: Path, *, status: int = 0, processes: int = 2, **settings) -> dict | None:
    """Run ranks over a folder; what rank 0 wrote down, None when it was killed."""
    random_samples(folder.parent / "samples")
    output = folder.parent / f"{folder.name}.json"
    output.unlink(missing_ok=True)
    command = [sys.executable, str(RANK), str(folder), str(output), json.dumps(settings)]
    found = run_ranks(command, processes, logs=folder.parent / "logs")
    logs = "\n".join(path.read_text(errors="replace") for path in (folder.parent / "logs").iterdir())
    assert found == status, logs
    return json.loads(output.read_text()) if output.exists() else None


@pytest.fixture(autouse=True)
def _imports_and_patience(monkeypatch):
    paths = [str(RANK.parent), str(RANK.parent.parent)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr(launch, "PATIENCE", 1.0)


@pytest.mark.parametrize(
    ("sharding", "settings"),
    [("none", dict(recompute=True)), ("stage1", dict(method="full")), ("none", dict(method="lora"))],
    ids=str,
)
def test_two_processes_have_the_curve_of_one(tmp_path, sharding, settings):
    alone = run_here(tmp_path / "one", stage(max_steps=8, **settings))
    both = run_two(tmp_path / "two", max_steps=8, micro_batch=2, sharding=sharding, **settings)
    steps, losses, norms = (np.array(column) for column in zip(*both["steps"], strict=True))
    assert steps.tolist() == list(range(1, 9))
    assert_close(losses, np.array(alone.losses), ROUNDING)
    assert_close(norms, np.array([record.grad_norm for record in alone.steps]), 2e-5)


@pytest.mark.parametrize(
    ("sharding", "settings"),
    [
        ("stage1", dict(method="full")),
        ("stage1", dict(method="lora", dropout=0.1)),
        ("none", dict(method="qlora", dropout=0.1)),
    ],
    ids=str,
)
def test_two_processes_resume_after_sigkill_to_the_last_digit(tmp_path, sharding, settings):
    settings |= dict(max_steps=9, micro_batch=2, sharding=sharding, neftune=5.0)
    whole = run_two(tmp_path / "whole", **settings)
    assert run_two(tmp_path / "broken", status=128 + 9, kill_after=5, **settings) is None
    rest = run_two(tmp_path / "broken", resume=True, **settings)
    assert rest["steps"] == whole["steps"][3:]


def test_one_process_resumes_after_sigkill_in_the_middle_of_a_checkpoint(tmp_path):
    """Killed behind the record of step 6, whose checkpoint is then not begun; then of a damaged newest one."""
    settings = dict(max_steps=9, micro_batch=4)
    whole = run_two(tmp_path / "whole", processes=1, **settings)
    run_two(tmp_path / "broken", processes=1, status=128 + 9, kill_after=8, **settings)
    newest = tmp_path / "broken" / "checkpoints" / "step-00000006" / "weights-00001.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    rest = run_two(tmp_path / "broken", processes=1, resume=True, **settings)
    assert "The checkpoint of step 6 is damaged" in rest["said"][0]
    assert rest["steps"] == whole["steps"][3:]


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    settings = dict(max_steps=9, sharding="stage1")
    whole = run_two(tmp_path / "whole", micro_batch=2, **settings)
    run_two(tmp_path / "broken", status=128 + 9, kill_after=5, micro_batch=2, **settings)
    rest = run_two(tmp_path / "broken", processes=1, resume=True, micro_batch=8, max_steps=9)
    assert_close(np.array(rest["steps"]), np.array(whole["steps"][3:]), 2e-5)


GRADIENTS = """
import sys
import numpy as np, paddle, paddle.distributed as dist, twins
from lora_twins import our_loss, spec
from aquila_pd.quantization.nf4 import quantize_model
from aquila_pd.adapters.lora import adapter_state, attach
from aquila_pd.sft.run.launch import leave

dist.parallel._global_parallel_env = None  # in a fork of a warm process: read there
dist.init_parallel_env()
rank = dist.get_rank()
_, model = twins.pair()
quantize_model(model, ("q_proj", "up_proj"))
paddle.seed(rank)  # other adapters on each rank: DataParallel takes those of rank 0
attach(model, spec(dora=True, targets=("q_proj", "v_proj", "up_proj")))
for parameter in adapter_state(model).values():
    parameter.set_value(parameter + 0.1 * paddle.randn(parameter.shape))
model.train()
wrapped = paddle.DataParallel(model)
our_loss(wrapped, twins.ids(rows=4)[2 * rank : 2 * rank + 2]).backward()
both = {name: p.grad.numpy() for name, p in adapter_state(model).items()}
model.clear_gradients()
our_loss(model, twins.ids(rows=4)).backward()  # not through the wrapper: all rows on each rank
for name, parameter in adapter_state(model).items():
    alone = parameter.grad.numpy()
    assert np.abs(alone).max() > 0, name
    twins.assert_close(both[name], alone, 1e-5 * np.abs(alone).max() + 1e-8, name)
print("equal", flush=True)
leave(0)
"""


def test_two_processes_have_the_gradients_of_one(tmp_path, capfd):
    """DoRA on quantized layers through paddle.DataParallel."""
    (tmp_path / "rank.py").write_text(GRADIENTS)
    assert run_ranks([sys.executable, str(tmp_path / "rank.py")], 2, logs=tmp_path) == 0
    said = capfd.readouterr().out + (tmp_path / "rank-1.log").read_text()
    assert said.count("equal") == 2, said


def test_when_one_process_fails_the_others_are_ended_and_its_words_are_named(tmp_path, capfd):
    code = (
        "import os, sys, time; rank = os.environ['PADDLE_TRAINER_ID']; sys.exit(3) if rank == '1' else time.sleep(60)"
    )
    assert run_together([sys.executable, "-c", code], 2, on_gpus=False, logs=tmp_path) == 3
    assert f"Rank 1 failed; what it said is in {tmp_path / 'rank-1.log'}" in capfd.readouterr().err


def test_the_command_trains_stages_with_and_without_sharding_on_two_processes(tmp_path, monkeypatch, capfd):
    """Fleet's groups are made before the first stage, which wants none, and are there for the second."""
    from chat_factory import tiny_chat_folder

    from aquila_pd.cli import main

    tiny_chat_folder(tmp_path / "model", "aquila-v1")
    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It is said."}]
    rows = ({"id": i, "conversations": [*turns, {"from": "human", "value": f"{i}"}, turns[1]]} for i in range(40))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        "model: model\noutput: run\n"
        "defaults: {length: 128, global_batch: 4, max_steps: 3, data: {train: {files: rows.jsonl}}}\n"
        "stages: [{name: one}, {name: two, sharding: stage1, recompute: true}, {name: three, method: lora}]\n"
    )
    assert main(["sft", str(tmp_path / "recipe.yaml"), "output=" + str(tmp_path / "alone")]) == 0
    assert main(["sft", str(tmp_path / "recipe.yaml"), "--processes", "2"]) == 0, capfd.readouterr().err

    def losses(run: str) -> list[float]:
        lines = map(json.loads, (tmp_path / run / "log.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["kind"] == "step" and line["stage"] != "three"]

    assert len(losses("run")) == 6
    assert_close(np.array(losses("run")), np.array(losses("alone")), ROUNDING)
