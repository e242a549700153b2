"""A JSON schema applied to a value: the keywords that ours uses, and an error for any other."""

from collections.abc import Iterator

TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
WORDS = {"description", "default", "$schema", "$defs"}


def violations(schema: dict, value: object, root: dict | None = None, path: str = "") -> list[str]:
    """ "path: keyword" for each violation."""
    root = root or schema
    if "$ref" in schema:
        return violations(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root, path)
    strange = schema.keys() - WORDS - {"type", *KEYWORDS}
    assert not strange, f"{path}: {strange}"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return [f"{path}: type"]
    found = [f"{path}: {word}" for word, holds in KEYWORDS.items() if word in schema and not holds(schema[word], value)]
    if "anyOf" in schema and not any(not violations(one, value, root, path) for one in schema["anyOf"]):
        found.append(f"{path}: anyOf")
    for key, one, item in _inside(schema, value):
        found += [f"{path}.{key}: unknown"] if one is None else violations(one, item, root, f"{path}.{key}")
    return found


def _inside(schema: dict, value: object) -> Iterator[tuple]:
    """(key, its schema or None, the value there) of every key and item that the schema speaks of."""
    if isinstance(value, dict) and "properties" in schema:
        yield from ((key, schema["properties"].get(key), item) for key, item in value.items())
    if isinstance(value, list) and "items" in schema:
        yield from ((number, schema["items"], item) for number, item in enumerate(value))
    if isinstance(value, list) and "prefixItems" in schema:
        yield from ((i, *pair) for i, pair in enumerate(zip(schema["prefixItems"], value, strict=False)))


def _is(value: object, kind: str) -> bool:
    if kind == "boolean" or isinstance(value, bool):
        return kind == "boolean" and isinstance(value, bool)
    return isinstance(value, TYPES[kind])


KEYWORDS = {
    "enum": lambda limit, value: value in limit,
    "minimum": lambda limit, value: value is None or value >= limit,
    "exclusiveMinimum": lambda limit, value: value is None or value > limit,
    "maximum": lambda limit, value: value is None or value <= limit,
    "exclusiveMaximum": lambda limit, value: value is None or value < limit,
    "minLength": lambda limit, value: len(value) >= limit,
    "minItems": lambda limit, value: len(value) >= limit,
    "maxItems": lambda limit, value: len(value) <= limit,
    "required": lambda keys, value: value.keys() >= set(keys),
    "additionalProperties": lambda allowed, value: allowed is False,
    **dict.fromkeys(("anyOf", "properties", "items", "prefixItems"), lambda inside, value: True),
}
