"""Conversion beside `cp -r` and beside PaddleNLP's own convert_from_torch, on a random folder of real shape.

    python benchmarks/convert.py --shape 1.3b

Each runs in a process of its own, in turn, its source read from the disk unless --warm. PaddleNLP's route writes into
the folder it reads, so it gets a copy, and its weights are then loaded: it offers no conversion without that.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from checkpoints import SHAPES  # noqa: E402
from harness import compare, forget, machine, mkl_setting, random_folder, run, write_json  # noqa: E402

PADDLENLP = """
import sys
from paddlenlp.transformers import LlamaForCausalLM
LlamaForCausalLM.from_pretrained(sys.argv[1], convert_from_torch=True, dtype="float32")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="0.6b", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--without-paddlenlp", action="store_true", help="leave its route out: it is slow and large")
    parser.add_argument("--warm", action="store_true", help="leave the source in the system's memory between runs")
    parser.add_argument("--json", type=Path, help="write the runs here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        work = Path(work)
        source = random_folder(work / "source", args.shape)
        target = work / "target"
        ours = [
            sys.executable,
            str(ROOT / "convert" / "torch2paddle.py"),
            "--input",
            str(source),
            "--output",
            str(target),
        ]

        def cleared(command):
            shutil.rmtree(target, ignore_errors=True)
            if not args.warm:
                forget(source)
            return run(command)

        commands = {
            "cp -r": lambda: cleared(["cp", "-r", str(source), str(target)]),
            "aquila_pd": lambda: cleared([*ours, "--verify", "none"]),
            "aquila_pd, --verify content": lambda: cleared([*ours, "--verify", "content"]),
        }
        if not args.without_paddlenlp:
            copy = work / "copy"

            def paddlenlp():
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(source, copy)
                if not args.warm:
                    forget(copy)
                return run([sys.executable, "-c", PADDLENLP, str(copy)], {"MKL_DEBUG_CPU_TYPE": mkl_setting()})

            commands["PaddleNLP convert_from_torch"] = paddlenlp
        size = sum(file.stat().st_size for file in source.iterdir()) / 1e9
        cache = "source in memory" if args.warm else "source read from the disk"
        print(f"{args.shape}, {size:.2f} GB bfloat16, {cache}; {machine()}")
        runs = compare(commands, rounds=args.rounds, base="cp -r", warm_up=args.warm)
        write_json(args.json, runs, shape=args.shape, gigabytes=size)


if __name__ == "__main__":
    main()
