"""Which test files start first: the slowest, so that no process is left alone with a long one at the end.

`make test PYTEST_ARGS=--record-seconds` writes seconds.json anew. It decides nothing but the order: a file that is not
in it starts first, an entry without its file is not read.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from paths import TESTS

FILE = Path(__file__).with_name("seconds.json")


def sort_slowest_first(items: list[pytest.Item]) -> None:
    """Files by their recorded seconds; the tests of a file stay together and in order."""
    recorded = json.loads(FILE.read_text())
    items.sort(key=lambda item: (-recorded.get(_name(item.nodeid), float("inf")), _name(item.nodeid)))


class Recorder:
    """A plugin of the process that starts the others: adds up the seconds of each file and writes them at the end."""

    def __init__(self, file: Path = FILE) -> None:
        self.file, self.seconds = file, Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[_name(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Files that did not run keep what they had, as long as they are there."""
        kept = json.loads(self.file.read_text()) if self.file.exists() else {}
        kept = {name: value for name, value in kept.items() if (TESTS / name).exists()}
        found = {name: round(value, 1) for name, value in self.seconds.items()}
        self.file.write_text(json.dumps(dict(sorted({**kept, **found}.items())), indent=0) + "\n")


def _name(nodeid: str) -> str:
    """e2e/test_demo.py of tests/e2e/test_demo.py::test_x[y]"""
    return nodeid.split("::")[0].removeprefix("tests/")
