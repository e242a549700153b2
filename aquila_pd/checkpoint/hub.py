"""Hugging Face hub ids as input: resolved to a snapshot folder where huggingface_hub is installed."""

import re
from fnmatch import fnmatch
from pathlib import Path

from ..utils.errors import CheckpointError
from .layout import BIN, BIN_SHARDS

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name
TEXT = ("*.json", "*.txt", "*.jinja", "tokenizer.model")  # config and tokenizer
WEIGHTS = (("*.safetensors",), (BIN, BIN_SHARDS))  # the first that a model has; it may have both


def find_input(asked: Path | str, *, weights: bool = True) -> Path:
    """Resolve an input to a path: a path that exists comes first, then a hub id.

    weights: fetch them too; without them only config and tokenizer come, enough for a plan. What the hub client has
    in its cache is not fetched again; with HF_HUB_OFFLINE nothing is. Raises CheckpointError when it cannot be fetched.
    """
    path, text = Path(asked), str(asked)
    if path.exists() or (path.parent.is_dir() and path.parent != Path()) or not HUB_ID.fullmatch(text):
        return path
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
        )
    except ImportError:
        return path  # no client: the sources say that there is no such folder
    try:
        try:
            names = HfApi().list_repo_files(text)
        except (OfflineModeIsEnabled, ConnectionError):
            return Path(snapshot_download(text, local_files_only=True))
        return Path(snapshot_download(text, allow_patterns=wanted(names, weights=weights)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"There is no folder {text}, and as a model id on the hub it could not be fetched: {reason}\n"
            "Give a folder, or check the id, the connection and the right to read the model."
        ) from error


def wanted(names: list[str], *, weights: bool) -> list[str]:
    """The files of a hub model that a conversion reads: none of subfolders, weights in one format."""
    top = [name for name in names if "/" not in name]
    found = [name for name in top if any(fnmatch(name, pattern) for pattern in TEXT)]
    if not weights:
        return [name for name in found if not name.endswith(".index.json")]  # which would tell of shards to come
    for patterns in WEIGHTS:
        held = [name for name in top if any(fnmatch(name, pattern) for pattern in patterns)]
        if held:
            return found + held
    return found
