"""A few ratios beside the recorded ones, in about four minutes: has something become slower?

    python benchmarks/smoke.py

It is a report and no gate: the exit status is 0 whatever moved. Only ratios are compared, never times; on another
machine than the recorded one even these may differ. `python benchmarks/bench.py --record` records anew.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import bench  # noqa: E402
from parts import RATIOS, SMOKE, Part  # noqa: E402
from ratios import HIGH, Spread, number, summary, table  # noqa: E402

MINUTES = 3.5  # no part is begun after that, so that the whole stays within four or a little more
ROUNDS = 2


def compared(recorded: dict[str, dict], now: dict[str, dict]) -> list[list[str]]:
    """Rows of recorded, now, change and a mark, for the ratios that both have.

    Marked is what moved by more than the recorded rounds lay apart.
    """
    rows = []
    for name, row in now.items():
        if name not in recorded:
            rows.append([name, "not recorded", number(row["median"]), "", ""])
            continue
        old = recorded[name]
        moved = row["median"] - old["median"]
        mark = ""
        if abs(moved) > old["max"] - old["min"]:
            mark = "better" if (moved > 0) == (row["best"] == HIGH) else "WORSE"
        then = Spread(old["median"], old["min"], old["max"], old["rounds"])
        rows.append([name, str(then), number(row["median"]), f"{moved / old['median']:+.0%}", mark])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", type=Path, default=bench.RECORDED, help="default: benchmarks/recorded.json")
    parser.add_argument("--folder", type=Path, help="keep the random weights here (default: a temporary folder)")
    args = parser.parse_args()
    if not args.recorded.is_file():
        print(f"{args.recorded} is not there: `python benchmarks/bench.py --record` writes it.")
        return 0
    recorded = json.loads(args.recorded.read_text())
    chosen = bench.arguments().parse_args(["--rounds", str(ROUNDS), "--threads", str(recorded["threads"])])
    results = bench.Results(bench.setting_of(chosen))
    print("\n".join(bench.describe(results.setting)))
    print(f"recorded on {recorded['machine']}", flush=True)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="aquila-bench-") as temporary:
        runner = bench.Runner(results, chosen, args.folder or Path(temporary))
        for part in SMOKE:
            if time.monotonic() - begin > MINUTES * 60:
                print(f"  {part.name} is left out: the time is used up", file=sys.stderr)
            elif isinstance(part, Part):
                runner.part(part)
            else:
                runner.script(part)
    rows = compared(recorded["ratios"], summary(RATIOS, results.measured))
    print(f"\n{table(['ratio of aquila_pd', 'recorded', 'now', 'change', 'beyond the recorded spread'], rows)}")
    for what, error in results.errors.items():
        print(f"FAILED {what}: {error}")
    print(f"{time.monotonic() - begin:.0f} s, load average {min(results.loads):.1f} to {max(results.loads):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
