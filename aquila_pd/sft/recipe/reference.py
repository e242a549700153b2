"""Reference of a recipe's keys, generated from the schema: the tables of docs/sft.md and a JSON schema for editors.

`python -m aquila_pd.sft.recipe.reference` names the files that are stale; with --write it writes them.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import TypeAdapter

from ...utils.validation import written
from .schema import RecipeKeys

ROOT = Path(__file__).resolve().parents[3]
GUIDE = Path("docs", "sft.md")
JSON_SCHEMA = Path("recipes", "recipe.schema.json")
BEGIN, END = "<!-- keys: python -m aquila_pd.sft.recipe.reference --write -->\n", "<!-- /keys -->\n"
# Head of a table -> the schema it lists; "" is the recipe itself.
TABLES = {
    "of the recipe": "",
    "of a stage": "Stage",
    "of `data`": "DataSpec",
    "of `train` and `evaluate`": "Source",
    "of `lora`": "LoraSpec",
    "of `optim` (AdamW)": "Optim",
}
KINDS = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}
LIMITS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}


# ------------------------------------------------------------------------------------------------- JSON schema


def json_schema() -> dict:
    """The schema of a recipe file. Of a stage nothing is required: `defaults` may say it."""
    made = _plain(TypeAdapter(RecipeKeys).json_schema())
    for shared in ("Stage", "DataSpec"):
        del made["$defs"][shared]["required"]
    stage = made["properties"]["stages"]["anyOf"][0]
    made["properties"]["defaults"] = {**stage, "description": "keys of stages; a stage says what is different in it"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def _plain(schema: object) -> object:
    """Without pydantic's titles; a value or null as one schema of two types."""
    if isinstance(schema, list):
        return list(map(_plain, schema))
    if not isinstance(schema, dict):
        return schema
    found = {key: _plain(value) for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
    some, *null = found.get("anyOf", [None])
    if null == [{"type": "null"}]:
        del found["anyOf"]
        return {**some, "type": [some["type"], "null"], **found}
    return found


# ------------------------------------------------------------------------------------------------------- tables


def tables() -> str:
    """One table of keys for each part of a recipe."""
    whole = _plain(TypeAdapter(RecipeKeys).json_schema())
    parts = {head: whole["$defs"][name] if name else whole for head, name in TABLES.items()}
    return "\n".join("".join(f"{line}\n" for line in _table(head, part)) for head, part in parts.items())


def _table(head: str, part: Mapping) -> Iterator[str]:
    yield f"| {head} | type | default | |"
    yield "|---|---|---|---|"
    for key, schema in part["properties"].items():
        default = "required" if key in part.get("required", ()) else _default(schema)
        yield f"| `{key}` | {_kind(schema)} | {default} | {schema.get('description', '')} |".replace("|  |", "| |")


def _default(schema: Mapping) -> str:
    if "default" not in schema:
        return ""
    value = schema["default"]
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def _kind(schema: Mapping) -> str:
    """A type with its limits in words."""
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return f"{_kind(schema['anyOf'][0])}; or a list"
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {_kind(schema['prefixItems'][0])}"
    if "$ref" in schema:
        return "keys"
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    limits = [f"{word} {written(schema[key])}" for key, word in LIMITS.items() if key in schema]
    return " or ".join([" ".join([KINDS[kinds[0]], *limits]), *(KINDS[kind] for kind in kinds[1:])])


# -------------------------------------------------------------------------------------------------------- files


def generated(root: Path = ROOT) -> dict[Path, str]:
    """What the files that follow from the schema have to hold."""
    guide = (root / GUIDE).read_text(encoding="utf-8")
    between = re.compile(f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", re.DOTALL)
    schema = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    return {GUIDE: between.sub(lambda _: f"\n{tables()}\n", guide), JSON_SCHEMA: schema}


def stale(root: Path = ROOT) -> list[Path]:
    """The files that do not hold it."""
    return [
        path
        for path, text in generated(root).items()
        if not (root / path).is_file() or (root / path).read_text(encoding="utf-8") != text
    ]


def main(argv: list[str] | None = None) -> int:
    """0 when both files are what the schema says, 1 when one is stale."""
    parser = argparse.ArgumentParser(prog="python -m aquila_pd.sft.recipe.reference", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the stale files")
    write = parser.parse_args(argv).write
    found, texts = stale(), generated()
    for path in found:
        print(f"{path} {'was written' if write else 'is stale; --write writes it'}")
        if write:
            (ROOT / path).write_text(texts[path], encoding="utf-8")
    return 0 if write or not found else 1


if __name__ == "__main__":
    sys.exit(main())
