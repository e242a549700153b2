"""Tokenizer throughput: AquilaTokenizer beside transformers' and PaddleNLP's tokenizers, same files, same texts.

    python benchmarks/tokenizer.py --vocab DIR [--texts FILE ...] [--rounds N] [--json FILE]

DIR holds vocab.json and merges.txt. Texts come from .jsonl rows ("text" or "conversations") or plain files, by
default from the shared data beside the project. The tokenizers take turns within each round, so that a busy machine
slows all of them alike, and the ratio to transformers is taken round by round; each round once with the library's
default of threads and once with one. Every tokenizer's ids are compared first.

Speeds are those of a process that has encoded for a while: AquilaTokenizer builds its tiktoken twin only after some
millions of characters. How long that takes, and what it is without the twin, stands in rows of its own.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
OURS, REFERENCE, SLOW = "AquilaTokenizer", "GPT2TokenizerFast", "PaddleNLP GPTTokenizer"
WITHOUT = "AquilaTokenizer without twin"
THREADS = "TOKENIZERS_PARALLELISM"  # read at every call, by the library and by us
ONE_THREAD = " on one thread"
PADDED = {"padding": True, "truncation": True, "max_length": 512, "return_tensors": "np"}
# The pure Python tokenizer gets every 20th text: new words cost it minutes for all of them. It remembers the words of
# the warming round, so its number here is the best it can do, not what fresh text would give.
SLOW_SHARE = 20


def read_texts(files: list[Path]) -> list[str]:
    """Rows of .jsonl files (their "text", or each turn of their "conversations"), and other files whole."""
    texts = []
    for file in files:
        content = file.read_text(encoding="utf-8")
        if file.suffix != ".jsonl":
            texts.append(content)
            continue
        for row in map(json.loads, content.splitlines()):
            texts += [row["text"]] if "text" in row else [turn["value"] for turn in row["conversations"]]
    return texts


def load_tokenizers(folder: Path) -> dict[str, Callable]:
    from paddlenlp.transformers import GPTTokenizer
    from transformers import GPT2TokenizerFast

    from aquila_pd import AquilaTokenizer

    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    ours, without = (AquilaTokenizer.from_pretrained(str(folder)) for _ in range(2))
    without.fast_ids.refuse()
    names = {name: token for name, token in ours.special_tokens_map.items() if isinstance(token, str)}
    found = {OURS: ours, WITHOUT: without}
    added = ours.added_tokens_decoder
    found[REFERENCE] = GPT2TokenizerFast(*files, **names, added_tokens_decoder=added, padding_side="left")
    try:
        found[SLOW] = GPTTokenizer(*files, **names)
    except Exception as error:  # a comparison more or less must not end the benchmark
        print(f"{SLOW} does not load these files and is left out: {error!r}")
    return found


def megabytes(texts: list[str]) -> float:
    return sum(len(text.encode("utf-8")) for text in texts) / 1e6


def measure(tokenizers: dict[str, Callable], texts: list[str], *, rounds: int) -> dict[str, list[float]]:
    """MB/s of every tokenizer in every round, {name: [round ...]}; the first, warming round is not counted."""
    speeds: dict[str, list[float]] = {}
    chosen = os.environ.get(THREADS)
    for turn in range(rounds + 1):
        for threads in ("", ONE_THREAD):
            if threads:
                os.environ[THREADS] = "false"
            for name, tokenizer in list(tokenizers.items())[:: 1 if turn % 2 else -1]:  # who goes first changes
                sample = texts[::SLOW_SHARE] if name == SLOW else texts
                for kind, options in {"ids": {}, "padded arrays": PADDED}.items():
                    if name == SLOW and (threads or kind != "ids"):
                        continue
                    start = time.perf_counter()
                    tokenizer(sample, **options)
                    seconds = time.perf_counter() - start
                    if turn > 0:
                        speeds.setdefault(f"{name}, {kind}{threads}", []).append(megabytes(sample) / seconds)
            os.environ.pop(THREADS, None)
            if chosen is not None:
                os.environ[THREADS] = chosen
    return speeds


def seconds_once(folder: Path, tokenizers: dict[str, Callable], *, rounds: int = 5) -> dict[str, dict]:
    """Seconds of what a process does once: loading both fast tokenizers in turn, and building the twin."""
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    works = {
        f"loading {OURS}": lambda: type(tokenizers[OURS]).from_pretrained(str(folder)),
        f"loading {REFERENCE}": lambda: type(tokenizers[REFERENCE])(*files),
        "building the twin": tokenizers[OURS].fast_ids.build,
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: spread(values) for name, values in times.items()}


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def summary(speeds: dict[str, list[float]]) -> dict[str, dict]:
    """Spread of the speeds, and of the ratios to transformers taken round by round."""
    table = {}
    for name, values in speeds.items():
        reference = speeds[f"{REFERENCE}, {name.rpartition(', ')[2]}"]
        ratios = [value / other for value, other in zip(values, reference, strict=True)]
        table[name] = {"MB/s": spread(values), "ratio": spread(ratios)}
    return table


def show(table: dict[str, dict]) -> None:
    print(f"{'tokenizer':<58}{'MB/s  min':>10}{'median':>8}{'max':>8}{'ratio  min':>14}{'median':>8}{'max':>8}")
    for name, row in table.items():
        numbers = [*row["MB/s"].values(), *row["ratio"].values()]
        widths = (10, 8, 8, 14, 8, 8)
        print(f"{name:<58}" + "".join(f"{n:>{w}.2f}" for n, w in zip(numbers, widths, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=Path, required=True, help="folder with vocab.json and merges.txt")
    parser.add_argument("--texts", type=Path, nargs="+", help="files of text (default: the shared data)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count (default: 15)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()

    shared = ROOT.parent / "shared"
    defaults = ["data/alpaca_sharegpt.jsonl", "data/multi_turn.jsonl", "tokenizer/golden_dev.jsonl"]
    texts = read_texts(arguments.texts or [shared / name for name in defaults])
    tokenizers = load_tokenizers(arguments.vocab)
    if tokenizers[OURS](texts)["input_ids"] != tokenizers[REFERENCE](texts)["input_ids"]:
        print(f"{OURS} and {REFERENCE} give different ids on these texts: nothing was measured.")
        return 1
    once = seconds_once(arguments.vocab, tokenizers)
    if tokenizers[OURS](texts)["input_ids"] != tokenizers[REFERENCE](texts)["input_ids"]:
        print(f"{OURS}'s twin gives different ids on these texts: nothing was measured.")
        return 1
    print(f"{len(texts)} texts, {megabytes(texts):.2f} MB; ids equal; {arguments.rounds} rounds")
    table = summary(measure(tokenizers, texts, rounds=arguments.rounds))
    show(table)
    for name, row in once.items():
        print(f"{name}, seconds once in a process: {row['median']:.2f} ({row['min']:.2f} to {row['max']:.2f})")
    if arguments.json:
        setting = {
            "texts": len(texts),
            "megabytes": megabytes(texts),
            "rounds": arguments.rounds,
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            THREADS: os.environ.get(THREADS),
        }
        arguments.json.write_text(
            json.dumps({"setting": setting, "results": table, "once": once}, indent=2), encoding="utf-8"
        )
    worst = min(row["ratio"]["median"] for name, row in table.items() if name.startswith(f"{OURS},"))
    print(f"{OURS} over {REFERENCE}, median of the rounds, slowest of the four uses: {worst:.2f}")
    return 0 if worst >= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
