"""The benchmarks' worker processes on a tiny model, one for each side."""

from benchmarks_factory import run_part
from parts import LAST, OURS, Case, Part, sides


def test_a_tiny_model_is_measured_end_to_end(tmp_path):
    cases = (
        Case("prefill", {"do": "prefill", "length": 24}),
        Case("decode", {"do": "decode", "batch": 2, "length": 16, "new": 4}),
        Case("wrong", {"do": "prefill", "length": 0}),
        Case("decode, again", {"do": "decode", "batch": 2, "length": 16, "new": 4}),
    )
    part = Part("part", "", "tiny", sides(OURS, LAST), cases, LAST)
    results = run_part(tmp_path / "bench.json", part)
    for case in ("prefill", "decode", "decode, again"):
        ours, theirs = (results.measured[case][side][0] for side in (OURS, LAST))
        assert ours["tokens"] == theirs["tokens"]
        assert all(found[figure] > 0 for found in (ours, theirs) for figure in ("seconds", "cpu", "peak_mb"))
    assert "prefill_chunk is 0" in results.errors[f"wrong, {OURS}"]  # and the process went on to the next case
    assert set(results.errors) <= {f"wrong, {side}" for side in (OURS, LAST)}
