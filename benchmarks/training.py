"""Training: our step beside others' on the same rows, padding left by packing, memory of preparing many rows.

    python benchmarks/training.py step --shape 0.4b-4 --recompute
    python benchmarks/training.py step --packs 1 --length 4096 --rounds 1 --warm-up 0 --sides aquila_pd
    python benchmarks/training.py padding FILES --vocab FOLDER
    python benchmarks/training.py memory --rows 10000 1000000

Weights are random. Each side of a step is a process of its own, so that its peak memory is its own; steps alternate,
and what counts is their ratio within a round.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from checkpoints import BLOCK, SHAPES, TIED  # noqa: E402
from device import paddle_device, torch_device  # noqa: E402
from harness import machine, run  # noqa: E402
from ratios import case_table  # noqa: E402
from workers import Worker  # noqa: E402

import aquila_pd  # noqa: E402, F401  MKL's kernels are chosen before paddle is loaded

OURS, NLP, TORCH, FUSED = "aquila_pd", "PaddleNLP", "transformers", "transformers, fused AdamW"
RATE, BETAS, EPSILON = 1e-5, (0.9, 0.95), 1e-8
WARM_UP = 3  # steps: state of AdamW is made in the first, and freed memory finds its places


def sizes(shape: str) -> dict:
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    return dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=shape in TIED,
        pad_token_id=None,
    )


def batch(shape: str, *, packs: int, length: int, samples: int) -> dict:
    """Packs of equal samples: ids, labels, positions, segments, int64 [packs, length]; all places are learned, but the
    last of each sample where there are several."""
    import numpy as np

    each = length // samples
    ids = np.random.default_rng(0).integers(1, SHAPES[shape][-1], [packs, length])
    places = np.tile(np.arange(each), samples)
    labels = np.roll(ids, -1, axis=1)
    return {
        "input_ids": ids,
        "labels": labels if samples == 1 else np.where(places < each - 1, labels, -100),
        "position_ids": np.broadcast_to(places, ids.shape).copy(),
        "segment_ids": np.broadcast_to(np.repeat(np.arange(1, samples + 1), each), ids.shape).copy(),
    }


def who_sees_whom(arrays: dict):
    """Booleans [packs, 1, length, length] for those who know no segments; None for rows of one sample."""
    import numpy as np

    segments = arrays["segment_ids"]
    if segments.max() == 1:
        return None
    same = segments[:, :, None] == segments[:, None, :]
    return (same & np.tri(segments.shape[1], dtype=bool))[:, None]


class Ours:
    """What the trainer of aquila_pd.sft runs."""

    def __init__(self, shape: str, *, threads: int, recompute: bool, samples: int):
        from aquila_pd import AquilaConfig, AquilaForCausalLM
        from aquila_pd.heap import keep_freed_memory
        from aquila_pd.sft.loss import SummedLoss
        from aquila_pd.sft.optimizer import adamw
        from aquila_pd.sft.recipe import Optim

        keep_freed_memory()
        self.device = paddle_device(threads)
        self.model = SummedLoss(_constant_then_random(lambda: AquilaForCausalLM(AquilaConfig(**sizes(shape)))))
        self.model.train()
        self.model.model.aquila.enable_recompute = recompute
        self.optimizer = adamw(self.model, Optim(betas=BETAS, eps=EPSILON), RATE)

    def step(self, arrays: dict) -> float:
        import paddle

        inputs = {name: paddle.to_tensor(array) for name, array in arrays.items()}
        loss = self.model(**inputs) / int((arrays["labels"] != -100).sum())
        loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad()
        return float(loss)


class PaddleNLP:
    def __init__(self, shape: str, *, threads: int, recompute: bool, samples: int):
        import paddle
        from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM

        self.device = paddle_device(threads)
        self.model = _constant_then_random(lambda: LlamaForCausalLM(LlamaConfig(**sizes(shape))))
        self.model.train()
        self.model.llama.enable_recompute = recompute
        self.optimizer = paddle.optimizer.AdamW(
            RATE, *BETAS, EPSILON, parameters=self.model.parameters(), weight_decay=0.0
        )

    def step(self, arrays: dict) -> float:
        import paddle

        given = {name: paddle.to_tensor(arrays[name]) for name in ("input_ids", "labels", "position_ids")}
        mask = who_sees_whom(arrays)
        given |= {} if mask is None else {"attention_mask": paddle.to_tensor(mask)}
        loss = self.model(**given, return_dict=True).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad()
        return float(loss)


class Transformers:
    """AdamW as torch.optim has it by default, or fused."""

    fused = None

    def __init__(self, shape: str, *, threads: int, recompute: bool, samples: int):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        self.device = torch_device(threads)
        self.model = LlamaForCausalLM(LlamaConfig(**sizes(shape), attn_implementation="sdpa")).to(self.device.name)
        self.model.train()
        if recompute:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=self.fused
        )

    def step(self, arrays: dict) -> float:
        import torch

        given = {name: torch.from_numpy(array).to(self.model.device) for name, array in arrays.items()}
        mask = who_sees_whom(arrays)
        mask = None if mask is None else torch.from_numpy(mask).to(self.model.device)
        logits = self.model(
            given["input_ids"], attention_mask=mask, position_ids=given["position_ids"], use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given["labels"].flatten(), ignore_index=-100)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class TransformersFused(Transformers):
    fused = True


def _constant_then_random(make):
    """The model that make() builds, with random matrices; Paddle's own drawing takes longer than a step."""
    import numpy as np
    import paddle

    initializer = paddle.nn.initializer
    initializer.set_global_initializer(initializer.Constant(1.0))
    model = make()
    initializer.set_global_initializer(None)
    block = np.random.default_rng(1).standard_normal(BLOCK).astype("float32") * 0.02
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.set_value(np.resize(block, parameter.shape))
    return model


def one_step(side, *, shape: str, packs: int, length: int, samples: int) -> dict:
    """Seconds of a step, of the wall clock and of the processor; the loss before it; the peak memory so far, MB."""
    arrays = batch(shape, packs=packs, length=length, samples=samples)
    cpu, begin = time.process_time(), side.device.mark()
    loss = side.step(arrays)
    (seconds,) = side.device.seconds([begin, side.device.mark()])
    return {"seconds": seconds, "cpu": time.process_time() - cpu, "loss": loss, "peak_mb": side.device.peak() / 1e6}


SIDES = {OURS: Ours, NLP: PaddleNLP, TORCH: Transformers, FUSED: TransformersFused}
MEASURES = {"step": one_step}


def compare_steps(args: argparse.Namespace) -> None:
    """Every side in a process of its own, its steps in turn with the others'."""
    settings = dict(threads=len(os.sched_getaffinity(0)), recompute=args.recompute, samples=args.samples)
    given = dict(do="step", shape=args.shape, packs=args.packs, length=args.length, samples=args.samples)
    found: dict[str, list[dict]] = {side: [] for side in args.sides}
    with ExitStack() as stack:
        workers = {}
        for side in args.sides:
            asked = dict(module="training", side=side, source=args.shape, settings=settings)
            workers[side] = Worker(asked, environment={})
            stack.callback(workers[side].close)
        for number in range(args.warm_up + args.rounds):
            for side, worker in workers.items():
                time.sleep(0.3)  # the others' threads wait in a loop for a moment before they sleep
                measured = worker.ask(given)
                if number >= args.warm_up:
                    found[side].append(measured)
            print(f"  round {number + 1 - args.warm_up}", file=sys.stderr, flush=True)
    again = ", recompute" if args.recompute else ""
    print(f"{args.shape}, {args.packs} x {args.length} tokens, samples in a row: {args.samples}{again}; {machine()}")
    print(case_table("step", found, args.sides[0]))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), **given, **settings, "rounds": found}, indent=2) + "\n")


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
    step.add_argument("--shape", choices=SHAPES, default="0.4b-4", help="of checkpoints.py (default: 0.4b-4)")
    step.add_argument("--packs", type=int, default=2, help="rows of a batch (default: 2)")
    step.add_argument("--length", type=int, default=256, help="places of a row (default: 256)")
    step.add_argument("--samples", type=int, default=1, help="in a row (default: 1)")
    step.add_argument("--recompute", action="store_true", help="each layer again in the backward pass")
    step.add_argument("--sides", nargs="+", choices=SIDES, default=[TORCH, FUSED, NLP, OURS], help="default: all")
    step.add_argument("--rounds", type=int, default=5)
    step.add_argument("--warm-up", type=int, default=WARM_UP, help=f"steps before (default: {WARM_UP})")
    step.add_argument("--json", type=Path, help="write all figures there")
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
