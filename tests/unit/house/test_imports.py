"""Two promises: checkpoint files are handled without Paddle or torch, and no module imports one that stands on it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = "aquila_pd"
HEAVY = ("paddle", "paddlenlp", "torch", "transformers", "tensorflow")

# From the ground up. A module, or a package, may import what stands in its own line or below.
# The public face (__init__) may import everything, lazily, and is imported by nothing inside.
WITHOUT_PADDLE = (
    {"utils"},
    {"runtime"},
    {"formats", "architecture"},
    {"tokenization"},
    {"checkpoint"},
)
MODEL = (
    {"configuration", "tokenizer"},
    {"ops"},
    {"fusion_ops"},
    {"model"},
    {"modeling"},
    {"generation", "quantization", "parallel"},
    {"text"},
    {"chat", "data", "adapters", "evaluation"},
    {"serving", "sft"},
)
COMMANDS = ({"doctor"}, {"cli"}, {"__init__"})
LAYERS = (*WITHOUT_PADDLE, *MODEL, *COMMANDS)
# Imports that go up on purpose, each with its reason.
ALLOWED = {
    ("modeling", "chat.predict"): "model.predict() is what upstream's users call; imported when they do",
    ("checkpoint.verify.logits", "modeling"): "the proof by logits runs the Paddle model",
    **{
        ("checkpoint.verify.paddle_side", name): "the proof layer by layer runs the Paddle model's layers"
        for name in ("configuration", "fusion_ops", "ops.attention_mask", "modeling", "ops.rope", "ops.threads")
    },
}
# Below the model, and yet each made of a framework: two are imported inside a function, when a proof runs both; the
# third needs the base library's ChatTemplate and is imported by tokenizer.py only.
OF_A_FRAMEWORK = {"checkpoint.verify.torch_side", "checkpoint.verify.paddle_side", "tokenization.chat_mixin"}


def modules(package: Path) -> Iterator[tuple[str, Path]]:
    """("checkpoint.sources.gguf", its file) for every module; a folder's __init__ has the folder's name."""
    for file in sorted(package.rglob("*.py")):
        parts = list(file.relative_to(package).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        yield ".".join(parts), file


def imports(name: str, file: Path, known: set[str]) -> Iterator[tuple[str, int]]:
    """The modules of the package that this one imports, at any depth of its code, with the line of each."""
    folder = name.split(".") if file.name == "__init__.py" and name != "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = folder[: len(folder) - node.level + 1] if node.level else []
            base = ([PACKAGE, *up] if node.level else []) + (node.module.split(".") if node.module else [])
            # what follows "import" is a module of its own or a name inside the one before it
            found = [path if ".".join(path[1:]) in known else base for path in ([*base, a.name] for a in node.names)]
        else:
            continue
        yield from ((".".join(path[1:]) or "__init__", node.lineno) for path in found if path[0] == PACKAGE)


def broken_rules(package: Path, layers: tuple[set[str], ...] = LAYERS) -> list[str]:
    """One line for each import that goes up, each module without a layer, and each cycle."""
    rank = {name: height for height, names in enumerate(layers) for name in names}
    files = dict(modules(package))
    found, edges = [], {}
    for name, file in files.items():
        top = name.split(".")[0]
        if top not in rank:
            found.append(f"{name} has no layer: give it one in tests/unit/house/test_imports.py")
            continue
        used = [(target, line) for target, line in imports(name, file, set(files)) if (name, target) not in ALLOWED]
        edges[name] = {target for target, _ in used if target != name}
        for target, line in used:
            if rank.get(target.split(".")[0], -1) > rank[top]:
                found.append(f"{name}, line {line}, imports {target}, which stands above it")
    return found + [f"a circle of imports: {' -> '.join(circle)}" for circle in cycles(edges)]


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Each circle found by walking the graph once, depth first."""
    done: set[str] = set()
    found: list[list[str]] = []

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(edges.get(name, ())):
                walk(target, [*path, name])
            done.add(name)

    for name in sorted(edges):
        walk(name, [])
    return found


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def light_modules() -> list[str]:
    """The public face and every module below the model, sources of checkpoints included."""
    lowest = {name for layer in WITHOUT_PADDLE for name in layer}
    found = [name for name, _ in modules(ROOT / PACKAGE) if name.split(".")[0] in lowest]
    names = [name for name in found if name not in OF_A_FRAMEWORK]
    return [PACKAGE, *(f"{PACKAGE}.{name}" for name in names)]


def loaded_by(statements: list[str]) -> list[str]:
    """Which of the heavy libraries are in memory after these statements, in a process of their own."""
    done = run("\n".join([*statements, f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"]))
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------------------- the two promises


def test_what_handles_files_loads_neither_paddle_nor_torch():
    assert loaded_by([f"import {name}" for name in light_modules()]) == []


def test_help_loads_neither_paddle_nor_torch():
    assert loaded_by(["from aquila_pd.cli import VERBS, help_text", "help_text()"]) == []


def test_the_package_and_its_help_load_no_library_at_all():
    """numpy alone would be half of the time that the help takes."""
    lines = [
        "import sys; before = set(sys.modules)",
        "from aquila_pd.cli import VERBS, help_text",
        "import aquila_pd; help_text()",
        "print({name.split('.')[0] for name in sys.modules.keys() - before} - sys.stdlib_module_names)",
    ]
    assert run("\n".join(lines)).stdout == "{'aquila_pd'}\n"
    assert "numpy" in run("\n".join([lines[0], "import numpy", *lines[1:]])).stdout, "the control"


def test_control_a_heavy_import_is_noticed(tmp_path):
    (tmp_path / "torch.py").write_text("")  # stands in for the real one, which takes seconds
    (tmp_path / "uses_torch.py").write_text("import torch")
    assert loaded_by([f"import sys; sys.path.insert(0, {str(tmp_path)!r})", "import uses_torch"]) == ["torch"]


def test_no_module_imports_one_that_stands_on_it():
    assert broken_rules(ROOT / PACKAGE) == []


# ---------------------------------------------------------------------------------------------- the base library

BASE = "paddlenlp"


def importers(package: Path) -> list[str]:
    """The modules of the package that import the base library, at any depth of their code."""
    found = []
    for name, file in modules(package):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            else:
                imported = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(path.split(".")[0] == BASE for path in imported):
                found.append(name)
    return sorted(set(found))


def test_one_module_imports_the_base_library():
    """A port to the library's successor is one file wide."""
    assert importers(ROOT / PACKAGE) == ["runtime.base"]


def test_control_another_importer_is_noticed(house):
    (house / "checkpoint" / "layout.py").write_text("def later():\n    from paddlenlp.utils.log import logger\n")
    (house / "modeling.py").write_text("import paddlenlp.transformers as library\n")
    assert importers(house) == ["checkpoint.layout", "modeling"]


def test_every_name_taken_from_the_base_library_is_there():
    from aquila_pd.runtime import base

    assert all(getattr(base, name) is not None for name in base.__all__)
    with pytest.raises(AttributeError, match="no attribute 'AutoModelOfTomorrow'"):
        _ = base.AutoModelOfTomorrow


# ----------------------------------------------------------------------------------------------- its controls


@pytest.fixture
def house(tmp_path):
    """A small package that keeps the rules, to break."""
    for name, text in {
        "__init__.py": "",
        "utils/__init__.py": "",
        "utils/errors.py": "import json\n",
        "architecture/__init__.py": "",
        "architecture/weight_map.py": "from ..utils.errors import AquilaError\nfrom ..utils import errors\n",
        "checkpoint/__init__.py": "",
        "checkpoint/plan.py": "from ..architecture.weight_map import weights\nfrom .layout import find\n",
        "checkpoint/layout.py": "from aquila_pd.utils.errors import report\nimport aquila_pd.architecture.weight_map\n",
        "modeling.py": "from .checkpoint.plan import plan\n",
    }.items():
        file = tmp_path / PACKAGE / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / PACKAGE


def test_control_a_house_in_order_has_nothing_to_report(house):
    assert broken_rules(house) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from ..modeling import Model",
        "from .. import modeling",
        "import aquila_pd.modeling",
        "from aquila_pd import modeling",
        "def later():\n    from ..modeling import Model",
    ],
)
def test_control_an_upward_import_is_noticed_in_every_spelling(house, statement):
    (house / "checkpoint" / "layout.py").write_text(statement)
    (finding, *_) = broken_rules(house)
    assert finding.startswith("checkpoint.layout, line ") and "imports modeling" in finding


def test_control_importing_the_public_face_from_inside_is_noticed(house):
    (house / "modeling.py").write_text("from aquila_pd import AquilaConfig\n")
    assert broken_rules(house) == ["modeling, line 1, imports __init__, which stands above it"]


def test_control_a_circle_within_a_layer_is_noticed(house):
    (house / "checkpoint" / "layout.py").write_text("from .plan import plan\n")
    assert broken_rules(house) == ["a circle of imports: checkpoint.layout -> checkpoint.plan -> checkpoint.layout"]


def test_control_a_module_without_a_layer_is_noticed(house):
    (house / "attic.py").write_text("")
    assert broken_rules(house) == ["attic has no layer: give it one in tests/unit/house/test_imports.py"]


# ---------------------------------------------------------------------------------------------- without Paddle

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def test_without_paddle_the_package_imports_and_its_model_says_what_to_install():
    done = run(BLOCKED.format(blocked=("paddle", "paddlenlp")) + "import aquila_pd\naquila_pd.AquilaForCausalLM")
    assert done.returncode == 1
    assert "InstallationError" in done.stderr
    assert "no paddlepaddle is installed" in done.stderr and 'pip install "aquila_pd[cpu]"' in done.stderr


def test_without_paddle_the_help_still_works():
    done = run(BLOCKED.format(blocked=HEAVY) + "from aquila_pd.cli import main\nmain(['--help'])")
    assert done.returncode == 0 and "doctor" in done.stdout
