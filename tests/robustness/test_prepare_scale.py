"""Preparing many rows: by several processes, one of which may be killed, in memory that does not grow with them."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from chat_factory import write_aquila_tokenizer
from effort import tries
from fork_server import warm
from paths import IMPORTED

from aquila_pd import AquilaTokenizer
from aquila_pd.data import encoding
from aquila_pd.data.packing import plan_epoch
from aquila_pd.data.prepare import prepare
from aquila_pd.data.samples import RECORD, Samples
from aquila_pd.data.settings import DataSpec, Source
from aquila_pd.text.prompts import ChatPrompts
from aquila_pd.utils.errors import DataError


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    return write_aquila_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def prompts(tokenizer_folder) -> ChatPrompts:
    return ChatPrompts(AquilaTokenizer.from_pretrained(str(tokenizer_folder)), "aquila-v1")


def write_rows(path: Path, answers: list[str]) -> Path:
    """A file of rows of one question and one answer each."""
    with path.open("w", encoding="utf-8") as out:
        for i, answer in enumerate(answers):
            turns = [{"from": "human", "value": f"question {i}?"}, {"from": "gpt", "value": f"a{i} {answer}"}]
            out.write(json.dumps({"conversations": turns}) + "\n")
    return path


def made(folder: Path, file: Path, prompts: ChatPrompts, *, workers: int, **more) -> dict[str, bytes]:
    """What preparing the file leaves in the folder."""
    spec = DataSpec(train=(Source((str(file),)),), **more)
    prepare(spec, prompts, length=100, seed=3, folder=folder, workers=workers)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --------------------------------------------------------------------------------------------- several processes


@pytest.fixture
def warm_workers(monkeypatch):
    """Processes that encode are forks of one that has loaded PaddleNLP, where the command starts new ones."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["aquila_pd.data.encoding", "aquila_pd.tokenizer"])
    asked = []
    monkeypatch.setattr(encoding, "get_context", lambda how: (asked.append(how), context)[1])
    monkeypatch.setattr(encoding, "ALONE", 1)
    monkeypatch.setattr(encoding, "BATCH", 8)
    yield
    assert set(asked) == {"spawn"}


def test_any_number_of_processes_makes_the_same_bytes(tmp_path, prompts, warm_workers):
    file = write_rows(tmp_path / "a.jsonl", ["word " * (i % 17) for i in range(300)])
    written = [made(tmp_path / f"{n}", file, prompts, workers=n, held_out=0.1) for n in (1, 2, 3)]
    assert written[0] == written[1] == written[2]


def be_killed(*unused: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_an_error_and_not_a_wait(tmp_path, prompts, warm_workers, monkeypatch):
    monkeypatch.setattr(encoding, "_begin", be_killed)
    file = write_rows(tmp_path / "a.jsonl", ["word"] * 100)
    with pytest.raises(DataError, match="was killed"):
        made(tmp_path / "out", file, prompts, workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# -------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import re, sys
from pathlib import Path
from aquila_pd import AquilaTokenizer
from aquila_pd.text.prompts import ChatPrompts
from aquila_pd.data import prepare as module, samples
from aquila_pd.data.settings import DataSpec, Source

tokenizer, file, out, keep = sys.argv[1:]
if keep:
    kept, add = [], samples.SamplesWriter.add
    samples.SamplesWriter.add = lambda self, *sample, **more: (kept.append(sample), add(self, *sample, **more))
prompts = ChatPrompts(AquilaTokenizer.from_pretrained(tokenizer), "aquila-v1")
module.prepare(DataSpec(train=(Source((file,)),)), prompts, length=128, seed=0, folder=Path(out), workers=1)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])  # the most it had at any time
"""
FEW, MANY = tries(3_000, 10_000), tries(24_000, 100_000)
BOUND = tries(4_000, 12_000)  # kB; the samples alone have 0.23 for each row, their texts 0.09


def peak(folder: Path, tokenizer: Path, rows: int, *, keep: str = "") -> int:
    """kB of a process at its peak; keep: it holds all samples, as it must not."""
    file = write_rows(folder / f"{rows}.jsonl", ["x" * 40] * rows)
    words = ["-c", MEASURE, tokenizer, file, folder / f"out-{rows}{keep}", keep]
    done = warm().run(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(IMPORTED)}, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_many_times_the_rows_cost_no_more_memory(tmp_path, tokenizer_folder):
    """But for the digests of rows that have been seen, of which an exact search for duplicates needs all."""
    few, many = (peak(tmp_path, tokenizer_folder, rows) for rows in (FEW, MANY))
    assert len(Samples.open(tmp_path / f"out-{MANY}" / "train")) == MANY
    assert many - few < BOUND
    assert peak(tmp_path, tokenizer_folder, MANY, keep="keep") - few > 3 * BOUND, "control: samples that are held"


def test_hundreds_of_thousands_of_samples_are_packed(tmp_path):
    """Lengths as rows of conversations have them: most short, a few very long."""
    count = tries(200_000, 1_000_000)
    lengths = np.clip(np.random.default_rng(1).lognormal(5.4, 1.0, count), 8, 4096).astype(np.int64)
    made = np.zeros(count, RECORD)
    made["row"], made["weight"] = np.arange(count) + 1, 1.0
    made["length"] = made["targets"] = lengths

    class Made:
        folder, digest, manifest, records = tmp_path, "made", {"longest": 4096}, made
        __len__ = lambda self: len(lengths)  # noqa: E731

    plan = plan_epoch(Made(), length=4096, seed=0, epoch=0, folder=tmp_path)
    assert plan.padding_share < 0.002
    assert np.array_equal(np.sort(plan._members), np.arange(len(lengths)))
