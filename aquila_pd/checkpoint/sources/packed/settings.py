"""Quantization settings of a checkpoint: where they are stored, and which values are supported."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ....utils.errors import CheckpointError, shown, shown_value
from ...layout import CONFIG, read_json

KEY = "quantization_config"
# beside config.json in older folders, with the method that they do not name
OLDER_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
AWQ_SPELLING = {"w_bit": "bits", "q_group_size": "group_size"}
ABSENT = object()
LARGEST_GROUP = 2**31 - 1  # far more inputs than any matrix has


@dataclass(frozen=True)
class Settings:
    """Quantization settings under the keys of the file they come from."""

    file: str
    values: Mapping[str, object]

    @property
    def method(self) -> object:
        return self.values.get("quant_method")

    def get(self, key: str, default: object = None) -> object:
        """The value; a null counts as absent."""
        value = self.values.get(key)
        return default if value is None else value

    def refused(self, known: Mapping[str, tuple]) -> list[str]:
        """A finding for each of these keys with an unsupported value; text is compared without case."""
        return [
            f"{self.file} says {key} = {shown_value(value)}; known: {', '.join(map(repr, values))}"
            for key, values in known.items()
            if (value := self.get(key, ABSENT)) is not ABSENT and not _among(value, values)
        ]

    def unread(self, known: set[str]) -> list[str]:
        """A note naming the unknown keys."""
        keys = sorted(key for key, value in self.values.items() if key not in known and value not in (None, {}, []))
        listed = shown(", ".join(keys))
        return [f"{self.file} says how it was packed in words that are not known here: {listed}"] * bool(keys)

    def group_size(self, default: int | None = None) -> int | None:
        """Inputs per group, -1 for one group of all; None for an invalid value."""
        size = self.get("group_size", default)
        return size if type(size) is int and (size == -1 or 1 <= size <= LARGEST_GROUP) else None

    def refused_group_size(self, default: int | None = None) -> list[str]:
        """A finding for an invalid group_size."""
        if self.group_size(default) is not None:
            return []
        return [
            f"{self.file} says group_size = {shown_value(self.get('group_size'))}; known: -1 and whole numbers from 1"
        ]


def find_settings(config: Mapping, folder: Path) -> Settings | None:
    """Quantization settings of config.json or of the older file beside it; None for neither."""
    settings = config.get(KEY)
    if settings is not None:
        if not isinstance(settings, dict):
            raise CheckpointError(
                f"{folder / CONFIG}: {KEY} is {shown_value(settings)}, not a mapping. Fetch config.json again."
            )
        return Settings(CONFIG, _spelled_alike(settings))
    for file, method in OLDER_FILES.items():
        if (folder / file).is_file():
            return Settings(file, _spelled_alike({"quant_method": method, **read_json(folder / file)}))
    return None


def _spelled_alike(settings: Mapping) -> dict:
    return {AWQ_SPELLING.get(key, key): value for key, value in settings.items()}


def _among(value: object, known: tuple) -> bool:
    """1 is not True here, which == would say."""
    value = value.lower() if isinstance(value, str) else value
    return any(type(value) is type(one) and value == one for one in known)
