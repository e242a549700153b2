"""Many clients of one server: mixed prompts and answers, clients that hang up, requests that are wrong; then the good
requests again one after the other, for what batching brings.

    python benchmarks/serving_load.py DIR --clients 64 --seconds 300

Starts `aquila-pd serve DIR` on the loopback interface. Fails when an answer is an error that its request did not ask
for, when the server's memory keeps growing, when anything is left running, or when it does not end with status 0.
"""

import argparse
import asyncio
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from harness import machine  # noqa: E402

SERVE = "import sys; from aquila_pd.serving.command import main; sys.exit(main(sys.argv[1:]))"
WORDS = "the quick brown fox jumps over 今天 天气 很好 你好 please introduce yourself 北京 🙂".split()  # noqa: SIM905
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HANGS_UP, IS_WRONG = 0.1, 0.1  # shares of the requests
GROWTH = 1.03  # of memory from the second quarter of the run to the last: the first may still warm up
SLACK_MB = 16.0
WRONG = (  # (path, body, status)
    (CHAT, {"messages": []}, 400),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}, 400),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "no_such_parameter": 1}, 400),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 10**9}, 400),
    (CHAT, {"model": "no-such-model", "messages": [{"role": "user", "content": "x"}]}, 404),
    (COMPLETIONS, {"prompt": ""}, 400),
    (COMPLETIONS, {"prompt": [-1]}, 400),
    (COMPLETIONS, "not an object", 400),
    ("/nothing", {}, 404),
)


@dataclass
class Asked:
    """One request of the plan. hang_up: seconds after which its client goes; status: what the server is to answer."""

    path: str
    body: object
    stream: bool = False
    hang_up: float | None = None
    status: int = 200


@dataclass
class Answer:
    """What became of one. Seconds; `wrong` says what was not as it should be."""

    kind: str
    first: float | None = None
    whole: float | None = None
    prompt_tokens: int = 0
    new_tokens: int = 0
    wrong: str = ""


@dataclass
class Phase:
    """Everything of one part of the run."""

    answers: list[Answer] = field(default_factory=list)
    done: list[Asked] = field(default_factory=list)  # good requests that were answered to the end
    seconds: float = 0.0
    engine: dict[str, float] = field(default_factory=dict)  # the server's own counts, of this phase

    def tokens(self) -> tuple[int, int]:
        return sum(a.prompt_tokens for a in self.answers), sum(a.new_tokens for a in self.answers)

    def rate(self) -> float:
        """New tokens a second of the requests that were answered to the end."""
        return self.tokens()[1] / self.seconds if self.seconds else 0.0


# --------------------------------------------------------------------------------------------------------- requests


def draw(rng: random.Random, longest: int) -> Asked:
    """A request: short and long prompts and answers, whole and streamed; some hang up, some are wrong."""
    if rng.random() < IS_WRONG:
        path, body, status = rng.choice(WRONG)
        return Asked(path, body, status=status)
    share = rng.choice([0.05, 0.1, 0.2, 0.5])  # of the context
    text = " ".join(rng.choice(WORDS) for _ in range(max(int(longest * share / 6), 1)))  # a word is up to 6 tokens
    new = rng.choice([4, 16, 32, 64, 128])
    asked: dict = {
        "max_tokens": min(new, longest // 4),
        "temperature": rng.choice([0, 0.7, 1]),
        "seed": rng.randrange(99),
    }
    if rng.random() < 0.7:
        path = CHAT
        asked["messages"] = [{"role": "user", "content": text}]
        asked |= {"logprobs": True, "top_logprobs": 2} if rng.random() < 0.1 else {}
    else:
        path = COMPLETIONS
        asked["prompt"] = text
        asked |= {"echo": True, "logprobs": 1} if rng.random() < 0.1 else {}
    asked |= {"n": 2} if rng.random() < 0.1 else {}
    stream = rng.random() < 0.6
    asked |= {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    return Asked(path, asked, stream, rng.uniform(0, 2) if rng.random() < HANGS_UP else None)


async def ask(client: httpx.AsyncClient, asked: Asked) -> Answer:
    """Send one request and judge what comes back."""
    kind = "wrong" if asked.status != 200 else "hangs up" if asked.hang_up is not None else "good"
    answer = Answer(kind)
    begin = time.perf_counter()
    try:
        async with asyncio.timeout(asked.hang_up):
            if asked.stream:
                await read_stream(client, asked, answer, begin)
            else:
                response = await client.post(asked.path, json=asked.body)
                judge(response.status_code, response.text, asked, answer)
        answer.whole = time.perf_counter() - begin
    except TimeoutError:
        if asked.hang_up is None:
            answer.wrong = "the client's own time limit"
    except httpx.HTTPError as error:
        answer.wrong = f"{type(error).__name__}: {error}"
    return answer


async def read_stream(client: httpx.AsyncClient, asked: Asked, answer: Answer, begin: float) -> None:
    async with client.stream("POST", asked.path, json=asked.body) as response:
        if response.status_code != 200:
            judge(response.status_code, (await response.aread()).decode(), asked, answer)
            return
        last = ""
        async for line in response.aiter_lines():
            if not line:
                continue
            answer.first = answer.first or time.perf_counter() - begin
            if '"error"' in line[:20]:
                answer.wrong = line[:300]
            if line != "data: [DONE]" and '"usage":{' in line:
                take_usage(json.loads(line.removeprefix("data: ")), answer)
            last = line
        if last != "data: [DONE]":
            answer.wrong = answer.wrong or f"the stream ended with {last[:100]!r}"


def judge(status: int, text: str, asked: Asked, answer: Answer) -> None:
    if status != asked.status:
        answer.wrong = f"status {status} in place of {asked.status}: {text[:300]}"
    elif status == 200:
        take_usage(json.loads(text), answer)
    elif "error" not in json.loads(text):
        answer.wrong = f"an error without words: {text[:300]}"


def take_usage(found: dict, answer: Answer) -> None:
    answer.prompt_tokens = found["usage"]["prompt_tokens"]
    answer.new_tokens = found["usage"]["completion_tokens"]


# ----------------------------------------------------------------------------------------------------------- phases


async def crowd(url: str, clients: int, seconds: float, longest: int, seed: int) -> Phase:
    """All clients at once, each sending its next request when the last is over."""
    phase, end = Phase(), time.perf_counter() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(number: int) -> None:
            rng = random.Random(f"{seed} {number}")
            while time.perf_counter() < end:
                asked = draw(rng, longest)
                answer = await ask(client, asked)
                phase.answers.append(answer)
                if answer.kind == "good" and not answer.wrong:
                    phase.done.append(asked)

        begin = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(clients)))
        phase.seconds = time.perf_counter() - begin
    return phase


async def queue_of_one(url: str, requests: list[Asked], seconds: float) -> Phase:
    """The same good requests one after the other, as many as there is time for."""
    phase, begin = Phase(), time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for asked in requests:
            phase.answers.append(await ask(client, asked))
            phase.seconds = time.perf_counter() - begin
            if phase.seconds > seconds:
                break
    return phase


async def warm_up(client: httpx.AsyncClient, slots: int, longest: int) -> None:
    """One long prompt in every slot: the cache of keys and values has its full size before memory is watched."""
    body = {"prompt": [5] * (longest - 8), "n": slots, "max_tokens": 8, "logit_bias": {"6": 100}}
    (await client.post(COMPLETIONS, json=body)).raise_for_status()


async def counts(client: httpx.AsyncClient) -> dict[str, float]:
    page = (await client.get("/metrics")).text
    return {name: metric(page, f"{name}_total") for name in ("steps", "new_tokens", "forward_seconds", "step_seconds")}


async def counted(client: httpx.AsyncClient, running: Awaitable[Phase]) -> Phase:
    """A phase with what the engine did meanwhile."""
    before = await counts(client)
    phase = await running
    after = await counts(client)
    phase.engine = {name: after[name] - before[name] for name in after}
    return phase


async def watch_memory(pid: int, samples: list[tuple[float, float]]) -> None:
    """(seconds, resident MB) once a second, until cancelled."""
    begin = time.perf_counter()
    while True:
        samples.append((time.perf_counter() - begin, resident(pid)))
        await asyncio.sleep(1)


def resident(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


# ---------------------------------------------------------------------------------------------------------- verdict


def memory(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Median resident MB of each quarter of the run."""
    size = max(len(samples) // 4, 1)
    quarters = [samples[i * size : (i + 1) * size] or samples[-1:] for i in range(4)]
    return {f"quarter {i}": statistics.median(mb for _, mb in part) for i, part in enumerate(quarters, 1)}


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{p}": ordered[min(int(len(ordered) * p / 100), len(ordered) - 1)] for p in (50, 90, 99) if ordered}


def metric(page: str, name: str) -> float:
    rows = [line for line in page.splitlines() if line.split("{")[0].split(" ")[0] == f"aquila_pd_{name}"]
    return sum(float(line.split()[-1]) for line in rows)


def findings(phases: list[Phase], quarters: dict[str, float], page: str, status: int) -> list[str]:
    """What speaks against the server."""
    found = [f"{a.kind}: {a.wrong}" for phase in phases for a in phase.answers if a.wrong]
    if quarters["quarter 4"] > quarters["quarter 2"] * GROWTH + SLACK_MB:
        found.append(f"memory grew from {quarters['quarter 2']:.0f} to {quarters['quarter 4']:.0f} MB")
    for name in ("engine_errors_total", "nonfinite_logits_total", "log_lines_lost_total", "running_sequences"):
        if metric(page, name):
            found.append(f"{name} is {metric(page, name):.0f} at the end")
    if status:
        found.append(f"the server ended with status {status}")
    return found


def table(together: Phase, alone: Phase, quarters: dict[str, float], clients: int) -> dict:
    """The figures, printed and returned."""
    figures = {}
    for name, phase in ((f"{clients} clients", together), ("1 client", alone)):
        good = [a for a in phase.answers if a.kind == "good" and not a.wrong]
        figures[name] = {
            "seconds": phase.seconds,
            "requests": dict(Counter(a.kind for a in phase.answers)),
            "new tokens/s": phase.rate(),
            "prompt tokens/s": phase.tokens()[0] / phase.seconds if phase.seconds else 0.0,
            "engine": phase.engine,
            "first token": percentiles([a.first for a in good if a.first is not None]),
            "whole answer": percentiles([a.whole for a in good if a.whole is not None]),
        }
    for name, row in figures.items():
        print(f"{name}: {row['requests']} in {row['seconds']:.0f} s")
        print(f"  {row['new tokens/s']:9.1f} new tokens/s  {row['prompt tokens/s']:9.1f} prompt tokens/s")
        for what in ("first token", "whole answer"):
            shown = "  ".join(f"{p} {value * 1000:.0f} ms" for p, value in row[what].items())
            print(f"  {what:12}  {shown}")
        engine = row["engine"]
        busy, model = (engine[name] / row["seconds"] for name in ("step_seconds", "forward_seconds"))
        print(f"  {'engine':12}  {engine['steps']:.0f} steps, busy {busy:.0%} of the time, in the model {model:.0%}")
    ratio = together.rate() / alone.rate() if alone.rate() else float("nan")
    print(f"tokens/s of {clients} clients over one: {ratio:.2f}x")
    print("resident MB: " + "  ".join(f"{name} {mb:.0f}" for name, mb in quarters.items()))
    return {**figures, "ratio": ratio, "memory": quarters}


# -------------------------------------------------------------------------------------------------------------- run


async def measure(url: str, pid: int, args: argparse.Namespace) -> tuple[Phase, Phase, list[tuple[float, float]], str]:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        longest = (await client.get("/v1/models")).json()["data"][0]["max_model_len"]
        await warm_up(client, args.slots, longest)
        samples: list[tuple[float, float]] = []
        watcher = asyncio.create_task(watch_memory(pid, samples))
        together = await counted(client, crowd(url, args.clients, args.seconds, longest, args.seed))
        watcher.cancel()
        alone = await counted(client, queue_of_one(url, together.done, args.serial_seconds or args.seconds / 4))
        end = time.perf_counter() + 30
        while True:
            page = (await client.get("/metrics")).text
            if not metric(page, "running_sequences") or time.perf_counter() > end:
                return together, alone, samples, page
            await asyncio.sleep(0.2)


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path, metavar="DIR", help="converted model with a chat template")
    made.add_argument("--clients", type=int, default=64)
    made.add_argument("--seconds", type=float, default=300, help="with all clients (default: 300)")
    made.add_argument("--serial-seconds", type=float, help="with one (default: a quarter of --seconds)")
    made.add_argument("--slots", type=int, default=16, help="of the server (default: 16)")
    made.add_argument("--max-length", type=int, default=1024, help="of prompt and answer in tokens (default: 1024)")
    made.add_argument("--template", help="see aquila-pd serve")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = made.parse_args()
    command = [sys.executable, "-c", SERVE, str(args.folder), "--port", "0", "--slots", str(args.slots)]
    command += ["--max-length", str(args.max_length)]
    command += ["--max-queue", str(args.clients * 2)]  # nobody is to be refused
    command += ["--template", args.template] if args.template else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    try:
        line = server.stdout.readline()
        if not line:
            raise SystemExit("The server did not start; run `aquila-pd serve` on the folder to see why.")
        together, alone, samples, page = asyncio.run(measure(line.split()[-1], server.pid, args))
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    finally:
        server.kill()
    quarters = memory(samples)
    print(machine())
    figures = table(together, alone, quarters, args.clients)
    found = findings([together, alone], quarters, page, status)
    for reason, count in Counter(found).most_common(10):
        print(f"WRONG {count} x {reason}")
    print("failed" if found else "passed: every error was the client's own, and memory stayed flat")
    if args.json:
        content = {"machine": machine(), "slots": args.slots, "max_length": args.max_length, **figures}
        content |= {"wrong": found, "rss": samples}
        content["answers"] = [asdict(answer) for answer in together.answers]
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
