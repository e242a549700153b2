"""Training: our step beside transformers' on the same packs, padding left by packing, memory of preparing many rows.

    python benchmarks/training.py step                 a model of 0.13 B (SmolLM2's sizes, random weights)
    python benchmarks/training.py padding FILES --vocab FOLDER
    python benchmarks/training.py memory --rows 10000 1000000

Steps of the two frameworks alternate in one process; what counts is their ratio within a round.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from harness import run  # noqa: E402

import aquila_pd  # noqa: E402, F401  MKL's kernels are chosen before paddle is loaded

SIZES = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    pad_token_id=None,
)


def batch(length: int, samples: int, packs: int):
    """Packs of equal samples: ids, labels, positions, segments, int64 [packs, length]; half of each is learned."""
    import numpy as np

    rng = np.random.default_rng(0)
    each = length // samples
    ids = rng.integers(1, SIZES["vocab_size"], [packs, length])
    places = np.tile(np.arange(each), samples)
    labels = np.roll(ids, -1, axis=1)
    learned = (places >= each // 2) & (places < each - 1)
    return {
        "input_ids": ids,
        "labels": np.where(learned, labels, -100),
        "position_ids": np.broadcast_to(places, ids.shape).copy(),
        "segment_ids": np.broadcast_to(np.repeat(np.arange(1, samples + 1), each), ids.shape).copy(),
    }


def ours(arrays: dict):
    import paddle

    from aquila_pd import AquilaConfig, AquilaForCausalLM
    from aquila_pd.sft.loss import SummedLoss
    from aquila_pd.sft.optimizer import adamw
    from aquila_pd.sft.recipe import Optim

    model = SummedLoss(AquilaForCausalLM(AquilaConfig(**SIZES)))
    model.train()
    optimizer = adamw(model, Optim(), 1e-5)
    inputs = {name: paddle.to_tensor(array) for name, array in arrays.items()}

    def step() -> float:
        loss = model(**inputs) / int((arrays["labels"] != -100).sum())
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        return float(loss)

    return step


def transformers(arrays: dict):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="sdpa"))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95))
    inputs = {name: torch.tensor(array) for name, array in arrays.items()}
    segments = inputs["segment_ids"]
    length = segments.shape[1]
    mask = torch.tril(torch.ones(length, length, dtype=torch.bool)) & (segments[:, :, None] == segments[:, None, :])

    def step() -> float:
        logits = model(
            inputs["input_ids"], attention_mask=mask[:, None], position_ids=inputs["position_ids"], use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def compare_steps(args: argparse.Namespace) -> None:
    import paddle
    import torch

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    paddle.base.core.set_num_threads(threads)
    arrays = batch(args.length, args.samples, args.packs)
    steps = {"aquila_pd": ours(arrays), "transformers": transformers(arrays)}
    for step in steps.values():
        step()
    ratios = []
    for number in range(args.rounds):
        seconds = {}
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[name] = time.perf_counter() - begin
        ratios.append(seconds["transformers"] / seconds["aquila_pd"])
        print(f"  round {number + 1}: {ratios[-1]:.2f}", file=sys.stderr, flush=True)
    print(
        f"{args.packs} x {args.length} tokens of {args.samples} samples, {threads} threads: transformers' step takes "
        f"{statistics.median(ratios):.2f} times ours ({min(ratios):.2f} to {max(ratios):.2f} in {args.rounds} rounds)"
    )


def padding(args: argparse.Namespace) -> None:
    """The share of places that packing leaves empty, over one epoch of real rows."""
    from aquila_pd.chat.prompts import ChatPrompts
    from aquila_pd.sft.data.packing import plan_epoch
    from aquila_pd.sft.data.prepare import TRAIN, prepare
    from aquila_pd.sft.data.samples import Samples
    from aquila_pd.sft.data.settings import DataSpec, Source
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    step = kinds.add_parser("step")
    step.add_argument("--length", type=int, default=1024, help="places of a pack (default: 1024)")
    step.add_argument("--samples", type=int, default=4, help="in a pack (default: 4)")
    step.add_argument("--packs", type=int, default=1, help="of a batch (default: 1)")
    step.add_argument("--rounds", type=int, default=5)
    step.set_defaults(do=compare_steps)
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
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
