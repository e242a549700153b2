"""Whole commands, each in a process of its own, taken in turn over several rounds; ratios with their spread.

Machines are noisy and shared, so nothing here reports a bare time: the commands of one round run one after the
other, and what counts is their ratio within the round.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "torch", "transformers", "tokenizers", "numpy")
# The widest instructions of a processor are most of its speed. aquila_pd knows them too, and is not asked: importing it
# sets variables that every side started later would get.
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}


def mkl_setting() -> str:
    """The choice of MKL's kernels that all sides get: what aquila_pd chooses, or the user's own."""
    from aquila_pd.runtime.mkl import VARIABLE, prefer_fast_kernels

    prefer_fast_kernels()
    return os.environ.get(VARIABLE, "")


@dataclass(frozen=True)
class Run:
    """One command, once. Seconds of wall clock and of processor time; peak resident memory in MB, and how much of the
    resident memory was anonymous (not mapped from files) at most."""

    wall: float
    cpu: float
    peak_mb: float
    anonymous_mb: float


def run(command: list[str], environment: dict[str, str] | None = None) -> Run:
    """Run to the end; its output is shown only if it fails. Peak memory is of the largest single process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(environment or {})}
    )
    anonymous: list[int] = [0]
    watcher = threading.Thread(target=_watch, args=(process.pid, anonymous), daemon=True)
    watcher.start()
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}")
    return Run(
        time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, max(anonymous) / 1024
    )


def _watch(pid: int, anonymous: list[int]) -> None:
    """Collect the process's anonymous resident memory in kB until it ends; where the system does not tell, nothing."""
    while True:
        found = [line for line in _lines(f"/proc/{pid}/status") if line.startswith("RssAnon")]
        if not found:
            return
        anonymous.append(int(found[0].split()[1]))
        time.sleep(0.02)


def forget(folder: Path) -> None:
    """Wait for the disk, then let the system drop its copy of a folder's files: they are read from the disk again."""
    os.sync()
    for path in folder.iterdir() if hasattr(os, "posix_fadvise") else []:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(
    commands: dict[str, Callable[[], Run]], *, rounds: int, base: str, warm_up: bool = True
) -> dict[str, list[Run]]:
    """Every command once per round, in turn; prints the table and returns the runs. The first round warms up."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for turn in range(0 if warm_up else 1, rounds + 1):
        for name, command in commands.items():
            measured = command()
            if turn:
                runs[name].append(measured)
            print(f"  {'warm-up' if not turn else f'round {turn}'}: {name}", file=sys.stderr, flush=True)
    print_table(runs, base)
    return runs


def print_table(runs: dict[str, list[Run]], base: str) -> None:
    columns = ["", f"wall, ratio to {base} (min to max)", "cpu, ratio", "peak memory, MB", "of it anonymous"]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, measured in runs.items():
        wall = [a.wall / b.wall for a, b in zip(measured, runs[base], strict=True)]
        cpu = [a.cpu / max(b.cpu, 1e-3) for a, b in zip(measured, runs[base], strict=True)]
        spread = f"{statistics.median(wall):.2f} ({min(wall):.2f} to {max(wall):.2f})"
        peak = statistics.median(r.peak_mb for r in measured)
        anonymous = statistics.median(r.anonymous_mb for r in measured)
        print(f"| {name} | {spread} | {statistics.median(cpu):.2f} | {peak:.0f} | {anonymous:.0f} |")


def random_folder(folder: Path, shape: str, dtype: str = "bfloat16") -> Path:
    """checkpoints.write_folder in a process of its own: a child's peak memory begins with its parent's."""
    run([sys.executable, str(Path(__file__).with_name("checkpoints.py")), str(folder), shape, dtype])
    return folder


def machine() -> str:
    """What the figures were taken on."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((int(line.split()[1]) / 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    name = names[0] if names else platform.processor()
    flags = next((line.split() for line in _lines("/proc/cpuinfo") if line.startswith("flags")), [])
    name += next((f" with {known}" for flag, known in VECTORS.items() if flag in flags), "")
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} x {name}, {memory:.0f} GiB, Python {platform.python_version()}, load average {load:.1f}"


def versions() -> dict[str, str]:
    """Versions of what is compared; aquila_pd's with its commit, and "+" where files have changed since."""
    found = {}
    for name in ("aquila_pd", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # the report shows what is there
            continue
    commit = _git("rev-parse", "--short", "HEAD")
    changed = "+" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return {**found, "aquila_pd": f"{found.get('aquila_pd', 'not installed')} ({commit or 'no commit'}{changed})"}


def _git(*arguments: str) -> str:
    """What git says about the project; "" where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # not this system's way, or the process has ended
        return []


def write_json(path: Path | None, runs: dict[str, list[Run]], **facts) -> None:
    if path is not None:
        content = {"machine": machine(), **facts, "runs": {k: [asdict(r) for r in v] for k, v in runs.items()}}
        path.write_text(json.dumps(content, indent=2) + "\n")
