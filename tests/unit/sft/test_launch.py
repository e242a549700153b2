"""How the launcher judges ranks that end: one status, and a word about each rank whose output is in a file."""

from dataclasses import dataclass

import pytest

from aquila_pd.sft.run import launch


@dataclass
class Rank:
    """A rank that ends by itself with a status, or waits until it is killed."""

    status: int | None = None
    killed: bool = False

    def poll(self) -> int | None:
        return -9 if self.killed else self.status

    def kill(self) -> None:
        self.killed = True

    def wait(self) -> int:
        return self.poll()


@pytest.mark.parametrize(
    ("statuses", "expected", "reported"),
    [
        ((0, 0), 0, []),
        ((3, 0), 3, []),  # rank 0 writes to the terminal itself
        ((0, 3), 3, [1]),
        ((1, -9), 137, [1]),  # both seen in one look: rank 0 failed since rank 1 was gone
        ((1, -9, -15), 137 + 6, [1, 2]),
    ],
)
def test_ranks_that_ended_before_the_first_look(tmp_path, capsys, statuses, expected, reported):
    assert launch._wait([Rank(status) for status in statuses], tmp_path, ()) == expected
    said = capsys.readouterr().err
    assert [n for n in range(len(statuses)) if f"Rank {n} failed; what it said is in {tmp_path}" in said] == reported


def test_a_rank_that_waits_for_one_that_failed_is_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "PATIENCE", 0)
    waiting = Rank()
    assert launch._wait([waiting, Rank(5)], tmp_path, ()) == 5 and waiting.killed
    assert "Rank 1 failed" in capsys.readouterr().err


def test_ranks_that_were_asked_to_stop_did_not_fail(tmp_path, capsys):
    assert launch._wait([Rank(143), Rank(143)], tmp_path, [15]) == 143
    assert capsys.readouterr().err == ""
