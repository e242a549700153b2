"""Where things lie: the project, its tests, what tests share, and the shared data beside the project."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"  # facts, goldens and tokenizer files
IMPORTED = [str(ROOT), str(TESTS), str(SUPPORT)]  # the sys.path of tests, for processes that they start
