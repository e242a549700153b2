"""Preparing training data: padding left by packing, memory of preparing many rows, processor time by encoder.

python benchmarks/preparing.py padding FILES --vocab FOLDER
python benchmarks/preparing.py memory --rows 10000 1000000 --model FOLDER
python benchmarks/preparing.py encoders FILES --vocab FOLDER
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from harness import run  # noqa: E402


def padding(args: argparse.Namespace) -> None:
    """The share of places that packing leaves empty, over one epoch of real rows."""
    from aquila_pd.data.packing import plan_epoch
    from aquila_pd.data.prepare import TRAIN, prepare
    from aquila_pd.data.samples import Samples
    from aquila_pd.data.settings import DataSpec, Source
    from aquila_pd.text.prompts import ChatPrompts
    from aquila_pd.tokenizer import AquilaTokenizer

    prompts = ChatPrompts(AquilaTokenizer.from_pretrained(args.vocab), args.template)
    for length in args.lengths:
        with tempfile.TemporaryDirectory() as place:
            spec = DataSpec(train=(Source(tuple(args.files)),))
            prepare(spec, prompts, length=length, seed=1, folder=Path(place) / "data", workers=1)
            samples = Samples.open(Path(place) / "data" / TRAIN)
            plan = plan_epoch(samples, length=length, seed=1, epoch=0, folder=Path(place) / "plans")
            padded = len(samples) * int(samples.lengths.max())
            print(
                f"length {length}: {len(samples):,} samples of {int(samples.lengths.mean())} tokens in {len(plan):,} "
                f"packs, {plan.padding_share:.2%} padding; every sample padded to the longest: "
                f"{1 - int(samples.lengths.sum()) / padded:.0%}"
            )


def memory(args: argparse.Namespace) -> None:
    """Peak memory of preparing files of so many short rows, each number in a process of its own."""
    found = {}
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            with (folder / "rows.jsonl").open("w") as file:
                for number in range(rows):
                    turns = [{"from": "human", "value": f"q {number}"}, {"from": "gpt", "value": f"a {number}"}]
                    file.write(json.dumps({"id": number, "conversations": turns}) + "\n")
            command = [sys.executable, "-m", "aquila_pd.cli", "data", "prepare", str(folder / "rows.jsonl")]
            command += ["--model", str(Path(args.model).resolve()), "--output", str(folder / "data"), "--workers", "1"]
            command += ["--length", "512", "--deduplicate", "none"]
            found[rows] = run(command, {"PYTHONPATH": str(ROOT)})
            print(f"  {rows:,} rows: {found[rows].anonymous_mb:.0f} MB anonymous", file=sys.stderr, flush=True)
    least = found[min(found)]
    for rows, measured in found.items():
        print(
            f"{rows:>11,} rows: {measured.anonymous_mb:,.0f} MB anonymous memory, "
            f"{measured.anonymous_mb / least.anonymous_mb:.2f} times that of {min(found):,}"
        )


def encoders(args: argparse.Namespace) -> None:
    """Processor seconds of preparing rows by the tokenizers library, and by tiktoken built beforehand, in turn."""
    from aquila_pd.data.prepare import prepare
    from aquila_pd.data.settings import DataSpec, Source
    from aquila_pd.text.prompts import ChatPrompts
    from aquila_pd.tokenizer import AquilaTokenizer

    tokenizers = {name: AquilaTokenizer.from_pretrained(args.vocab) for name in ("library", "tiktoken")}
    tokenizers["library"].fast_ids.refuse()
    tokenizers["tiktoken"].fast_ids.build()
    digests, ratios = set(), []
    for _ in range(args.rounds):
        seconds = {}
        for name, tokenizer in tokenizers.items():
            prompts = ChatPrompts(tokenizer, args.template)
            with tempfile.TemporaryDirectory() as place:
                rows = Path(place) / "rows.jsonl"
                rows.write_text("".join(Path(file).read_text() for file in args.files) * args.copies)
                spec = DataSpec(train=(Source((str(rows),)),), deduplicate="none")
                begin = time.process_time()
                made = prepare(spec, prompts, length=2048, seed=1, folder=Path(place) / "data", workers=1)
                seconds[name] = time.process_time() - begin
            digests.add(made.train["digest"])
        ratios.append(seconds["tiktoken"] / seconds["library"])
        print("  " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()), flush=True)
    assert len(digests) == 1, "the samples differ"
    ratios.sort()
    print(f"{made.train['rows']:,} rows: {ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    share = kinds.add_parser("padding")
    share.add_argument("files", nargs="+")
    share.add_argument("--vocab", required=True, help="folder of a tokenizer")
    share.add_argument("--template", default="aquila-legacy")
    share.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    share.set_defaults(do=padding)
    rows = kinds.add_parser("memory")
    rows.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    rows.add_argument("--model", required=True, help="a converted folder, whose tokenizer is used")
    rows.set_defaults(do=memory)
    by = kinds.add_parser("encoders")
    by.add_argument("files", nargs="+")
    by.add_argument("--vocab", required=True, help="folder of a tokenizer")
    by.add_argument("--template", default="aquila-legacy")
    by.add_argument("--copies", type=int, default=5, help="times that the files are read (default: 5)")
    by.add_argument("--rounds", type=int, default=5)
    by.set_defaults(do=encoders)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
