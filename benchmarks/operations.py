"""What a device takes for each fused operation beside its plain twin, forward and forward with backward.

    python benchmarks/operations.py [--tokens 512] [--threads 1]

The two take turns, so that a busy machine slows both alike; the figure is the ratio to the plain twin, median and
spread over the rounds. Below 1 the plain one takes longer. On a CPU these are the operations of ops/cpu.py and
ops/cpu_training.py.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [folder for folder in (str(HERE.parent), str(HERE)) if folder not in sys.path]

import aquila_pd  # noqa: E402, F401  before paddle, for its choice of matrix kernels

# isort: split
import paddle  # noqa: E402
from harness import machine  # noqa: E402

from aquila_pd.fusion_ops import TWINS  # noqa: E402
from aquila_pd.ops import threads  # noqa: E402
from aquila_pd.ops.attention_mask import Mask, PackedMask  # noqa: E402
from aquila_pd.ops.rope import Angles  # noqa: E402
from aquila_pd.runtime.malloc import keep_freed_memory  # noqa: E402

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD = 1024, 4096, 16, 4, 64
SAMPLES = 4  # in a row of packed attention


def arguments(name: str, T: int, S: int) -> tuple:
    """Arguments of one operation for T queries over S keys, batch 1."""
    if name == "rms_norm":
        return paddle.randn([1, T, HIDDEN]), paddle.ones([HIDDEN]), 1e-5
    if name == "swiglu":
        return paddle.randn([1, T, INTERMEDIATE]), paddle.randn([1, T, INTERMEDIATE])
    q = paddle.randn([1, T, HEADS, HEAD])
    if name == "rope":
        return q, paddle.randn([1, T, KV_HEADS, HEAD]), Angles(*paddle.randn([2, 1, T, 1, HEAD]))
    k, v = paddle.randn([2, 1, KV_HEADS, S, HEAD])
    if name == "attention":
        return q, k, v, Mask.of_chunk(T, S, S)
    return q, k, v, PackedMask(paddle.arange(T).unsqueeze(0) * SAMPLES // T)


def seconds(function: Callable, given: tuple, backward: bool) -> float:
    for tensor in given:
        if isinstance(tensor, paddle.Tensor):
            tensor.stop_gradient = not backward
    start = time.perf_counter()
    with paddle.set_grad_enabled(backward):
        out = function(*given)
        out = out[0] if isinstance(out, tuple) else out
        if backward:
            out.sum().backward()
    float(out.flatten()[0])  # wait for a device that runs behind
    return time.perf_counter() - start


def ratio(twins, given: tuple, *, backward: bool, rounds: int) -> str:
    seconds(twins.plain, given, backward)  # what fails here are the arguments
    try:
        seconds(twins.fused, given, backward)
    except Exception as error:  # the doctor says which kernel is missing
        return f"not available ({type(error).__name__})"
    found = []
    for _ in range(rounds):
        plain = min(seconds(twins.plain, given, backward) for _ in range(3))
        found.append(min(seconds(twins.fused, given, backward) for _ in range(3)) / plain)
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def cells(twins, kind: str, T: int, rounds: int) -> list[str]:
    """A prompt, a prompt with its gradients, a step over keys that are there; "-" for what is never asked of it."""
    prompt = arguments(twins.name, T, T)
    differentiated = kind not in twins.no_backward_on
    return [
        ratio(twins, prompt, backward=False, rounds=rounds),
        ratio(twins, prompt, backward=True, rounds=rounds) if differentiated else "-",
        "-"
        if twins.name == "packed_attention"
        else ratio(twins, arguments(twins.name, 1, 4 * T), backward=False, rounds=rounds),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="length of the prompt (default: 512)")
    parser.add_argument("--threads", type=int, default=1, help="of Paddle on a CPU (default: 1)")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    keep_freed_memory()  # as models do
    threads.use(args.threads)
    paddle.seed(0)
    T, device = args.tokens, paddle.device.get_device()
    print(f"{device}, {args.threads} threads; {machine()}\n")
    print(f"| time, plain = 1 | forward, {T} tokens | with backward, {T} tokens | forward, 1 token over {4 * T} |")
    print("|---|---|---|---|")
    kind = device.split(":")[0]
    for twins in TWINS:
        print(f"| {twins.name} | {' | '.join(cells(twins.on(kind), kind, T, args.rounds))} |", flush=True)


if __name__ == "__main__":
    main()
