"""Recipe loader: YAML, overrides and defaults, validated against recipe/schema.py; all findings at once.

    name: two stages            # default: the file's name
    model: ../models/base       # a converted folder
    output: ../runs/first       # one run folder for all stages
    defaults:                   # stage keys that all stages share; a stage says what is different in it
      optim: {lr: 1e-5, schedule: cosine, warmup_steps: 40}
    stages:
      - name: foundation
        data: {train: {files: 7M/*.parquet}}
      - name: chat
        data: {train: {files: Gen/*.parquet}}

Paths are relative to the folder of the recipe; those of an override on the command line, to the current folder.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ...utils.errors import RecipeError, report, shown_value
from ...utils.files import read_text
from . import yaml_nodes
from .findings import findings_of
from .schema import LoraSpec, Optim, Recipe, RecipeKeys, Stage
from .yaml_nodes import Node

__all__ = ["LoraSpec", "Optim", "Recipe", "Stage", "load_recipe", "load_values"]

INSTEAD = (("warmup_steps", "warmup_ratio"),)  # two ways to say the same; a stage's takes the place of the defaults'
KEYS = TypeAdapter(RecipeKeys)
PATHS = ("model", "output", "files", "contamination")  # keys whose text is a path
ADVICE = "Nothing was started. The recipes in recipes/ show every key in use."


def load_recipe(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, changed by overrides such as "stages.0.optim.lr=2e-5" or "stages.*.epochs=1".

    Raises RecipeError with every finding, each with its path and line.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"There is no recipe {path}.{_nearby(path)}")
    text = read_text(path, RecipeError)
    try:
        root, findings = yaml_nodes.parse(text)
    except RecipeError as error:
        raise RecipeError(report(f"{path} cannot be read:", [str(error)], ADVICE)) from error
    changes = []
    for override in overrides:
        try:
            change = yaml_nodes.parse_override(override)
            changes.append(replace(change, value=_anchor(change.value, os.getcwd(), change.keys)))
        except RecipeError as error:
            findings.append(str(error))
    recipe = _recipe(root, changes, findings, folder=path.parent, named=path.stem, source=str(path))
    return replace(recipe, text=text, overrides=tuple(overrides))


def load_values(values: Mapping, *, text: str = "", overrides: Sequence[str] = (), written: Mapping = {}) -> Recipe:
    """A recipe out of what Recipe.values() gave and a manifest kept, with what is known of its file beside."""
    root, findings = yaml_nodes.parse(json.dumps(values))
    recipe = _recipe(root, [], findings, folder=Path.cwd(), named="", source="The recipe in the run folder")
    written = dict(written) or recipe.written
    return replace(recipe, text=text, overrides=tuple(overrides), written=written, digest=digest_of(written))


def _recipe(root: Node, changes: list, findings: list[str], *, folder: Path, named: str, source: str) -> Recipe:
    """Nodes to the recipe: overrides of the defaults, defaults into stages, other overrides, types, contradictions."""
    findings = list(findings)
    if not isinstance(root.content, dict):
        raise RecipeError(report(f"{source} cannot be used:", ["it holds no keys and values"], ADVICE))
    for early in (True, False):
        for change in changes:
            if (change.keys[0] == "defaults") == early:
                root, wrong = yaml_nodes.apply(root, change, instead=INSTEAD)
                findings += wrong
        root = _with_defaults(root) if early else root
    if "name" not in root.content and named:
        root = replace(root, content={**root.content, "name": Node(named, "name", None)})
    keys = _validated(root, findings)
    if findings:
        raise RecipeError(report(f"{source} cannot be used:", sorted(findings, key=_line), ADVICE))
    anchored = _validated(_anchor(root, os.path.abspath(folder)), findings)
    if findings:
        raise RecipeError(report(f"{source} cannot be used:", findings, ADVICE))
    written = keys.values()
    return Recipe(**vars(anchored), written=written, digest=digest_of(written))


def digest_of(values: Mapping) -> str:
    """A name for everything a recipe asks for: equal digests, equal keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _validated(root: Node, findings: list[str]) -> RecipeKeys | None:
    """The keys of a recipe; None, and the violations among the findings, when they are not valid."""
    stages = root.get("stages")
    findings += _across_stages(root, stages.content if stages and isinstance(stages.content, list) else [])
    own = replace(root, content={key: node for key, node in root.content.items() if key != "defaults"})
    try:
        return KEYS.validate_python(own.plain())
    except ValidationError as error:
        findings += [line for line in findings_of(error, own) if line not in findings]
        return None


def _with_defaults(root: Node) -> Node:
    """The nodes with `defaults` laid under every stage."""
    defaults, stages = root.get("defaults"), root.get("stages")
    if stages is not None and isinstance(stages.content, dict):  # one stage needs no list
        stages = replace(stages, content=[stages])
    if stages is None or not isinstance(stages.content, list) or not defaults or not isinstance(defaults.content, dict):
        return root if stages is None else replace(root, content={**root.content, "stages": stages})
    laid = [yaml_nodes.lay_over(defaults, stage, instead=INSTEAD) for stage in stages.content]
    return replace(root, content={**root.content, "stages": replace(stages, content=laid)})


def _across_stages(root: Node, stages: list[Node]) -> list[str]:
    """Names that are there twice, and LoRA's keys where nothing uses them."""
    findings: list[str] = []
    seen: dict[str, Node] = {}
    for stage in stages:
        name = stage.get("name")
        if name and isinstance(name.content, str):
            first = seen.setdefault(name.content.casefold(), name)  # some file systems do not tell A from a
            if first is not name:
                same = f"{first.path} is {shown_value(first.content)}, and each stage has a folder of its name"
                findings.append(f"{name.path}: {same} {name.place}")
        findings += _idle_lora(stage)
    lora, methods = (root.get("defaults") or root).get("lora"), [_text(stage.get("method")) for stage in stages]
    changed = any(method and method.line is None for method in (stage.get("method") for stage in stages))
    if lora and lora.content and stages and not changed and not any(method in ("lora", "qlora") for method in methods):
        findings.append(f"{lora.path}: no stage has method lora or qlora, so nothing uses it {lora.place}")
    defaults = root.get("defaults")
    if defaults and not isinstance(defaults.content, dict | None):
        findings.append(f"defaults: a list or text where keys and values belong {defaults.place}")
    return findings


def _idle_lora(stage: Node) -> Iterable[str]:
    """LoRA's keys of a stage that trains everything; not those a change of method on the command line left idle."""
    method, lora = stage.get("method"), stage.get("lora")
    if lora is None or _text(method) in ("lora", "qlora"):
        return []
    own = [node for node in (lora.content.values() if isinstance(lora.content, dict) else [lora]) if node.content]
    overridden = method is not None and method.line is None
    idle = [node for node in own if not node.inherited and not (overridden and node.line is not None)]
    return [f"{node.path}: method is full, so nothing uses it {node.place}" for node in idle]


def _text(node: Node | None) -> str:
    return node.content if node and isinstance(node.content, str) else Stage.method


def _anchor(node: Node, folder: str, keys: tuple[str, ...] = ()) -> Node:
    """The nodes with every path in them made absolute; keys: those that lead to the node."""
    content = node.content
    if isinstance(content, dict):
        return replace(node, content={key: _anchor(value, folder, (*keys, key)) for key, value in content.items()})
    if isinstance(content, list):
        return replace(node, content=[_anchor(value, folder, keys) for value in content])
    if content and any(key in PATHS for key in keys[-2:] if not key.isdecimal()):
        return replace(node, content=os.path.abspath(os.path.join(folder, os.path.expanduser(content))))
    return node


def _line(finding: str) -> int:
    found = re.search(r"\(lines? (\d+)", finding)
    return int(found[1]) if found else 1 << 30


def _nearby(path: Path) -> str:
    there = sorted(one.name for one in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    return f" In {path.parent} there are {', '.join(there)}." if there else " Give the path of a YAML file."
