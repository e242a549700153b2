"""Runs of `aquila-pd sft` for tests: rows and recipes written to disk, the command as a user calls it, what it left."""

import contextlib
import hashlib
import io
import json
import random
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

from aquila_pd import cli

WORDS = "Hello please introduce yourself the quick brown fox jumps over lazy dog human curious 你好 北京 天气 首都 🙂"
SAME_EACH_TIME = ("loss", "lr", "grad_norm", "epoch", "steps", "valid_tokens", "tokens", "positions")


# ------------------------------------------------------------------------------------------- rows and recipes


def words(rng: random.Random, least: int = 2, most: int = 7) -> str:
    return " ".join(rng.choice(WORDS.split()) for _ in range(rng.randint(least, most)))


def rows(count: int, *, seed: int) -> list[dict]:
    """Conversations of one or two questions with their answers, no two the same."""
    rng = random.Random(seed)
    return [
        {"id": i, "conversations": [turn(("human", "gpt")[k % 2], words(rng)) for k in range(2 * rng.randint(1, 2))]}
        for i in range(count)
    ]


def turn(who: str, text: str) -> dict:
    return {"from": who, "value": text}


def write_rows(file: Path, found: list) -> Path:
    """JSON lines; a text is a line as it stands."""
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in found)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def stage(name: str, files: Path, **more) -> dict:
    """A stage as a recipe holds it; `data` adds to the files."""
    return {"name": name, "data": {"train": {"files": str(files)}, **more.pop("data", {})}, **more}


def write_recipe(file: Path, stages: list[dict], **more) -> Path:
    """A recipe of small packs; JSON is YAML. more: keys of the recipe, `defaults` added to those here."""
    small = dict(length=256, global_batch=2, micro_batch=1, dtype="float32", optim={"lr": 3e-3, "warmup_steps": 1})
    defaults = {**small, **more.pop("defaults", {})}
    file.write_text(json.dumps({"seed": 5, "output": "run", **more, "defaults": defaults, "stages": stages}))
    return file


# ------------------------------------------------------------------------------------------------ the command


class Outcome(NamedTuple):
    """What a command ended with and said."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        return self.out + self.err


def call(*arguments: object) -> Outcome:
    """`aquila-pd ARGUMENTS` in this process; what it raises is printed as Python would, with status 1."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:
            traceback.print_exc()
            status = 1
    return Outcome(status, out.getvalue(), err.getvalue())


def sft(*arguments: object) -> Outcome:
    return call("sft", *arguments, *([] if "--help" in arguments else ["--threads", 1, "--workers", 1]))


def trained(*arguments: object) -> Outcome:
    """A run that has to end well."""
    outcome = sft(*arguments)
    assert outcome.status == 0, outcome.message
    return outcome


def refused(outcome: Outcome, *said: str, status: int = 1) -> str:
    """Check that a command ended with one message for people, in which all of `said` is; the message."""
    assert outcome.status == status, outcome.message
    assert "Traceback" not in outcome.message, outcome.message
    assert outcome.err.strip(), "nothing was said on stderr"
    for text in said:
        assert text in outcome.err, f"{text!r} is not in:\n{outcome.err}"
    return outcome.err


# ------------------------------------------------------------------------------------------ what a run has left


def records(run: Path, kind: str = "step") -> list[dict]:
    """Records of one kind in a run's log, in order; a line that is no JSON fails."""
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [record for record in found if record["kind"] == kind]


def curve(run: Path) -> dict[tuple[str, int], tuple]:
    """(stage, step) -> everything of a step's record that does not depend on the clock; a step logged twice fails."""
    found: dict[tuple[str, int], tuple] = {}
    for record in records(run):
        step = record["stage"], record["step"]
        assert step not in found, f"step {step} is in the log twice"
        found[step] = tuple(record[name] for name in SAME_EACH_TIME)
    return found


def evaluations(run: Path) -> list[tuple]:
    return [(one["stage"], one["step"], one["loss"], one["tokens"], one.get("best")) for one in records(run, "eval")]


def losses(run: Path, name: str) -> list[float]:
    return [record["loss"] for record in records(run) if record["stage"] == name]


def manifest(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of the safetensors files of a folder."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    assert found, f"{folder} holds no tensors"
    return found


def weights_of(run: Path) -> dict[str, str]:
    """Name -> digest of every tensor of all results of a run and of its model."""
    return {
        f"{folder.relative_to(run)}/{name}": hashlib.sha256(value.tobytes()).hexdigest()
        for folder in sorted([*run.glob("stages/*/result"), *run.glob("model")])
        for name, value in tensors(folder).items()
    }


def tree(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file below a folder, locks aside, with its time and digest: what must not change."""
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "run.lock"
    }


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def distance(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> float:
    """The largest difference of two folders of the same tensors."""
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name].astype("float64") - right[name]).max()) for name in left)


# ----------------------------------------------------------------------------------- another judge of the loss


def loss_of(folder: Path, file: Path, template: str, work: Path) -> float:
    """The mean loss over all answers in a file of rows, by transformers on the folder brought back to torch."""
    import torch
    from transformers import AutoModelForCausalLM

    from aquila_pd.data.targets import encode_conversation
    from aquila_pd.text.prompts import ChatPrompts
    from aquila_pd.tokenizer import AquilaTokenizer

    outcome = call("to-torch", "--input", folder, "--output", work, "--overwrite")
    assert outcome.status == 0, outcome.message
    model = AutoModelForCausalLM.from_pretrained(work, torch_dtype=torch.float32).eval()
    tokenizer = AquilaTokenizer.from_pretrained(str(folder))
    prompts = ChatPrompts(tokenizer, template)
    total = count = 0.0
    for messages in messages_in(file):
        ids, is_target = encode_conversation(prompts, messages)
        with torch.no_grad():
            scores = model(torch.tensor(np.asarray(ids)[None].astype("int64"))).logits[0, :-1].double().log_softmax(-1)
        for place in np.flatnonzero(np.asarray(is_target)[1:]):
            total -= float(scores[place, int(ids[place + 1])])
            count += 1
    return total / count


def messages_in(file: Path) -> Iterator[list[dict]]:
    roles = {"human": "user", "gpt": "assistant"}
    for line in file.read_text(encoding="utf-8").splitlines():
        turns = json.loads(line)["conversations"]
        yield [{"role": roles[one["from"]], "content": one["value"]} for one in turns]
