"""Where weights come from: any format, handed out under Hugging Face names in Hugging Face layout."""

from pathlib import Path
from typing import Self

import numpy as np

from ... import families
from ...errors import CheckpointError, report
from ...families.base import dims
from ...families.dialect import rotate_half_rows
from ..layout import Layout, find_layout
from .reader import Reader, Stored


class Source:
    """An open checkpoint. Used as a context manager.

    fields: the family's reading of config.json; dims: sizes; tensors: Hugging Face name -> how it is stored.
    """

    def __init__(self, layout: Layout, reader: Reader, family: families.Family):
        self.layout, self.family, self._reader = layout, family, reader
        self.path = layout.path
        self.config = reader.config
        self.fields = family.fields(reader.config)
        self.dims = dims(self.fields)
        self.notes = [*layout.notes, *reader.notes]
        self.dialect = reader.dialect or family.dialect
        self._names = _hf_names(self.dialect.to_hf, list(reader.stored), layout.path)
        self.tensors: dict[str, Stored] = {hf: reader.stored[name] for hf, name in self._names.items()}

    def read(self, hf_name: str) -> np.ndarray:
        """One tensor in Hugging Face's layout, mapped from the file where possible."""
        tensor = self._reader.read(self._names[hf_name])
        whose = self.dialect.heads_of(hf_name)
        if whose is None:
            return tensor
        heads = self.fields["num_attention_heads" if whose == "q" else "num_key_value_heads"]
        return rotate_half_rows(tensor, heads)

    @property
    def nbytes(self) -> int:
        """Size of the files, which is what has to be read."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return sum((folder / file).stat().st_size for file in {stored.file for stored in self.tensors.values()})

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_source(path: Path, family: str = families.AUTO) -> Source:
    """Open the checkpoint at a path; reads headers and config only.

    Raises CheckpointError for files that cannot be read, ConfigError for a config.json that cannot be understood.
    """
    layout = find_layout(path)
    reader = _open_reader(layout)
    try:
        return Source(layout, reader, families.find_family(reader.config, family))
    except BaseException:
        reader.close()
        raise


def _open_reader(layout: Layout) -> Reader:
    if layout.kind == "gguf":
        from .gguf import GGUFReader as reader
    elif layout.kind == "torch_bin":
        from .torch_bin import TorchBinReader as reader
    else:
        from .safetensors import SafetensorsReader as reader
    return reader(layout.path)


def _hf_names(to_hf, names: list[str], path: Path) -> dict[str, str]:
    """Hugging Face name -> name in the file."""
    found: dict[str, str] = {}
    twice = []
    for name in names:
        hf = to_hf(name)
        if hf in found:
            twice.append(f"{found[hf]} and {name} are both {hf}")
        found[hf] = name
    if twice:
        raise CheckpointError(report(f"{path} holds tensors twice under two names:", twice, "Remove one of each."))
    return found
