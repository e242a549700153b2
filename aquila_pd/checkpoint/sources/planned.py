"""Config-only source: shapes and dtypes that follow from config.json, for a dry run."""

import numpy as np

from ...architecture.families.base import Family, dims
from ...architecture.families.dialect import Dialect
from ...architecture.weight_map import weights
from ...formats.dtypes import NAMED
from ...utils.errors import CheckpointError
from .reader import ALL, Stored

NOWHERE = "a file that is not there yet"


class PlannedReader:
    """Tensor headers without values."""

    def __init__(self, config: dict, family: Family):
        fields = family.fields(config)
        tag = NAMED.get(fields["dtype"], "F32")
        self.config = config
        self.dialect: Dialect | None = Dialect("planned")  # the table's own names
        self.stored = {weight.hf: Stored(tag, weight.hf_shape, NOWHERE) for weight in weights(dims(fields))}
        self.notes = ["only config.json is there: this is a plan for weights still to be fetched"]

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> np.ndarray:
        raise CheckpointError(f"{name} cannot be read: the folder holds config.json and no weights.")

    def close(self) -> None:
        pass
