"""What is measured, as data: parts with their cases and sides, and the ratios with the bars of issue 6."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ratios import HIGH, Measured, Of, Ratio

# Shapes of checkpoints.py: the issue's, four layers of it, and SmolLM2-135M's.
AQUILA, FOUR_LAYERS, SMOL = "0.4b", "0.4b-4", "135m"
OURS, TORCH, LAST, NLP, LIMIT = "aquila_pd", "transformers", "transformers, last position", "PaddleNLP", "limit"
DRAWING = "aquila_pd, sampling"


@dataclass(frozen=True)
class Side:
    """Who is measured. program: in the part's module's SIDES; source: the folder it loads, or "shape" for the name of
    the shape instead of a folder."""

    name: str
    program: str
    source: str
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """What every side of a part is asked."""

    name: str
    request: dict


@dataclass(frozen=True)
class Part:
    """Cases that the same sides are asked, in turn, in processes that stay; with `fresh` in a new one each time, once:
    memory hardly varies, and what was used before would hide it. base: the side that tables show ratios to."""

    name: str
    about: str
    shape: str
    sides: tuple[Side, ...]
    cases: tuple[Case, ...]
    base: str
    module: str = "generation"
    fresh: bool = False


@dataclass(frozen=True)
class Script:
    """A benchmark with a command of its own, which takes --rounds and writes what it measured with --json.

    arguments: further ones; "{vocab}" stands for the folder of --vocab, "{work}" for the one with random weights,
    "{model}" for --model.
    read: from that JSON to figures by case and side. rounds: other than the run's. needs: an option of bench.py without
    which it is left out.
    """

    name: str
    about: str
    script: str
    arguments: tuple[str, ...]
    read: Callable[[dict], Measured]
    rounds: int | None = None
    needs: str = ""


def starts(content: dict) -> Measured:
    """What start.py writes: whole commands; `beyond` is without an empty Python's start in the same round."""
    runs = content["runs"]
    empty = [one["wall"] for one in runs["python -c pass"]]
    return {
        "start": {
            side: [
                {"seconds": one["wall"], "beyond": one["wall"] - wall, "cpu": one["cpu"], "peak_mb": one["peak_mb"]}
                for one, wall in zip(some, empty, strict=True)
            ]
            for side, some in runs.items()
        }
    }


def loads(content: dict) -> Measured:
    """What load.py writes: a table for each dtype of the files and state of the system's memory."""
    found: Measured = {}
    for table in content["tables"]:
        runs = table["runs"]
        case = f"load {table['dtype']}, {table['state']}"
        found[case] = {
            side: [{"seconds": one["seconds"], "peak_mb": one["peak"] / 1e6} for one in some]
            for side, some in runs.items()
        }
        found[case]["weights"] = [{"peak_mb": table["weights"] / 1e6}] * max(map(len, runs.values()))
    return found


def tokenizing(content: dict) -> Measured:
    """What tokenizer.py writes: ratios of speed to transformers' tokenizer, and seconds of what is done once.

    It keeps three figures of all its rounds, which stand for rounds here.
    """
    kept = ("min", "median", "max")
    found = {name: [{"speed": row["ratio"][k]} for k in kept] for name, row in content["results"].items()}
    found |= {name: [{"once": row[k]} for k in kept] for name, row in content["once"].items()}
    return {"tokenizer": found}


GENERATION = {
    OURS: Side(OURS, "aquila_pd", "ours"),
    TORCH: Side(TORCH, "transformers", "torch"),
    LAST: Side(LAST, "transformers", "torch", {"last": True}),
    NLP: Side(NLP, "PaddleNLP", "llama"),
    LIMIT: Side(LIMIT, "limit", "shape"),
    DRAWING: Side(DRAWING, "aquila_pd", "ours", {"sampling": True}),
}


def sides(*names: str) -> tuple[Side, ...]:
    return tuple(GENERATION[name] for name in names)


def training(name: str, *, batch: int, length: int, recompute: bool = False, **more: int) -> Case:
    return Case(name, {"do": "step", "batch": batch, "length": length, "recompute": recompute, **more})


def decode(name: str, *, batch: int = 1, length: int = 128, new: int = 33) -> Case:
    return Case(name, {"do": "decode", "batch": batch, "length": length, "new": new})


def lengths(kind: str, *sizes: int, name: str = "") -> tuple[Case, ...]:
    return tuple(Case(f"{name or kind} {length}", {"do": kind, "length": length}) for length in sizes)


BATCHES = tuple(decode(f"decode batch {batch}", batch=batch) for batch in (1, 4, 16))
PARTS: tuple[Part | Script, ...] = (
    Part("prefill", "reading a prompt", AQUILA, sides(OURS, LAST, TORCH, NLP), lengths("prefill", 512, 2048), LAST),
    Part("decode", "batch 1, 4, 16 behind 128 tokens", AQUILA, sides(OURS, TORCH, NLP, LIMIT), BATCHES, TORCH),
    Part(
        "context",
        "decoding behind 2048 tokens",
        AQUILA,
        sides(OURS, TORCH, NLP),
        (decode("decode at 2048", length=2048, new=17),),
        TORCH,
    ),
    Part(
        "prefill-135m",
        "reading a prompt, small",
        SMOL,
        sides(OURS, LAST, TORCH, NLP),
        lengths("prefill", 512, 2048, name="prefill 135M"),
        LAST,
    ),
    Part("decode-135m", "decoding, small", SMOL, sides(OURS, TORCH, NLP, LIMIT), (decode("decode 135M"),), TORCH),
    Part(
        "memory",
        "what a prompt takes beyond the weights",
        AQUILA,
        sides(OURS, LAST, TORCH, NLP),
        lengths("memory", 512, 1024, 2048, 4096),
        LAST,
        fresh=True,
    ),
    Part(
        "sampling",
        "temperature and top_p beside greedy",
        AQUILA,
        sides(OURS, DRAWING),
        tuple(decode(f"sampling batch {batch}", batch=batch) for batch in (1, 16)),
        OURS,
    ),
    Part(
        "training",
        "a step of 2 x 256 tokens, four layers",
        FOUR_LAYERS,
        sides(OURS, TORCH, NLP),
        (
            training("training step", batch=2, length=256),
            training("training step, recompute", batch=2, length=256, recompute=True),
        ),
        TORCH,
        module="training_sides",
    ),
    Part(
        "training-135m",
        "a step of 2 x 256 tokens, small",
        SMOL,
        sides(OURS, TORCH, NLP),
        (training("training step 135M", batch=2, length=256),),
        TORCH,
        module="training_sides",
    ),
    Part(
        "training-packed",
        "a step of 1 x 1024 tokens, eight samples in the row, four layers",
        FOUR_LAYERS,
        sides(OURS, TORCH, NLP),
        (training("training packed", batch=1, length=1024, samples=8),),
        TORCH,
        module="training_sides",
    ),
    Part(
        "training-memory",
        "two steps of 1 x 4096 tokens, four layers",
        FOUR_LAYERS,
        sides(OURS, TORCH, NLP),
        (
            training("training 1 x 4096", batch=1, length=4096, before=1),
            training("training 1 x 4096, recompute", batch=1, length=4096, recompute=True, before=1),
        ),
        TORCH,
        module="training_sides",
        fresh=True,
    ),
    Script(
        "load",
        "from_pretrained to float32",
        "load.py",
        ("--shape", AQUILA, "--folder", "{work}", "--paddlenlp"),
        loads,
        rounds=3,  # PaddleNLP's own way takes most of a minute
    ),
    Script(
        "start",
        "import, help, first token of aquila-pd generate; with --model",
        "start.py",
        ("{model}",),
        starts,
        needs="model",
    ),
    Script("tokenizer", "batches of texts to ids", "tokenizer.py", ("--vocab", "{vocab}"), tokenizing, rounds=15),
)


def against(name: str, case: str, other: str, bar: float | None = None, **more) -> Ratio:
    """Our time over another side's."""
    return Ratio(name, Of(case, OURS), Of(case, other), bar, **more)


def growth(batch: int, bar: float) -> Ratio:
    rates = (Of(f"decode batch {size}", OURS, "rate") for size in (batch, 1))
    return Ratio(f"decode, tokens/s of batch {batch} / batch 1", *rates, bar, best=HIGH)


def linear(case: str, smaller: str, bar: float) -> Ratio:
    extra = (Of(name, OURS, "extra_mb") for name in (case, smaller))
    return Ratio(f"{case} / {smaller.split()[-1]}", *extra, bar)


RATIOS: tuple[Ratio, ...] = (
    *(
        ratio
        for case in ("prefill 512", "prefill 2048", "prefill 135M 512", "prefill 135M 2048")
        for ratio in (
            against(f"{case} / PaddleNLP", case, NLP, 0.5),
            against(f"{case} / transformers, last position", case, LAST, 1.05),
            against(f"{case} / transformers, all logits", case, TORCH),
        )
    ),
    against("decode batch 1 / transformers", "decode batch 1", TORCH, 0.62),
    against("decode batch 1 / PaddleNLP", "decode batch 1", NLP),
    against("decode batch 1 / weights over bandwidth", "decode batch 1", LIMIT, 1.25, aim=True),
    against("decode batch 4 / transformers", "decode batch 4", TORCH),
    against("decode batch 16 / transformers", "decode batch 16", TORCH),
    growth(4, 3.0),
    growth(16, 6.0),
    against("decode at 2048 / PaddleNLP", "decode at 2048", NLP, 1 / 3),
    against("decode at 2048 / transformers", "decode at 2048", TORCH),
    against("decode 135M / transformers", "decode 135M", TORCH, 0.65),
    against("decode 135M / PaddleNLP", "decode 135M", NLP),
    against("decode 135M / weights over bandwidth", "decode 135M", LIMIT, 1.25, aim=True),
    # linear is 2 each time; a tenth is left to the allocator's rounding
    linear("memory 2048", "memory 1024", 2.2),
    linear("memory 4096", "memory 2048", 2.2),
    Ratio(
        "memory 4096 / transformers, last position",
        Of("memory 4096", OURS, "extra_mb"),
        Of("memory 4096", LAST, "extra_mb"),
    ),
    *(
        Ratio(f"{case} / greedy", Of(case, DRAWING), Of(case, OURS))
        for case in ("sampling batch 1", "sampling batch 16")
    ),
    *(
        against(f"{case} / {other}", case, other, bar)
        for case in ("training step", "training step, recompute", "training step 135M")
        for other, bar in ((NLP, 0.8), (TORCH, 0.7))
    ),
    against("training packed / PaddleNLP", "training packed", NLP),
    against("training packed / transformers", "training packed", TORCH),
    *(
        Ratio(f"{case} / PaddleNLP, memory", Of(case, OURS, "peak_mb"), Of(case, NLP, "peak_mb"), 0.7)
        for case in ("training 1 x 4096", "training 1 x 4096, recompute")
    ),
    *(
        ratio
        for files in ("float32", "bfloat16")
        for case in [f"load {files}, warm"]
        for ratio in (
            against(f"{case} / transformers", case, TORCH, 1.2),
            against(f"{case} / plain read", case, "plain read", 2.0),
            Ratio(f"{case}, memory / weights", Of(case, OURS, "peak_mb"), Of(case, "weights", "peak_mb"), 1.15),
        )
    ),
    *(against(f"load {files}, cold / transformers", f"load {files}, cold", TORCH) for files in ("float32", "bfloat16")),
    Ratio("start, import aquila_pd", Of("start", "import aquila_pd", "beyond"), None, 0.1, unit=" s"),
    Ratio("start, aquila-pd --help", Of("start", "aquila-pd --help"), None, 0.3, unit=" s"),
    Ratio("start, first token / transformers", Of("start", "aquila-pd generate"), Of("start", TORCH), 1.0),
    *(
        Ratio(
            f"tokenizer, {kind} / transformers, speed",
            Of("tokenizer", f"AquilaTokenizer, {kind}", "speed"),
            None,
            1.0,
            HIGH,
        )
        for kind in ("ids", "padded arrays", "ids on one thread", "padded arrays on one thread")
    ),
    Ratio("tokenizer, loading", Of("tokenizer", "loading AquilaTokenizer", "once"), None, 1.0, unit=" s"),
)


def smaller(name: str, *, keep: tuple[str, ...], cases: tuple[str, ...]) -> Part:
    """A part with a few of its sides and cases, and answers half as long."""
    part = next(part for part in PARTS if part.name == name)
    kept = [case for case in part.cases if case.name in cases]
    shorter = [Case(c.name, {**c.request, **({"new": 17} if "new" in c.request else {})}) for c in kept]
    return replace(part, sides=tuple(side for side in part.sides if side.name in keep), cases=tuple(shorter))


# What bench-smoke measures. PaddleNLP's and transformers' versions are pinned, so one of them is enough to see us move.
SMOKE: tuple[Part | Script, ...] = (
    smaller("prefill", keep=(OURS, LAST), cases=("prefill 512",)),
    smaller("decode", keep=(OURS, TORCH), cases=("decode batch 1", "decode batch 4")),
    smaller("training", keep=(OURS, TORCH), cases=("training step",)),
    Script(
        "load",
        "float32 alone",
        "load.py",
        ("--shape", AQUILA, "--folder", "{work}", "--dtype", "float32"),
        loads,
        rounds=1,
    ),
)
