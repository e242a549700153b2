"""Modules describe themselves in the field's words: prose about people reads like a translation."""

import ast
import re
from pathlib import Path

import pytest
from paths import ROOT

PEOPLE = re.compile(r"\b(who|whom|whoever|nobody|somebody|anybody|everybody|told|turned)\b", re.IGNORECASE)


def first_lines(file: Path) -> list[tuple[str, str]]:
    """(name, first line) of the docstrings of a module and of its public classes and functions."""
    module = ast.parse(file.read_text("utf-8"))
    named = [node for node in module.body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_"]
    found = [("the module", ast.get_docstring(module)), *((node.name, ast.get_docstring(node)) for node in named)]
    return [(name, text.splitlines()[0]) for name, text in found if text]


def strange_lines(package: Path) -> list[str]:
    files = sorted(package.rglob("*.py"))
    return [
        f"{file.relative_to(package)}, {name}: {line}"
        for file in files
        for name, line in first_lines(file)
        if PEOPLE.search(line)
    ]


def test_modules_and_public_names_speak_of_things_and_not_of_people():
    assert strange_lines(ROOT / "aquila_pd") == []


@pytest.mark.parametrize(
    "text", ['"""Who joins."""', 'def f():\n    """Nobody asks."""', 'class C:\n    """Rows, turned.\n\n    More."""']
)
def test_control_a_line_about_people_is_noticed(tmp_path, text):
    (tmp_path / "module.py").write_text(text)
    assert len(strange_lines(tmp_path)) == 1


def test_every_module_says_what_it_is():
    files = (ROOT / "aquila_pd").rglob("*.py")
    assert [str(file) for file in files if not ast.get_docstring(ast.parse(file.read_text("utf-8")))] == []
