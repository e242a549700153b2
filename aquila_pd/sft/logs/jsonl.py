"""log.jsonl: every record of a run as JSON Lines, for programs.

Each line names its kind ("stage", "step", "eval", "saved", "said"), its stage and its step. A run that goes on from a
checkpoint cuts off what was written after it, so that every step is there once, as if nothing had happened.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...utils.errors import TrainingError

NAME = "log.jsonl"


class JsonLines:
    """Appends records. Each line goes to the system at once: a process that is killed loses none, and tears one."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, record: Mapping) -> None:
        line = json.dumps({"kind": kind, **{key: _plain(value) for key, value in record.items()}}, ensure_ascii=False)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> Iterator[dict]:
    """The records of a log, in order, without a last line that was torn off. Other damage is a TrainingError."""
    for _, record in _lines(path):
        if record is not None:
            yield record


def cut_log(path: Path, *, stages: Sequence[str], stage: str, step: int) -> list[str]:
    """Cut off what was written after a step of a stage, and a line torn off at the end. What was done, in words.

    stages: the names of all, in order. A log that is not there is one with nothing in it.
    """
    if not path.exists():
        return []
    order = {name: number for number, name in enumerate(("", *stages))}  # "": said before any stage began
    last = (order[stage], step or -1)  # a stage that begins anew writes its first lines again
    keep, later, torn = 0, 0, False
    for end, record in _lines(path):
        if record is None:
            torn = True
        elif later or (order.get(record.get("stage"), len(order)), record.get("step", 0)) > last:
            later += 1
        else:
            keep = end
    if keep < path.stat().st_size:
        os.truncate(path, keep)
    said = [f"{NAME}: its last line was torn off and is gone."] if torn else []
    if later:
        said.append(f"{NAME}: {later:,} lines after step {step:,} of stage {stage} are cut off; that part runs again.")
    return said


def _lines(path: Path) -> Iterator[tuple[int, dict | None]]:
    """(where the line ends, its record) for each line; None for a torn last one."""
    size, end = path.stat().st_size, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            end += len(line)
            record = _parse(line)
            if record is None and end < size:
                raise TrainingError(
                    f"{path}, line {number}, is no record of a run: the file is damaged. Move it away; the run goes on "
                    f"without what it held."
                )
            yield end, record


def _parse(line: bytes) -> dict | None:
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _plain(value: object) -> object:
    """A value as JSON has it: no NaN in there, and numpy's numbers as Python's, with all their digits."""
    if isinstance(value, Mapping):
        return {key: _plain(inside) for key, inside in value.items()}
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
