"""`aquila-pd inspect`: format, family, tensors of a checkpoint and its default plan. Reads headers and config only."""

import argparse
import math
from collections import Counter

from ..architecture.families import AUTO, FAMILIES
from ..formats.dtypes import DTYPES, FLOATS
from ..formats.safetensors import DEFAULT_SHARD_SIZE
from ..utils.command import run
from ..utils.errors import CheckpointError, printable, report, shown
from ..utils.units import counted, megabytes
from .describe import describe_model, describe_output
from .hub import find_input
from .io.manifest import MANIFEST, check_manifest
from .io.pipeline import count_workers
from .plan import make_plan
from .sources import Source, open_source
from .targets import PADDLE, TORCH, find_target

KINDS = {
    "safetensors": "safetensors",
    "torch_bin": "torch .bin",
    "gguf": "GGUF",
    "planned": "config.json only, no weights",
}
FRAMEWORKS = {"torch": "a torch checkpoint", "paddle": "a Paddle checkpoint"}


def describe_source(source: Source) -> str:
    """Description of an open checkpoint as text."""
    parameters = sum(math.prod(stored.shape) for stored in source.tensors.values())
    nbytes: Counter = Counter()
    counts: Counter = Counter()
    for stored in source.tensors.values():
        kind = stored.packed or FLOATS.get(stored.dtype, stored.dtype)
        counts[kind] += 1
        nbytes[kind] += 0 if stored.packed else math.prod(stored.shape) * DTYPES[stored.dtype].itemsize
    kinds = [
        f"{counted(counts[kind], 'tensor')} {kind}" + (f", {megabytes(nbytes[kind])}" if nbytes[kind] else "")
        for kind in sorted(counts, key=lambda kind: (-nbytes[kind], kind))
    ]
    lines = [
        f"{source.path}",
        f"  is        {FRAMEWORKS[source.framework]} of family {source.family.name}, {KINDS[source.layout.kind]}",
        *describe_model(source.fields),
        f"  tensors   {len(source.tensors):,}, {parameters:,} parameters: {'; '.join(kinds)}",
    ]
    lines += [f"  file      {path.name}, {megabytes(path.stat().st_size)}" for path in source.files]
    lines += [f"  note      {note}" for note in source.notes]
    return "\n".join(map(printable, lines))


def inspect(text: str, *, family: str = AUTO, check: bool = False) -> None:
    """Print what the checkpoint at a path (or of a hub id) is; with check, compare it with its manifest.

    Raises an AquilaError for a checkpoint that cannot be read or does not fit its config.
    """
    with open_source(find_input(text, weights=check), family, may_be_planned=True) as source:
        print(describe_source(source))
        target = find_target(TORCH if source.framework == PADDLE else PADDLE)
        plan = make_plan(source, target, dtype=None, max_shard_size=DEFAULT_SHARD_SIZE)
        for label, line in describe_output(plan):
            print(f"  {'would be' if label == 'output' else label:<8}  {line}")
        for warning in plan.warnings:
            print(f"  warning   {printable(warning)}")
        if check:
            _check(source)
        elif (source.path / MANIFEST).is_file():
            print(f"  manifest  {MANIFEST} is there; --check compares every file with it")


def _check(source: Source) -> None:
    agree, findings, others = check_manifest(source.path, workers=count_workers(None))
    for name in others:
        print(f"  note      {shown(name)} is not in the manifest")
    if findings:
        headline = f"{source.path} is not what its manifest says:"
        raise CheckpointError(report(headline, findings, "Fetch the named files again, or convert again."))
    print(f"  manifest  {counted(agree, 'file')} have the hashes of {MANIFEST}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="aquila-pd inspect", description="Say what a checkpoint is and would become.")
    made.add_argument("checkpoint", help="a folder, a .gguf file, or the id of a model on the Hugging Face hub")
    made.add_argument(
        "--family", default=AUTO, choices=[AUTO, *FAMILIES], help="how to read config.json (default: auto, by itself)"
    )
    made.add_argument(
        "--check", action="store_true", help=f"read every file and compare its hash with {MANIFEST} (default: no)"
    )
    return made


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 a complete model, 1 an incomplete or damaged one (with findings), 2 wrong arguments."""
    args = parser().parse_args(argv)
    return run(lambda: inspect(args.checkpoint, family=args.family, check=args.check))
