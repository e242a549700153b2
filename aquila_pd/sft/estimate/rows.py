"""Token counts of a stage: exact where its rows are prepared, else extrapolated from the files and marked as such."""

import math
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from ...data.formats import BadRow, read_talk
from ...data.packing import plan_epoch
from ...data.pipeline import DataFile, data_files
from ...data.samples import Samples
from ...data.sources import read_rows
from ...utils.errors import DataError
from ...utils.units import counted
from ..recipe.load import Stage
from .memory import Rows

COUNTED = 500_000  # samples, over all epochs, up to which packs are fitted to be counted
PADDING = 0.003  # of packs that are not fitted: what best fit leaves free on real rows
LOOKED_AT = 200  # rows of a file that an estimate reads
FILES = 20  # files that it looks into, spread over all
BEGINNING = 1 << 22  # bytes of a file whose lines are counted
# Of Aquila's tokenizer on real rows of Infinity-Instruct (4.7 to 4.8), and the part of their tokens that answers are.
BYTES_PER_TOKEN, LABELS = 4.7, 0.75
UNPACKED = 3.5  # bytes in a gzip file for each of its own


@dataclass(frozen=True)
class Amount:
    """One epoch of a stage.

    samples, tokens: seen in it, weights counted. packs: of each epoch; one number stands for all where they are
    estimated. rows: what sizes depend on. source: how this is known, in words.
    """

    samples: int
    tokens: float
    packs: tuple[int, ...]
    rows: Rows
    exact: bool
    source: str

    @property
    def labels(self) -> float:
        """Tokens that are trained on."""
        return self.tokens * self.rows.labels

    def packs_in(self, epochs: float) -> int:
        """Packs of so many epochs, as the trainer takes them: of the last one a fraction."""
        sizes = [self.packs[min(epoch, len(self.packs) - 1)] for epoch in range(math.ceil(epochs))]
        if epochs % 1:
            sizes[-1] = max(1, round(sizes[-1] * (epochs % 1)))
        return sum(sizes)


def amount(stage: Stage, *, seed: int, prepared: Path | None) -> Amount:
    """What a stage trains on. prepared: its folder of samples, where there is one.

    Raises DataError for files that are not there, and samples that are damaged.
    """
    return _counted(stage, seed, Samples.open(prepared)) if prepared is not None else _estimated(stage)


def unknown(stage: Stage) -> Rows:
    """What sizes depend on where there are no rows to look at: samples of half a pack."""
    return Rows(LABELS, stage.length / 4)


def rows_of(samples: Samples) -> Rows:
    """What sizes depend on, as it is in the samples; each counts as often as it is seen."""
    weights = np.asarray(samples.records["weight"])
    lengths = samples.lengths.astype(np.float64)
    tokens = max(float((weights * lengths).sum()), 1.0)
    keys = float((weights * lengths * (lengths + 1)).sum()) / 2 / tokens
    return Rows(float((weights * samples.target_counts).sum()) / tokens, keys)


def _counted(stage: Stage, seed: int, samples: Samples) -> Amount:
    weights = np.asarray(samples.records["weight"])
    tokens, seen = float((samples.lengths * weights).sum()), round(float(weights.sum()))
    epochs = math.ceil(stage.epochs)
    fit = seen * epochs <= COUNTED
    packs = tuple(_packs(samples, stage, seed, epoch) for epoch in range(epochs)) if fit else (_about(tokens, stage),)
    return Amount(seen, tokens, packs, rows_of(samples), fit, "counted in the prepared rows")


def _packs(samples: Samples, stage: Stage, seed: int, epoch: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return len(plan_epoch(samples, length=stage.length, seed=seed, epoch=epoch, folder=Path(folder)))


def _about(tokens: float, stage: Stage) -> int:
    return max(1, math.ceil(tokens * (1 + PADDING) / stage.length))


# ------------------------------------------------------------------------------------------ from files alone


def _estimated(stage: Stage) -> Amount:
    """From the number of rows, or the size, of the files, and a look at some of their rows."""
    files = [file for file in data_files(stage.data) if file.part == "train"]
    looked = {file.path: _mean_bytes(file) for file in files[:: max(1, len(files) // FILES)]}
    known = [size for size in looked.values() if size]
    if not known:
        raise DataError(f"None of the first {LOOKED_AT} rows of {files[0].path} can be read: of what format is it?")
    mean = sum(known) / len(known)
    rows = {file: _rows(file.path, looked.get(file.path) or mean) for file in files}
    kept = 1 - stage.data.held_out
    seen = kept * sum(count * file.weight for file, count in rows.items())
    sizes = ((count * file.weight, looked.get(file.path) or mean) for file, count in rows.items())
    tokens = kept * sum(count * size for count, size in sizes) / BYTES_PER_TOKEN
    each = min(tokens / max(seen, 1), stage.length)
    source = f"estimated from {counted(len(files), 'file')}, before filters and duplicates"
    return Amount(round(seen), tokens, (_about(tokens, stage),), Rows(LABELS, (each + 1) / 2), False, source)


def _mean_bytes(file: DataFile) -> float:
    """UTF-8 bytes of a row's texts, in the mean of the first ones; 0 when none can be read."""
    rows = islice(read_rows([file.path], on_bad=lambda *wrong: None), LOOKED_AT)
    sizes = []
    for row in rows:
        try:
            turns = read_talk(row.value, file.format).turns
        except BadRow:
            continue
        sizes.append(sum(len(turn.text.encode("utf-8", "surrogatepass")) for turn in turns))
    return sum(sizes) / len(sizes) if sizes else 0.0


def _rows(path: Path, mean: float) -> float:
    """Rows of a file: a table says it, lines of a beginning are counted, else by the size of its texts."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        return parquet.ParquetFile(path).metadata.num_rows
    size = path.stat().st_size
    if path.suffix == ".jsonl":
        with path.open("rb") as stream:
            beginning = stream.read(BEGINNING)
        lines = beginning.count(b"\n") + (len(beginning) == size and not beginning.endswith(b"\n"))
        return lines * size / max(len(beginning), 1)
    return size * (UNPACKED if path.suffix == ".gz" else 1) / max(mean, 1)
