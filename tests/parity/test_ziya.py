"""Ziya2-13B-Chat: LLaMA's architecture, 39,424 rows, a SentencePiece tokenizer; for PaddleNLP's LLaMA and for ours."""

from collections import namedtuple
from pathlib import Path

import checkpoint_factory as factory
import numpy as np
import pytest
from ziya_factory import REAL, write_real_config, write_ziya

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


def test_a_tokenizer_that_may_cut_otherwise_is_warned_of(ziya, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "aquila_pd.tokenization.convert.doubts_of_model", lambda model: ["7 pieces may be cut otherwise"]
    )
    assert main(["--input", str(ziya), "--output", str(tmp_path / "out"), "--verify", "none"]) == 0
    assert "warning   7 pieces may be cut otherwise; PaddleNLP's own LlamaTokenizer" in capsys.readouterr().out
