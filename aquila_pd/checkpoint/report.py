"""Summary of a conversion: closing lines on the terminal, and --report as JSON."""

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from ..formats.safetensors import write_json
from ..utils.errors import ConfigError, OutputError
from ..utils.files import hash_file
from ..utils.units import counted, megabytes
from .io.manifest import MANIFEST
from .io.output import nearest_parent
from .plan import Plan
from .verify import Verified

VERSIONS_OF = ("aquila_pd", "numpy", "ml_dtypes", "torch", "transformers", "gguf", "paddlepaddle", "paddlenlp")


@dataclass
class Summary:
    """Result of a conversion. seconds: of writing; resumed: shards an earlier run had finished; files: name in the
    output folder -> its size and hash; nonfinite: weights with NaN or infinite values were found and named; verified:
    each check's result."""

    plan: Plan
    output: Path
    workers: int
    files: dict[str, dict] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    resumed: int = 0
    seconds: float = 0.0
    nonfinite: bool = False
    verified: list[Verified] = field(default_factory=list)

    @property
    def last_line(self) -> str:
        plan = self.plan
        written = sum(shard.nbytes for shard in plan.shards[self.resumed :])
        checks = "; ".join(check.sentence for check in self.verified) or "not verified"
        resumed = f", {counted(self.resumed, 'shard')} of it by an earlier run" if self.resumed else ""
        return (
            f"Converted {counted(len(plan.moves), 'tensor')}, {megabytes(plan.nbytes)}{resumed}, in {self.seconds:.1f} "
            f"s ({written / max(self.seconds, 1e-6) / 1e6:,.0f} MB/s) to {self.output}; {checks}."
        )


def closing_words(summary: Summary) -> str:
    """The last lines of a run, to be pasted into an issue: what was done, and by what exactly."""
    plan, versions = summary.plan, ", ".join(f"{name} {v}" for name, v in _versions().items() if v)
    manifest = hash_file(summary.output / MANIFEST)
    return "\n".join(
        [
            summary.last_line,
            f"  made      from {plan.kind} of family {plan.family}, {counted(summary.workers, 'worker')}, "
            f"{counted(len(plan.shards), 'shard')}, {MANIFEST} sha256 {manifest[:16]}",
            f"  with      Python {platform.python_version()}, {versions}",
        ]
    )


# What every report has had since the first: how an earlier one of ours is recognised.
REPORT_KEYS = {"source", "output", "kind", "family", "tensors", "bytes", "versions"}


def check_report(path: Path | None, source: Path, output: Path) -> None:
    """Preflight of the report path: an unwritable one, or one that would replace another file, is refused early."""
    if path is None:
        return
    if path.suffix.lower() in (".html", ".htm"):
        raise ConfigError(f"The report {path} would be JSON; pages are made by `aquila-pd verify --report`.")
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


def write_report(path: Path, summary: Summary) -> None:
    try:
        write_json(path, report_of(summary))
    except OSError as error:
        raise OutputError(
            f"The model in {summary.output} is complete; only the report {path} could not be written: "
            f"{error.strerror or error}. Make room or choose another place; there is no need to convert again."
        ) from error


def report_of(summary: Summary) -> dict:
    """The summary as JSON data: plan, source, duration, versions."""
    plan = summary.plan
    return {
        "source": str(plan.source),
        "output": str(summary.output),
        "kind": plan.kind,
        "target": {"framework": plan.target.framework, "architecture": plan.target.architecture},
        "family": plan.family,
        "config": plan.config,
        "tensors": len(plan.moves),
        "bytes": plan.nbytes,
        "seconds": round(summary.seconds, 3),
        "workers": summary.workers,
        "shards_of_an_earlier_run": summary.resumed,
        "shards": [{"file": s.file, "bytes": s.nbytes, "tensors": len(s.entries)} for s in plan.shards],
        "files": summary.files,  # name -> bytes and sha256, as in the manifest
        "dropped": [{"name": name, "reason": reason} for name, reason in plan.dropped],
        "chat_template": plan.chat_template and {"name": plan.chat_template.name, "why": plan.chat_template.why},
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
