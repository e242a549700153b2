"""Nodes of a YAML text as frozen dataclasses: typed by the annotations alone, every finding at once.

Knows no recipe. A field's annotation says its type (bool, int, float, str, Literal, another dataclass, tuple[X, ...],
tuple[X, X], or one of these or None), its metadata its limits (`limits`); what two fields must not say together is a
`Check`.
"""

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ...utils.errors import AquilaError, shown_value
from .yaml_nodes import Node, inner

WHOLE = re.compile(r"[-+]?\d+(_\d+)*")
NUMBER = re.compile(r"[-+]?(\d+(_\d+)*\.?(\d+)?|\.\d+)([eE][-+]?\d+)?")
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
CLOSE = 0.6  # of difflib's ratio, from which on a key is taken for another one mistyped
BAD = object()  # in place of a value that cannot be used


@dataclass(frozen=True)
class Limits:
    """least <= x, above < x, x <= most, x < below."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def wrong(self, value: float) -> str | None:
        """What the value must be and is not."""
        tests = (
            (self.least, "at least", lambda x, y: x >= y),
            (self.above, "more than", lambda x, y: x > y),
            (self.most, "at most", lambda x, y: x <= y),
            (self.below, "less than", lambda x, y: x < y),
        )
        asked = [(f"{words} {limit:g}", test(value, limit)) for limit, words, test in tests if limit is not None]
        return None if all(kept for _, kept in asked) else " and ".join(words for words, _ in asked)


def limits(default: Any = dataclasses.MISSING, **named: float) -> Any:
    """A dataclass field whose number, or each of whose numbers, has limits: `limits(0.1, least=0, below=1)`."""
    return field(default=default, metadata={"limits": Limits(**named)})


# Of a dataclass field that is no key: what is known of the file itself.
ABOUT_FILE = {"compare": False, "metadata": {"key": False}}


def keys(cls: type) -> list[dataclasses.Field]:
    """The fields of a dataclass that are keys of a file."""
    return [one for one in dataclasses.fields(cls) if one.metadata.get("key", True)]


@dataclass(frozen=True)
class Check:
    """What fields must not say together. at: the field the finding stands at. needs: fields that `wrong` reads; it is
    asked only when all of them could be read. wrong(values) -> the finding in words, or None."""

    at: str
    needs: tuple[str, ...]
    wrong: Callable[[Mapping[str, Any]], str | None]


@dataclass
class Reader:
    """Reads nodes and collects findings.

    checks: by dataclass. elsewhere: names of keys as other programs have them -> ours, with its path when it is not
    beside. outside: path -> dataclass of keys that somebody may have put in the wrong place.
    """

    checks: Mapping[type, tuple[Check, ...]] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, type] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def found(self, path: str, what: str, node: Node, hint: str = "") -> Any:
        """Note a finding; returns BAD."""
        line = f"{path}: {what} {node.place}{hint}"
        if line not in self.findings:  # what stages inherit is read once for each of them
            self.findings.append(line)
        return BAD

    def read(self, kind: Any, node: Node, about: Mapping = types.MappingProxyType({})) -> Any:
        """The node as a value of a type; BAD, with findings, when it is none."""
        kind, optional = _without_none(kind)
        if dataclasses.is_dataclass(kind):
            return self.read_dataclass(kind, node)
        if node.content is None:
            return (
                None if optional else self.found(node.path, "it has no value; leave the key out for its default", node)
            )
        if get_origin(kind) is tuple:
            return self._tuple(get_args(kind), node, about)
        if get_origin(kind) is Literal:
            return self._choice(get_args(kind), node)
        if not isinstance(node.content, str):
            return self.found(node.path, f"a {_shape(node)} where {_noun(kind)} belongs", node)
        if kind is str:
            return node.content
        return self._number(kind, node, about)

    def read_dataclass(self, cls: type, node: Node) -> Any:
        """A mapping as a dataclass; an empty one, or null, is all defaults."""
        if not isinstance(node.content, dict | None):
            return self.found(node.path, f"{_described(node)} where keys and values belong", node)
        content = node.content or {}
        fields = {one.name: one for one in keys(cls)}
        hints = get_type_hints(cls)
        before = len(self.findings)
        for key in content:
            if key not in fields:
                self._unknown(cls, key, content[key])
        values, complete = {}, True
        for name, one in fields.items():
            value = self.read(hints[name], content[name], one.metadata) if name in content else _default(one)
            if value is dataclasses.MISSING:
                self.found(inner(node.path, name), "it is missing", node)
            if value is BAD or value is dataclasses.MISSING:
                complete = False
            else:
                values[name] = value
        for check in self.checks.get(cls, ()):
            wrong = check.wrong(values) if values.keys() >= set(check.needs) else None
            if wrong:
                self.found(inner(node.path, check.at), wrong, content.get(check.at, node))
        if not complete:
            return BAD
        try:
            made = cls(**values)
            return made if len(self.findings) == before else BAD
        except AquilaError as error:  # checks of its own
            for line in _lines(error):
                self._found_inside(node, line)
            return BAD

    def _found_inside(self, node: Node, line: str) -> None:
        """A finding of a dataclass, "train.0.weight: ...", with the path and the line of what it is about."""
        name, colon, what = line.partition(": ")
        keys_left = name.split(".") if colon else []
        while keys_left:
            key = keys_left[0]
            if isinstance(node.content, list) and key.isdecimal():
                node = node.content[int(key)]
            elif node.get(key) is not None:
                node = node.get(key)
            elif key != "0":  # the one value that stands for a list of one
                break
            keys_left.pop(0)
        self.found(".".join([node.path, *keys_left]), what if colon else line, node)

    def _tuple(self, kinds: tuple, node: Node, about: Mapping) -> Any:
        """A list; where any number may be, one value alone is a list of one."""
        items = node.content if isinstance(node.content, list) else [node]
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(items)
        elif len(items) != len(kinds):
            return self.found(node.path, f"{_described(node)} where a list of {len(kinds)} values belongs", node)
        values = tuple(self.read(kind, item, about) for kind, item in zip(kinds, items, strict=True))
        return BAD if BAD in values else values

    def _choice(self, known: tuple[str, ...], node: Node) -> Any:
        if node.content in known:
            return node.content
        near = isinstance(node.content, str) and difflib.get_close_matches(node.content.lower(), known, 1, CLOSE)
        hint = f"; did you mean {near[0]}?" if near else ""
        return self.found(node.path, f"{_described(node)} is none of {', '.join(known)}", node, hint)

    def _number(self, kind: type, node: Node, about: Mapping) -> Any:
        text = node.content
        if node.quoted and kind is not str:
            return self.found(node.path, f"{shown_value(text)} is text; without quotes it can be {_noun(kind)}", node)
        if kind is bool:
            return BOOLS[text.lower()] if text.lower() in BOOLS else self._not(kind, node)
        if not (WHOLE if kind is int else NUMBER).fullmatch(text) or len(text) > 40:
            return self._not(kind, node)
        value = kind(text)
        if not math.isfinite(value):
            return self._not(kind, node)
        wrong = about["limits"].wrong(value) if "limits" in about else None
        return self.found(node.path, f"it is {text} and must be {wrong}", node) if wrong else value

    def _not(self, kind: type, node: Node) -> Any:
        return self.found(node.path, f"{_described(node)} is not {_noun(kind)}", node)

    def _unknown(self, cls: type, key: str, node: Node) -> None:
        near = self.nearest(cls, key)
        self.found(node.path, "unknown key", node, f"; did you mean {near}?" if near else "")

    def nearest(self, cls: type, key: str) -> str | None:
        """The known key that an unknown one stands for: the same name in another place, another program's name for it,
        or a name that is nearly the same."""
        outside = [inner(path, name) for path, one in self.outside.items() for name in _keys(one)]
        paths = [*_keys(cls), *sorted(outside, key=lambda path: path.count(".")), *self.outside]
        known = {path: path.rpartition(".")[2] for path in paths if path}
        for asked in (self.elsewhere.get(key), key):
            same = [path for path, name in known.items() if asked in (path, name)]
            if same:
                return same[0]
        near = difflib.get_close_matches(key.lower(), list(dict.fromkeys(known.values())), 1, CLOSE)
        near = near or [name for name in known.values() if {name} & set(re.split(r"[_\-.]", key.lower()))]
        return next((path for path, name in known.items() if near and near[0] in (name, path)), None)


def _lines(error: AquilaError) -> list[str]:
    """The findings in a message made by `report`; the message itself when it is another."""
    found = [line.strip() for line in str(error).split("\n") if line.startswith("  ")]
    return found or [str(error)]


def _default(one: dataclasses.Field) -> Any:
    return one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default


def _keys(cls: type) -> list[str]:
    """Every key of a dataclass, then those of the dataclasses in it, as a path: optim.lr."""
    fields = [one.name for one in keys(cls)]
    hints = get_type_hints(cls)
    nested = [(name, hints[name]) for name in fields if dataclasses.is_dataclass(hints[name])]
    return fields + [f"{name}.{key}" for name, kind in nested for key in _keys(kind)]


def _without_none(kind: Any) -> tuple[Any, bool]:
    """(X, True) for X | None, else (the type, False)."""
    if get_origin(kind) in (Union, types.UnionType):
        (inside,) = (one for one in get_args(kind) if one is not type(None))
        return inside, True
    return kind, False


def _noun(kind: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def _shape(node: Node) -> str:
    return "list" if isinstance(node.content, list) else "mapping"


def _described(node: Node) -> str:
    if isinstance(node.content, str):
        return shown_value(node.content)
    return "nothing" if node.content is None else f"a {_shape(node)}"
