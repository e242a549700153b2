"""`aquila-pd verify`: what is proven, what is not, what cannot be read, and the reports in between."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import checkpoint_factory as factory
import pytest
import sentencepiece
import verify_factory
from fork_server import converter
from paths import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from aquila_pd.checkpoint.convert import convert
from aquila_pd.checkpoint.sources import open_source
from aquila_pd.checkpoint.verify.command import main
from aquila_pd.checkpoint.verify.page import page
from aquila_pd.checkpoint.verify.tokens import compare_tokenizers
from aquila_pd.tokenization import load
from aquila_pd.utils.errors import VerificationError

LEVELS = ("content", "logits", "layerwise")


@pytest.fixture
def folders(tmp_path) -> list[str]:
    """Arguments that name a model and its right conversion."""
    torch, paddle = verify_factory.both(tmp_path, torch_dtype="bfloat16")
    return ["--torch", str(torch), "--paddle", str(paddle)]


def flip_last_byte(file: Path) -> str:
    """Change the last byte of a safetensors file; returns the name of the tensor it belongs to."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__")
    return max(header, key=lambda name: header[name]["data_offsets"][1])


# ------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("level", LEVELS)
def test_a_right_conversion_is_proven_at_every_level(folders, capsys, level):
    assert main([*folders, "--level", level]) == 0
    said = capsys.readouterr()
    assert "config and headers agree (30 tensors)" in said.out and said.out.splitlines()[-1].startswith("Proven: ")


@pytest.mark.parametrize("side", ["torch", "paddle"])
def test_a_changed_byte_in_either_folder_is_named(folders, capsys, tmp_path, side):
    name = flip_last_byte(sorted((tmp_path / side).glob("*.safetensors"))[-1])
    assert main(folders) == 1
    assert re.search(rf"values +{name.replace('model.', 'aquila.')}: 1 of", capsys.readouterr().err)


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_not_proven_is_one_message_and_status_1(folders, capsys, tmp_path, level):
    next(m for m in verify_factory.MUTATIONS if m.name == "layers off by one").apply(tmp_path / "paddle")
    assert main([*folders, "--level", level]) == 1
    said = capsys.readouterr()
    assert "Proven" not in said.out and said.err.startswith("error: ") and "Nothing was kept" not in said.err


def test_every_difference_of_config_and_headers_is_told_at_once(folders, capsys, tmp_path):
    tensors = factory.load_folder(tmp_path / "paddle")
    tensors["aquila.norm.weight"] = tensors["aquila.norm.weight"][:-1].copy()
    del tensors["lm_head.weight"]
    tensors["aquila.extra"] = tensors["aquila.norm.weight"]
    said = {**verify_factory.config(torch_dtype="bfloat16"), "rope_theta": 5.0, "rms_norm_eps": 1e-6}
    verify_factory.paddle_folder(tmp_path / "paddle", said, tensors)
    assert main(folders) == 1
    message = capsys.readouterr().err
    for line in (
        "config      rope_theta: the source says 10000.0, config.json 5.0",
        "config      rms_norm_eps: the source says 1e-05, config.json 1e-06",
        "missing     lm_head.weight",
        "unexpected  aquila.extra",
        "shape       aquila.norm.weight: [32] was due, the file has [31]",
    ):
        assert line in message


def test_a_dtype_that_config_and_tensors_say_differently_is_told(folders, capsys, tmp_path):
    file = tmp_path / "paddle" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "float16"}))
    assert main(folders) == 1
    assert "dtype: config.json says 'float16', the tensors are BF16" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"--torch": "nowhere"}, "nowhere"),
        ({"--paddle": "nowhere"}, "nowhere"),
        ({"--torch": "paddle"}, "is a Paddle folder. Give the torch checkpoint"),
        ({"--paddle": "torch"}, "none of its 30 tensors has a Paddle name"),
    ],
)
def test_folders_that_cannot_be_compared_are_one_message_and_status_1(folders, capsys, tmp_path, changed, words):
    args = dict(zip(folders[::2], folders[1::2], strict=True))
    args |= {key: str(tmp_path / value) for key, value in changed.items()}
    assert main([part for pair in args.items() for part in pair]) == 1
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


@pytest.mark.parametrize(
    "more", [["--level", "guess"], ["--prompt", "a"], ["--report", "report.txt"], ["--level", "logits", "--nonsense"]]
)
def test_wrong_arguments_have_status_2(folders, more):
    with pytest.raises(SystemExit) as caught:
        main([*folders, *more])
    assert caught.value.code == 2


def test_a_prompt_is_run_in_place_of_the_fixed_ids(folders, capsys, tmp_path):
    factory.write_byte_tokenizer(tmp_path / "paddle", bos="<s>", eos="</s>", pad="<pad>")
    report = tmp_path / "report.json"
    assert main([*folders, "--level", "layerwise", "--prompt", "abcab", "--report", str(report)]) == 0
    assert json.loads(report.read_text())["tokens"] == {
        "prompt": "abcab",
        "ids": [[3, 4, 5, 3, 4]],
        "embedding_rows": [3, 80],
    }
    assert main([*folders, "--level", "layerwise", "--prompt", ""]) == 1
    assert "The prompt makes 0 tokens" in capsys.readouterr().err


def test_content_needs_neither_paddle_nor_torch(folders):
    heavy = ("torch", "paddle", "paddlenlp", "transformers")
    code = f"import sys\nfrom aquila_pd.checkpoint.verify.command import main\nstatus = main({folders!r})\n"
    code += f"print(status, [name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


@pytest.mark.parametrize(
    "said, words",
    [
        ({"weight_quantize_algo": "nf4", "weight_blocksize": 64}, "weight_quantize_algo = 'nf4' packs the weights"),
        ({"weight_quantize_algo": None, "quant_type": "a8w8"}, "quant_type = 'a8w8' packs the weights"),
        ({"weight_quantize_algo": None, "quant_type": None, "weight_blocksize": 64, "shift": False}, None),
        (None, None),
    ],
)
def test_what_paddlenlp_saves_about_packing_counts_where_it_asks_for_some(folders, capsys, tmp_path, said, words):
    file = tmp_path / "paddle" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": said}))
    assert main(folders) == (1 if words else 0)
    assert (words or "") in capsys.readouterr().err


def test_the_script_and_the_verb_are_the_same_command(folders):
    for command in (["convert/verify.py"], ["-m", "aquila_pd.cli", "verify"]):
        done = converter().run([*command, *folders], cwd=ROOT)
        assert done.returncode == 0 and "Proven: content equal" in done.stdout, done.stderr


# ----------------------------------------------------------------------------------------------- tokenizers

LINES = ["the cat and the dog, the end", "北京 是 中国 的首都", "1234 1234 def f(x):"]


def write_bpe(folder: Path, lines: list[str] = LINES) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(lines * 5, trainer)
    backend.model.save(str(folder))


def write_json_tokenizer(folder: Path) -> None:
    write_bpe(folder)
    backend = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(folder / "tokenizer.json"))


def write_sentencepiece(folder: Path) -> None:
    how = {"vocab_size": 330, "byte_fallback": True, "model_type": "bpe", "normalization_rule_name": "identity"}
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES * 5),
            model_writer=file,
            remove_extra_whitespaces=False,
            minloglevel=2,
            hard_vocab_limit=False,
            **how,
        )


def write_pair(root: Path, write) -> tuple[Path, Path]:
    """A model with a tokenizer of its own, and the folder converted from it."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    said = factory.config(vocab_size=400, **ids)
    if write is None:
        source = factory.write_gguf(root / "tiny.gguf", factory.config(), factory.weights(factory.config()))
    else:
        source = factory.write_safetensors(root / "torch", said, factory.weights(said))
        write(source)
    convert(source, root / "paddle", verify="none", say=lambda text: None)
    return source, root / "paddle"


@pytest.mark.parametrize(
    "write, reader",
    [
        (write_bpe, "the source's read by the tokenizers library"),
        (write_json_tokenizer, "the source's read by the tokenizers library"),
        (write_sentencepiece, "the source's read by sentencepiece"),
        (None, "both read by this project"),
    ],
    ids=["vocab.json", "tokenizer.json", "tokenizer.model", "gguf"],
)
def test_tokenizers_are_compared_and_it_is_said_who_read_them(tmp_path, capsys, write, reader):
    source, paddle = write_pair(tmp_path, write)
    args = ["--torch", str(source), "--paddle", str(paddle)]
    assert main(args) == 0
    assert f"tokenizers agree on 16 texts ({reader})" in capsys.readouterr().out
    write_bpe(paddle, [line[::-1] for line in LINES])
    (paddle / "tokenizer.json").unlink()
    (paddle / "tokenizer_config.json").write_text("{}")
    (paddle / "special_tokens_map.json").unlink(missing_ok=True)
    assert main(args) == 1
    said = capsys.readouterr().err
    assert "is not that of" in said and re.search(r"tokens +'.* the source says \[", said)


def test_a_token_put_in_front_of_every_text_is_a_difference(tmp_path):
    source, paddle = write_pair(tmp_path, write_sentencepiece)
    with open_source(source) as opened:
        assert "agree" in compare_tokenizers(opened, paddle)
        file = paddle / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "add_bos_token": False}))
        with pytest.raises(VerificationError, match=r"tokens +'': from token 0 on the source says \[1\], the Paddle"):
            compare_tokenizers(opened, paddle)


def test_files_that_this_project_reads_wrongly_are_found_out_by_the_library(tmp_path, monkeypatch):
    right = load.set_pipeline
    monkeypatch.setattr(load, "set_pipeline", lambda *args, **how: right(*args, add_prefix_space=True))
    source, paddle = write_pair(tmp_path, write_bpe)
    with open_source(source) as opened, pytest.raises(VerificationError, match=r"tokens +'Hello"):
        compare_tokenizers(opened, paddle)


def test_a_tokenizer_on_one_side_only_is_not_compared_and_that_is_said(folders, capsys, tmp_path):
    factory.write_byte_tokenizer(tmp_path / "paddle", bos="<s>", eos="</s>", pad="<pad>")
    source, paddle = write_pair(tmp_path / "other", write_bpe)
    for file in (*paddle.glob("*token*"), paddle / "vocab.json", paddle / "merges.txt"):
        file.unlink()
    for args, whose in (
        (folders, "the source"),
        (["--torch", str(source), "--paddle", str(paddle)], "the Paddle folder"),
    ):
        assert main(args) == 0
        assert f"tokenizers were not compared: {whose} has none." in capsys.readouterr().out


def test_comparing_tokenizers_needs_neither_framework_too(tmp_path):
    source, paddle = write_pair(tmp_path, write_sentencepiece)
    test_content_needs_neither_paddle_nor_torch(["--torch", str(source), "--paddle", str(paddle)])


# -------------------------------------------------------------------------------------------------- reports


class Page(HTMLParser):
    """Tags with their attributes, text, and whether every tag that was opened is closed."""

    VOID = ("meta", "line", "polyline", "br")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_json_report_holds_everything_needed_to_judge(folders, tmp_path):
    report = tmp_path / "report.json"
    assert main([*folders, "--level", "layerwise", "--report", str(report)]) == 0
    found = json.loads(report.read_text())
    assert (found["verdict"], found["level"]) == ("proven", "layerwise")
    assert found["torch"]["dtypes"] == found["paddle"]["dtypes"] == {"BF16": 30}
    assert len(found["torch"]["config_sha256"]) == len(found["paddle"]["config_sha256"]) == 64
    assert [place["name"] for place in found["places"]][-2:] == ["final norm", "head"] and len(found["places"]) == 9
    assert len(found["seconds_per_layer"]) == 3 and len(found["tokens"]["ids"][0]) == 96
    assert {"torch", "paddlepaddle", "aquila_pd", "python"} <= set(found["versions"])
    assert found["weights_read_independently"] is True


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_the_page_needs_nothing_from_elsewhere_and_begins_with_the_verdict(folders, tmp_path, level, broken):
    if broken:
        verify_factory.MUTATIONS[0].apply(tmp_path / "paddle")
    report = tmp_path / "report.html"
    status = main([*folders, "--level", level, "--report", str(report)])
    text = report.read_text()
    found = Page(text)
    assert found.open == [] and not {"script", "link", "img", "iframe"} & {tag for tag, _ in found.tags}
    assert not re.search(r"https?://|url\(|@import", text)
    assert not [key for _, attributes in found.tags for key in attributes if key in ("src", "href") or key[:2] == "on"]
    # one altered value of q_proj moves the logits too little for that level: it compares whole models
    assert status == (broken and level != "logits")
    assert found.text.index("Not proven" if status else "Proven") < found.text.index("What was compared")
    assert (len([tag for tag, a in found.tags if a.get("class", "").startswith("curve")]) == 8) == (
        level == "layerwise"
    )


def marked(text: str) -> list[str]:
    """The cells of the page that are marked as bad, each with the name of its row."""
    rows = re.findall(r"<tr>(<td.*)</tr>", text)
    cells = [re.findall(r"<td( class=\"bad\")?>([^<]*)", row) for row in rows]
    heads = ("place", "Paddle", "torch", "times", "Paddle so far")
    return [
        f"{row[0][1]}: {heads[i]}" for row in cells for i, (bad, _) in enumerate(row[: len(heads)]) if bad and i != 0
    ]


def test_the_page_marks_where_an_error_is_made_and_not_what_follows(folders, tmp_path):
    args = [*folders, "--level", "layerwise", "--report", str(tmp_path / "report.html")]
    verify_factory.transposed("aquila.layers.1.self_attn.o_proj.weight", "").apply(tmp_path / "paddle")
    assert main(args) == 1
    cells = ["layer 1, attention: Paddle", "layer 1, attention: times"]
    assert marked((tmp_path / "report.html").read_text()) == cells


def test_the_page_marks_the_first_drift_that_no_place_makes_by_itself(folders, tmp_path, monkeypatch):
    from aquila_pd.modeling import DecoderLayer

    right = DecoderLayer.forward
    monkeypatch.setattr(DecoderLayer, "forward", lambda self, x, *how: right(self, x, *how) + 1e-3 * x)
    assert main([*folders, "--level", "layerwise", "--report", str(tmp_path / "report.html")]) == 1
    assert marked((tmp_path / "report.html").read_text()) == ["layer 0, MLP: Paddle so far"]


def test_the_report_names_the_weights_by_their_hashes_where_a_manifest_has_them(folders, tmp_path):
    convert(tmp_path / "torch", tmp_path / "made", verify="none", say=lambda text: None)
    for paddle, known in ((tmp_path / "paddle", False), (tmp_path / "made", True)):
        for suffix in ("json", "html"):
            report = tmp_path / f"{paddle.name}.{suffix}"
            assert main([*folders[:3], str(paddle), "--report", str(report)]) == 0
        digest = factory.digests(paddle)["model.safetensors"]
        found = json.loads((tmp_path / f"{paddle.name}.json").read_text())
        assert found["paddle"]["weights_sha256"] == ({"model.safetensors": digest} if known else None)
        text = Page((tmp_path / f"{paddle.name}.html").read_text()).text
        assert (digest in text) == known == ("Paddle weights: absent" not in text)
        assert "torch weights: absent, as the folder has no manifest" in text


def test_names_in_the_page_are_escaped(tmp_path):
    folder = tmp_path / "a<b>&'\"c"
    torch, paddle = verify_factory.both(folder)
    report = tmp_path / "report.html"
    assert main(["--torch", str(torch), "--paddle", str(paddle), "--report", str(report)]) == 0
    assert "a<b>" not in report.read_text() and str(paddle) in Page(report.read_text()).text


def test_a_page_can_be_made_of_numbers_that_are_none(tmp_path):
    config = verify_factory.config()
    tensors = factory.weights(config)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    torch = factory.write_safetensors(tmp_path / "torch", config, tensors)
    paddle = verify_factory.paddle_folder(tmp_path / "paddle", config, factory.expected(tensors))
    for suffix in ("json", "html"):
        report = tmp_path / f"report.{suffix}"
        args = ["--torch", str(torch), "--paddle", str(paddle), "--level", "layerwise", "--report", str(report)]
        assert main(args) == 1
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    assert "There is no reference" in page(found)


def test_a_report_replaces_only_an_earlier_report(folders, tmp_path, capsys):
    for suffix in ("json", "html"):
        report = tmp_path / f"report.{suffix}"
        assert main([*folders, "--report", str(report)]) == 0
        assert main([*folders, "--report", str(report)]) == 0
        report.write_text("{}")
        assert main([*folders, "--report", str(report)]) == 1
        assert report.read_text() == "{}"
    assert "no earlier report" in capsys.readouterr().err


@pytest.mark.parametrize(
    "place, words",
    [("paddle/report.json", "only read"), ("torch/report.html", "only read"), ("no/report.json", "is no folder")],
)
def test_a_report_that_cannot_be_is_refused_before_the_work(folders, tmp_path, capsys, place, words):
    assert main([*folders, "--report", str(tmp_path / place)]) == 1
    said = capsys.readouterr()
    assert words in said.err and said.out == ""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_termination_ends_with_143_and_leaves_no_report(folders, tmp_path):
    report = tmp_path / "report.json"
    code = (
        "import os, signal\nfrom aquila_pd.checkpoint.verify import command\n"
        "command.prove = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"raise SystemExit(command.main({[*folders, '--report', str(report)]!r}))"
    )
    done = converter().run(["-c", code], cwd=ROOT)
    assert done.returncode == 143 and "Stopped by SIGTERM" in done.stderr and not report.exists()
