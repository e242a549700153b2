"""A folder of the size of 34B, nearly all holes: its first shards are converted and kept over an interruption."""

import json
import shutil
from pathlib import Path

import numpy as np
from ziya_factory import write_real_config

from aquila_pd.architecture.weight_map import Dims, weights
from convert.torch2paddle import main


def write_sparse(folder: Path, config: dict) -> Path:
    """The folder with all its bytes, nearly all of them holes: headers are real, each tensor has a few values."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv = hidden // heads * config["num_key_value_heads"]
    dims = Dims(config["vocab_size"], hidden, hidden, kv, config["intermediate_size"], config["num_hidden_layers"])
    rows, place = {}, 0
    for weight in weights(dims):
        nbytes = 2 * int(np.prod(weight.hf_shape))
        rows[weight.hf] = {"dtype": "BF16", "shape": weight.hf_shape, "data_offsets": [place, place + nbytes]}
        place += nbytes
    header = json.dumps(rows).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + place)
        for i, row in enumerate(rows.values()):  # the last value of each tensor, another one for each
            file.seek(8 + len(header) + row["data_offsets"][1] - 2)
            file.write((i + 1).to_bytes(2, "little"))
    return folder


def test_a_part_of_34b_converts_from_sparse_files(tmp_path, monkeypatch, capsys):
    """The first shards of a folder of 67 GB, and then an interruption that keeps them."""
    from safetensors import safe_open

    from aquila_pd.checkpoint.io import journal

    source = write_sparse(tmp_path, write_real_config(tmp_path, "34b"))
    record = journal.Journal.record

    def two_shards(self, file, finished, **options):
        record(self, file, finished, **options)
        if len(self.finished) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "record", two_shards)
    monkeypatch.setattr("aquila_pd.checkpoint.io.output.SPARE", -(10**12))  # the rest is never written
    out = tmp_path.parent / f"{tmp_path.name}-out"
    argv = ["--input", str(source), "--output", str(out), "--max-shard-size", "700MB", "--verify", "none"]
    assert main(argv) == 130
    assert "2 of 122 shards are finished and kept" in capsys.readouterr().err
    staged = out.with_name(f"{out.name}.partial")
    found = {}
    for file in sorted(staged.glob("model-*.safetensors")):
        with safe_open(file, "np") as opened:
            found |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  not a dict
            assert list(found) == list(dict.fromkeys(found))
            for name in opened.keys():  # noqa: SIM118
                row = opened.get_slice(name).get_shape()[0] - 1
                assert opened.get_slice(name)[row:].reshape(-1)[-1:].view(np.uint16)[0] > 0
    assert found["aquila.layers.0.mlp.gate_proj.weight"].get_shape() == [6144, 24576]
    shutil.rmtree(staged)
