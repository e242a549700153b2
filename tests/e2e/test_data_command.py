"""`aquila-pd data`: what it says of rows, what it shows of them, and the folder it makes; no weights are read."""

import io
import json
import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from chat_factory import write_aquila_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from aquila_pd import AquilaTokenizer
from aquila_pd.cli import main as cli
from aquila_pd.data import command
from aquila_pd.data.preview import Segment, coloured, marked, segments_of
from aquila_pd.data.samples import Samples
from aquila_pd.data.stats import bins_of, histogram, quantile
from aquila_pd.data.targets import write_conversation
from aquila_pd.text.prompts import ChatPrompts

V1 = ("--template", "aquila-v1")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder that holds a tokenizer and no weights."""
    return write_aquila_tokenizer(tmp_path_factory.mktemp("model") / "tiny")


def row(*texts: str, **more) -> dict:
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": said, **more}


def write_rows(path: Path, content: list[dict]) -> Path:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in content), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return write_rows(
        tmp_path / "rows.jsonl",
        [
            row("who?", "me 🙂", id=7, source="flan"),
            row("again", "", "no answer", "none"),
            row("q", "a", "Q", "A", id="x", source="gen"),
            row("who?", "me 🙂", id=8),
            row("b" * 100, "c" * 100, source="flan"),
        ],
    )


def data(capsys, *arguments: object) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)"""
    status = cli(["data", *map(str, arguments)])
    return status, *capsys.readouterr()


# ------------------------------------------------------------------------------------------------ stats


def test_stats_count_rules_rows_turns_and_characters(capsys, file):
    status, out, err = data(capsys, "stats", file)
    assert status == 0 and err == ""
    assert "duplicate_exact" in out and "Rows by their length in characters" in out and "tokens" not in out
    assert "  flan    2" in out and "  gen     1" in out and "  (none)  1" in out


def line_of(out: str, part: str) -> list[str]:
    """The numbers of a part in the table of stats."""
    (line,) = (line for line in out.splitlines() if line.startswith(part))
    return line.removeprefix(part).split()


def test_stats_count_words_as_a_person_would(capsys, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [row("12345", "123"), row("12", "1234567890", "q", "a")])
    assert line_of(data(capsys, "stats", file)[1], "train") == ["2", "3", "22", "63.6%"]


def test_stats_with_a_tokenizer_count_tokens_and_what_is_learned(capsys, file, model, tmp_path):
    status, out, _ = data(capsys, "stats", file, "--model", model, *V1, "--length", 60)
    assert status == 0 and "Samples by their length in tokens" in out and "too_long" in out
    prompts = ChatPrompts(AquilaTokenizer.from_pretrained(str(model)), "aquila-v1")
    texts = [("hello", "an answer 🙂"), ("</s>", "b", "c", "d")]
    file = write_rows(tmp_path / "few.jsonl", [row(*said) for said in texts])
    messages = [[{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(said)] for said in texts]
    samples = [write_conversation(prompts, said).sample for said in messages]
    tokens, learned = sum(len(sample.ids) for sample in samples), sum(sample.labels for sample in samples)
    out = data(capsys, "stats", file, "--model", model, *V1)[1]
    assert line_of(out, "train")[4:] == ["2", str(tokens), f"{learned / tokens:.1%}"]


def test_stats_of_a_part_that_is_held_out(capsys, file, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [row("only", "here")])
    status, out, _ = data(capsys, "stats", file, "--evaluate", other)
    assert status == 0 and any(line.startswith("held out  ") for line in out.splitlines())


def test_stats_draw_a_picture(capsys, file, model, tmp_path):
    picture = tmp_path / "lengths.png"
    status, out, _ = data(capsys, "stats", file, "--model", model, *V1, "--length", 60, "--picture", picture)
    assert status == 0 and f"drawn in {picture}" in out
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and struct.unpack(">II", content[16:24]) == (1080, 600)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "lengths.png"}
    status, _, err = data(capsys, "stats", file, "--picture", tmp_path / "nowhere" / "l.png")
    assert status == 1 and "is no folder" in err


def test_lengths_in_bins_quantiles_and_bars():
    lengths = Counter({1: 1, 5: 2, 47: 10, 48: 20, 4096: 3})
    bins = bins_of(lengths)
    assert sum(count for _, _, count in bins) == 36 and bins[0][:2] == (0, 3) and bins[-1] == (4096, 6143, 3)
    assert (32, 47, 10) in bins and (48, 63, 20) in bins
    assert all(a[1] + 1 == b[0] for a, b in pairwise(bins))
    assert [quantile(lengths, of) for of in (0.5, 0.9, 1.0)] == [48, 48, 4096]
    lines = list(histogram(lengths))
    assert len(lines) == len(bins) and max(lines, key=lambda line: line.count("█")).split()[0] == "48-63"
    assert bins_of(Counter()) == list(histogram(Counter())) == [] and quantile(Counter(), 0.5) == 0
    assert bins_of(Counter({0: 4})) == [(0, 3, 4)]


# ------------------------------------------------------------------------------------------------ preview


def test_preview_marks_what_is_learned_where_there_are_no_colours(capsys, file, model):
    status, out, err = data(capsys, "preview", file, "--model", model, *V1, "--rows", 1)
    assert (status, err) == (0, "")
    title, counts, text = out.rstrip("\n").split("\n")
    assert title == f"{file}:1  (id 7, source flan)" and counts.endswith(" learned")
    assert text == "⟨<|startofpiece|>⟩who?⟨<|endofpiece|>⟩⟦me 🙂⟨</s>⟩⟧"


def test_preview_shows_a_row_by_its_number_and_by_its_id(capsys, file, model):
    by_number = data(capsys, "preview", file, "--model", model, *V1, "--row", 3)
    by_name = data(capsys, "preview", file, "--model", model, *V1, "--row", "rows.jsonl:3")
    by_id = data(capsys, "preview", file, "--model", model, *V1, "--id", "x")
    assert by_number == by_name == by_id and f"{file}:3  (id x" in by_id[1] and "⟦A⟨</s>⟩⟧" in by_id[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--row", "4"), "No such row is left"),  # a duplicate
        (("--id", "nobody"), "No such row is left"),
        (("--row", "0"), "rows are counted from 1"),
        (("--row", "elsewhere.jsonl:1"), "is none of the files"),
        (("--rows", "0"), "at least 1"),
        (("--length", "1"), "fewer than 2 tokens"),
        (("--held-out", "2"), "held_out: it is 2.0 and must be less than 1"),
    ],
)
def test_preview_says_what_it_cannot_show(capsys, file, model, arguments, message):
    status, out, err = data(capsys, "preview", file, "--model", model, *V1, *arguments)
    assert (status, out) == (1, "") and message in err


def test_preview_of_a_number_in_one_of_several_files_asks_which(capsys, file, model, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [row("q", "other")])
    status, _, err = data(capsys, "preview", file, other, "--model", model, *V1, "--row", 1)
    assert status == 1 and "may be in any of several files" in err and str(other) in err
    assert "other" in data(capsys, "preview", file, other, "--model", model, *V1, "--row", "other.jsonl:1")[1]


def test_preview_shows_the_samples_of_a_long_row(capsys, model, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [row(*(f"{i}" * 20 for i in range(6)))])
    _, out, _ = data(capsys, "preview", file, "--model", model, *V1, "--length", 90)
    assert "(split)" in out and "sample 1 of 2: " in out and "sample 2 of 2: " in out
    _, out, _ = data(capsys, "preview", file, "--model", model, *V1, "--length", 90, "--overlong", "drop")
    assert "(too_long)" in out and "token" not in out


def test_preview_cannot_be_made_to_steer_a_terminal(capsys, model, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [row("\x1b[2Jq", "\x1b]0;title\x07a\u202e", id="\x1b[31m")])
    _, out, _ = data(capsys, "preview", file, "--model", model, *V1)
    assert not {"\x1b", "\x07", "\u202e"} & set(out)


def test_preview_colours_on_a_terminal(capsys, file, model, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", highlight=False)
    monkeypatch.setattr(command, "_console", lambda: console)
    assert data(capsys, "preview", file, "--model", model, *V1, "--rows", 1)[0] == 0
    shown = screen.getvalue()
    for text, style in (("<|startofpiece|>", "2;7"), ("w", "2"), ("🙂", "1;32"), ("</s>", "1;7;32")):
        assert f"\x1b[{style}m{text}\x1b[0m" in shown
    assert "⟦" not in shown and "⟨" not in shown


def test_borders_of_tokens_are_shown_with_the_number_of_those_that_share_a_character():
    segments = [
        Segment("<|a|>", False, is_special=True),
        Segment("q", False),
        Segment("🙂", True, tokens=3),
        Segment(" x", True),
        Segment(" ", False, tokens=0),
        Segment("</s>", True, is_special=True),
    ]
    assert marked(segments, borders=True) == "⟨<|a|>⟩│q│⟦🙂₃│ x⟧ │⟦⟨</s>⟩⟧"
    assert marked(segments, borders=False) == "⟨<|a|>⟩q⟦🙂 x⟧ ⟦⟨</s>⟩⟧"
    assert "".join(text for text, _ in coloured(segments, borders=True)) == "<|a|>│q│🙂₃│ x │</s>"


@given(
    contents=st.lists(st.text(max_size=12) | st.sampled_from(["</s>", "🙂👨‍👩‍👧", "e\u0301"]), min_size=2, max_size=4)
)
@settings(max_examples=40, deadline=None)
def test_segments_are_the_text_and_its_tokens(model, contents):
    prompts = ChatPrompts(AquilaTokenizer.from_pretrained(str(model)), "aquila")
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    text, sample, _ = write_conversation(prompts, messages)
    segments = segments_of(prompts, messages)
    assert "".join(segment.text for segment in segments) == text
    assert sum(segment.tokens for segment in segments) == len(sample.ids)
    assert any(segment.is_learned for segment in segments) == bool(sample.is_target.any())
    assert sum(segment.is_special for segment in segments) == sample.ids.tolist().count(prompts.tokenizer.eos_token_id)


# ------------------------------------------------------------------------------------------------ prepare


def test_prepare_makes_a_folder_and_says_so_in_one_last_line(capsys, file, model, tmp_path):
    arguments = ("prepare", file, "--model", model, *V1, "--length", 300, "--output", tmp_path / "out")
    status, out, err = data(capsys, *arguments)
    assert (status, err) == (0, "")
    samples = Samples.open(tmp_path / "out" / "train", verify=True)
    last = out.rstrip("\n").split("\n")[-1]
    assert last.startswith(f"{tmp_path / 'out'}: 4 rows, 4 samples, {samples.lengths.sum():,} tokens, ")
    assert "duplicate_exact" in out and last.endswith("; made in 0 s.")
    status, out, _ = data(capsys, *arguments)
    assert status == 0 and out.rstrip().endswith("was there already, of the same inputs.")
    status, _, err = data(capsys, *arguments[:-3], 200, *arguments[-2:])
    assert status == 1 and "length: prepared with 300, now 200" in err


def test_prepare_says_what_is_held_out(capsys, file, model, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [row("only", "here")])
    where = ("--output", tmp_path / "out", "--evaluate", other)
    status, out, _ = data(capsys, "prepare", file, "--model", model, *V1, "--length", 300, *where)
    assert status == 0 and "; held out: 1 row, 1 sample, " in out and (tmp_path / "out" / "held_out").is_dir()


def test_lines_that_cannot_be_read_are_said_on_stderr(capsys, file, model, tmp_path):
    with file.open("a") as more:
        more.write("{broken\n")
    where = ("--length", 300, "--output", tmp_path / "out")
    status, _, err = data(capsys, "prepare", file, "--model", model, *V1, *where)
    assert status == 0 and f"{file}, row 6: " in err
    status, _, err = data(capsys, "stats", file, "--max-bad-lines", 0)
    assert status == 1


# ------------------------------------------------------------------------------------------------ what is asked


def test_a_model_without_template_or_tokenizer_and_no_model_are_said(capsys, file, model, tmp_path):
    assert "records no chat template" in data(capsys, "preview", file, "--model", model)[2]
    status, _, err = data(capsys, "preview", file, "--model", tmp_path / "none", *V1)
    assert status == 1 and "does not exist" in err
    (tmp_path / "empty").mkdir()
    assert data(capsys, "preview", file, "--model", tmp_path / "empty", *V1)[0] == 1
    assert "needs --model" in data(capsys, "stats", file, *V1)[2]
    assert "needs --model" in data(capsys, "stats", file, "--length", 9)[2]


def test_all_options_reach_the_spec():
    from aquila_pd.data.options import spec_of
    from aquila_pd.data.settings import DataSpec, Source

    words = "stats a b* --format openai --deduplicate near --near-threshold 0.7 --language zh --language en --source s "
    words += "--exclude-source t* --contamination g.jsonl --keep-contaminated --evaluate e --max-bad-lines 3"
    words += " --overlong drop"
    assert spec_of(command.parser().parse_args(words.split())) == DataSpec(
        train=(Source(("a", "b*"), "openai"),),
        evaluate=(Source(("e",), "openai"),),
        overlong="drop",
        max_bad_lines=3,
        deduplicate="near",
        near_threshold=0.7,
        languages=("zh", "en"),
        sources=("s",),
        exclude_sources=("t*",),
        contamination=("g.jsonl",),
        drop_contaminated=False,
    )
    assert spec_of(command.parser().parse_args(["stats", "a"])) == DataSpec(train=(Source(("a",)),))


def test_help_states_the_defaults(capsys):
    for verb in ("stats", "preview", "prepare"):
        with pytest.raises(SystemExit) as ended:
            cli(["data", verb, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert ended.value.code == 0
        for default in ("(default: exact)", "(default: 0.8)", "(default: 100)", "(default: split)", "(default: all)"):
            assert default in said
    with pytest.raises(SystemExit) as ended:
        cli(["data"])
    assert ended.value.code == 2
