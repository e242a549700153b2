"""Checkpoints are whole or not there: interrupted at every step of writing, damaged in every file."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from aquila_pd.sft.loop import checkpoints as module
from aquila_pd.sft.loop.checkpoints import Checkpoints, Ranks, array_of, damage
from aquila_pd.utils.errors import CheckpointError, TrainingError

WEIGHTS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.float32([1.5])}
MOMENTS = {"a.weight//moment1_0": np.full((3, 4), 2.0, np.float32)}


class Array(np.ndarray):
    """An array that is asked for as a framework's tensor."""

    def numpy(self) -> np.ndarray:
        return np.asarray(self)


def tensors(arrays: dict) -> dict:
    return {name: array.view(Array) for name, array in arrays.items()}


def write_state(folder: Path) -> None:
    """What stands for PaddleNLP's own file."""
    (folder / "trainer_state.json").write_text('{"global_step": 3}')


def save(folder: Path, step: int, *, keep: int = 2, best: int | None = None, weights=WEIGHTS, **facts) -> Checkpoints:
    made = Checkpoints(folder, keep=keep)
    tensors_of = dict(weights=tensors(weights), optimizer=tensors(MOMENTS))
    made.save(step, **tensors_of, ranks=Ranks(), facts=facts, write_more=write_state, best=best)
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_found_again(tmp_path):
    found = save(tmp_path, 3, loss=0.1 + 0.2).newest(print)
    assert found.step == 3 and found.facts == {"loss": 0.1 + 0.2}
    for stored, arrays in ((found.weights(), WEIGHTS), (found.optimizer(), MOMENTS)):
        assert {name: array_of(info).tolist() for name, info in stored.items()} == {
            k: v.tolist() for k, v in arrays.items()
        }
    assert names(tmp_path) == ["step-00000003"]


def test_the_newest_stay_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        checkpoints = save(tmp_path, step, best=2)
    assert checkpoints.steps() == [2, 4, 5]


def test_the_best_of_each_that_stays_is_there_for_a_run_that_goes_back_to_it(tmp_path):
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4)):
        checkpoints = save(tmp_path, step, best=best)
    assert checkpoints.steps() == [1, 3, 4]  # 3 knows 1 as the best


def test_without_any_there_is_nothing_to_go_on_from(tmp_path):
    assert Checkpoints(tmp_path / "none", keep=1).newest(print) is None


@pytest.mark.parametrize(
    "file",
    [
        "checkpoint.json",
        "weights-00001.safetensors",
        "optimizer-00001-of-00001-00001.safetensors",
        "trainer_state.json",
        "part-00001-of-00001.json",
    ],
)
@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "empty"])
def test_a_damaged_newest_one_is_said_and_the_one_before_taken(tmp_path, file, how):
    save(tmp_path, 3)
    save(tmp_path, 6)
    victim = tmp_path / "step-00000006" / file
    content = victim.read_bytes()
    if how == "gone":
        victim.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        victim.write_bytes({"cut": content[:-5], "flipped": flipped, "empty": b""}[how])
    if file == "checkpoint.json" and how == "flipped":
        victim.write_bytes(b"\xff" + content)  # one flipped bit may leave good JSON
    said: list[str] = []
    found = Checkpoints(tmp_path, keep=2).newest(said.append)
    assert found.step == 3
    assert len(said) == 1 and "step 6 is damaged" in said[0] and file.split("-")[0].split(".")[0] in said[0]
    assert names(tmp_path) == ["damaged-step-00000006", "step-00000003"]


def test_when_none_is_whole_the_run_does_not_start_anew_in_silence(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "step-00000003" / "weights-00001.safetensors").write_bytes(b"")
    for _ in range(2):  # also when it is tried once more
        with pytest.raises(TrainingError, match="All checkpoints") as error:
            Checkpoints(tmp_path, keep=2).newest(lambda text: pytest.fail(text))
        assert "step-00000003: weights-00001.safetensors has 0 bytes" in str(error.value)
        assert names(tmp_path) == ["step-00000003"]


def test_a_whole_one_is_read_once(tmp_path, monkeypatch):
    checkpoints = save(tmp_path, 3)
    hashed: list[str] = []
    original = module.hash_file
    monkeypatch.setattr(module, "hash_file", lambda path: (hashed.append(path.name), original(path))[1])
    assert checkpoints.newest(print).step == 3
    assert len(hashed) == len(set(hashed)) > 0


def test_what_killed_runs_left_goes_with_the_next_one(tmp_path):
    for name in (".step-00000002.partial", ".step-00000001.going"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights-00001.safetensors").write_bytes(b"x" * 100)
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000003"]


def test_a_part_that_is_not_there_makes_no_checkpoint(tmp_path):
    """On a network's file system the first rank may not see what another has written."""
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="part-00002-of-00002"):
        Checkpoints(tmp_path, keep=2).save(
            2, weights=tensors(WEIGHTS), optimizer=tensors(MOMENTS), ranks=Ranks(0, 2, lambda: None)
        )
    assert names(tmp_path) == ["step-00000001"]


def test_one_asked_for_its_weights_is_looked_at_as_far_as_these_go(tmp_path):
    checkpoints = save(tmp_path, 3)
    (tmp_path / "step-00000003" / "optimizer-00001-of-00001-00001.safetensors").write_bytes(b"")
    assert checkpoints.with_weights(3).step == 3
    (tmp_path / "step-00000003" / "weights-00001.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"weights-00001\.safetensors has 0 bytes"):
        checkpoints.with_weights(3)
    with pytest.raises(CheckpointError, match="never finished"):
        checkpoints.with_weights(4)


MOMENTS_OF_WRITING = ("write_json", "write_shard", "sync", "rename", "remove_folder")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("function", MOMENTS_OF_WRITING)
def test_interrupted_at_any_moment_a_whole_one_is_left(tmp_path, monkeypatch, function):
    """Without clean-up, as SIGKILL leaves it: nothing after the moment runs."""
    monkeypatch.setattr(module.shutil, "rmtree", lambda *args, **options: None)
    original = getattr(module, function)
    for call in range(12):
        folder = tmp_path / function / str(call)
        monkeypatch.setattr(module, function, original)
        save(folder, 1, keep=1)
        calls = iter(range(100))

        def die_at(*args, calls=calls, call=call, **options):
            if next(calls) == call:
                raise Killed
            return original(*args, **options)

        monkeypatch.setattr(module, function, die_at)
        try:
            save(folder, 2, keep=1, weights={"a.weight": WEIGHTS["a.weight"] + 1})
            done = True
        except Killed:
            done = False
        newest = Checkpoints(folder, keep=1).newest(lambda text: pytest.fail(text))
        assert newest is not None and not damage(newest.folder)
        if done:
            assert newest.step == 2
            break
    assert done and call > 0, "no moment was interrupted"


def test_a_disk_without_room_leaves_the_one_before_and_no_half_one(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args, **options):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module, "write_shard", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_a_step_saved_twice_is_the_later_one(tmp_path):
    save(tmp_path, 1)
    later = save(tmp_path, 1, weights={"a.weight": WEIGHTS["a.weight"] * 2})
    assert array_of(later.newest(print).weights()["a.weight"])[2, 3] == 22


def test_ranks_write_their_own_part_and_everybody_finds_all(tmp_path):
    """Two ranks in threads, which wait for each other as processes do."""
    import threading

    barrier = threading.Barrier(2, timeout=60)
    errors = []

    def write(rank: int) -> None:
        try:
            Checkpoints(tmp_path, keep=2).save(
                7,
                weights=tensors(WEIGHTS) if rank == 0 else {},
                optimizer=tensors({f"p{rank}//moment1_0": np.float32([rank])}),
                ranks=Ranks(rank, 2, barrier.wait),
            )
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    found = Checkpoints(tmp_path, keep=2).newest(print)
    assert sorted(found.optimizer()) == ["p0//moment1_0", "p1//moment1_0"]
    shutil.move(found.folder / "optimizer-00002-of-00002-00001.safetensors", tmp_path / "elsewhere")
    assert "optimizer-00002-of-00002-00001.safetensors is not there" in damage(found.folder)


def test_half_precision_keeps_its_bits(tmp_path):
    class Half:
        shape, dtype = (3,), "paddle.bfloat16"

        def numpy(self):
            return np.uint16([16256, 65535, 1])

    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, weights={"h": Half()}, optimizer={}, ranks=Ranks())
    info = checkpoints.newest(print).weights()["h"]
    assert info.dtype == "BF16" and array_of(info).tolist() == [16256, 65535, 1]
