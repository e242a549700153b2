"""The modules a converted folder carries, so that its usage text runs where aquila_pd is not installed.

They lie flat beside the weights: modeling.py becomes modeling_aquila_pd.py, `from .x import y` in it
`from x_aquila_pd import y`. Only fusion_ops.py keeps its name, as in the published Paddle release.
"""

import ast
import re
from functools import cache
from pathlib import Path

from ..versions import NAME, VERSION

PACKAGE = Path(__file__).resolve().parent.parent
ROOTS = ("modeling", "tokenizer")
KEEPS_ITS_NAME = ("fusion_ops",)
ORIGIN = f"# From {NAME} {VERSION}.\n"


def flat_name(module: str) -> str:
    """The module's name in a converted folder."""
    return module if module in KEEPS_ITS_NAME else f"{module}_aquila_pd"


def bundled_modules(package: Path = PACKAGE) -> list[str]:
    """The roots and all they import from the package, also inside functions."""
    found: list[str] = []
    waiting = list(ROOTS)
    while waiting:
        module = waiting.pop(0)
        if module not in found:
            found.append(module)
            waiting += imported_modules((package / f"{module}.py").read_text("utf-8"))
    return sorted(found)


def imported_modules(code: str) -> list[str]:
    """Modules of the same package that this code imports."""
    found = []
    for node in _relative_imports(code):
        found += [node.module] if node.module else [alias.name for alias in node.names]
    return found


@cache
def _relative_imports(code: str) -> list[ast.ImportFrom]:
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) and node.level]
    for node in nodes:
        # a flat folder has no packages; a bundled module that wants one is our own bug
        assert node.level == 1 and "." not in (node.module or ""), ast.unparse(node)
    return nodes


def flatten(code: str) -> str:
    """The code with its relative imports turned into imports of flat modules; nothing else changes."""
    lines = code.splitlines(keepends=True)
    for node in _relative_imports(code):
        at = node.lineno - 1
        indent = lines[at][: node.col_offset]
        if node.module:
            lines[at] = re.sub(r"from\s+\.\w+", f"from {flat_name(node.module)}", lines[at], count=1)
            continue
        flat = [f"{indent}{_import_as(alias)}\n" for alias in node.names]
        lines[at : node.end_lineno] = ["".join(flat)] + [""] * (node.end_lineno - node.lineno)
    return "".join(lines)


def _import_as(alias: ast.alias) -> str:
    flat, name = flat_name(alias.name), alias.asname or alias.name
    return f"import {flat}" if flat == name else f"import {flat} as {name}"


def write_bundle(output: Path, package: Path = PACKAGE) -> list[str]:
    """Write the modules into a converted folder; return the file names."""
    written = []
    for module in bundled_modules(package):
        code = (package / f"{module}.py").read_text("utf-8")
        (output / f"{flat_name(module)}.py").write_text(ORIGIN + flatten(code), "utf-8")
        written.append(f"{flat_name(module)}.py")
    return written
