"""Rows to train on, made up for tests, and files of them."""

import gzip
import json
from pathlib import Path

from aquila_pd.data.counters import Counters
from aquila_pd.data.pipeline import Conversation, Findings, conversations
from aquila_pd.data.settings import DataSpec, Source


def chat(*texts: str, **more) -> dict:
    """A row of Infinity-Instruct: texts of human and gpt in turn."""
    turns = [{"from": "gpt" if place % 2 else "human", "value": text} for place, text in enumerate(texts)]
    return {"conversations": turns, **more}


def said(*texts: str) -> list[dict]:
    """The same as messages."""
    return [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)]


def write_lines(file: Path, rows: list) -> Path:
    """JSON lines; packed where the name ends in .gz."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return file


def spec_of(*files: Path, **more) -> DataSpec:
    return DataSpec(train=(Source(tuple(map(str, files))),), **more)


def run(spec: DataSpec, seed: int = 0, **more) -> tuple[list[Conversation], Counters, Findings]:
    """All conversations of a spec, with what was counted and found."""
    counters, findings = Counters(), Findings()
    return list(conversations(spec, seed, counters=counters, findings=findings, **more)), counters, findings
