"""Ten times the rows cost no more memory, but for what finding duplicates says it costs. Measured in processes of
their own, at their peak: forks of one that has imported what they need, and with it the same beginning."""

import json
from pathlib import Path

import pytest
from fork_server import ForkServer
from sft_rows_factory import chat

FEW, MANY = 4_000, 40_000
NOISE = 10_000_000  # bytes by which peaks differ all the same: buffers of libraries that fill once

RUN = """
import sys
from pathlib import Path
from aquila_pd.data.counters import Counters
from aquila_pd.data.pipeline import conversations
from aquila_pd.data.settings import DataSpec, Source

Path("/proc/self/clear_refs").write_text("5")  # the peak begins here, and not with what the process forked from had
file, deduplicate, keep = sys.argv[1:]
spec = DataSpec(train=(Source((file,)),), deduplicate=deduplicate, held_out=0.01)
rows = conversations(spec, 0, counters=Counters())
found = len(list(rows)) if keep == "keep" else sum(1 for _ in rows)
# not getrusage: that one cannot begin anew
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(found, int(peak.split()[1]) * 1024)
"""


def write(file: Path, count: int) -> Path:
    """Tiny rows, no two the same, in a file of one kind."""
    rows = (chat(f"question {number}", f"answer {number * number}", id=number) for number in range(count))
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), file, row_group_size=10**9)  # one group, the worst of all
    elif file.suffix == ".json":
        with file.open("w") as out:
            for number, row in enumerate(rows):
                out.write(("," if number else "[") + json.dumps(row))
            out.write("]")
    else:
        with file.open("w") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    return file


@pytest.fixture(scope="module")
def server():
    made = ForkServer(["aquila_pd.data.pipeline", "pyarrow.parquet"])
    yield made
    made.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """files(name, count) is a file of so many rows, written once."""
    folder, made = tmp_path_factory.mktemp("rows"), {}

    def file(name: str, count: int) -> Path:
        if (name, count) not in made:
            made[name, count] = write(folder / f"{count}-{name}", count)
        return made[name, count]

    return file


@pytest.fixture
def peak(server, files):
    """peak(name, deduplicate, rows) is bytes of a process at its peak."""

    def peak(name: str, deduplicate: str, rows: int, *, keep: str = "") -> int:
        done = server.run(["-c", RUN, files(name, rows), deduplicate, keep], timeout=300)
        assert done.returncode == 0, done.stderr
        found, nbytes = map(int, done.stdout.split())
        assert found == rows
        return nbytes

    return peak


@pytest.mark.parametrize(
    ("name", "deduplicate", "each"),
    [
        ("rows.jsonl", "none", 0),
        ("rows.json", "none", 0),
        ("rows.parquet", "none", 0),
        ("rows.jsonl", "exact", 16 * 2.9 * 1.5),  # bytes for each row, by duplicates.py
    ],
)
def test_ten_times_the_rows_cost_no_more(peak, name, deduplicate, each):
    few, many = (peak(name, deduplicate, count) for count in (FEW, MANY))
    assert many - few <= each * (MANY - FEW) + NOISE


def test_control_rows_that_are_held_are_noticed(peak):
    few, many = (peak("rows.jsonl", "none", count, keep="keep") for count in (FEW, MANY))
    assert many - few > 2 * NOISE
