"""Sequence packing: the samples of an epoch in packs of one length, with labels, position ids and segment ids.

A pack of length 12 out of samples A (5 tokens), B (4) and C (2); lower case is what a sample learns, `.` is -100:

    place         0   1   2   3   4   5   6   7   8   9  10  11
    input_ids    A0  A1  A2  a3  a4  B0  B1  b2  b3  C0  c1 pad
    labels        .   .  a3  a4   .   .  b2  b3   .  c1   .   .     labels[t] is what follows place t in its own sample
    position_ids  0   1   2   3   4   0   1   2   3   0   1   0     begins anew with each sample
    segment_ids   1   1   1   1   1   2   2   2   2   3   3   0     a place attends to its own segment's earlier places

So the last place of a sample has no label, and nothing of a sample is ever seen from another. No mask of
length x length is held: the segments say it all.

Packs are fitted (best_fit.py) over windows of samples, taken in the order of the epoch. A window is a random part of
all samples, and large against a pack. Where samples are not all long against a pack, the room left free is less than
one pack a window: with few samples a part of the last pack is most of it, with a window of them next to nothing.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from ..architecture.labels import IGNORE_INDEX
from ..utils.atomic import shared_folder
from ..utils.errors import DataError
from ..utils.files import read_object, write_json
from .best_fit import best_fit
from .epoch_order import Permutation, derive_key, draw
from .samples import Samples

log = logging.getLogger("aquila_pd")

VERSION = 1  # of plans: another one when the same inputs give other packs
WINDOW = 1 << 16  # samples that are fitted together
MANIFEST, MEMBERS, PACKS = "plan.json", "members.bin", "packs.bin"
PACK = np.dtype([("begin", "<i8"), ("end", "<i8"), ("tokens", "<i8"), ("targets", "<i8")])  # begin, end: of its members


def windows(samples: Samples, *, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """The samples of an epoch in its order, WINDOW at a time."""
    waiting, count = [], 0
    for numbers in draw(samples.records, seed=seed, epoch=epoch):
        waiting.append(numbers)
        count += len(numbers)
        while count >= WINDOW:
            together = np.concatenate(waiting)
            yield together[:WINDOW]
            waiting, count = [together[WINDOW:]], count - WINDOW
    if count:
        yield np.concatenate(waiting)


class Plan:
    """The packs of one epoch. length: places of a pack. A pack's members are numbers of samples."""

    def __init__(self, folder: Path, length: int):
        self.length = length
        self._members = np.memmap(folder / MEMBERS, dtype="<i8", mode="r")
        self._packs = np.memmap(folder / PACKS, dtype=PACK, mode="r")

    def __len__(self) -> int:
        return len(self._packs)

    def members(self, number: int) -> np.ndarray:
        """The samples of a pack in their order, int64."""
        pack = self._packs[number]
        return np.asarray(self._members[int(pack["begin"]) : int(pack["end"])])

    @property
    def target_counts(self) -> np.ndarray:
        """Labels other than -100 in each pack, int64 [packs]."""
        return self._packs["targets"]

    @property
    def token_counts(self) -> np.ndarray:
        """Places of each pack that are no padding, int64 [packs]."""
        return self._packs["tokens"]

    @cached_property
    def padding_share(self) -> float:
        """The part of all places that nothing stands in."""
        return 1 - int(self.token_counts.sum()) / (len(self) * self.length)


def plan_epoch(samples: Samples, *, length: int, seed: int, epoch: int, folder: Path) -> Plan:
    """The packs of an epoch (0, 1, ...): made once, then read from `folder`.

    A function of its arguments alone, the same on every machine. Each sample is in as many packs as it is seen in the
    epoch. Packs stand in a random order. Several processes may ask at once.
    Raises DataError when a sample is longer than a pack, or there is none.
    """
    if not len(samples):
        raise DataError(f"{samples.folder} holds no samples. Prepare data that has something to train on.")
    if samples.manifest["longest"] > length:
        raise DataError(
            f"{samples.folder} holds samples of up to {samples.manifest['longest']:,} tokens, and packs shall have "
            f"{length:,}.\nPrepare the data for the length of the packs."
        )
    asked = {"version": VERSION, "samples": samples.digest, "length": length, "seed": seed, "epoch": epoch}
    place = Path(folder) / f"epoch-{epoch}-{derive_key('plan', *asked.items()):016x}"
    if not _is_whole(place, asked):
        _build(samples, asked, place)
    return Plan(place, length)


def _is_whole(place: Path, asked: dict) -> bool:
    """Whether the plan is there; a damaged one is reported and removed."""
    if not place.is_dir():
        return False
    with suppress(DataError, OSError):
        manifest = read_object(place / MANIFEST, DataError)
        sizes = {name: (place / name).stat().st_size for name in (MEMBERS, PACKS)}
        if manifest.get("asked") == asked and manifest.get("bytes") == sizes:
            return True
    log.warning("The plan of packs in %s is damaged: made again.", place)
    shutil.rmtree(place)
    return False


def _build(samples: Samples, asked: dict, place: Path) -> None:
    """Make the folder of a plan appear at `place`; a second process finds it there."""
    with shared_folder(place) as partial:
        with (partial / MEMBERS).open("wb") as members, (partial / PACKS).open("wb") as packs:
            written = 0
            for number, window in enumerate(windows(samples, seed=asked["seed"], epoch=asked["epoch"])):
                key = derive_key("packs", asked["seed"], asked["epoch"], number)
                order, rows = _fitted(samples, window, asked["length"], key)
                rows["begin"] += written
                rows["end"] += written
                members.write(order.astype("<i8").tobytes())
                packs.write(rows.tobytes())
                written += len(order)
        if not written:
            raise DataError(
                f"None of the samples in {samples.folder} is seen in epoch {asked['epoch']}: their weights are so "
                "small. Give more weight, or train for more epochs."
            )
        sizes = {name: (partial / name).stat().st_size for name in (MEMBERS, PACKS)}
        write_json(partial / MANIFEST, {"asked": asked, "bytes": sizes})


def _fitted(samples: Samples, window: np.ndarray, length: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """A window's samples pack by pack, and its PACK records; packs in random order."""
    chosen = samples.records[window]
    order, ends = best_fit(chosen["length"], length)
    begins = np.concatenate([[0], ends[:-1]])
    shuffled = Permutation(len(ends), key).at(0, len(ends))
    sizes = (ends - begins)[shuffled]
    rows = np.empty(len(ends), PACK)
    rows["end"] = np.cumsum(sizes)
    rows["begin"] = rows["end"] - sizes
    # the old place of each new one: begin of its pack, and as far behind it
    order = order[np.arange(len(order)) + np.repeat(begins[shuffled] - rows["begin"], sizes)]
    for field, of_samples in (("tokens", "length"), ("targets", "targets")):
        rows[field] = np.add.reduceat(chosen[of_samples][order], rows["begin"])
    return window[order], rows


def pack_arrays(samples: Samples, members: np.ndarray, length: int, *, pad_id: int = 0) -> dict[str, np.ndarray]:
    """A pack as int64 arrays [length]: input_ids, labels, position_ids, segment_ids; see the drawing above."""
    arrays = {name: np.zeros(length, np.int64) for name in ("input_ids", "labels", "position_ids", "segment_ids")}
    arrays["input_ids"][:] = pad_id
    arrays["labels"][:] = IGNORE_INDEX
    begin = 0
    for segment, number in enumerate(members, start=1):
        ids, is_target = samples.sample(number)
        end = begin + len(ids)
        assert end <= length, "a plan of another length"
        arrays["input_ids"][begin:end] = ids
        arrays["labels"][begin : end - 1] = np.where(is_target[1:], ids[1:], IGNORE_INDEX)
        arrays["position_ids"][begin:end] = np.arange(len(ids))
        arrays["segment_ids"][begin:end] = segment
        begin = end
    return arrays
