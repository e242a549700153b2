"""`aquila-pd doctor`: installed versions against tested ones, device and kernels of this machine, and fixes.

Facts are gathered first (`examine`), then printed or written as JSON; nothing is installed or changed. It works
where Paddle is missing or does not load, which is when it is needed.
"""

import argparse
import contextlib
import importlib
import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata

from .runtime import mkl, versions
from .runtime.versions import PINS, Pin, satisfies
from .utils import cores

BREAKING = ("breaks", "missing")  # verdicts that make the exit status 1
GEMM_SIZE = 1024
GEMM_SECONDS = 0.3  # for each thread count


@dataclass(frozen=True)
class PackageRow:
    """One package. verdict: ok, untested, absent (optional), missing (required) or breaks; run: what mends it."""

    package: str
    installed: str
    tested: str
    verdict: str
    run: str = ""
    note: str = ""


@dataclass
class Examination:
    """Everything doctor reports."""

    packages: list[PackageRow]
    machine: dict[str, str] = field(default_factory=dict)
    loads: dict[str, str] = field(default_factory=dict)  # library -> "yes, ..." or why it does not
    fusions: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.problems and all(row.verdict not in BREAKING for row in self.packages)


# ------------------------------------------------------------------------------------------------ packages


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def judge(row: Pin, find: Callable[[str], str | None] = installed_version) -> PackageRow | None:
    """The verdict on one row of the table; None for a package that should not be there and is not."""
    name = next((name for name in (row.name, *row.instead) if find(name)), row.name)
    version = find(name)
    if row.extra == "conflict":
        return version and PackageRow(name, version, "-", "breaks", f"pip uninstall {name}", row.breaks[0][1])
    if version is None:
        return _not_installed(row)
    install = f'pip install "{row.name}=={row.tested}"' if name == row.name else _gpu_install(row)
    for spec, harm in row.breaks:
        if satisfies(version, spec):
            return PackageRow(name, version, row.tested, "breaks", install, harm)
    if name != row.name:
        run = "" if version.partition("+")[0] == row.tested else install
        return PackageRow(name, version, row.tested, "untested", run, f"only {row.name} on a CPU has been tested")
    if version.partition("+")[0] == row.tested:
        return PackageRow(name, version, row.tested, "ok")
    if row.spec.startswith("==") or not satisfies(version, row.spec):
        return PackageRow(name, version, row.tested, "untested", install, row.why)
    return PackageRow(name, version, row.tested, "ok", note="in the range asked for, another version was tested")


def _gpu_install(row: Pin) -> str:
    return f"install {row.instead[0]} {row.tested} from Paddle's own package index"


def _not_installed(row: Pin) -> PackageRow:
    needed = row.extra in ("", "cpu")
    run = f'pip install "{row.name}=={row.tested}"'
    if row.extra == "cpu":
        run += f" (or, for a GPU, {_gpu_install(row)})"
    notes = {
        "verify": "only for .bin sources, `--verify logits` and the tests",
        "gguf": "only for GGUF sources",
        "test": "only for the tests",
        "dev": "only for `make check`",
    }
    return PackageRow(row.name, "-", row.tested, "missing" if needed else "absent", run, notes.get(row.extra, row.why))


def judge_python(version: str) -> PackageRow:
    """The verdict on the interpreter itself."""
    if not satisfies(version, versions.PYTHON):
        run = f"python{versions.TESTED_PYTHON} -m venv .venv"
        return PackageRow("python", version, versions.TESTED_PYTHON, "breaks", run, f"outside {versions.PYTHON}")
    tested = version.startswith(versions.TESTED_PYTHON + ".")
    return PackageRow("python", version, versions.TESTED_PYTHON, "ok" if tested else "untested")


def judge_all(find: Callable[[str], str | None] = installed_version) -> list[PackageRow]:
    """Python and every package of the table, then two Paddles in one place, which overwrite each other's files."""
    rows = [judge_python(platform.python_version()), *(row for pin in PINS if (row := judge(pin, find)))]
    paddle = versions.pin("paddlepaddle")
    both = [name for name in (paddle.name, *paddle.instead) if find(name)]
    if len(both) > 1:
        run = f"pip uninstall {' '.join(both)}, then install one of them again"
        rows.append(PackageRow(" + ".join(both), "both", "one", "breaks", run, "they share one folder"))
    return rows


# ------------------------------------------------------------------------------------------------- machine


def try_import(name: str) -> str:
    """Import a library with its output suppressed: "yes" and the seconds, or "no" and the error's first line."""
    start = time.perf_counter()
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):  # --json owns the standard output
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    except Exception as error:  # a broken installation raises anything, not only ImportError
        return f"no: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    finally:
        logging.disable(logging.NOTSET)
    return f"yes, {time.perf_counter() - start:.1f} s"


def gemm_gflops(threads: int) -> float:
    """fp32 matrix product of 1024 x 1024 on the CPU with this many threads: best of a few runs, in GFLOP/s."""
    import paddle
    from paddle.base import core

    device = paddle.get_device()
    paddle.set_device("cpu")
    core.set_num_threads(threads)
    try:
        x = paddle.ones([GEMM_SIZE, GEMM_SIZE])
        paddle.matmul(x, x).numpy()
        best, end = float("inf"), time.perf_counter() + GEMM_SECONDS
        while time.perf_counter() < end:
            start = time.perf_counter()
            paddle.matmul(x, x).numpy()
            best = min(best, time.perf_counter() - start)
    finally:
        core.set_num_threads(1)  # Paddle's own default
        paddle.set_device(device)
    return 2 * GEMM_SIZE**3 / best / 1e9


def device_facts() -> dict[str, str]:
    """Where Paddle computes, and how fast its matrix product is there on the CPU."""
    import paddle

    speeds = [f"{gemm_gflops(n):.0f} with {n} thread{'s' if n > 1 else ''}" for n in sorted({1, cores.count()})]
    cuda = paddle.is_compiled_with_cuda()
    gpus = paddle.device.cuda.device_count() if cuda else 0
    found = {
        "device": paddle.get_device(),
        "compiled with CUDA": f"yes, {gpus} GPU{'s' if gpus != 1 else ''} found" if cuda else "no",
        f"CPU GEMM {GEMM_SIZE}^3 fp32, GFLOP/s": ", ".join(speeds),
    }
    if cuda and not gpus:
        found["note"] = "this Paddle is built for GPUs and none is visible; it computes on the CPU"
    return found


def processor_facts() -> dict[str, str]:
    """The system, and what was decided about MKL's kernels."""
    decision = mkl.prefer_fast_kernels()
    return {
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "matrix kernels": f"{decision.action}. {decision.reason}",
    }


def fusion_facts() -> list[dict[str, str]]:
    """Which twin of each operation a model built here would use, and why."""
    from . import fusion_ops

    return [{"operation": one.name, "chosen": one.chosen, "reason": one.reason} for one in fusion_ops.choices()]


def examine(find: Callable[[str], str | None] = installed_version) -> Examination:
    """Run all checks. Never raises for a broken installation: a failing import becomes a problem."""
    found = Examination(judge_all(find), processor_facts())  # the processor first: it must come before Paddle
    if find("paddlepaddle") is None and find("paddlepaddle-gpu") is None:
        return found
    found.loads["paddle"] = try_import("paddle")
    if find("paddlenlp") is not None:
        found.loads["paddlenlp"] = try_import("paddlenlp")
    found.problems += [f"{name} does not load: {what}" for name, what in found.loads.items() if what.startswith("no")]
    if found.loads["paddle"].startswith("yes"):
        try:
            found.machine |= device_facts()
            found.fusions = fusion_facts()
        except Exception as error:  # a kernel that fails is a finding, whatever its type
            found.problems.append(f"Paddle loads but does not compute: {type(error).__name__}: {error}")
    return found


# ------------------------------------------------------------------------------------------------ printing


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell, the last one free; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def render(found: Examination) -> str:
    """The whole report as text; its last line is the verdict."""
    rows = [("package", "installed", "tested", "verdict", "")]
    rows += [(row.package, row.installed, row.tested, row.verdict, row.note) for row in found.packages]
    parts = [table(rows), table([("machine", ""), *found.machine.items()])]
    if found.loads:
        parts.append(table([("loads", ""), *found.loads.items()]))
    if found.fusions:
        head = ("operation", "chosen", "reason")
        parts.append(table([head, *((one["operation"], one["chosen"], one["reason"]) for one in found.fusions)]))
    fixes = [(row.package, row.run) for row in found.packages if row.run]
    if fixes:
        parts.append(table([("what to run", ""), *fixes]))
    return "\n\n".join([*parts, verdict(found)])


def verdict(found: Examination) -> str:
    """One line (more when libraries do not load): sound or not, and what stands in the way."""
    broken = [row.package for row in found.packages if row.verdict in BREAKING]
    untested = [row.package for row in found.packages if row.verdict == "untested"]
    if not found.sound:
        needs = [f"missing or not working together: {', '.join(broken)}"] if broken else []
        return "\n".join(["This installation will not work.", *(f"  {line}" for line in needs + found.problems)])
    if untested:
        return f"This installation works as far as is known; other versions were tested of: {', '.join(untested)}."
    return "This installation is sound."


def main(argv: list[str] | None = None) -> int:
    """Print the report. Exit status 0: sound, or only optional parts are missing; 1: something breaks."""
    parser = argparse.ArgumentParser(prog="aquila-pd doctor", description="Installed versions beside the tested ones.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables (default: tables)")
    asked = parser.parse_args(argv)
    os.environ.setdefault("GLOG_minloglevel", "2")  # probing a kernel that is not there is no warning here
    found = examine()
    if asked.json:
        print(json.dumps({"sound": found.sound, "verdict": verdict(found), **asdict(found)}, indent=2))
    else:
        print(render(found))
    return 0 if found.sound else 1


if __name__ == "__main__":
    sys.exit(main())
