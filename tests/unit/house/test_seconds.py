"""The order in which test files start, and the record it follows."""

import json
from types import SimpleNamespace

import seconds


def items(*names: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(nodeid=f"tests/{name}") for name in names]


def test_slow_files_start_first_and_new_ones_before_them(tmp_path, monkeypatch):
    monkeypatch.setattr(seconds, "FILE", tmp_path / "seconds.json")
    seconds.FILE.write_text(json.dumps({"unit/b.py": 1.0, "e2e/a.py": 30.0, "unit/gone.py": 99.0}))
    found = items("unit/b.py::two", "unit/b.py::one", "e2e/a.py::x", "unit/new.py::y")
    seconds.sort_slowest_first(found)
    names = ["unit/new.py::y", "e2e/a.py::x", "unit/b.py::two", "unit/b.py::one"]
    assert [item.nodeid for item in found] == [f"tests/{name}" for name in names]


def test_a_record_adds_up_a_file_and_forgets_files_that_are_gone(tmp_path):
    file, here = tmp_path / "seconds.json", "unit/house/test_seconds.py"
    file.write_text(json.dumps({here: 9.0, "unit/house/test_imports.py": 4.0, "unit/gone.py": 99.0}))
    recorder = seconds.Recorder(file)
    for duration in (0.25, 1.0):
        recorder.pytest_runtest_logreport(SimpleNamespace(nodeid=f"tests/{here}::test[a::b]", duration=duration))
    recorder.pytest_sessionfinish()
    assert json.loads(file.read_text()) == {here: 1.2, "unit/house/test_imports.py": 4.0}


def test_the_record_is_of_files_of_this_project():
    assert all(
        name.startswith(("unit/", "parity/", "robustness/", "e2e/")) for name in json.loads(seconds.FILE.read_text())
    )
