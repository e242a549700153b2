"""Prefill and decode speed: the engine beside transformers' and PaddleNLP's own generate(), on the same weights.

    python benchmarks/generation.py --shape 0.4b --batch 1 4 16

Greedy, float32, equally long random prompts, each side in a process of its own, in turn, with the same number of
threads. Prefill is the time to the first token of all rows; decoding the median step after it.
transformers reads the folder the Paddle side was converted from. With --sampling the engine draws with temperature
0.8 and top_p 0.9 too, to show what that costs.
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
from harness import machine, random_folder, run  # noqa: E402
from load import as_paddlenlp_llama  # noqa: E402

COMMON = """
import json, sys, time
import numpy as np
folder, batch, length, new, threads = sys.argv[1], *map(int, sys.argv[2:6])
prompts = np.random.default_rng(0).integers(3, 30000, (batch, length))

def measure(generate):
    # generate(ids, n, step) continues rows by n tokens and calls step() after each; the median: machines are noisy
    generate(prompts[:, :8], 2, lambda: None)  # warms up kernels and memory
    times = []
    begin = time.perf_counter()
    generate(prompts, new, lambda: times.append(time.perf_counter()))
    return {"prefill": batch * length / (times[0] - begin), "decode": batch / float(np.median(np.diff(times)))}
"""
OURS = """
import aquila_pd, paddle
from aquila_pd.generation import Engine, SamplingParams
from aquila_pd.modeling import AquilaForCausalLM
paddle.base.core.set_num_threads(threads)
model = AquilaForCausalLM.from_pretrained(folder, dtype="float32")
model.eval()
model.fuse_projections()
engine = Engine(model, slots=batch, prefix_reuse=False, prefill_chunk=batch * length)
chosen = dict(temperature=0.8, top_p=0.9, seed=1) if "sampling" in sys.argv else dict(temperature=0)

def generate(ids, n, step):
    for row in ids.tolist():
        engine.add(row, SamplingParams(max_new_tokens=n, **chosen))
    while engine.step():
        step()

result = measure(generate)
stats = engine.stats
result["overhead"] = 1 - stats.forward_seconds / stats.step_seconds
print(json.dumps(result))
"""
TRANSFORMERS = """
import torch
from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
torch.set_num_threads(threads)
model = LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
model.generation_config.eos_token_id = None
model.generation_config.pad_token_id = 0

class Step(StoppingCriteria):
    def __init__(self, step):
        self.step = step

    def __call__(self, ids, scores, **_):
        self.step()
        return torch.zeros(len(ids), dtype=torch.bool)

def generate(ids, n, step):
    ids = torch.from_numpy(np.ascontiguousarray(ids))
    criteria = StoppingCriteriaList([Step(step)])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False,
                   stopping_criteria=criteria)

print(json.dumps(measure(generate)))
"""
PADDLENLP = """
import paddle
from paddlenlp.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from paddlenlp.transformers import LlamaForCausalLM
paddle.base.core.set_num_threads(threads)
model = LlamaForCausalLM.from_pretrained(folder, dtype="float32", low_cpu_mem_usage=True)
model.eval()

class Step(StoppingCriteria):
    def __init__(self, step):
        self.step = step

    def __call__(self, input_ids, logits, **_):
        self.step()
        return False

def generate(ids, n, step):
    ids = paddle.to_tensor(np.ascontiguousarray(ids))
    # an end token that is never drawn: the vocabulary has no such id, and all rows run to the end
    model.generate(ids, attention_mask=paddle.ones_like(ids), max_new_tokens=n, decode_strategy="greedy_search",
                   eos_token_id=-1, pad_token_id=0, stopping_criteria=StoppingCriteriaList([Step(step)]))

with paddle.no_grad():
    print(json.dumps(measure(generate)))
"""


def run_side(code: str, folder: Path, *arguments: object) -> dict:
    environment = {**os.environ, "MKL_DEBUG_CPU_TYPE": "5", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": arguments[3]}
    command = [sys.executable, "-c", COMMON + code, str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"A side failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.4b", choices=SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=33, help="tokens generated after it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sampling", action="store_true", help="measure the engine with temperature and top_p too")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        folders = make_folders(Path(work), args.shape)
        print(f"{args.shape}, float32, prompts of {args.prompt}, {args.new} new tokens, {args.threads} threads")
        print(machine(), flush=True)
        sides = {
            "aquila_pd": (OURS, folders["ours"], []),
            "transformers": (TRANSFORMERS, folders["torch"], []),
            "PaddleNLP": (PADDLENLP, folders["llama"], []),
        }
        if args.sampling:
            sides["aquila_pd, sampling"] = (OURS, folders["ours"], ["sampling"])
        figures = {}
        for batch in args.batch:
            sizes = list(map(str, (batch, args.prompt, args.new, args.threads)))
            rounds = []
            for turn in range(args.rounds):
                rounds.append({name: run_side(code, f, *sizes, *more) for name, (code, f, more) in sides.items()})
                print(f"  batch {batch}, round {turn + 1}", file=sys.stderr, flush=True)
            figures[batch] = rounds
        print_tables(figures)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), **vars(args), "figures": figures}, default=str) + "\n")


def make_folders(work: Path, shape: str) -> dict[str, Path]:
    folders = {"torch": random_folder(work / "torch", shape, "float32"), "ours": work / "ours", "llama": work / "llama"}
    convert = [sys.executable, str(ROOT / "convert" / "torch2paddle.py"), "--input", str(folders["torch"])]
    run([*convert, "--output", str(folders["ours"]), "--verify", "none"])
    renaming = multiprocessing.get_context("spawn").Process(
        target=as_paddlenlp_llama, args=(folders["ours"], folders["llama"])
    )
    renaming.start()
    renaming.join()
    return folders


def print_tables(figures: dict[int, list[dict]]) -> None:
    names = list(next(iter(figures.values()))[0])
    for what in ("prefill", "decode"):
        print(f"\n{what}, tokens/s as a ratio to transformers at the same batch, median (min to max)\n")
        print(f"| batch | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
        for batch, rounds in figures.items():
            ratios = {n: [r[n][what] / r["transformers"][what] for r in rounds] for n in names}
            print(f"| {batch} | {' | '.join(spread(ratios[n]) for n in names)} |")
    smallest = min(figures)
    print(f"\ndecode, tokens/s as a ratio to batch {smallest} of the same side and round\n")
    print(f"| batch | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for batch, rounds in figures.items():
        pairs = zip(rounds, figures[smallest], strict=True)
        grown = [{n: a[n]["decode"] / b[n]["decode"] for n in names} for a, b in pairs]
        print(f"| {batch} | {' | '.join(spread([g[n] for g in grown]) for n in names)} |")
    for name in (n for n in names if n.startswith("aquila_pd")):
        shares = {batch: spread([100 * r[name]["overhead"] for r in rounds]) for batch, rounds in figures.items()}
        print(f"\n{name}: time of a step outside the model, percent, by batch: {shares}")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
