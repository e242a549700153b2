"""Ziya2-13B-Chat: LLaMA's architecture, 39,424 rows, a SentencePiece tokenizer; for PaddleNLP's LLaMA and for ours."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import checkpoint_factory as factory
import numpy as np
import pytest
from ziya_factory import write_ziya

from aquila_pd.architecture.weight_map import Dims, weights
from convert.paddle2torch import to_torch
from convert.torch2paddle import main

PROMPT = "请介绍一下北京。 Hello 🙂"


@pytest.fixture(scope="module")
def ziya(tmp_path_factory) -> Path:
    return write_ziya(tmp_path_factory.mktemp("ziya") / "Ziya2-13B-Chat")


@pytest.fixture(scope="module")
def converted(ziya) -> dict[str, Path]:
    """Architecture -> the folder made for it, with --family auto."""
    folders = {name: ziya.parent / name for name in ("aquila", "llama")}
    for name, folder in folders.items():
        assert main(["--input", str(ziya), "--output", str(folder), "--architecture", name]) == 0
    return folders


def torch_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.numpy()


def paddle_logits(model, ids: np.ndarray) -> np.ndarray:
    import paddle

    model.eval()
    with paddle.no_grad():
        found = model(paddle.to_tensor(ids))
    return (found[0] if isinstance(found, tuple) else found).numpy()


def pieces(folder: Path):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_both_folders_compute_what_torch_computes(ziya, converted):
    from paddlenlp.transformers import LlamaForCausalLM

    from aquila_pd.modeling import AquilaForCausalLM

    ids = np.random.default_rng(0).integers(0, 39424, (2, 40))
    wanted = torch_logits(ziya, ids)
    ours = AquilaForCausalLM.from_pretrained(str(converted["aquila"]), dtype="float32")
    theirs = LlamaForCausalLM.from_pretrained(str(converted["llama"]), dtype="float32")
    for model in (ours, theirs):
        assert np.abs(paddle_logits(model, ids) - wanted).max() < 1e-4 * wanted.std() + 1e-4
    # control: a wrong eps, of which Ziya's generations have two, is seen
    theirs.config.rms_norm_eps = 1e-2
    for layer in theirs.llama.layers:
        layer.input_layernorm.variance_epsilon = 1e-2
    assert np.abs(paddle_logits(theirs, ids) - wanted).max() > 1e-2 * wanted.std()


def test_the_tokenizer_makes_the_ids_of_sentencepiece(ziya, converted):
    from paddlenlp.transformers import AutoTokenizer, LlamaTokenizer

    from aquila_pd.tokenizer import AquilaTokenizer

    wanted = [1, *pieces(ziya).encode(PROMPT)]
    assert AquilaTokenizer.from_pretrained(str(converted["aquila"]))(PROMPT)["input_ids"] == wanted
    assert AutoTokenizer.from_pretrained(str(converted["aquila"]))(PROMPT)["input_ids"] == wanted
    for kind in (AutoTokenizer, LlamaTokenizer):
        tokenizer = kind.from_pretrained(str(converted["llama"]))
        assert isinstance(tokenizer, LlamaTokenizer)
        assert tokenizer(PROMPT)["input_ids"] == wanted


def test_the_chat_template_is_recorded(converted):
    from aquila_pd.tokenizer import AquilaTokenizer

    tokenizer = AquilaTokenizer.from_pretrained(str(converted["aquila"]))
    turns = [
        {"role": "user", "content": " q1 "},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<human>:q1\n<bot>:a1\n<human>:q2\n<bot>:"


def test_the_way_back_is_the_folder_it_came_from(ziya, converted, tmp_path):
    from transformers import AutoTokenizer

    for name, folder in converted.items():
        back = tmp_path / name
        assert to_torch(["--input", str(folder), "--output", str(back)]) == 0
        original, returned = factory.load_folder(ziya), factory.load_folder(back)
        assert {n: (t.dtype, t.tobytes()) for n, t in original.items()} == {
            n: (t.dtype, t.tobytes()) for n, t in returned.items()
        }
        assert (back / "tokenizer.model").read_bytes() == (ziya / "tokenizer.model").read_bytes()
        assert AutoTokenizer.from_pretrained(back)(PROMPT)["input_ids"] == [1, *pieces(ziya).encode(PROMPT)]


# ------------------------------------------------------------------------------------- 34B and 70B, without weights

REAL = {
    # hidden, intermediate, layers, heads, key/value heads: bytes of bfloat16 weights by hand
    "34b": (6144, 24576, 60, 48, 8),
    "70b": (8192, 28672, 80, 64, 8),
}


def write_real_config(folder: Path, size: str) -> dict:
    hidden, intermediate, layers, heads, kv_heads = REAL[size]
    config = factory.config(
        vocab_size=100008,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        bos_token_id=100006,
        eos_token_id=100007,
        torch_dtype="bfloat16",
    )
    factory.write_config(folder, config)
    return config


@pytest.mark.parametrize("size", REAL)
def test_a_config_alone_is_planned_with_shards_bytes_and_time(tmp_path, capsys, monkeypatch, size):
    monkeypatch.setattr(
        "aquila_pd.checkpoint.io.output.shutil.disk_usage", lambda path: namedtuple("U", "free")(10**12)
    )
    hidden, intermediate, layers, heads, kv_heads = REAL[size]
    write_real_config(tmp_path / size, size)
    assert main(["--input", str(tmp_path / size), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    kv = hidden // heads * kv_heads
    values = 2 * 100008 * hidden + hidden
    values += layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate + 2 * hidden)
    assert f"{2 * values / 1e9:.2f} GB in" in text
    lines = [line.split() for line in text.splitlines() if line.startswith("  model-0")]
    assert sum(int(line[1].replace(",", "")) for line in lines) == 2 * values
    assert len(lines) == {"34b": 14, "70b": 30}[size]
    assert lines[-1][-1] == "lm_head.weight"
    assert "  time      about " in text
    assert "only config.json is there" in text
    assert not (tmp_path / "out").exists()
    # without --dry-run there is nothing to convert
    assert main(["--input", str(tmp_path / size), "--output", str(tmp_path / "out")]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err


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


@pytest.mark.slow
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


def test_a_tokenizer_that_may_cut_otherwise_is_warned_of(ziya, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "aquila_pd.tokenization.convert.doubts_of_model", lambda model: ["7 pieces may be cut otherwise"]
    )
    assert main(["--input", str(ziya), "--output", str(tmp_path / "out"), "--verify", "none"]) == 0
    assert "warning   7 pieces may be cut otherwise; PaddleNLP's own LlamaTokenizer" in capsys.readouterr().out
