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
import verify_factory

from aquila_pd.checkpoint.verify.command import main
from aquila_pd.checkpoint.verify.page import page

ROOT = Path(__file__).resolve().parents[1]
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


def test_the_script_and_the_verb_are_the_same_command(folders):
    for command in (["convert/verify.py"], ["-m", "aquila_pd.cli", "verify"]):
        done = subprocess.run(
            [sys.executable, *command, *folders], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0 and "Proven: content equal" in done.stdout, done.stderr


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
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 143 and "Stopped by SIGTERM" in done.stderr and not report.exists()
