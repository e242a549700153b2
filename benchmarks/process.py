"""One side in a process of its own: made once, then asked again and again.

    python benchmarks/process.py '{"module": "generation", "side": "aquila_pd", "source": "FOLDER", "settings": {...}}'

Requests and replies are lines of JSON: {"do": "prefill", "length": 512} in, {"seconds": ...} out, or {"error": ...}
when it failed; the first reply says that the side is made. What libraries print goes to stderr.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import aquila_pd  # noqa: E402, F401  before paddle: it chooses MKL's kernels


def answer(work, replies) -> bool:
    """Write what the work returns, or its error; False after an error."""
    try:
        reply, good = work(), True
    except Exception as error:  # the other sides go on, and the report says it
        traceback.print_exc()
        reply, good = {"error": f"{type(error).__name__}: {error}"}, False
    print(json.dumps(reply), file=replies, flush=True)
    return good


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked = json.loads(sys.argv[1])
    made = {}

    def make() -> dict:
        made["module"] = importlib.import_module(asked["module"])
        made["side"] = made["module"].SIDES[asked["side"]](asked["source"], **asked["settings"])
        return {}

    if not answer(make, replies):
        return
    for line in sys.stdin:
        request = json.loads(line)
        kind = request.pop("do")
        answer(lambda kind=kind, request=request: made["module"].MEASURES[kind](made["side"], **request), replies)


if __name__ == "__main__":
    main()
