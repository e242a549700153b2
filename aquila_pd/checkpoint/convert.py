"""From a Hugging Face folder or a GGUF file to a folder that PaddleNLP loads: plan, write, verify, appear."""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from .. import families, shards
from ..errors import CheckpointError, ConfigError, OutputError, report
from ..shards import Entry, write_json
from .bundle import write_bundle
from .ids import GENERATION_CONFIG, check_vocabulary
from .layout import CONFIG
from .moving import move
from .output import check_output, clear_leftovers, nearest_parent, staging
from .plan import NAMES, Plan, describe, make_plan, megabytes
from .progress import Progress, counted
from .sources import Source, open_source
from .verify import Verified, check_logits_possible, verify_content, verify_logits

VERIFICATIONS = ("none", "content", "logits")
VERSIONS_OF = ("aquila_pd", "numpy", "ml_dtypes", "torch", "transformers", "gguf", "paddlepaddle", "paddlenlp")


@dataclass
class Summary:
    """What a conversion did. seconds: of writing; files: names in the output folder; verified: each check's result."""

    plan: Plan
    output: Path
    files: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    verified: list[Verified] = field(default_factory=list)

    @property
    def last_line(self) -> str:
        rate = self.plan.nbytes / max(self.seconds, 1e-6) / 1e6
        checks = "; ".join(check.sentence for check in self.verified) or "not verified"
        return (
            f"Converted {counted(len(self.plan.moves), 'tensor')}, {megabytes(self.plan.nbytes)}, "
            f"in {self.seconds:.1f} s ({rate:,.0f} MB/s) to {self.output}; {checks}."
        )


def convert(
    source: Path | str,
    output: Path | str,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = shards.DEFAULT_SHARD_SIZE,
    family: str = families.AUTO,
    verify: str = "content",
    report_file: Path | str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Summary:
    """Convert a checkpoint. Nothing is written before the plan stands, and nothing half done is left behind.

    dtype: of the output, None keeps what is stored. verify: "none", "content" (every value is read again and
    compared) or "logits" (content, and both frameworks run). dry_run ends after the plan and the checks of the
    output. Raises an AquilaError: what was asked, what was found, what to do.
    """
    source, output = Path(source), Path(output)
    report_file = Path(report_file) if report_file else None
    if verify not in VERIFICATIONS:
        raise ConfigError(f"The verification {verify!r} is not known. Choose one of {', '.join(VERIFICATIONS)}.")
    shards.parse_size(max_shard_size)  # before a large source is opened
    with open_source(source, family) as opened, TemporaryDirectory(prefix="aquila_pd-") as prepared:
        plan = make_plan(opened, dtype=dtype, max_shard_size=max_shard_size)
        summary = Summary(plan, output, warnings=[*plan.warnings, *_prepare_tokenizer(opened, Path(prepared))])
        say(describe(plan, output))
        _say_warnings(summary.warnings, say)
        for line in [] if dry_run else clear_leftovers(output):
            say(line)
        check_output(output, opened.path, overwrite=overwrite, nbytes=plan.nbytes)
        check_report(report_file, opened.path, output)
        if verify == "logits":
            check_logits_possible(opened)
        if dry_run:
            say("Dry run: nothing was written" + (", the report neither." if report_file else "."))
            return summary
        with staging(output, overwrite=overwrite, say=say) as folder:
            found = _write(opened, folder, summary, tokenizer=Path(prepared))
            _say_warnings(found, say)
            summary.warnings += found
            _verify(opened, folder, summary, verify=verify, rounded_to=dtype, nonfinite=bool(found), say=say)
    with _completed(output):
        if report_file:
            _write_report(report_file, summary)
        say(summary.last_line)
    return summary


def _say_warnings(warnings: list[str], say: Callable[[str], None]) -> None:
    for warning in warnings:
        say(f"  warning   {warning}")


def _prepare_tokenizer(source: Source, folder: Path) -> list[str]:
    """Make the tokenizer's files before any weight is written: one that cannot be read or used stops the plan."""
    from ..tokenizer_files import SENTENCEPIECE, TOKENIZER_JSON, write_tokenizer  # imports the tokenizers library

    written = write_tokenizer(source.path, folder)
    if TOKENIZER_JSON in written:
        check_vocabulary(folder, source.fields["vocab_size"])
        return []
    if SENTENCEPIECE in written:
        return [f"{SENTENCEPIECE} is a SentencePiece model, which AquilaTokenizer cannot load yet; it is only copied"]
    return [f"{source.path} holds no tokenizer files; the output has none either"]


def _write(source: Source, folder: Path, summary: Summary, *, tokenizer: Path) -> list[str]:
    """Weights with their index, then what makes the folder a model; returns what was found in the values."""
    begin = time.monotonic()
    try:
        findings = write_weights(source, folder, summary.plan)
        write_json(folder / CONFIG, summary.plan.config)
        write_json(folder / GENERATION_CONFIG, summary.plan.generation)
        for path in sorted(tokenizer.iterdir()):  # one by one: copytree would copy the temporary folder's mode too
            shutil.copyfile(path, folder / path.name)
        write_bundle(folder)
    except BrokenPipeError:  # of the progress lines, whose reader is gone; no disk is at fault
        raise
    except OSError as error:
        if error.filename and source.path in [Path(error.filename), *Path(error.filename).parents]:
            raise  # the source cannot be read; the output is not to blame
        raise OutputError(
            f"Writing {summary.output} failed: {error.strerror or error}. Nothing was kept.\n"
            "Make room, or choose another disk."
        ) from error
    summary.seconds = time.monotonic() - begin
    summary.files = sorted(path.name for path in folder.iterdir())
    return findings


def write_weights(source: Source, folder: Path, plan: Plan) -> list[str]:
    """Stream every tensor from its source to its place; name those that hold NaN or infinite values.

    Raises CheckpointError naming every tensor with finite values that its dtype cannot hold.
    """
    findings: list[str] = []
    overflows: dict[str, int] = {}
    progress = Progress("write", total=plan.nbytes, tensors=len(plan.moves))

    def fill(entry: Entry, region: np.ndarray) -> None:
        weight = plan.moves[entry.name]
        tensor = source.read(weight.hf)
        counts = move(tensor, region, transpose=weight.transpose)
        shards.release(tensor)
        if counts.nonfinite:
            findings.append(f"{weight.hf} holds {counts.nonfinite} NaN or infinite values; they were kept")
        if counts.overflowed:
            overflows[weight.hf] = counts.overflowed
        progress.advance(entry.nbytes)

    try:
        shards.write_shards(folder, plan.shards, fill)
    finally:
        progress.close()
    if overflows:
        raise CheckpointError(_overflow_report(plan, overflows))
    return findings


def _overflow_report(plan: Plan, overflows: dict[str, int]) -> str:
    tags = {
        weight.hf: entry.dtype
        for shard in plan.shards
        for entry in shard.entries
        for weight in [plan.moves[entry.name]]
        if weight.hf in overflows
    }
    lines = [
        f"overflow    {name}: {counted(n, 'value')} too large for {NAMES[tags[name]]}" for name, n in overflows.items()
    ]
    advice = {
        "F16": "Use --dtype bfloat16, which has the range of float32.",
        "BF16": "Use --dtype float32.",
    }.get(next(iter(tags.values())), "No dtype of a Paddle model can hold them; look at the source.")
    headline = f"{plan.source} holds values that would become infinite:"
    return report(headline, lines, f"Nothing was kept. {advice}")


def _verify(
    source: Source,
    folder: Path,
    summary: Summary,
    *,
    verify: str,
    rounded_to: str | None,
    nonfinite: bool,
    say: Callable[[str], None],
) -> None:
    """nonfinite: weights with NaN or infinite values were found and named."""
    if verify == "none":
        return
    summary.verified.append(verify_content(source, folder))
    if verify == "logits":
        say("  verify    logits: running torch and Paddle on the same ids, both in float32")
        summary.verified.append(verify_logits(source, folder, rounded_to=rounded_to, nonfinite_weights=nonfinite))


# What every report has had since the first: how an earlier one of ours is recognised.
REPORT_KEYS = {"source", "output", "kind", "family", "tensors", "bytes", "versions"}


def check_report(path: Path | None, source: Path, output: Path) -> None:
    """A report that cannot be written, or would cost somebody a file, should not cost a conversion."""
    if path is None:
        return
    source, output = source.resolve(), output.resolve()
    place = path.resolve()
    parent = place.parent
    if place == source:
        raise OutputError(f"The report {path} is the source itself, which is never written to. Choose another name.")
    if source.is_dir() and source in place.parents:
        raise OutputError(
            f"The report {path} lies in the source {source}, which is never written to. Choose another place."
        )
    if output in [place, *place.parents]:
        raise OutputError(f"The report {path} lies in the output, which is replaced whole. Choose a place beside it.")
    if not parent.is_dir():
        what = "is a file" if parent.exists() or nearest_parent(parent).is_file() else "does not exist; make it first"
        raise OutputError(f"The report {path} cannot be written: its folder {parent} {what}.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"The report {path} cannot be written: its folder {parent} is read-only. Choose another.")
    if place.exists() and not _is_report(place):
        raise OutputError(
            f"The report {path} would replace a {'folder' if place.is_dir() else 'file'} that is no earlier report. "
            "Choose another name, or remove it yourself."
        )


def _is_report(path: Path) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and set(found) >= REPORT_KEYS


def _write_report(path: Path, summary: Summary) -> None:
    try:
        write_json(path, report_of(summary))
    except OSError as error:
        raise OutputError(
            f"The model in {summary.output} is complete; only the report {path} could not be written: "
            f"{error.strerror or error}. Make room or choose another place; there is no need to convert again."
        ) from error


@contextmanager
def _completed(output: Path) -> Iterator[None]:
    """What stops a run now no longer undoes it, and carries a note that says so."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError) as error:
        error.add_note(f"The model in {output} is complete.")
        raise


def report_of(summary: Summary) -> dict:
    """The summary as JSON: what, from where, how long, and with which versions."""
    plan = summary.plan
    return {
        "source": str(plan.source),
        "output": str(summary.output),
        "kind": plan.kind,
        "family": plan.family,
        "config": plan.config,
        "tensors": len(plan.moves),
        "bytes": plan.nbytes,
        "seconds": round(summary.seconds, 3),
        "shards": [{"file": s.file, "bytes": s.nbytes, "tensors": len(s.entries)} for s in plan.shards],
        "files": summary.files,
        "dropped": [{"name": name, "reason": reason} for name, reason in plan.dropped],
        "notes": list(plan.notes),
        "warnings": summary.warnings,
        "verified": [asdict(check) for check in summary.verified],
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in VERSIONS_OF}
