"""Tokenized samples of random ids."""

from pathlib import Path

import numpy as np

from aquila_pd.data.samples import Samples, SamplesWriter


def write_samples(folder: Path, lengths: list[int], *, weights: list[float] | None = None, seed: int = 0) -> Samples:
    """Samples of random ids from 1 on, of which about half are targets; sample i comes from row i + 1."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with SamplesWriter(folder) as writer:
        for i, length in enumerate(lengths):
            ids, is_target = generator.integers(1, 1000, length), generator.random(length) < 0.5
            writer.add(ids, is_target, file=0, row=i + 1, weight=weights[i] if weights else 1.0)
        writer.finish(["rows.jsonl"])
    return Samples.open(folder)
