"""A model's id on the Hugging Face hub in place of a folder, where a hub client is installed."""

import re
from pathlib import Path

from ..errors import CheckpointError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name
# what a conversion reads; other frameworks' weights would be downloaded in vain
WANTED = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "*.jinja"]


def find_input(text: str) -> Path:
    """The path a person wrote, or the folder of the hub model they named. A path that exists always comes first.

    Files come from the hub client's cache, which a download fills first (never with HF_HUB_OFFLINE set). Raises
    CheckpointError when the id cannot be fetched.
    """
    path = Path(text)
    if path.exists() or not HUB_ID.fullmatch(text):
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        return path  # no client: the sources say that there is no such folder
    try:
        return Path(snapshot_download(text, allow_patterns=WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"There is no folder {text}, and as a model id on the hub it could not be fetched: {reason}\n"
            "Give a folder, or check the id, the connection and the right to read the model."
        ) from error
