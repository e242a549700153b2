"""Code bundle of a converted folder: a verbatim copy of the modules it needs, so it runs without aquila_pd installed.

One subfolder, CODE, holds verbatim copies of the modules that the model and the tokenizer import when they are loaded;
beside the weights lie four one-line modules under the names of the published Paddle release. What is imported inside a
function only (readers of GGUF and SentencePiece files, training on a CPU, chat) stays out, and says so where it is
asked for (errors.only_in_the_package).
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ..runtime.versions import NAME, VERSION

PACKAGE = Path(__file__).resolve().parent.parent
CODE = "aquila_pd_code"
# Beside the weights -> the module it stands for. fusion_ops.py has no suffix in the published release either.
SHIMS = {
    "configuration_aquila_pd.py": "configuration",
    "modeling_aquila_pd.py": "modeling",
    "tokenizer_aquila_pd.py": "tokenizer",
    "fusion_ops.py": "fusion_ops",
}
ROOTS = ("__init__", *SHIMS.values())
ORIGIN = f"# From {NAME} {VERSION}: the code is in {CODE}/.\n"


def bundled_files(package: Path = PACKAGE) -> list[str]:
    """Paths of the bundled modules inside the package: the roots and the closure of their top-level imports."""
    found: set[str] = set()
    waiting = [f"{root}.py" for root in ROOTS]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _needed_by(package / file, package)
    return sorted(found)


@cache
def _needed_by(file: Path, package: Path) -> list[str]:
    """The modules of the package that this one imports outside of functions, and the __init__ of their folders."""
    needed = []
    for node in _run_at_import(ast.parse(file.read_text("utf-8")).body):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        # `from .x import y`: y is a module of the folder x, or a name inside the module x
        inside = [folder / f"{alias.name}.py" for alias in node.names]
        modules = [path for path in inside if path.is_file()]
        if len(modules) < len(inside):
            modules.append(folder.with_suffix(".py") if folder.with_suffix(".py").is_file() else folder / "__init__.py")
        parents = [
            parent / "__init__.py" for module in modules for parent in module.parents if package in parent.parents
        ]
        needed += [str(path.relative_to(package)) for path in (*modules, *parents)]
    return needed


def _run_at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is loaded: not those inside functions."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            for part in ("body", "orelse", "finalbody", "handlers"):
                yield from _run_at_import(getattr(node, part, []))


def write_bundle(output: Path, package: Path = PACKAGE) -> list[str]:
    """Write the bundle into a converted folder; returns the relative paths of its files."""
    written = {f"{CODE}/{file}": (package / file).read_bytes() for file in bundled_files(package)}
    written |= {shim: f"{ORIGIN}from {CODE}.{module} import *\n".encode() for shim, module in SHIMS.items()}
    for name, content in written.items():
        file = output / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return sorted(written)
