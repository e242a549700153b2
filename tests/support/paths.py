"""Where things lie: the project, its tests, what tests share, and the shared data beside the project."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"  # facts, goldens and tokenizer files
MMLU = [f"mmlu_{subject}_{part}.csv" for subject in ("abstract_algebra", "astronomy") for part in ("dev", "test")]
BENCHMARKS = tuple(  # questions of real benchmarks; the folder holds other files too
    f"{SHARED}/eval/{name}"
    for name in ("ARC-Challenge.json", "ARC-Easy.json", "winogrande.json", "gsm8k_test.jsonl", *MMLU)
)
IMPORTED = [str(ROOT), str(TESTS), str(SUPPORT)]  # the sys.path of tests, for processes that they start
