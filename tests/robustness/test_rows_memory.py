"""Ten times the rows cost no more memory, but for what finding duplicates says it costs. Measured at the peak of
processes of their own, forked from a warm one."""

import json
from pathlib import Path

import pytest
from effort import tries
from fork_server import warm
from paths import ROOT
from sft_rows_factory import chat

FEW, MANY = tries(4_000, 8_000), tries(40_000, 80_000)
NOISE = tries(8_000_000, 12_000_000)  # bytes by which peaks differ all the same: buffers of libraries that fill once

RUN = """
import sys
from pathlib import Path
from aquila_pd.data.counters import Counters
from aquila_pd.data.pipeline import conversations
from aquila_pd.data.settings import DataSpec, Source

file, deduplicate, keep = sys.argv[1:]
spec = DataSpec(train=(Source((file,)),), deduplicate=deduplicate, held_out=0.01)
rows = conversations(spec, 0, counters=Counters())
found = len(list(rows)) if keep == "keep" else sum(1 for _ in rows)
# not getrusage: that one begins with what the parent process had
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


def peak(file: Path, deduplicate: str, rows: int, *, keep: str = "") -> int:
    """Bytes of a process at its peak."""
    done = warm().run(["-c", RUN, file, deduplicate, keep], cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    found, nbytes = map(int, done.stdout.split())
    assert found == rows
    return nbytes


@pytest.mark.parametrize(
    ("name", "deduplicate", "each"),
    [
        ("rows.jsonl", "none", 0),
        ("rows.json", "none", 0),
        ("rows.parquet", "none", 0),
        ("rows.jsonl", "exact", 16 * 2.9 * 1.5),  # bytes for each row, by duplicates.py
    ],
)
def test_ten_times_the_rows_cost_no_more(tmp_path, name, deduplicate, each):
    few = peak(write(tmp_path / f"few-{name}", FEW), deduplicate, FEW)
    many = peak(write(tmp_path / f"many-{name}", MANY), deduplicate, MANY)
    assert many - few <= each * (MANY - FEW) + NOISE


def test_control_rows_that_are_held_are_noticed(tmp_path):
    few, many = (write(tmp_path / f"{count}.jsonl", count) for count in (FEW, MANY))
    assert peak(many, "none", MANY, keep="keep") - peak(few, "none", FEW, keep="keep") > 3 * NOISE
