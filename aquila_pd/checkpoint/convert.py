"""From a Hugging Face folder or a GGUF file to a folder that PaddleNLP loads: plan, write, verify, appear."""

import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from .. import families, shards
from ..errors import ConfigError, OutputError
from ..shards import Entry, write_json
from .bundle import write_bundle
from .layout import CONFIG, read_json
from .moving import move
from .output import check_output, nearest_parent, staging
from .plan import Plan, describe, make_plan, megabytes
from .progress import Progress
from .sources import Source, open_source
from .verify import Verified, check_logits_possible, verify_content, verify_logits

GENERATION_CONFIG = "generation_config.json"
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
            f"Converted {len(self.plan.moves)} tensors, {megabytes(self.plan.nbytes)}, in {self.seconds:.1f} s "
            f"({rate:,.0f} MB/s) to {self.output}; {checks}."
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
    with open_source(source, family) as opened, TemporaryDirectory(prefix="aquila_pd-") as prepared:
        plan = make_plan(opened, dtype=dtype, max_shard_size=max_shard_size)
        summary = Summary(plan, output, warnings=[*plan.warnings, *_prepare_tokenizer(opened.path, Path(prepared))])
        say(describe(plan, output))
        _say_warnings(summary.warnings, say)
        check_output(output, opened.path, overwrite=overwrite, nbytes=plan.nbytes)
        _check_report(report_file, opened.path)
        if verify == "logits":
            check_logits_possible(opened)
        if dry_run:
            say("Dry run: nothing was written.")
            return summary
        with staging(output) as folder:
            found = _write(opened, folder, summary, tokenizer=Path(prepared))
            _say_warnings(found, say)
            summary.warnings += found
            _verify(opened, folder, summary, verify=verify, rounded_to=dtype, say=say)
    if report_file:
        write_json(report_file, report_of(summary))
    say(summary.last_line)
    return summary


def _say_warnings(warnings: list[str], say: Callable[[str], None]) -> None:
    for warning in warnings:
        say(f"  warning   {warning}")


def _prepare_tokenizer(source: Path, folder: Path) -> list[str]:
    """Make the tokenizer's files before any weight is written: a tokenizer that cannot be read stops the plan."""
    from ..tokenizer_files import write_tokenizer  # imports the tokenizers library

    written = write_tokenizer(source, folder)
    return [] if written else [f"{source} holds no tokenizer files; the output has none either"]


def _write(source: Source, folder: Path, summary: Summary, *, tokenizer: Path) -> list[str]:
    """Weights with their index, then what makes the folder a model; returns what was found in the values."""
    begin = time.monotonic()
    findings = write_weights(source, folder, summary.plan)
    write_json(folder / CONFIG, summary.plan.config)
    write_json(folder / GENERATION_CONFIG, generation_config(source, summary.plan))
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    write_bundle(folder)
    summary.seconds = time.monotonic() - begin
    summary.files = sorted(path.name for path in folder.iterdir())
    return findings


def write_weights(source: Source, folder: Path, plan: Plan) -> list[str]:
    """Stream every tensor from its source to its place; return what was found in the values."""
    findings: list[str] = []
    progress = Progress("write", total=plan.nbytes, tensors=len(plan.moves))

    def fill(entry: Entry, region: np.ndarray) -> None:
        weight = plan.moves[entry.name]
        tensor = source.read(weight.hf)
        counts = move(tensor, region, transpose=weight.transpose)
        shards.release(tensor)
        if counts.nonfinite:
            findings.append(f"{weight.hf} holds {counts.nonfinite} NaN or infinite values; they were kept")
        if counts.overflowed:
            findings.append(
                f"{weight.hf}: {counts.overflowed} values are too large for {entry.dtype}; they are infinite now"
            )
        progress.advance(entry.nbytes)

    try:
        shards.write_shards(folder, plan.shards, fill)
    except OSError as error:
        raise OutputError(
            f"Writing to {folder.parent} failed: {error.strerror or error}. Nothing was kept.\n"
            "Make room, or choose another disk."
        ) from error
    finally:
        progress.close()
    return findings


# sampling options that mean the same in PaddleNLP; max_length does not (there it counts new tokens only)
GENERATION_KEYS = ("max_new_tokens", "min_new_tokens", "repetition_penalty", "num_beams", "length_penalty")
SAMPLING_KEYS = ("temperature", "top_k", "top_p")


def generation_config(source: Source, plan: Plan) -> dict:
    """generation_config.json: the plan's token ids, and the source's options as far as PaddleNLP has them."""
    ids = {name: plan.config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    path = source.path / GENERATION_CONFIG
    if not path.is_file():
        return ids
    theirs = read_json(path)
    if isinstance(theirs.get("eos_token_id"), list):
        ids["eos_token_id"] = theirs["eos_token_id"]  # a chat model may end in more than one way
    keys = GENERATION_KEYS + (SAMPLING_KEYS if theirs.get("do_sample") else ())
    kept = {key: theirs[key] for key in keys if theirs.get(key) is not None}
    return {**ids, **({"decode_strategy": "sampling"} if theirs.get("do_sample") else {}), **kept}


def _verify(
    source: Source, folder: Path, summary: Summary, *, verify: str, rounded_to: str | None, say: Callable[[str], None]
) -> None:
    if verify == "none":
        return
    summary.verified.append(verify_content(source, folder))
    if verify == "logits":
        say("  verify    logits: running torch and Paddle on the same ids, both in float32")
        summary.verified.append(verify_logits(source, folder, rounded_to=rounded_to))


def _check_report(path: Path | None, source: Path) -> None:
    """A report that cannot be written should not cost a conversion."""
    if path is None:
        return
    parent = path.resolve().parent
    if not nearest_parent(path.resolve()) == parent:
        raise OutputError(f"The report {path} cannot be written: its folder {parent} does not exist. Make it first.")
    if source.is_dir() and source.resolve() in [parent, *parent.parents]:
        raise OutputError(
            f"The report {path} lies in the source {source}, which is never written to. Choose another place."
        )


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
