"""Fingerprint of prepared samples: files, settings, template and tokenizer, compared without tokenizing again."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from ..text.prompts import ChatPrompts
from ..tokenization.chat_templates import TEMPLATES
from ..utils.errors import DataError
from ..utils.files import hash_file
from .contamination import CSV
from .pipeline import data_files
from .settings import DataSpec
from .sources import find_files

VERSION = 1  # of the way from files to samples: another one when the same inputs give other samples
FILES = ("files", "benchmarks")
OF_THE_PLACE = ("path", "mtime_ns")  # what may differ between two files that hold the same


def describe_inputs(
    spec: DataSpec, prompts: ChatPrompts, *, length: int, seed: int, known: Mapping | None = None
) -> dict:
    """All that decides which samples are made, as JSON. Reads every file once, to hash it.

    known: an earlier description; a file of the same path, size and time as there is not read again.
    Raises DataError for files that are not there.
    """
    hashes = {_place(entry): entry["sha256"] for key in FILES for entry in (known or {}).get(key, ())}
    return {
        "version": VERSION,
        "length": length,
        "seed": seed,
        "template": {"name": prompts.name, "sha256": _digest(_template_of(prompts))},
        "tokenizer": _digest(_tokenizer_of(prompts)),
        **_settings_of(spec),
        "files": [
            {"part": file.part, "format": file.format, "weight": file.weight, **_content_of(file.path, hashes)}
            for file in data_files(spec)
        ],
        "benchmarks": [
            _content_of(path, hashes) for found in find_files(spec.contamination, also=(CSV,)) for path in found
        ],
    }


def digest_of(inputs: Mapping) -> str:
    """Equal for equal inputs, wherever the files lie."""
    return _digest({**inputs, **{key: [_content(entry) for entry in inputs[key]] for key in FILES}})


def check_unchanged(inputs: Mapping) -> None:
    """Raise DataError when a file has changed since it was described."""
    for entry in (entry for key in FILES for entry in inputs[key]):
        path = Path(entry["path"])
        found = path.stat() if path.is_file() else None
        if found is None or (found.st_size, found.st_mtime_ns) != (entry["bytes"], entry["mtime_ns"]):
            raise DataError(f"{path} was changed while it was read. Prepare the data again when it stays as it is.")


def differences(before: Mapping, now: Mapping) -> Iterator[str]:
    """One line for each input that is another one now."""
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if key in FILES:
            yield from _other_files(old or [], new or [], "benchmark" if key == "benchmarks" else "file")
        elif key == "template" and old != new and old["name"] != new["name"]:
            yield f"template: prepared with {old['name']}, now {new['name']}"
        elif key in ("template", "tokenizer") and old != new:
            yield f"{key}: another one than it was prepared with"
        elif old != new:
            yield f"{key}: prepared with {json.dumps(old)}, now {json.dumps(new)}"


def _other_files(before: list[dict], now: list[dict], what: str) -> Iterator[str]:
    old, new = ([_content(entry) for entry in entries] for entries in (before, now))
    if old == new:
        return
    gone = [entry["path"] for entry in before if _content(entry) not in new]
    added = [entry["path"] for entry in now if _content(entry) not in old]
    yield from (f"{what} {path}: holds something else, or is read in another way" for path in gone if path in added)
    yield from (f"{what} {path}: is not among them now" for path in gone if path not in added)
    yield from (f"{what} {path}: was not among them" for path in added if path not in gone)
    if not gone and not added:
        yield f"{what}s: in another order, or another number of times"


def _content_of(path: Path, hashes: Mapping) -> dict:
    facts = path.stat()
    entry = {"path": str(path), "bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    return {**entry, "sha256": hashes.get(_place(entry)) or hash_file(path)}


def _place(entry: Mapping) -> tuple:
    return entry["path"], entry["bytes"], entry["mtime_ns"]


def _content(entry: Mapping) -> dict:
    return {key: value for key, value in entry.items() if key not in OF_THE_PLACE}


def _settings_of(spec: DataSpec) -> dict:
    """What of a spec decides, beside its files."""
    left_out = {"train", "evaluate", "contamination", "max_bad_lines"}
    left_out |= set() if spec.deduplicate == "near" else {"near_threshold"}
    left_out |= set() if spec.contamination else {"drop_contaminated"}
    found = {key: value for key, value in asdict(spec).items() if key not in left_out}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def _template_of(prompts: ChatPrompts) -> list:
    named = TEMPLATES.get(prompts.name)
    written = repr(named) if named else prompts.tokenizer.init_kwargs.get("chat_template")
    return [written, list(prompts.stop_strings), list(prompts.stop_ids)]


def _tokenizer_of(prompts: ChatPrompts) -> list:
    tokenizer = prompts.tokenizer
    return [tokenizer.backend.to_str(), tokenizer.eos_token_id, tokenizer.surrogates]


def _digest(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()
