"""Order and packing: every sample exactly as often as its weight says, hardly any padding, the same everywhere."""

import multiprocessing
import shutil
from collections import Counter
from hashlib import sha256
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples_factory import write_samples

from aquila_pd.architecture.labels import IGNORE_INDEX
from aquila_pd.data import epoch_order as order
from aquila_pd.data import packing
from aquila_pd.data.best_fit import best_fit
from aquila_pd.data.epoch_order import Permutation, draw, phases_of, times_seen
from aquila_pd.data.packing import Plan, pack_arrays, plan_epoch
from aquila_pd.data.samples import RECORD, Samples, SamplesWriter
from aquila_pd.utils.errors import DataError


def lengths_like_rows(count: int, *, seed: int = 1, most: int = 2048) -> np.ndarray:
    """Lengths as rows of conversations have them: most short, a few very long."""
    drawn = np.random.default_rng(seed).lognormal(5.4, 1.0, count)
    return np.clip(drawn, 8, most).astype(np.int64)


def records(count: int, weight: float = 1.0) -> np.ndarray:
    made = np.zeros(count, RECORD)
    made["row"], made["weight"] = np.arange(count) + 1, weight
    return made


def seen(plan: Plan) -> Counter:
    return Counter(int(number) for i in range(len(plan)) for number in plan.members(i))


# --------------------------------------------------------------------------------------------------------- order


@given(count=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_a_permutation_holds_every_number_once_and_any_stretch_of_it_is_the_same(count, key):
    permutation = Permutation(count, key)
    whole = permutation.at(0, count)
    assert sorted(whole) == list(range(count))
    begin, end = count // 3, count // 2
    assert np.array_equal(permutation.at(begin, end), whole[begin:end])


def test_a_permutation_is_the_same_on_every_machine():
    assert Permutation(10, 7).at(0, 10).tolist() == [0, 3, 4, 7, 2, 9, 6, 5, 1, 8]
    many = Permutation(7_449_106, 20231121).at(7_000_000, 7_000_004)
    assert many.tolist() == [314827, 3066102, 2984295, 2972804]


def test_every_number_comes_to_every_place_equally_often():
    count, keys = 20, 800
    places = np.array([Permutation(count, key).at(0, count) for key in range(keys)])  # [keys, count]
    expected = keys / count
    for place in range(count):
        squares = ((np.bincount(places[:, place], minlength=count) - expected) ** 2 / expected).sum()
        assert squares < 50, "chi-square of 19 degrees of freedom: 1 in 10,000 is above"
    pairs = Counter(zip(places[:, 0].tolist(), places[:, 1].tolist(), strict=True))
    assert len(pairs) > 0.8 * 20 * 19 and max(pairs.values()) < 6 * keys / (20 * 19)


def test_neighbours_in_the_files_are_no_neighbours_in_the_order():
    shuffled = Permutation(100_000, 3).at(0, 100_000)
    assert abs(np.corrcoef(np.arange(100_000), shuffled)[0, 1]) < 0.02
    assert np.count_nonzero(np.diff(shuffled) == 1) < 10


@given(weight=st.floats(0.01, 30), epochs=st.integers(1, 40))
def test_weights_are_exact_over_epochs(weight, epochs):
    phases = phases_of(np.zeros(200, int), np.arange(200), 5)
    weights = np.full(200, weight)
    each = [times_seen(weights, phases, epoch) for epoch in range(epochs)]
    assert all(((times >= np.floor(weight - 1e-5)) & (times <= np.ceil(weight + 1e-5))).all() for times in each)
    assert np.abs(sum(each) - weight * epochs).max() < 1 + 1e-4 * epochs


def test_a_weight_of_two_and_a_half_is_twice_and_other_halves_once_more():
    epochs = [
        np.bincount(np.concatenate(list(draw(records(3000, 2.5), seed=1, epoch=e))), minlength=3000) for e in (0, 1)
    ]
    assert set(epochs[0]) == {2, 3} and (epochs[0] + epochs[1] == 5).all()
    assert 1350 < np.count_nonzero(epochs[0] == 3) < 1650


def test_the_parts_of_a_row_are_seen_equally_often():
    made = records(4000, 0.5)
    made["row"] = np.arange(4000) // 4  # four parts a row
    times = np.bincount(np.concatenate(list(draw(made, seed=2, epoch=0))), minlength=4000).reshape(1000, 4)
    assert (times == times[:, :1]).all() and set(times[:, 0]) == {0, 1}


def test_drawing_costs_no_memory_of_the_number_of_samples(monkeypatch):
    monkeypatch.setattr(order, "CHUNK", 100)
    pieces = list(draw(records(1050, 1.5), seed=0, epoch=3))
    assert max(map(len, pieces)) <= 100 and len(pieces) == 21  # of 2 * 1050 copies
    assert sum(map(len, pieces)) == pytest.approx(1575, abs=60)


# ------------------------------------------------------------------------------------------------------ best fit


def packs_of(lengths: list[int], length: int) -> list[list[int]]:
    """The lengths in each pack; every sample is in one of them, none is over-full."""
    order, ends = best_fit(np.array(lengths, dtype=np.int64), length)
    assert sorted(order) == list(range(len(lengths)))
    packs = [np.array(lengths)[pack].tolist() for pack in np.split(order, ends[:-1])]
    assert all(0 < sum(pack) <= length for pack in packs)
    return packs


def sums_of(lengths: list[int]) -> set[int]:
    """What can be filled with some of the lengths."""
    return {sum(chosen) for count in range(len(lengths) + 1) for chosen in combinations(lengths, count)}


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=300))
@settings(deadline=None)
def test_every_sample_is_in_one_pack_and_none_fits_into_an_earlier_one(lengths):
    packs = packs_of(lengths, 64)
    for i, pack in enumerate(packs):
        assert all(sum(pack) + size > 64 for later in packs[i + 1 :] for size in later)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9), length=st.integers(30, 60))
@settings(deadline=None)
def test_a_pack_is_filled_as_well_as_what_is_left_can_fill_it(lengths, length):
    left = sorted(lengths)
    for pack in packs_of(lengths, length):
        longest = left.pop()
        best = max(total for total in sums_of(left) if longest + total <= length)
        assert longest in pack and sum(pack) == longest + best
        pack.remove(longest)
        for size in pack:
            left.remove(size)


def fitted_one_by_one(lengths: list[int], length: int) -> int:
    """How many packs the usual best fit makes: longest first, each into the fullest pack that has the room."""
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):
        room = min((room for room in rooms if room >= size), default=None)
        if room is None:
            rooms.append(length - size)
        else:
            rooms[rooms.index(room)] -= size
    return len(rooms)


def test_samples_that_wait_for_each_other_fill_packs_that_one_by_one_stay_open():
    lengths = [13, 13, 8, 5, 5, 4, 4, 3]
    assert fitted_one_by_one(lengths, 15) == 5 and len(packs_of(lengths, 15)) == 4
    # no short samples: each begins with 47 tokens of headers
    drawn = np.clip(47 + np.random.default_rng(0).lognormal(4.2, 0.5, 3000), 47, 512).astype(np.int64)
    fewest = -(-drawn.sum() // 512)
    assert len(packs_of(drawn.tolist(), 512)) == fewest < 0.99 * fitted_one_by_one(drawn.tolist(), 512)


# --------------------------------------------------------------------------------------------------------- plans


def test_a_plan_holds_every_sample_once_in_another_order_each_epoch(tmp_path):
    samples = write_samples(tmp_path / "samples", lengths_like_rows(800, most=300).tolist())
    plans = [plan_epoch(samples, length=300, seed=5, epoch=e, folder=tmp_path / "plans") for e in (0, 1)]
    for plan in plans:
        assert seen(plan) == Counter(range(800))
        sizes = [samples.lengths[plan.members(i)].sum() for i in range(len(plan))]
        assert sizes == plan.token_counts.tolist() and max(sizes) <= 300
        assert plan.target_counts.tolist() == [samples.target_counts[plan.members(i)].sum() for i in range(len(plan))]
        assert plan.padding_share == pytest.approx(1 - sum(sizes) / (300 * len(plan)))
    assert plans[0].members(0).tolist() != plans[1].members(0).tolist()


def test_weights_count_how_often_a_sample_is_in_an_epoch(tmp_path):
    weights = [(0.5, 1.0, 2.0, 3.5)[i % 4] for i in range(400)]
    samples = write_samples(tmp_path / "samples", [5 + i % 30 for i in range(400)], weights=weights)
    counts = sum(
        (seen(plan_epoch(samples, length=64, seed=0, epoch=e, folder=tmp_path / "p")) for e in (0, 1)), Counter()
    )
    assert all(counts[i] == 2 * weights[i] for i in range(400))


def test_several_windows_lose_nothing_between_them(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 70)
    monkeypatch.setattr(order, "CHUNK", 64)
    samples = write_samples(tmp_path / "samples", lengths_like_rows(500, most=200).tolist())
    plan = plan_epoch(samples, length=256, seed=1, epoch=0, folder=tmp_path / "plans")
    assert seen(plan) == Counter(range(500))
    assert plan.token_counts.tolist() == [samples.lengths[plan.members(i)].sum() for i in range(len(plan))]


def test_packs_do_not_stand_in_the_order_of_their_filling(tmp_path):
    samples = write_samples(tmp_path / "samples", lengths_like_rows(2000, most=400).tolist())
    plan = plan_epoch(samples, length=400, seed=1, epoch=0, folder=tmp_path / "plans")
    longest = [samples.lengths[plan.members(i)].max() for i in range(len(plan))]
    assert abs(np.corrcoef(np.arange(len(plan)), longest)[0, 1]) < 0.2


def test_the_same_inputs_give_the_same_bytes_and_other_inputs_others(tmp_path):
    lengths = lengths_like_rows(300, most=100).tolist()

    def bytes_of(name: str, *, lengths=lengths, seed: int = 3, epoch: int = 2, length: int = 128) -> str:
        samples = write_samples(tmp_path / name / "samples", lengths)
        plan_epoch(samples, length=length, seed=seed, epoch=epoch, folder=tmp_path / name / "plans")
        (place,) = (tmp_path / name / "plans").iterdir()
        return sha256(b"".join((place / file).read_bytes() for file in ("members.bin", "packs.bin"))).hexdigest()

    made = bytes_of("a")
    assert made == bytes_of("b")
    others = [
        bytes_of("c", seed=4),
        bytes_of("d", epoch=3),
        bytes_of("e", length=127),
        bytes_of("f", lengths=lengths[1:]),
    ]
    assert len({made, *others}) == 5


def test_a_plan_is_made_once_and_found_again(tmp_path, monkeypatch):
    samples = write_samples(tmp_path / "samples", [10] * 50)
    first = plan_epoch(samples, length=32, seed=0, epoch=0, folder=tmp_path / "plans")
    monkeypatch.setattr(packing, "_build", lambda *a: pytest.fail("made twice"))
    again = plan_epoch(samples, length=32, seed=0, epoch=0, folder=tmp_path / "plans")
    assert [again.members(i).tolist() for i in range(len(again))] == [
        first.members(i).tolist() for i in range(len(first))
    ]


def test_a_damaged_plan_is_made_again(tmp_path, caplog):
    samples = write_samples(tmp_path / "samples", [10] * 50)
    plan_epoch(samples, length=32, seed=0, epoch=0, folder=tmp_path / "plans")
    (place,) = (tmp_path / "plans").iterdir()
    good = (place / "members.bin").read_bytes()
    (place / "members.bin").write_bytes(good[:-8])
    with caplog.at_level("WARNING", "aquila_pd"):
        plan_epoch(samples, length=32, seed=0, epoch=0, folder=tmp_path / "plans")
    assert (place / "members.bin").read_bytes() == good and "damaged: made again" in caplog.text


def test_a_failed_plan_leaves_nothing(tmp_path, monkeypatch):
    samples = write_samples(tmp_path / "samples", [10] * 50)
    monkeypatch.setattr("aquila_pd.utils.atomic.sync", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plan_epoch(samples, length=32, seed=0, epoch=0, folder=tmp_path / "plans")
    assert list((tmp_path / "plans").iterdir()) == []


def _plan(folder: Path) -> list:
    plan = plan_epoch(Samples.open(folder / "samples"), length=64, seed=0, epoch=0, folder=folder / "plans")
    return [plan.members(i).tolist() for i in range(len(plan))]


def test_processes_that_ask_at_once_get_the_same_plan(tmp_path):
    write_samples(tmp_path / "samples", lengths_like_rows(3000, most=64).tolist())
    with multiprocessing.get_context("fork").Pool(4) as pool:
        first, *others = pool.map(_plan, [tmp_path] * 4)
    assert all(other == first for other in others)
    assert len(list((tmp_path / "plans").iterdir())) == 1


def test_a_sample_longer_than_a_pack_is_an_error_and_so_is_nothing(tmp_path):
    samples = write_samples(tmp_path / "samples", [10, 33])
    with pytest.raises(DataError, match="up to 33 tokens, and packs shall have 32"):
        plan_epoch(samples, length=32, seed=0, epoch=0, folder=tmp_path / "plans")
    with pytest.raises(DataError, match="holds no samples"):
        plan_epoch(write_samples(tmp_path / "none", []), length=32, seed=0, epoch=0, folder=tmp_path / "plans")
    light = write_samples(tmp_path / "light", [10], weights=[1e-5])
    with pytest.raises(DataError, match="weights are so small"):
        plan_epoch(light, length=32, seed=0, epoch=0, folder=tmp_path / "plans")


@pytest.mark.parametrize("length", [2048, 4096])
def test_padding_is_at_most_one_percent_for_lengths_like_those_of_rows(tmp_path, length):
    samples = write_samples(tmp_path / "samples", lengths_like_rows(5000, most=length).tolist())
    assert plan_epoch(samples, length=length, seed=0, epoch=0, folder=tmp_path / "plans").padding_share < 0.01


def test_control_first_come_first_served_would_pad_more():
    lengths = lengths_like_rows(5000)
    packs, room = 0, 0
    for size in lengths:
        room, packs = (room - size, packs) if size <= room else (2048 - size, packs + 1)
    assert 1 - lengths.sum() / (2048 * packs) > 0.05


# -------------------------------------------------------------------------------------------------------- arrays


def test_a_pack_is_as_the_drawing_says(tmp_path):
    (tmp_path / "samples").mkdir()
    with SamplesWriter(tmp_path / "samples") as writer:
        for row, (ids, marks) in enumerate(
            (([10, 11, 12, 13, 14], "00011"), ([20, 21, 22, 23], "0011"), ([30, 31], "01"))
        ):
            writer.add(np.array(ids), np.array([mark == "1" for mark in marks]), file=0, row=row + 1)
        writer.finish(["rows.jsonl"])
    arrays = pack_arrays(Samples.open(tmp_path / "samples"), np.array([0, 1, 2]), 12, pad_id=9)
    x = IGNORE_INDEX
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "input_ids": [10, 11, 12, 13, 14, 20, 21, 22, 23, 30, 31, 9],
        "labels": [x, x, 13, 14, x, x, 22, 23, x, 31, x, x],
        "position_ids": [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0],
        "segment_ids": [1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 0],
    }
    assert all(array.dtype == np.int64 and array.shape == (12,) for array in arrays.values())


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_no_label_crosses_samples_and_the_counts_are_the_labels(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("arrays")
    lengths = np.random.default_rng(seed).integers(1, 40, 60).tolist()
    samples = write_samples(folder / "samples", lengths, seed=seed)
    plan = plan_epoch(samples, length=40, seed=seed, epoch=0, folder=folder / "plans")
    for i in range(len(plan)):
        arrays = pack_arrays(samples, plan.members(i), 40)
        learned = np.flatnonzero(arrays["labels"] != IGNORE_INDEX)
        assert len(learned) == plan.target_counts[i]
        segments = arrays["segment_ids"]
        assert (segments[learned] == segments[learned + 1]).all() if len(learned) else True
        assert (arrays["labels"][learned] == arrays["input_ids"][learned + 1]).all() if len(learned) else True
        assert (segments > 0).sum() == plan.token_counts[i]
    shutil.rmtree(folder)
