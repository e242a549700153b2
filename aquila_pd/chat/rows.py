"""JSONL rows of `aquila-pd generate`: parsing, encoding to prompt ids, results written in order."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..text.loading import Loaded
from ..utils.atomic import PARTIAL, rename
from ..utils.errors import AquilaError, ChatError, OutputError, TokenizerError, report, shown_value
from ..utils.files import JSON_ERRORS, parse_json, why_not_a_file
from ..utils.units import counted

WRITTEN = ("text", "finish_reason", "tokens", "prompt_tokens", "error")  # keys of results; none may come in a row


@dataclass
class Row:
    """where: how messages name the row; given: what was read; chat: whether a template is used; ids: the prompt."""

    where: str
    given: Mapping
    chat: bool = False
    ids: list[int] = field(default_factory=list)


def rows_of_file(file: Path) -> list[Row]:
    """The rows of a JSONL file. Raises ChatError that names every line that is none."""
    wrong = why_not_a_file(file)
    if wrong:
        raise ChatError(f"{file} {wrong}. Give a file with one JSON object a line.")
    rows, findings = [], []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file.name}, line {number}"
            given, finding = _parsed(line)
            rows.append(Row(where, given))
            findings += [f"{where}: {finding}"] if finding else []
    if not rows:
        raise ChatError(f'{file} holds no rows. Write one JSON object a line, such as {{"prompt": "..."}}.')
    _raise(findings)
    return rows


def rows_of_prompts(prompts: list[str]) -> list[Row]:
    return [Row(f"--prompt {number}", {"prompt": prompt}) for number, prompt in enumerate(prompts, 1)]


def _parsed(line: bytes) -> tuple[dict, str | None]:
    """The object in a line, and what is wrong with it."""
    try:
        given = parse_json(line.decode("utf-8-sig"))
    except JSON_ERRORS as error:  # UnicodeDecodeError is one of them
        return {}, f"no JSON ({error})"
    if not isinstance(given, dict):
        return {}, f"{shown_value(given)} is no object"
    if ("prompt" in given) == ("messages" in given):
        return given, 'needs "prompt" or "messages", and one of them only'
    if not isinstance(given.get("prompt", ""), str):
        return given, f"the prompt {shown_value(given['prompt'])} is no text"
    taken = sorted(given.keys() & set(WRITTEN))
    return given, f"has {', '.join(taken)}, which the results have" if taken else None


def _raise(findings: list[str]) -> None:
    if findings:
        advice = 'A row is {"prompt": text} or {"messages": [{"role": ..., "content": text}, ...]}. Nothing was run.'
        raise ChatError(report("These rows cannot be used:", findings, advice))


def encode_rows(rows: list[Row], loaded: Loaded, *, chat: bool) -> None:
    """Encode the rows' prompts to ids. chat: a prompt is a user turn, not a text to continue.

    Raises ConfigError where a chat template is needed and there is none, ChatError that names every row that cannot be
    written.
    """
    findings = []
    for row in rows:
        row.chat = chat or "messages" in row.given
        try:
            row.ids = _encoded(row, loaded)
        except (ChatError, TokenizerError) as error:
            findings.append(f"{row.where}: {' '.join(str(error).split())}")
    _raise(findings)


def _encoded(row: Row, loaded: Loaded) -> list[int]:
    if not row.chat:
        return loaded.tokenizer.encode(row.given["prompt"])["input_ids"]
    said = row.given["messages"] if "messages" in row.given else [{"role": "user", "content": row.given["prompt"]}]
    return loaded.require_prompts().encode(said)


def result_of(row: Row, *, text: str, finish_reason: str, tokens: int, error: Exception | None = None) -> dict:
    """The output object of a row: its input and its result."""
    found = {**row.given, "text": text, "finish_reason": finish_reason, "tokens": tokens, "prompt_tokens": len(row.ids)}
    if error is not None:  # one of ours in its own words, another by its name
        found["error"] = str(error) if isinstance(error, AquilaError) else f"{type(error).__name__}: {error}"
    return found


def in_order(finished: Iterable[tuple[int, dict]], held: dict[int, dict]) -> Iterator[dict]:
    """Reorder buffer: results by ascending number, each once all before it have come; `held` is the buffer."""
    number = 0
    for found, result in finished:
        held[found] = result
        while number in held:
            yield held.pop(number)
            number += 1


class RowFile:
    """JSONL writer: NAME.partial until `finish` renames it; file None: stdout."""

    def __init__(self, file: Path | None):
        self.file, self.count = file, 0
        self.partial = None if file is None else file.with_name(f"{file.name}{PARTIAL}")
        if self.partial is None:
            self._stream = sys.stdout
        else:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.partial.open("w", encoding="utf-8", newline="\n")

    def write(self, result: dict) -> None:
        self._stream.write(json.dumps(result, ensure_ascii=False) + "\n")
        self._stream.flush()
        self.count += 1

    def finish(self) -> None:
        """Rename the partial file."""
        if self.partial is not None:
            self._stream.close()
            rename(self.partial, self.file)

    def leave(self) -> str:
        """Close without giving the file its name; returns a sentence that says what is kept."""
        if self.partial is None:
            return f"{counted(self.count, 'row')} came out."
        with suppress(OSError):  # a full disk, which was the reason
            self._stream.close()
        return f"{counted(self.count, 'row')} of the results {'is' if self.count == 1 else 'are'} in {self.partial}."


def check_output(file: Path, *, overwrite: bool, source: Path | None) -> None:
    """Raise OutputError for a place that results cannot go to."""
    if source is not None and source.exists() and file.exists() and file.samefile(source):
        raise OutputError(f"{file} is the file the prompts come from. Give another name to --output.")
    if file.is_dir():
        raise OutputError(f"{file} is a folder. Give the name of a file to --output.")
    if file.exists() and not overwrite:
        raise OutputError(f"{file} is there already. Give another name, or --overwrite.")
