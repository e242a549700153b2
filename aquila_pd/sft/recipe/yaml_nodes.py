"""YAML nodes with line and path, and overrides from the command line.

Nothing is interpreted here: a scalar keeps the text it was written with, because what it means follows from where it
stands (`no` is a language among languages, and `1e-5` a number, which YAML 1.1 reads as text).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import yaml

from ...utils.errors import RecipeError, shown_value
from ...utils.validation import Unquoted

STANDARD = "tag:yaml.org,2002:"
TAGS = {
    STANDARD + name for name in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map", "merge", "value")
}
NULL, MERGE = STANDARD + "null", STANDARD + "merge"
MOST_NODES = 20_000  # an anchor used by anchors used by anchors is a thousand lines of nothing that fill the memory
NOTHING = ("", "null", "~")


@dataclass(frozen=True)
class Node:
    """One value. content: the text of a scalar (None for null), a list, or a mapping in the order written.

    path: where it stands, as messages name it. line: 1-based line of its key, or of the value itself in a list; None
    when it was given on the command line. quoted: a scalar in quotes, which is text whatever it looks like.
    inherited: it came out of another mapping, by `defaults`.
    """

    content: "str | list[Node] | dict[str, Node] | None"
    path: str
    line: int | None
    quoted: bool = False
    inherited: bool = False

    @property
    def place(self) -> str:
        """The end of a message: where to look."""
        return "(given on the command line)" if self.line is None else f"(line {self.line})"

    def get(self, key: str) -> "Node | None":
        """The value of a key; None where there is none, or no mapping."""
        return self.content.get(key) if isinstance(self.content, dict) else None

    def find(self, place: tuple) -> "tuple[Node, tuple]":
        """The deepest node on the way to a place, and the keys left. A value alone is the first of its list."""
        key = place[0] if place else None
        if isinstance(key, int) and not isinstance(self.content, list):
            return self.find(place[1:]) if key == 0 else (self, place)
        inside = self.content[key] if isinstance(key, int) and key < len(self.content) else self.get(key)
        return (self, place) if inside is None else inside.find(place[1:])

    def plain(self) -> object:
        """What pydantic reads: dictionaries, lists, text; a scalar without quotes as Unquoted."""
        content = self.content
        if isinstance(content, dict):
            return {key: node.plain() for key, node in content.items()}
        if isinstance(content, list):
            return tuple(node.plain() for node in content)
        return content if content is None or self.quoted else Unquoted(content)


def inner(path: str, key: str | int) -> str:
    """The path of what stands inside: stages.0, stages.0.optim."""
    return f"{path}.{key}" if path else str(key)


# ----------------------------------------------------------------------------------------------------- reading


def parse(text: str, *, path: str = "", line: int | None = 0) -> tuple[Node, list[str]]:
    """The nodes of one YAML document, and a line for each key that is there twice, tag or key that cannot be used.

    line: how many lines stand before the text; None for a text without lines, out of a command line. Raises RecipeError
    for what is no YAML.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        reader = _Reader(line)
        return (Node(None, path, line), []) if root is None else (reader.read(root, path), reader.findings)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark and line is not None else ""
        said = ", ".join(filter(None, (error.context, error.problem)))
        raise RecipeError(f"{where}{said}") from error
    except yaml.YAMLError as error:  # a character that YAML has no place for
        raise RecipeError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise RecipeError("it is nested too deeply") from error


class _Reader:
    def __init__(self, line: int | None):
        self.first = line
        self.findings: list[str] = []
        self.count = 0
        self.open: set[int] = set()  # nodes we are inside of; an anchor may contain itself

    def line(self, node: yaml.Node) -> int | None:
        return None if self.first is None else self.first + node.start_mark.line + 1

    def read(self, node: yaml.Node, path: str, line: int | None = None) -> Node:
        line = self.line(node) if line is None else line
        self.count += 1
        if self.count > MOST_NODES:
            raise RecipeError(f"it holds more than {MOST_NODES:,} values, which no recipe needs")
        if node.tag not in TAGS:
            self.findings.append(f"{path}: the tag {shown_value(node.tag)} is not used in recipes (line {line})")
        if isinstance(node, yaml.ScalarNode):
            return Node(None if node.tag == NULL else node.value, path, line, quoted=node.style is not None)
        if id(node) in self.open:
            raise RecipeError(f"{path}: an anchor contains itself (line {line})")
        self.open.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            content = [self.read(item, inner(path, i)) for i, item in enumerate(node.value)]
        else:
            content = self._mapping(node, path)
        self.open.discard(id(node))
        return Node(content, path, line)

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key, value in node.value:
            if key.tag == MERGE:
                merged = {**self._merged(value, path), **merged}
            elif not isinstance(key, yaml.ScalarNode):
                self.findings.append(f"{path or 'the recipe'}: a list or mapping is no key (line {self.line(key)})")
            elif key.value in own:
                first = own[key.value].line
                self.findings.append(
                    f"{inner(path, key.value)}: the key is there twice (lines {first} and {self.line(key)})"
                )
            else:
                own[key.value] = self.read(value, inner(path, key.value), self.line(key))
        return {**merged, **own}

    def _merged(self, value: yaml.Node, path: str) -> dict[str, Node]:
        """What `<<: *anchor`, or a list of anchors of which the first wins, puts into a mapping."""
        found: dict[str, Node] = {}
        for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            if isinstance(one, yaml.MappingNode):
                found = {**self.read(one, path).content, **found}
            else:
                self.findings.append(f"{path}: << wants a mapping (line {self.line(value)})")
        return found


# ------------------------------------------------------------------------------------------------------ laying over


def lay_over(base: Node | None, over: Node | None, *, instead: Iterable[tuple[str, str]] = ()) -> Node:
    """`over` with everything of `base` that it does not say, mapping by mapping; lists and scalars are taken whole.

    instead: pairs of keys that say the same in two ways; one of `over` takes the place of both in `base`.
    """
    if over is None:
        return _inherited(base)
    if base is None or not isinstance(base.content, dict) or not isinstance(over.content, dict):
        return over
    hidden = {other for pair in instead for one, other in (pair, pair[::-1]) if one in over.content}
    kept = {key: node for key, node in base.content.items() if key not in hidden or key in over.content}
    keys = [*kept, *(key for key in over.content if key not in kept)]
    content = {key: lay_over(kept.get(key), over.content.get(key), instead=instead) for key in keys}
    return replace(over, content=content)


def _inherited(node: Node) -> Node:
    content = node.content
    if isinstance(content, dict):
        content = {key: _inherited(value) for key, value in content.items()}
    elif isinstance(content, list):
        content = [_inherited(value) for value in content]
    return replace(node, content=content, inherited=True)


# -------------------------------------------------------------------------------------------------------- overrides


@dataclass(frozen=True)
class Override:
    """`stages.0.optim.lr=2e-5` as the keys to go and the value to put there."""

    keys: tuple[str, ...]
    value: Node


def parse_override(text: str) -> Override:
    """One `key=value`. Keys are parted by points, entries of a list are counted from 0 ("stages.0" or "stages[0]"), and
    * is every entry. A value in brackets or quotes is read as YAML, any other is the text it is. Raises RecipeError.
    """
    left, equals, right = text.partition("=")
    keys = tuple(re.sub(r"\[(\d+|\*)\]", r".\1", left.strip()).split("."))
    if not equals or not all(keys):
        raise RecipeError(f"{shown_value(text)} is no override; they look like stages.0.optim.lr=2e-5")
    value = right.strip()
    path = ".".join(keys)
    if value in NOTHING:
        return Override(keys, Node(None, path, None))
    if value[0] not in "[{'\"":
        return Override(keys, Node(value, path, None))
    node, findings = parse(value, path=path, line=None)
    if findings:
        raise RecipeError("; ".join(findings))
    return Override(keys, node)


def apply(root: Node, override: Override, *, instead: Iterable[tuple[str, str]] = ()) -> tuple[Node, list[str]]:
    """The nodes with an override put in, and what stands in its way (nothing is changed then)."""
    findings: list[str] = []
    changed = _put(root, override.keys, override.value, findings, tuple(instead))
    return (root, findings) if findings else (changed, [])


def _put(node: Node, keys: tuple[str, ...], value: Node, findings: list[str], instead: tuple) -> Node:
    if not keys:
        return _moved(value, node.path)
    key, rest = keys[0], keys[1:]
    if isinstance(node.content, list):
        items = list(node.content)
        for i in _chosen(key, len(items), node, findings):
            items[i] = _put(items[i], rest, value, findings, instead)
        return replace(node, content=items)
    if isinstance(node.content, str):
        findings.append(f"{node.path}: {shown_value(node.content)} has nothing inside it to override with {key!r}")
        return node
    content = dict(node.content or {})
    old = content.get(key, Node(None, inner(node.path, key), None))
    content[key] = _put(old, rest, value, findings, instead)
    for one, other in (pair for both in instead for pair in (both, both[::-1])):
        if key == one:
            content.pop(other, None)
    return replace(node, content=content)


def _chosen(key: str, count: int, node: Node, findings: list[str]) -> Iterator[int]:
    if key == "*":
        yield from range(count)
    elif key.isdecimal() and int(key) < count:
        yield int(key)
    else:
        findings.append(f"{node.path}: {key!r} is none of its {count} entries, which count from 0; * is all of them")


def _moved(value: Node, path: str) -> Node:
    """The value of an override with the path it has where it was put."""
    content = value.content
    if isinstance(content, dict):
        content = {key: _moved(node, inner(path, key)) for key, node in content.items()}
    elif isinstance(content, list):
        content = [_moved(node, inner(path, i)) for i, node in enumerate(content)]
    return replace(value, content=content, path=path)
