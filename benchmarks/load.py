"""Loading a checkpoint: ours beside PaddleNLP's LLaMA (as it comes, and with its low-memory path), transformers, and
a plain read of the files.

    python benchmarks/load.py --shape 0.6b

Each loads in a process of its own, in turn, to float32; the imports, which are most of a small load, are timed by
an "import only" row of each library and taken off by whoever wants to.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from checkpoints import SHAPES  # noqa: E402
from harness import compare, machine, random_folder, run, write_json  # noqa: E402

READ = """
import sys, pathlib
buffer = bytearray(1 << 24)
for file in pathlib.Path(sys.argv[1]).glob("*.safetensors"):
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
"""
# transformers maps float32 files and reads nothing until a weight is used, so each side uses every weight once.
TOUCH = """
def touch(model):
    for parameter in model.parameters():
        parameter.max()
"""
OURS = """
import sys
from aquila_pd import AquilaForCausalLM
if len(sys.argv) > 1:
    touch(AquilaForCausalLM.from_pretrained(sys.argv[1], dtype="float32"))
"""
PADDLENLP = """
import sys
from paddlenlp.transformers import LlamaForCausalLM
if len(sys.argv) > 1:
    touch(LlamaForCausalLM.from_pretrained(sys.argv[1], dtype="float32", low_cpu_mem_usage=len(sys.argv) > 2))
"""
TRANSFORMERS = """
import sys, torch
from transformers import LlamaForCausalLM
if len(sys.argv) > 1:
    touch(LlamaForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32))
"""


def python(code: str, *arguments: object):
    environment = {"MKL_DEBUG_CPU_TYPE": "5", "PYTHONPATH": str(ROOT)}
    return lambda: run([sys.executable, "-c", TOUCH + code, *map(str, arguments)], environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.6b", choices=SHAPES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--without-paddlenlp", action="store_true", help="leave its slow default path out")
    parser.add_argument("--json", type=Path, help="write the runs here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        torch_folder = random_folder(Path(work) / "torch", args.shape, args.dtype)
        ours, llama = Path(work) / "ours", Path(work) / "llama"
        convert = [sys.executable, str(ROOT / "convert" / "torch2paddle.py"), "--input", str(torch_folder)]
        run([*convert, "--output", str(ours), "--verify", "none"])
        # In a process of its own: a child's peak memory begins with its parent's.
        renaming = multiprocessing.get_context("spawn").Process(target=as_paddlenlp_llama, args=(ours, llama))
        renaming.start()
        renaming.join()
        commands = {
            "transformers": python(TRANSFORMERS, torch_folder),
            "transformers, import only": python(TRANSFORMERS),
            "plain read": python(READ, ours),
            "aquila_pd": python(OURS, ours),
            "aquila_pd, import only": python(OURS),
            "PaddleNLP LLaMA, low_cpu_mem_usage": python(PADDLENLP, llama, "low"),
        }
        if not args.without_paddlenlp:
            commands["PaddleNLP LLaMA"] = python(PADDLENLP, llama)
        size = sum(file.stat().st_size for file in ours.glob("*.safetensors")) / 1e9
        print(f"{args.shape}, {size:.2f} GB {args.dtype} to float32; {machine()}")
        runs = compare(commands, rounds=args.rounds, base="transformers")
        write_json(args.json, runs, shape=args.shape, gigabytes=size, dtype=args.dtype)


def as_paddlenlp_llama(ours: Path, llama: Path) -> None:
    """The same weights under the names of PaddleNLP's LLaMA."""
    from aquila_pd.shards import read_layout, save_tensors, view

    layout = read_layout(ours)
    tensors = ((name.replace("aquila.", "llama.", 1), view(info)) for name, info in layout.items())
    llama.mkdir()
    save_tensors(llama, tensors, max_shard_size="2GB")
    config = json.loads((ours / "config.json").read_text())
    config.update(architectures=["LlamaForCausalLM"], model_type="llama")
    (llama / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
