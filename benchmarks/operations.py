"""Fused twins beside plain ones, forward and forward with backward, on the device at hand.

    python benchmarks/operations.py [--tokens 512] [--threads 1]

The two take turns, so that a busy machine slows both alike; the figure is the ratio fused to plain, median and
spread over the rounds. Below 1 the fused twin is faster. This is why a CPU takes operations of cpu_ops.py.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).parent)]

import paddle  # noqa: E402
from harness import machine  # noqa: E402

import aquila_pd  # noqa: E402, F401  before paddle, for its choice of matrix kernels
from aquila_pd import threads  # noqa: E402
from aquila_pd.fusion_ops import TWINS  # noqa: E402
from aquila_pd.masks import causal_mask  # noqa: E402

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD = 1024, 4096, 16, 4, 64


def arguments(name: str, T: int, S: int) -> tuple:
    """Arguments of one operation for T queries over S keys, batch 1."""
    if name == "rms_norm":
        return paddle.randn([1, T, HIDDEN]), paddle.ones([HIDDEN]), 1e-5
    if name == "swiglu":
        return paddle.randn([1, T, INTERMEDIATE]), paddle.randn([1, T, INTERMEDIATE])
    q, k = paddle.randn([1, T, HEADS, HEAD]), paddle.randn([1, T, KV_HEADS, HEAD])
    if name == "rope":
        return q, k, paddle.randn([1, T, 1, HEAD]), paddle.randn([1, T, 1, HEAD])
    k = paddle.randn([1, KV_HEADS, S, HEAD])
    return q, k, paddle.randn([1, KV_HEADS, S, HEAD]), causal_mask(paddle.ones([1, S], dtype="bool"), T)


def seconds(function, given: tuple, backward: bool) -> float:
    for tensor in given:
        if isinstance(tensor, paddle.Tensor) and tensor.is_floating_point():
            tensor.stop_gradient = not backward
    start = time.perf_counter()
    out = function(*given)
    out = out[0] if isinstance(out, tuple) else out
    if backward:
        out.sum().backward()
    float(out.flatten()[0])  # wait for a device that runs behind
    return time.perf_counter() - start


def ratio(twins, given: tuple, *, backward: bool, rounds: int) -> str:
    try:
        seconds(twins.fused, given, backward)
    except Exception as error:  # the doctor says which kernel is missing
        return f"not available ({type(error).__name__})"
    found = []
    for _ in range(rounds):
        plain = min(seconds(twins.plain, given, backward) for _ in range(3))
        found.append(min(seconds(twins.fused, given, backward) for _ in range(3)) / plain)
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="length of the prompt (default: 512)")
    parser.add_argument("--threads", type=int, default=1, help="of Paddle on a CPU (default: 1)")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    threads.use(args.threads)
    paddle.seed(0)
    T = args.tokens
    print(f"{paddle.device.get_device()}, {args.threads} threads; {machine()}\n")
    print(f"| fused / plain | forward, {T} tokens | with backward, {T} tokens | forward, 1 token over {4 * T} |")
    print("|---|---|---|---|")
    for twins in TWINS:
        prompt, step = arguments(twins.name, T, T), arguments(twins.name, 1, 4 * T)
        cells = [
            ratio(twins, prompt, backward=False, rounds=args.rounds),
            ratio(twins, prompt, backward=True, rounds=args.rounds),
            ratio(twins, step, backward=False, rounds=args.rounds),
        ]
        print(f"| {twins.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
