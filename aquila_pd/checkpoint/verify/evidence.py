"""Record of a verification run: level, folders, findings, versions, as plain data for a report."""

import hashlib
import math
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np

from ...utils.errors import CheckpointError, ConfigError, VerificationError
from ...utils.files import read_object
from ..io.manifest import MANIFEST, read_manifest
from ..io.pipeline import count_workers
from ..layout import CONFIG
from ..report import VERSIONS_OF
from ..sources import Source
from .comparison import Sides, compare_folders
from .content import verify_content
from .drift import FACTOR, FLOOR_LARGEST, UNSOUND
from .layerwise import Proof, run_layerwise
from .logits import check_logits_possible, check_torch, token_ids_for, verify_logits
from .result import Verified
from .tokens import compare_tokenizers

LEVELS = ("content", "logits", "layerwise")
MADE_BY = "aquila_pd verify"  # how an earlier report is recognised
ADVICE = "Compare with --level content whether values differ, with --level layerwise where the models part."
LONGEST = 512  # tokens of a prompt: attention's scores take memory by the square


@dataclass
class Evidence:
    """What a run was asked and what it found. prompt: None for the fixed ids; failure: why it is not proven."""

    source: Source
    folder: Path
    level: str
    prompt: str | None
    ids: np.ndarray | None = None  # [B, T]
    about_ids: str = ""
    about_tokenizers: str = ""
    sides: Sides | None = None
    verified: Verified | None = None
    proof: Proof | None = None
    failure: VerificationError | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def sentence(self) -> str:
        if self.failure:
            return str(self.failure)
        about_ids = self.about_ids if self.level == "layerwise" else ""
        return f"{self.verified.sentence}{about_ids}{self.about_tokenizers}"


def prove(
    source: Source, folder: Path, *, level: str, prompt: str | None = None, say: Callable[[str], None] = print
) -> Evidence:
    """Run a level, after comparing config, headers and tokenizers. What is not proven is kept, not raised."""
    evidence = Evidence(source, folder, level, prompt)
    if level == "logits":
        check_logits_possible(source)
    elif level == "layerwise":
        check_torch(source)
    if level != "content":
        evidence.ids, evidence.about_ids = _token_ids(source, folder, prompt)
    try:
        evidence.sides = compare_folders(source, folder)
        say(f"  config and headers agree ({len(evidence.sides.weights)} tensors)")
        evidence.about_tokenizers = compare_tokenizers(source, folder, prompt)
        evidence.verified = _run_level(evidence, say)
    except VerificationError as error:
        evidence.failure = error
    return evidence


def _run_level(evidence: Evidence, say: Callable[[str], None]) -> Verified:
    sides = evidence.sides
    if evidence.level == "content":
        return verify_content(sides.source, sides.folder, workers=count_workers(None))
    if evidence.level == "logits":
        given = None if evidence.prompt is None else evidence.ids
        how = {"rounded_to": sides.rounded_to, "ids": given, "advice": ADVICE}
        return verify_logits(sides.source, sides.folder, **how)
    evidence.proof = run_layerwise(sides, evidence.ids[0], say=say)
    return evidence.proof.verified()


def _token_ids(source: Source, folder: Path, prompt: str | None) -> tuple[np.ndarray, str]:
    """ids [B, T] and what to say of them."""
    if prompt is None:
        return token_ids_for(source.fields)
    from ...tokenization.convert import load_backend  # imports the tokenizers library

    ids = load_backend(folder).encode(prompt).ids[:LONGEST]
    vocabulary = source.fields["vocab_size"]
    if not ids or max(ids) >= vocabulary:
        raise ConfigError(
            f"The prompt makes {len(ids)} tokens, the highest id is {max(ids, default=None)}; wanted are ids below "
            f"{vocabulary}. Give another --prompt, or none for fixed ids."
        )
    return np.array([ids]), f"; the first {LONGEST} tokens of the prompt" if len(ids) == LONGEST else ""


# ------------------------------------------------------------------------------------------------ as plain data


def as_data(evidence: Evidence) -> dict:
    """Everything a reader needs to judge the proof or to repeat it, as JSON has it."""
    found = {
        "made_by": MADE_BY,
        "verdict": "not proven" if evidence.failure else "proven",
        "level": evidence.level,
        "sentence": evidence.sentence,
        "torch": _about_source(evidence.source),
        "paddle": _about_folder(evidence),
        **_about_tokens(evidence),
        **(_about_layers(evidence.proof) if evidence.proof else {}),
        "seconds": round(time.monotonic() - evidence.began, 3),
        "peak_memory_bytes": _peak_memory(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
    }
    return _finite(found)


def _about_source(source: Source) -> dict:
    return {
        "path": str(source.path),
        "kind": source.layout.kind,
        "family": source.family.name,
        "dtypes": dict(Counter(tensor.dtype for tensor in source.tensors.values())),
        "bytes": source.nbytes,
        "config_sha256": _hash(source.path / CONFIG),
        "weights_sha256": _weight_hashes(source.path),
        "notes": list(source.notes),
    }


def _about_folder(evidence: Evidence) -> dict:
    held = evidence.sides.held.values() if evidence.sides else ()
    return {
        "path": str(evidence.folder),
        "dtypes": dict(Counter(info.dtype for info in held)),
        "rounded_tensors": len(evidence.sides.rounded) if evidence.sides else None,
        "bytes": sum(info.nbytes for info in held),
        "config_sha256": _hash(evidence.folder / CONFIG),
        "weights_sha256": _weight_hashes(evidence.folder),
        "config": read_object(evidence.folder / CONFIG, ConfigError),
    }


def _about_tokens(evidence: Evidence) -> dict:
    if evidence.ids is None:
        return {}
    rows = evidence.ids[:1] if evidence.level == "layerwise" else evidence.ids
    seen, of = len(np.unique(rows)), evidence.source.fields["vocab_size"]
    return {"tokens": {"prompt": evidence.prompt, "ids": rows.tolist(), "embedding_rows": [seen, of]}}


def _about_layers(proof: Proof) -> dict:
    return {
        "weights_read_by": proof.how,
        "weights_read_independently": proof.independent,
        "allowed": {"factor": FACTOR, "floor_of_largest": FLOOR_LARGEST, "control_rms": UNSOUND},
        "places": [place.as_dict() for place in proof.places],
        "logits": {name: asdict(logits) for name, logits in proof.logits.items()},
        "seconds_per_layer": [round(seconds, 3) for seconds in proof.seconds],
    }


def _hash(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _weight_hashes(folder: Path) -> dict[str, str] | None:
    """File -> sha256 as the folder's manifest says, which is not hashed again; None without a manifest."""
    try:
        files = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    except CheckpointError:
        return None
    return {name: about["sha256"] for name, about in files.items() if name.endswith(".safetensors")} or None


def _versions() -> dict[str, str]:
    found = {}
    for name in (*VERSIONS_OF, "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _peak_memory() -> int | None:
    """The most this process has held, mapped pages of files included; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _finite(value: object) -> object:
    """JSON knows no NaN and no infinity; they become text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
