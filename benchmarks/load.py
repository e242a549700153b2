"""Loading a checkpoint to float32: ours beside transformers, PaddleNLP's LLaMA and a plain read of the files.

    python benchmarks/load.py --shape 0.6b

Each side loads in a process of its own, in turn. What is timed is from_pretrained() and then one use of every weight,
since a mapped file is not read before: imports are in start.py. Memory is what the process takes at most beyond what
it had after its imports, mapped files included. For files of float32 and of bfloat16, warm (in the system's memory)
and cold (dropped from it before each load).
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from checkpoints import SHAPES  # noqa: E402
from harness import forget, machine, mkl_setting, random_folder, run  # noqa: E402

# %s: imports, and how a folder is loaded. Peak memory is counted anew from after the imports.
MEASURE = """
import json, os, pathlib, sys, time
folder = sys.argv[1]
%s
def memory(row):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(row))

pathlib.Path("/proc/self/clear_refs").write_text("5")
before, start = memory("VmRSS"), time.perf_counter()
model = load(folder)
returned = time.perf_counter() - start
if model is not None:
    for parameter in model.parameters():
        parameter.max()
seconds = time.perf_counter() - start
print(json.dumps({"returned": returned, "seconds": seconds, "peak": memory("VmHWM") - before}))
"""
READ = """
def load(folder):
    buffer = bytearray(1 << 24)
    for file in pathlib.Path(folder).glob("*.safetensors"):
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
"""
OURS = """
from aquila_pd import AquilaForCausalLM
def load(folder):
    return AquilaForCausalLM.from_pretrained(folder, dtype="float32")
"""
PADDLENLP = """
from paddlenlp.transformers import LlamaForCausalLM
def load(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype="float32", low_cpu_mem_usage=len(sys.argv) > 2)
"""
TRANSFORMERS = """
import torch
from transformers import LlamaForCausalLM
torch.set_num_threads(2)
def load(folder):
    return LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
"""
BASE = "transformers"


def measured(code: str, *arguments: object) -> dict:
    """{"returned", "seconds", "peak"} of one load; "peak" in bytes."""
    environment = {"MKL_DEBUG_CPU_TYPE": mkl_setting(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE % code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise SystemExit(f"A load failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.6b", choices=SHAPES)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; what is there already is used again")
    parser.add_argument("--paddlenlp", action="store_true", help="its two ways to load, too: slow, and warm only")
    parser.add_argument("--json", type=Path, help="write the runs here")
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for dtype in args.dtype:
            folders = make_folders((args.folder or Path(temporary)) / f"{args.shape}-{dtype}", args, dtype)
            size = sum(file.stat().st_size for file in folders["ours"].glob("*.safetensors"))
            weights = size * (2 if dtype == "bfloat16" else 1)  # in memory, as float32
            for cold in (False, True):
                runs = compare(folders, args, cold=cold)
                state = "cold" if cold else "warm"
                print(f"\n{args.shape}, {size / 1e9:.2f} GB of {dtype} to float32, {state}; {machine()}")
                print_table(runs, weights)
                found.append({"shape": args.shape, "dtype": dtype, "state": state, "weights": weights, "runs": runs})
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine(), "tables": found}, indent=2) + "\n")


def make_folders(work: Path, args: argparse.Namespace, dtype: str) -> dict[str, Path]:
    """The same weights for each side."""
    folders = {"torch": work / "torch", "ours": work / "ours"}
    random_folder(folders["torch"], args.shape, dtype)
    if not folders["ours"].is_dir():
        convert = [sys.executable, str(ROOT / "convert" / "torch2paddle.py"), "--input", str(folders["torch"])]
        run([*convert, "--output", str(folders["ours"]), "--verify", "none"])
    if args.paddlenlp:
        folders["llama"] = work / "llama"
        # In a process of its own: a child's peak memory begins with its parent's.
        renaming = multiprocessing.get_context("spawn").Process(
            target=as_paddlenlp_llama, args=(folders["ours"], folders["llama"])
        )
        renaming.start()
        renaming.join()
    return folders


def compare(folders: dict[str, Path], args: argparse.Namespace, *, cold: bool) -> dict[str, list[dict]]:
    """Every side once per round, in turn; the first round of a warm comparison is not counted."""
    sides = {
        BASE: (folders["torch"], TRANSFORMERS, ()),
        "plain read": (folders["ours"], READ, ()),
        "aquila_pd": (folders["ours"], OURS, ()),
        "aquila_pd, fused=True": (folders["ours"], OURS.replace("dtype=", "fused=True, dtype="), ()),
    }
    if args.paddlenlp and not cold:
        sides["PaddleNLP LLaMA, low_cpu_mem_usage"] = (folders["llama"], PADDLENLP, ("low",))
        sides["PaddleNLP LLaMA"] = (folders["llama"], PADDLENLP, ())
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    for turn in range(1 if cold else 0, args.rounds + 1):
        for name, (folder, code, more) in sides.items():
            if cold:
                forget(folder)
            result = measured(code, folder, *more)
            if turn:
                runs[name].append(result)
            print(f"  {'cold' if cold else 'warm'}, round {turn}: {name}", file=sys.stderr, flush=True)
    return runs


def print_table(runs: dict[str, list[dict]], weights: int) -> None:
    columns = ["", f"ratio to {BASE} (min to max)", "ratio to a plain read", "before its weights are used"]
    print(f"\n| {' | '.join([*columns, 'peak memory over the weights'])} |\n|{'---|' * (len(columns) + 1)}")
    for name, some in runs.items():
        row = [
            spread(some, runs[BASE], "seconds", "seconds"),
            spread(some, runs["plain read"], "seconds", "seconds"),
            spread(some, runs[BASE], "returned", "seconds"),
            f"{statistics.median(one['peak'] for one in some) / weights:.2f}",
        ]
        print(f"| {name} | {' | '.join(row)} |")


def spread(some: list[dict], base: list[dict], what: str, of: str) -> str:
    ratios = [a[what] / b[of] for a, b in zip(some, base, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def as_paddlenlp_llama(ours: Path, llama: Path) -> None:
    """The same weights under the names of PaddleNLP's LLaMA."""
    from aquila_pd.formats.safetensors import read_layout, save_tensors, view

    if llama.is_dir():
        return
    layout = read_layout(ours)
    tensors = ((name.replace("aquila.", "llama.", 1), view(info)) for name, info in layout.items())
    llama.mkdir()
    save_tensors(llama, tensors, max_shard_size="2GB")
    config = json.loads((ours / "config.json").read_text())
    config.update(architectures=["LlamaForCausalLM"], model_type="llama")
    (llama / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
