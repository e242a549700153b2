"""RoPE scaling has one address: only architecture/rope_scaling.py looks into rope_scaling of a config.json."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "aquila_pd"
NAME = "rope_scaling"
READER = "architecture/rope_scaling.py"
# Families hand the dict over: where a file writes it elsewhere, they first bring it to its place.
FAMILIES = "architecture/families/"
OWN_KEYS = {"rope_type", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "mscale_all_dim"}
LOOKING = {"get", "items", "keys", "values", "pop", "setdefault"}  # methods of a dict


def raw_reads(source: str) -> list[int]:
    """Lines that look into a rope_scaling, or name a key that nothing but one has."""
    tree = ast.parse(source)
    names = set(_names_of_it(tree))
    return sorted({node.lineno for node in ast.walk(tree) if _looks_into(node, names) or _is_own_key(node)})


def _looks_into(node: ast.AST, names: set[str]) -> bool:
    match node:
        case ast.Subscript(value=value):
            return _is_it(value, names)
        case ast.Attribute(value=value, attr=name):
            return name in LOOKING and _is_it(value, names)
        case ast.Compare(ops=ops, comparators=comparators):
            return isinstance(ops[-1], ast.In | ast.NotIn) and _is_it(comparators[-1], names)
        case ast.Dict(keys=keys, values=values):  # {**it}
            return any(key is None and _is_it(value, names) for key, value in zip(keys, values, strict=True))
    return False


def _is_own_key(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in OWN_KEYS


def _is_it(node: ast.expr, names: set[str]) -> bool:
    """Whether an expression is a rope_scaling: x.rope_scaling, x["rope_scaling"], x.get("rope_scaling"), any of these
    `or {}`, or a name that was given one."""
    match node:
        case ast.Name(id=name):
            return name in names
        case ast.Attribute(attr=name):
            return name == NAME
        case ast.Subscript(slice=ast.Constant(value=key)):
            return key == NAME
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=key), *_]):
            return key == NAME
        case ast.BoolOp(values=values):
            return any(_is_it(value, names) for value in values)
        case ast.NamedExpr(value=value):
            return _is_it(value, names)
    return False


def _names_of_it(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.NamedExpr) and _is_it(node.value, set()):
            yield node.target.id
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                yield from (left.id for left, right in pairs if isinstance(left, ast.Name) and _is_it(right, set()))


def where(folder: Path) -> list[str]:
    found = []
    for file in sorted(folder.rglob("*.py")):
        name = file.relative_to(folder).as_posix()
        if name != READER and not name.startswith(FAMILIES):
            found += [f"{name}, line {line}" for line in raw_reads(file.read_text("utf-8"))]
    return found


def test_nobody_else_looks_into_the_raw_dict():
    assert where(PACKAGE) == []


def test_control_its_reader_and_the_families_do():
    assert raw_reads((PACKAGE / READER).read_text("utf-8"))
    assert raw_reads((PACKAGE / FAMILIES / "base.py").read_text("utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        'kind = config.rope_scaling["type"]',
        'kind = fields["rope_scaling"]["type"]',
        'kind = fields.get("rope_scaling", {}).get("type")',
        'scaling = config.rope_scaling or {"factor": 1.0}\nfactor = scaling["factor"]',
        'positions, scaling = fields["max"], fields["rope_scaling"]\nif scaling and scaling["type"] == "dynamic": pass',
        'if scaling := fields["rope_scaling"]:\n    print(scaling.items())',
        'both = {**config.rope_scaling, "x": 1}',
        'known = "factor" in config.rope_scaling',
        'theirs = said["rope_type"]',
        'low = said.get("low_freq_factor")',
    ],
)
def test_control_every_way_to_look_into_it_is_noticed(line):
    assert raw_reads(line)


@pytest.mark.parametrize(
    "line",
    [
        "factor = config.rope.factor",
        'config["rope_scaling"] = read_scaling(own)',
        "config.rope_scaling = scaling.to_hf()",
        'both = {**fields, "rope_scaling": RopeScaling.of(fields).to_config()}',
        "RopeScaling.read(config.rope_scaling, theta=1e4)",
    ],
)
def test_control_handing_it_on_is_no_look(line):
    assert raw_reads(line) == []
