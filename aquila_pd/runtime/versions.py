"""Dependency table: version range, tested version and reason of every package. Standard library only.

setup.py makes its requirements from this table and `aquila-pd doctor` judges an installation by it. The packages
these packages bring along are held at their tested versions by requirements/tested.txt, which `make venv` uses.
"""

import importlib.util
import re
from dataclasses import dataclass

NAME = "aquila_pd"
VERSION = "0.1.0"
PYTHON = ">=3.11,<3.13"
TESTED_PYTHON = "3.11"
TEST_EXTRAS = ("verify", "gguf", "serve", "sft")  # what the test suite needs beside its own tools


@dataclass(frozen=True)
class Pin:
    """A pinned package.

    spec: what pip is asked for ("" when pip is not to install it); tested: the version every test ran with.
    extra: "" when always installed, else the extra it belongs to. why: the reason in one line.
    breaks: ranges known not to work, and how; outside them a version that differs from `tested` is merely untested.
    instead: other distributions that fill the same place.
    """

    name: str
    spec: str
    tested: str
    why: str
    extra: str = ""
    breaks: tuple[tuple[str, str], ...] = ()
    instead: tuple[str, ...] = ()


PINS = (
    Pin(
        "paddlepaddle",
        "==3.3.1",
        "3.3.1",
        "Paddle itself: either this (CPU) or paddlepaddle-gpu, so neither can be a hard requirement",
        extra="cpu",
        breaks=(("<3", "paddlenlp 3 needs Paddle 3"),),
        instead=("paddlepaddle-gpu",),
    ),
    Pin(
        "paddlenlp",
        "==3.0.0b4",
        "3.0.0b4",
        "the newest 3.x; the Auto classes are joined through its private tables, so the version is exact",
        breaks=(("<3", "its Trainer and generation differ from what this project builds on"),),
    ),
    Pin(
        "aistudio-sdk",
        "<0.3",
        "0.2.6",
        "paddlenlp imports a function that 0.3 removed",
        breaks=((">=0.3", "`import paddlenlp` fails with it"),),
    ),
    Pin(
        "numpy",
        "==1.26.4",
        "1.26.4",
        "the newest that paddlenlp allows",
        breaks=((">=2", "paddlenlp does not allow NumPy 2"),),
    ),
    Pin(
        "pyarrow",
        "<22",
        "21.0.0",
        "the last that works with NumPy 1",
        breaks=((">=22", "it needs NumPy 2, which paddlenlp does not allow"),),
    ),
    Pin("datasets", "<4", "3.6.0", "paddlenlp's version limits on dill and multiprocess leave 3.x"),
    Pin(
        "protobuf",
        "<7",
        "6.33.6",
        "visualdl, the Trainer's default report, writes booleans into integer fields",
        breaks=((">=7", "the Trainer's default report stops with `HparamInfo.int_value: Expected an int`"),),
    ),
    Pin(
        "tokenizers",
        "==0.21.4",
        "0.21.4",
        "token ids are compared with this one; paddlenlp and transformers 4.55 allow 0.21 only",
        breaks=(("<0.21", "paddlenlp asks for at least 0.21"), (">=0.22", "paddlenlp asks for less than 0.22")),
    ),
    Pin(
        "tiktoken",
        "==0.14.0",
        "0.14.0",
        "encodes large batches and rows to train on; its splitting was compared with tokenizers' by character",
    ),
    Pin("ml_dtypes", ">=0.5.4", "0.5.4", "bfloat16 for numpy"),
    Pin("rich", ">=15,<16", "15.0.0", "draws progress and tables on a terminal"),
    Pin("pydantic", ">=2.14,<3", "2.14.3", "validates recipes, data settings, sampling parameters and requests"),
    Pin("torch", "==2.13.0", "2.13.0", "gives the logits to compare with; reads .bin of before 1.6", extra="verify"),
    Pin(
        "transformers",
        "==4.55.4",
        "4.55.4",
        "the reference model; the last that tokenizers 0.21 allows",
        extra="verify",
        breaks=((">=4.56", "it asks for tokenizers 0.22, which paddlenlp does not allow"),),
    ),
    Pin(
        "safetensors",
        ">=0.8",
        "0.8.0",
        "an independent reader, for the proof layer by layer and for tests",
        extra="verify",
    ),
    Pin("gguf", ">=0.19,<0.20", "0.19.0", "reads GGUF checkpoints", extra="gguf"),
    Pin("fastapi", ">=0.165,<1", "0.165.0", "the routes of the server", extra="serve"),
    Pin("uvicorn", ">=0.54,<1", "0.54.0", "speaks HTTP for the server", extra="serve"),
    Pin("prometheus_client", ">=0.26,<1", "0.26.0", "writes /metrics in Prometheus' format", extra="serve"),
    Pin("PyYAML", ">=6.0.3,<7", "6.0.3", "reads recipes", extra="sft"),
    Pin("matplotlib", ">=3.11,<4", "3.11.2", "draws loss curves and length histograms", extra="sft"),
    Pin("visualdl", "==2.5.3", "2.5.3", "Paddle's own training log, on request", extra="sft"),
    Pin("datasketch", ">=2.0,<3", "2.0.0", "MinHash signatures that find near-duplicate rows", extra="sft"),
    Pin("py3langid", "==0.2.2", "0.2.2", "tells languages apart; the last that works with NumPy 1", extra="sft"),
    Pin("pytest", "==9.2.0", "9.2.0", "runs the tests", extra="test"),
    Pin("pytest-timeout", ">=2.4", "2.4.0", "ends a test that hangs", extra="test"),
    Pin("pytest-xdist", ">=3.8", "3.8.0", "runs the tests in two processes", extra="test"),
    Pin("hypothesis", "==6.170.15", "6.170.15", "makes damaged files for the tests", extra="test"),
    Pin("bitsandbytes", "==0.50.2", "0.50.2", "writes genuine NF4 checkpoints for the tests", extra="test"),
    Pin("peft", "==0.17.1", "0.17.1", "the LoRA that ours is compared with", extra="test"),
    Pin("openai", "==3.57.0", "3.57.0", "the client the server is made for, in the tests", extra="test"),
    Pin("httpx", "==0.28.1", "0.28.1", "looks at the server's bytes in the tests and the load tool", extra="test"),
    Pin("lm_eval", "==0.4.13", "0.4.13", "scores texts through the server in the tests", extra="test"),
    Pin("tenacity", "==9.2.1", "9.2.1", "lm_eval asks a server only with it", extra="test"),
    Pin("playwright", "==1.65.2", "1.65.2", "drives Chromium over the chat page in the tests", extra="test"),
    Pin("ruff", "==0.17.6", "0.17.6", "lint and format; the layout depends on its version", extra="dev"),
    Pin(
        "paddleformers",
        "",
        "",
        "the successor of paddlenlp, not used here",
        extra="conflict",
        breaks=((">=0", "it asks for other versions of aistudio-sdk and transformers: give it its own environment"),),
    ),
)


def pin(name: str) -> Pin:
    """The row of this package; KeyError when the table has none."""
    for row in PINS:
        if row.name == name:
            return row
    raise KeyError(name)


def requirements() -> list[str]:
    """What is always installed, as pip requirements."""
    return [row.name + row.spec for row in PINS if row.extra == ""]


def extras() -> dict[str, list[str]]:
    """pip requirements by extra; `test` includes what the tests compare with."""
    found: dict[str, list[str]] = {}
    for row in PINS:
        if row.extra and row.spec:
            found.setdefault(row.extra, []).append(row.name + row.spec)
    for extra in TEST_EXTRAS:
        found["test"] += found[extra]
    return found


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: "3.0.0b4" -> (3, 0, 0), "2.13.0+cpu" -> (2, 13, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else ()


def satisfies(version: str, spec: str) -> bool:
    """Whether a version meets a spec such as ">=0.19,<0.20"; of ==, >= and <, all that the table uses.

    A local label such as +cpu is ignored; pre-release labels count for == only.
    """
    return all(_meets(version, part.strip()) for part in spec.split(",") if part.strip())


def _meets(version: str, part: str) -> bool:
    sign, wanted = re.fullmatch(r"(==|>=|<)(.+)", part).groups()
    if sign == "==":
        return version.partition("+")[0] == wanted
    width = max(len(release(version)), len(release(wanted)))
    have, limit = (numbers + (0,) * (width - len(numbers)) for numbers in (release(version), release(wanted)))
    return have >= limit if sign == ">=" else have < limit


def require_paddle() -> None:
    """Raise InstallationError, an ImportError, that says what to install when Paddle or PaddleNLP is not there.

    Only looks; nothing is imported.
    """
    from ..utils.errors import InstallationError, report

    missing = [name for name in ("paddle", "paddlenlp") if not _importable(name)]
    if not missing:
        return
    paddle, paddlenlp = pin("paddlepaddle"), pin("paddlenlp")
    findings = {
        "paddle": "no paddlepaddle is installed: the model, the tokenizer and generation need it",
        "paddlenlp": "no paddlenlp is installed: loading, training and generation stand on it",
    }
    raise InstallationError(
        report(
            "This part of aquila_pd needs Paddle:",
            [findings[name] for name in missing],
            f'On a CPU:  pip install "{NAME}[cpu]"  (tested: paddlepaddle {paddle.tested}, '
            f"paddlenlp {paddlenlp.tested}).\n"
            f"On a GPU:  install paddlepaddle-gpu {paddle.tested} from Paddle's own package index, as its install page "
            f"says (PyPI has only old versions), then  pip install {NAME}.\n"
            "`aquila-pd doctor` lists everything that is installed beside what was tested.",
        ),
        name=missing[0],
    )


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
