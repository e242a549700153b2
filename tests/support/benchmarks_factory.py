"""A part of the benchmarks, run with tiny settings."""

import argparse
import sys
from pathlib import Path

from paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # last: none of its names hides another

import bench
from parts import Part, Script


def run_part(path: Path, part: Part | Script) -> bench.Results:
    args = argparse.Namespace(rounds=2, threads=1, dtype="float32", vocab=None, model=None)
    facts = {"date": "2026-01-01", "machine": "m, load average 0.0", "versions": {"aquila_pd": "0"}}
    results = bench.Results({**facts, **vars(args), "MKL_DEBUG_CPU_TYPE": "5"}, path)
    runner = bench.Runner(results, args, path.parent)
    (runner.part if isinstance(part, Part) else runner.script)(part)
    return results
