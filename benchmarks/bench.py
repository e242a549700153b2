"""All of issue 6 in one command: ours, PaddleNLP's and transformers' LLaMA on the same random weights.

    python benchmarks/bench.py                               everything, 30 to 60 minutes
    python benchmarks/bench.py --only decode --rounds 5      one part; --list names them

Every side has a process of its own, and the sides are asked in turn, so that a busy machine slows all of them alike.
What is printed are ratios within a round, median (min to max); docs/BENCHMARKS.md says what each of them means.
The exit status is 1 when a side failed, not when a bar is missed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [folder for folder in (str(ROOT), str(Path(__file__).parent)) if folder not in sys.path]

from folders import make_folder  # noqa: E402
from harness import machine, mkl_setting, run, versions  # noqa: E402
from parts import OURS, PARTS, RATIOS, TORCH, Part, Script, Side  # noqa: E402
from ratios import Measured, bars_table, case_table, summary  # noqa: E402
from workers import SideFailed, Worker  # noqa: E402

LOSSES_WITHIN = 1e-3  # of each other, after some steps of AdamW in float32 from the same weights
OUTPUT = ROOT / "bench-output"
RECORDED = Path(__file__).with_name("recorded.json")
# Products of float32 in full precision on both sides of a GPU; no look-ups on a network.
FIXED = {"NVIDIA_TF32_OVERRIDE": "0", "HF_HUB_OFFLINE": "1", "GLOG_minloglevel": "2"}


class Results:
    """What was measured so far, kept in a file after each round."""

    def __init__(self, setting: dict, path: Path | None = None):
        self.setting, self.path = setting, path
        self.measured: Measured = {}
        self.errors: dict[str, str] = {}  # by "case, side"
        self.loads = [os.getloadavg()[0]]

    def add(self, case: str, side: str, figures: dict | None) -> None:
        load = os.getloadavg()[0]
        self.loads.append(load)
        self.measured.setdefault(case, {}).setdefault(side, []).append(figures and {**figures, "load": load})

    def fail(self, case: str, side: str, error: object) -> None:
        self.errors[f"{case}, {side}"] = str(error)
        print(f"  FAILED {case}, {side}: {error}", file=sys.stderr, flush=True)

    def content(self) -> dict:
        loads = {"min": min(self.loads), "max": max(self.loads)}
        return {
            **self.setting,
            "load_average": loads,
            "ratios": summary(RATIOS, self.measured),
            "errors": self.errors,
            "measured": self.measured,
        }

    def save(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_name(self.path.name + ".partial")
            unfinished.write_text(json.dumps(self.content(), indent=1) + "\n")
            unfinished.replace(self.path)


# ------------------------------------------------------------------------------------------------ running parts


class Runner:
    """Runs parts on one machine with one setting; folders of weights are made below `work` when first wanted."""

    def __init__(self, results: Results, args: argparse.Namespace, work: Path):
        self.results, self.rounds, self.work, self.args = results, args.rounds, work, args
        self.settings = {"threads": args.threads, "dtype": args.dtype}
        self.environment = {**FIXED, "OMP_NUM_THREADS": str(args.threads), "MKL_DEBUG_CPU_TYPE": mkl_setting()}

    def part(self, part: Part) -> None:
        """Measure a part: every case, every side in turn, in every round."""
        with ExitStack() as running:
            workers = {} if part.fresh else self._started(part, running)
            for turn in [1] if part.fresh else range(self.rounds + 1):
                for case in part.cases:
                    for side in in_turn(part.sides, turn):
                        ask = self._fresh(part, side) if part.fresh else workers.get(side.name)
                        self._ask(case, side, ask, counts=turn > 0)
                    self._compare(case.name)
                print(f"  {part.name}: {f'round {turn}' if turn else 'warm-up'}", file=sys.stderr, flush=True)
                self.results.save()

    def _asked(self, part: Part, side: Side) -> dict:
        source = part.shape
        if side.source != "shape":
            try:
                source = str(make_folder(self.work, part.shape, side.source, self.settings["dtype"]))
            except SystemExit as error:  # how harness.run tells that a command failed
                raise SideFailed(str(error)) from None
        settings = {**self.settings, **side.settings}
        return {"module": part.module, "side": side.program, "source": source, "settings": settings}

    def _started(self, part: Part, running: ExitStack) -> dict[str, Callable[[dict], dict]]:
        """How to ask each side that could be started."""
        found = {}
        for side in part.sides:
            try:
                worker = Worker(self._asked(part, side), environment=self.environment)
            except SideFailed as error:
                for case in part.cases:
                    self.results.fail(case.name, side.name, error)
                continue
            running.callback(worker.close)
            found[side.name] = worker.ask
        return found

    def _fresh(self, part: Part, side: Side) -> Callable[[dict], dict]:
        def ask(request: dict) -> dict:
            worker = Worker(self._asked(part, side), environment=self.environment)
            try:
                return worker.ask(request)
            finally:
                worker.close()

        return ask

    def _ask(self, case, side: Side, ask: Callable[[dict], dict] | None, *, counts: bool) -> None:
        figures = None
        if ask is not None:
            try:
                figures = ask(case.request)
            except SideFailed as error:
                self.results.fail(case.name, side.name, error)
        if counts:
            self.results.add(case.name, side.name, figures)

    def _compare(self, case: str) -> None:
        """Sides that compute something else are no comparison: tokens have to be the same, losses nearly."""
        last = {side: rounds[-1] for side, rounds in self.results.measured.get(case, {}).items() if rounds[-1]}
        ours = last.get(OURS, {})
        for side, found in last.items():
            for what, within in (("tokens", 0.0), ("loss", LOSSES_WITHIN)):
                if what in ours and what in found and not np.allclose(ours[what], found[what], rtol=within, atol=0):
                    self.results.fail(case, side, f"{what} {found[what]}, but {ours[what]} of {OURS}")

    def script(self, script: Script) -> None:
        """Run a benchmark that is a command of its own, and take over its runs."""
        if script.needs and getattr(self.args, script.needs) is None:
            print(f"  {script.name} is left out: it wants --{script.needs}", file=sys.stderr, flush=True)
            return
        places = {"vocab": self.args.vocab, "model": self.args.model, "work": self.work}
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "runs.json"
            arguments = [argument.format(**places) for argument in script.arguments]
            command = [sys.executable, str(Path(__file__).with_name(script.script)), *arguments]
            try:
                run([*command, "--rounds", str(script.rounds or self.rounds), "--json", str(path)], self.environment)
            except SystemExit as error:  # its output is in there; the last line says what it died of
                self.results.fail(script.name, script.script, str(error).strip().splitlines()[-1])
            try:
                found = script.read(json.loads(path.read_text())) if path.is_file() else {}
            except (ValueError, LookupError) as error:
                self.results.fail(script.name, script.script, f"its JSON is not what was expected: {error!r}")
                found = {}
        for case, sides in found.items():
            for side, rounds in sides.items():
                for figures in rounds:
                    self.results.add(case, side, figures)
        print(f"  {script.name}: done", file=sys.stderr, flush=True)
        self.results.save()


def in_turn(sides: tuple[Side, ...], turn: int) -> tuple[Side, ...]:
    """Who goes first changes: the next one finds the caches as the last one left them."""
    return sides[:: 1 if turn % 2 else -1]


# ------------------------------------------------------------------------------------------------ telling


def setting_of(args: argparse.Namespace) -> dict:
    """What the figures were taken with."""
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "threads": args.threads,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "MKL_DEBUG_CPU_TYPE": mkl_setting(),
    }


def describe(setting: dict) -> Iterator[str]:
    """The lines above the tables."""
    yield f"{setting['date']}; {setting['machine']}"
    yield ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    mkl = setting["MKL_DEBUG_CPU_TYPE"]
    kernels = f"MKL_DEBUG_CPU_TYPE={mkl} for every side, PaddleNLP's too" if mkl else "MKL's own choice of kernels"
    yield f"{setting['dtype']}, {setting['threads']} threads, {setting['rounds']} rounds; {kernels}"


def report(results: Results) -> None:
    """Print every table."""
    content = results.content()
    bases = {case.name: part.base for part in PARTS if isinstance(part, Part) for case in part.cases}
    for case, sides in results.measured.items():
        if not any(found and "seconds" in found for rounds in sides.values() for found in rounds):
            continue
        base = bases.get(case, TORCH if TORCH in sides else next(iter(sides)))
        print(f"\n{case_table(case, sides, base if any(sides.get(base, [])) else next(iter(sides)))}")
    if content["ratios"]:
        print(f"\n{bars_table(content['ratios'])}")
    loads = content["load_average"]
    print(f"\nLoad average during the run: {loads['min']:.1f} to {loads['max']:.1f}.")
    for what, error in results.errors.items():
        print(f"FAILED {what}: {error}")


def record(content: dict, path: Path = RECORDED) -> None:
    """Keep these ratios for bench-smoke; those of parts that were not measured now stay as they were."""
    kept = json.loads(path.read_text())["ratios"] if path.is_file() else {}
    taken = {"date": content["date"], "aquila_pd": content["versions"]["aquila_pd"]}
    now = {name: {**row, **taken} for name, row in content["ratios"].items()}
    facts = {key: content[key] for key in ("machine", "versions", "threads", "dtype", "MKL_DEBUG_CPU_TYPE")}
    path.write_text(json.dumps({**facts, "ratios": {**kept, **now}}, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------ the command


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help="parts (default: all)")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one of warming up (default: 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every side (default: all)")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="not float32: GPU"
    )
    parser.add_argument("--folder", type=Path, help="keep the random weights here (default: a temporary folder)")
    parser.add_argument("--vocab", type=Path, default=ROOT.parent / "shared" / "tokenizer", help="tokenizer's folder")
    parser.add_argument("--model", type=Path, help="a real model as transformers loads it, for the part start")
    parser.add_argument("--json", type=Path, default=OUTPUT / "bench.json", help="all figures (default: bench-output/)")
    parser.add_argument("--chart", type=Path, default=OUTPUT / "bench.png", help="picture, .png or .svg (likewise)")
    parser.add_argument("--record", action="store_true", help="keep the ratios in benchmarks/recorded.json")
    return parser


def main() -> int:
    parser = arguments()
    args = parser.parse_args()
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads are whole numbers from 1")
    if args.list:
        print("\n".join(f"{part.name:<18}{part.about}" for part in PARTS))
        return 0
    results = Results(setting_of(args), args.json)
    print("\n".join(describe(results.setting)), flush=True)
    begin, interrupted = time.monotonic(), False
    with tempfile.TemporaryDirectory(prefix="aquila-bench-") as temporary:
        work = args.folder or Path(temporary)
        runner = Runner(results, args, work)
        try:
            for part in PARTS:
                if part.name in args.only:
                    (runner.part if isinstance(part, Part) else runner.script)(part)
        except KeyboardInterrupt:
            interrupted = True
    report(results)
    results.save()
    content = results.content()
    if args.record:
        record(content)
    draw(content, args.chart)
    print(f"{'Interrupted' if interrupted else 'Done'} after {(time.monotonic() - begin) / 60:.0f} min; {args.json}")
    return 130 if interrupted else 1 if results.errors else 0


def draw(content: dict, path: Path) -> None:
    """The chart, where there is something to draw and to draw with."""
    if not content["ratios"]:
        return
    try:
        from chart import draw_ratios
    except ModuleNotFoundError as error:
        print(f"No chart: {error.name} is not installed (pip install 'aquila_pd[sft]').")
        return
    draw_ratios(content, path)
    print(f"Chart: {path}")


if __name__ == "__main__":
    sys.exit(main())
