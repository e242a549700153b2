"""The tokenizer files AquilaTokenizer reads and writes: folders, GGUF files, other vocabularies, damaged ones."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import gguf
import pytest
from paths import SHARED, TESTS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from aquila_pd import AquilaTokenizer
from aquila_pd.formats import gguf as gguf_file
from aquila_pd.formats.gguf import open_gguf
from aquila_pd.tokenization.convert import (
    AQUILA_SPECIALS,
    from_gguf,
    load_backend,
    write_tokenizer,
    write_torch_tokenizer,
)
from aquila_pd.utils.errors import CheckpointError, TokenizerError

FILES = SHARED / "tokenizer"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"
POINTED = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def golden() -> list[dict]:
    if not FILES.is_dir():
        pytest.skip(f"no tokenizer files at {FILES}: this test did not run")
    return [json.loads(line) for line in (FILES / "golden_dev.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a byte-level BPE of 300-odd tokens and nothing but vocab.json and merges.txt."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=311, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the cat and the dog, the end", "北京 北京 北京", "1234 1234"] * 5, trainer)
    folder = tmp_path / "tiny"
    folder.mkdir()
    backend.model.save(str(folder))
    return folder


def set_json(path: Path, **values: object) -> None:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**found, **values}), encoding="utf-8")


def write_gguf(path: Path, folder: Path, *, pre: str | None = "smollm", model: str = "gpt2", **extra: object) -> Path:
    """A GGUF file that holds only the tokenizer of a vocab.json folder, and two control tokens behind it."""
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    tokens = [*sorted(vocab, key=vocab.get), "<|im_start|>", "<|im_end|>", "<user made>"]
    types = [1] * len(vocab) + [3, 3, 4]
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(256)
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(extra.get("tokens", tokens))
    writer.add_token_types(types)
    writer.add_token_merges(extra.get("merges", merges))
    writer.add_bos_token_id(extra.get("bos", len(vocab)))
    writer.add_eos_token_id(len(vocab) + 1)
    writer.add_add_bos_token(extra.get("add_bos", False))
    writer.add_chat_template("{{ messages[0]['content'] }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


# ------------------------------------------------------------------------------------------------ saving and loading


def test_a_saved_tokenizer_comes_back_the_same(golden, tmp_path):
    tokenizer = AquilaTokenizer.from_pretrained(str(FILES))
    tokenizer.add_tokens(["<new>"])
    tokenizer.init_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    saved = tokenizer.save_pretrained(str(tmp_path))
    assert all(Path(name).is_file() for name in saved)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "AquilaTokenizer"
    assert str(tmp_path.parent) not in json.dumps(config) and str(FILES) not in json.dumps(config)
    again = AquilaTokenizer.from_pretrained(str(tmp_path))
    texts = [row["text"] for row in golden] + ["x<new>y"]
    assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.model_max_length == tokenizer.model_max_length == 2048
    assert again.apply_chat_template("hello", tokenize=False) == "hello"
    second = tmp_path / "second"
    again.save_pretrained(str(second))
    for name in map(Path, saved):
        assert (second / name.name).read_bytes() == name.read_bytes()


def test_a_converted_folder_is_complete_and_leaves_the_source_alone(golden, tmp_path):
    before = {path.name: path.read_bytes() for path in FILES.iterdir()}
    names = write_tokenizer(FILES, tmp_path)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    assert {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"} == set(
        names
    )
    assert {path.name: path.read_bytes() for path in FILES.iterdir()} == before
    assert json.loads((tmp_path / "vocab.json").read_bytes()) == json.loads((FILES / "vocab.json").read_bytes())
    merges = [(folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:] for folder in (FILES, tmp_path)]
    assert merges[0] == merges[1]
    texts = [row["text"] for row in golden]
    assert AquilaTokenizer.from_pretrained(str(tmp_path))(texts)["input_ids"] == [row["ids"] for row in golden]
    (tmp_path / "tokenizer.json").unlink()  # what is left must say as much
    assert AquilaTokenizer.from_pretrained(str(tmp_path))(texts)["input_ids"] == [row["ids"] for row in golden]


def test_hugging_face_reads_the_written_tokenizer_json(golden, tmp_path):
    from transformers import PreTrainedTokenizerFast

    write_tokenizer(FILES, tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs([row["text"] for row in golden])["input_ids"] == [row["ids"] for row in golden]


@pytest.mark.parametrize(
    "template", [[{"name": "default", "template": "{{ 1 }}"}, {"name": "b", "template": "{{ 2 }}"}], "{% unknown %}"]
)
def test_chat_templates_are_kept_word_for_word(tiny, tmp_path, template):
    set_json(tiny / "tokenizer_config.json", chat_template=template)
    write_tokenizer(tiny, tmp_path / "out")
    tokenizer = AquilaTokenizer.from_pretrained(str(tmp_path / "out"))
    tokenizer.save_pretrained(str(tmp_path / "again"))
    for folder in ("out", "again"):
        assert json.loads((tmp_path / folder / "tokenizer_config.json").read_text())["chat_template"] == template


def test_a_template_file_beside_the_config_is_read(tiny):
    (tiny / "chat_template.jinja").write_text("{{ messages[0]['content'] }}?")
    assert AquilaTokenizer.from_pretrained(str(tiny)).apply_chat_template("hm", tokenize=False) == "hm?"


@pytest.mark.parametrize(
    "held", [{"chat_template": "{{ 1 }}"}, {"conversation": ["{{user}}", "{{bot}}"], "query": "Q"}]
)
def test_a_template_in_chat_template_json_is_kept(tiny, tmp_path, held):
    set_json(tiny / "chat_template.json", **held)
    write_tokenizer(tiny, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"]
    assert written == held.get("chat_template", held)
    rendered = [
        AquilaTokenizer.from_pretrained(str(folder)).apply_chat_template("hm", tokenize=False)
        for folder in (tiny, tmp_path / "out")
    ]
    assert rendered == ["1" if "chat_template" in held else "Q"] * 2


def test_a_recorded_template_is_written_in_place_of_the_sources_own(tiny, tmp_path):
    write_tokenizer(tiny, tmp_path / "new", chat_template="{{ 'recorded' }}")
    set_json(tiny / "tokenizer_config.json", chat_template="{{ 'its own' }}")
    write_tokenizer(tiny, tmp_path / "kept")
    write_tokenizer(tiny, tmp_path / "replaced", chat_template="{{ 'recorded' }}")
    for folder, said in {"new": "recorded", "kept": "its own", "replaced": "recorded"}.items():
        tokenizer = AquilaTokenizer.from_pretrained(str(tmp_path / folder))
        assert tokenizer.apply_chat_template("hm", tokenize=False) == said


# -------------------------------------------------------------------------------------------- other vocabularies


def test_nothing_about_the_vocabulary_is_constant(tiny):
    tokenizer = AquilaTokenizer.from_pretrained(str(tiny))
    n = len(json.loads((tiny / "vocab.json").read_text(encoding="utf-8")))
    assert tokenizer.vocab_size == n < 400
    assert [tokenizer.convert_tokens_to_ids(token) for token in AQUILA_SPECIALS] == list(range(n, n + 8))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (n + 6, n + 7)
    text = "[CLS]the cat 北京 1234 🙂</s>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_listed_in_files_keep_their_ids(tiny):
    n = len(json.loads((tiny / "vocab.json").read_text(encoding="utf-8")))
    set_json(tiny / "tokenizer_config.json", bos_token="[CLS]", eos_token={"content": "</s>", "__type": "AddedToken"})
    set_json(tiny / "special_tokens_map.json", bos_token={"content": "[CLS]"}, eos_token="</s>")
    set_json(tiny / "added_tokens.json", **{"</s>": n, "[CLS]": n + 1})
    tokenizer = AquilaTokenizer.from_pretrained(str(tiny))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (n + 1, n, n + 2)
    assert tokenizer("a</s>[CLS]")["input_ids"][-2:] == [n, n + 1]
    assert tokenizer.decode([n, n + 1], skip_special_tokens=True) == ""


def test_other_names_bring_no_aquila_tokens(tiny):
    set_json(tiny / "tokenizer_config.json", bos_token="a", eos_token="b", pad_token="b")
    tokenizer = AquilaTokenizer.from_pretrained(str(tiny))
    assert len(tokenizer) == tokenizer.vocab_size
    assert tokenizer.tokenize("[CLS]") != ["[CLS]"]


def test_a_bos_the_files_ask_for_is_put_in_front(tiny, tmp_path):
    set_json(tiny / "tokenizer_config.json", add_bos_token=True)
    write_tokenizer(tiny, tmp_path / "out")
    for folder in (tiny, tmp_path / "out"):
        tokenizer = AquilaTokenizer.from_pretrained(str(folder))
        bare = tokenizer(["the cat", "end"], add_special_tokens=False)["input_ids"]
        bos = tokenizer.bos_token_id
        assert tokenizer(["the cat", "end"])["input_ids"] == [[bos, *row] for row in bare]
        assert tokenizer("the cat", "end")["input_ids"] == [bos, *bare[0], bos, *bare[1]]
        assert tokenizer("the cat", max_length=2, truncation=True)["input_ids"] == [bos, bare[0][0]]
        assert tokenizer("the cat", max_length=1, truncation=True)["input_ids"] == [bos]
        assert tokenizer("the cat", return_special_tokens_mask=True)["special_tokens_mask"][:2] == [1, 0]
        assert tokenizer.tokenize("end") == tokenizer.convert_ids_to_tokens(bare[1])


def test_the_pattern_can_be_named(tiny):
    plain = AquilaTokenizer.from_pretrained(str(tiny))
    named = AquilaTokenizer.from_pretrained(str(tiny), pre_tokenizer="smollm")
    assert plain.tokenize("1234") == ["1234"]
    assert named.tokenize("1234") == ["1", "2", "3", "4"]
    set_json(tiny / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    assert AquilaTokenizer.from_pretrained(str(tiny)).tokenize("1234") == ["1", "2", "3", "4"]


# ---------------------------------------------------------------------------------------------------------- GGUF


def test_a_gguf_file_gives_the_tokenizer_it_carries(tiny, tmp_path):
    source = write_gguf(tmp_path / "model.gguf", tiny)
    direct = AquilaTokenizer.from_pretrained(str(source))
    names = write_tokenizer(source, tmp_path / "out")
    again = AquilaTokenizer.from_pretrained(str(tmp_path / "out"))
    assert {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"} == set(
        names
    )
    n = len(json.loads((tiny / "vocab.json").read_text(encoding="utf-8")))
    text = "<|im_start|>the cat 1234 <user made><|im_end|>北京"
    for tokenizer in (direct, again):
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (n, n + 1, 256)
        ids = tokenizer(text)["input_ids"]
        assert (ids[0], ids[-3]) == (n, n + 1) or n + 1 in ids
        assert n + 2 in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == "the cat 1234 <user made>北京"
        assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
        assert tokenizer.apply_chat_template("hello", tokenize=False) == "hello"
    plain = from_gguf(write_gguf(tmp_path / "plain.gguf", tiny, pre="gpt-2"))[0]
    assert plain.encode("1234").tokens == ["1234"]  # the control: another pattern, other tokens


def test_a_gguf_file_without_a_pattern_name_says_what_it_got(tiny, tmp_path, caplog):
    backend, config = from_gguf(write_gguf(tmp_path / "old.gguf", tiny, pre=None))
    assert config["pre_tokenizer"] == "gpt-2"
    assert "gpt-2" in caplog.text and "old.gguf" in caplog.text
    assert backend.encode("1234").tokens == ["1234"]


def test_a_gguf_file_that_adds_bos_does(tiny, tmp_path):
    backend, config = from_gguf(write_gguf(tmp_path / "bos.gguf", tiny, add_bos=True))
    assert backend.encode("the").tokens[0] == config["bos_token"] == "<|im_start|>"


def test_a_gguf_file_with_text_that_is_not_utf8_is_named(tiny, tmp_path):
    path = write_gguf(tmp_path / "bad.gguf", tiny)
    path.write_bytes(path.read_bytes().replace(b"<user made>", b"<user\xffmade>"))
    with pytest.raises(CheckpointError, match=r"bad.gguf: its metadata tokenizer.ggml.tokens is damaged"):
        from_gguf(path)


def test_a_gguf_file_is_parsed_once_while_somebody_holds_it(tiny, tmp_path, monkeypatch):
    parsed = []

    parse = gguf_file._parse
    monkeypatch.setattr(gguf_file, "_parse", lambda path, package: parsed.append(path) or parse(path, package))
    path = write_gguf(tmp_path / "model.gguf", tiny)
    held = open_gguf(path)
    from_gguf(path)
    assert len(parsed) == 1
    write_gguf(path, tiny, pre="gpt-2", bos=3)
    os.utime(path, (1, 1))  # a clock may be too coarse to show the change
    assert from_gguf(path)[1]["pre_tokenizer"] == "gpt-2"  # another file under the same name
    assert len(parsed) == 2
    gone = weakref.ref(held)
    del held
    assert gone() is None  # the map goes with the last who holds it


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model": "bert"}, "kind 'bert'"),
        ({"model": "llama"}, "tokenizer.ggml.scores has 0 entries for"),
        ({"pre": "tekken"}, "Known are: gpt-2, smollm"),
        ({"merges": ["a b", "no such"]}, "joins tokens that do not exist: no such"),
        ({"tokens": ["a"] * 314}, "tokens twice"),
        ({"bos": 100_000}, "bos the id 100000"),
    ],
    ids=str,
)
def test_a_gguf_file_that_cannot_be_read_is_an_error(tiny, tmp_path, options, expected):
    with pytest.raises(TokenizerError, match=expected):
        from_gguf(write_gguf(tmp_path / "bad.gguf", tiny, **options))


# ------------------------------------------------------------------------------------------------ the way to torch


def torch_tokenizer(paddle: Path, folder: Path):
    """transformers' tokenizer of what is written for it, and its tokenizer_config.json."""
    from transformers import AutoTokenizer

    names = write_torch_tokenizer(paddle, folder)
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return AutoTokenizer.from_pretrained(str(folder)), config


def test_transformers_gives_the_golden_ids_after_the_way_back(golden, tmp_path):
    write_tokenizer(FILES, tmp_path / "paddle", chat_template="{{ messages[0]['content'] }}!")
    theirs, config = torch_tokenizer(tmp_path / "paddle", tmp_path / "torch")
    assert config["tokenizer_class"] == "GPT2TokenizerFast" == type(theirs).__name__
    assert config["clean_up_tokenization_spaces"] is False
    ids = theirs([row["text"] for row in golden])["input_ids"]
    assert ids == [row["ids"] for row in golden]
    assert theirs.batch_decode(ids) == [row["text"] for row in golden]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (100006, 100007, 0, 100008)
    assert theirs.apply_chat_template([{"role": "user", "content": "hm"}], tokenize=False) == "hm!"
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "torch" / name).read_bytes() == (tmp_path / "paddle" / name).read_bytes()
    write_tokenizer(tmp_path / "torch", tmp_path / "again")  # and what is written can be converted once more
    again = AquilaTokenizer.from_pretrained(str(tmp_path / "again"))
    assert again([row["text"] for row in golden])["input_ids"] == [row["ids"] for row in golden]


NAMED = {"bos_token": "a", "eos_token": "b", "unk_token": "!"}


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (NAMED, "GPT2TokenizerFast"),
        ({**NAMED, "add_prefix_space": True}, "GPT2TokenizerFast"),
        ({**NAMED, "add_bos_token": True}, "PreTrainedTokenizerFast"),
        ({**NAMED, "tokenizer_class": "Qwen2Tokenizer"}, "PreTrainedTokenizerFast"),
        ({"eos_token": "b"}, "PreTrainedTokenizerFast"),
        ({"eos_token": "b", "add_prefix_space": True}, "PreTrainedTokenizerFast"),
    ],
)
def test_the_class_named_for_transformers_encodes_the_same(tiny, tmp_path, said, name):
    set_json(tiny / "tokenizer_config.json", **said)
    write_tokenizer(tiny, tmp_path / "paddle")
    theirs, config = torch_tokenizer(tmp_path / "paddle", tmp_path / "torch")
    ours = AquilaTokenizer.from_pretrained(str(tmp_path / "paddle"))
    assert config["tokenizer_class"] == name == type(theirs).__name__
    texts = ["the cat", " 1234 北京", "x[CLS]</s>\n", ""]
    assert dict(theirs(texts)) == dict(ours(texts))  # no token_type_ids either
    assert theirs.get_vocab() == ours.get_vocab()


def test_control_the_wrong_class_for_transformers_would_be_noticed(tiny, tmp_path):
    from transformers import AutoTokenizer

    set_json(tiny / "tokenizer_config.json", eos_token="b")
    write_tokenizer(tiny, tmp_path / "paddle")
    theirs, _ = torch_tokenizer(tmp_path / "paddle", tmp_path / "torch")
    set_json(tmp_path / "torch" / "tokenizer_config.json", tokenizer_class="GPT2TokenizerFast")
    wrong = AutoTokenizer.from_pretrained(str(tmp_path / "torch"))
    assert wrong("<|endoftext|>")["input_ids"] != theirs("<|endoftext|>")["input_ids"]  # it invents that token


def test_a_template_in_paddlenlps_form_is_left_out_for_transformers(tiny, tmp_path, caplog):
    set_json(tiny / "tokenizer_config.json", chat_template={"conversation": ["{{user}}"], "query": "Q"})
    _, config = torch_tokenizer(tiny, tmp_path / "torch")
    assert "chat_template" not in config and "no Jinja text" in caplog.text


def test_a_folder_without_tokenizer_files_has_no_way_back(tmp_path):
    assert write_torch_tokenizer(tmp_path, tmp_path / "out") == []


# ---------------------------------------------------------------------------------------------------- bad input


def test_a_lone_surrogate_is_named_or_replaced(tiny):
    tokenizer = AquilaTokenizer.from_pretrained(str(tiny))
    bad = "ab\ud800c"
    with pytest.raises(TokenizerError, match=r"Text 1 of the batch holds the surrogate U\+D800 at position 2"):
        tokenizer(["fine", bad])
    for encode in (tokenizer, tokenizer.encode, tokenizer.tokenize):
        with pytest.raises(TokenizerError, match="position 2"):
            encode(bad)
    tolerant = AquilaTokenizer.from_pretrained(str(tiny), surrogates="replace")
    assert tolerant.decode(tolerant(bad)["input_ids"]) == "ab\ufffdc"
    assert tolerant.batch_decode(tolerant(["fine", bad])["input_ids"]) == ["fine", "ab\ufffdc"]
    assert tolerant.decode(tolerant("\ud83d\ude42")["input_ids"]) == "🙂"  # both halves are there
    with pytest.raises(TokenizerError, match="'error' or 'replace'"):
        AquilaTokenizer.from_pretrained(str(tiny), surrogates="ignore")


def test_ids_that_cannot_be_ids_are_an_error(tiny):
    tokenizer = AquilaTokenizer.from_pretrained(str(tiny))
    for bad in ([5, -100], [1.5]):
        with pytest.raises(TokenizerError, match="whole numbers from 0"):
            tokenizer.decode(bad)
        with pytest.raises(TokenizerError, match="-100"):
            tokenizer.batch_decode([bad])
    assert tokenizer.decode([5, 10**6]) == tokenizer.decode([5])


def test_padding_without_a_pad_token_says_so(tiny):
    tokenizer = AquilaTokenizer.from_pretrained(str(tiny))
    assert tokenizer.pad_token is None
    with pytest.raises(ValueError, match="does not have a padding token"):
        tokenizer(["a", "a b c"], padding=True)


def test_a_folder_without_tokenizer_files_gets_none(tmp_path):
    (tmp_path / "in").mkdir()
    assert write_tokenizer(tmp_path / "in", tmp_path / "out") == []
    with pytest.raises(TokenizerError, match="no tokenizer that can be loaded"):
        AquilaTokenizer.from_pretrained(str(tmp_path / "in"))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: (f / "merges.txt").unlink(), "missing     merges.txt"),
        (lambda f: (f / "vocab.json").write_text('{"a": 0'), "vocab.json is not JSON"),
        (lambda f: (f / "vocab.json").write_text("[" * 100_000), "vocab.json is not JSON"),
        (lambda f: (f / "tokenizer_config.json").write_bytes(b"\xff"), "tokenizer_config.json is not UTF-8"),
        *((lambda f, name=name: (f / name).write_text(POINTER), f"{name} is a Git LFS pointer") for name in POINTED),
        (lambda f: (f / "vocab.json").write_text("[]"), "holds a list"),
        (lambda f: (f / "merges.txt").write_text("#version: 0.2\nq zz\n"), "do not make a BPE"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
        (lambda f: set_json(f / "tokenizer_config.json", tokenizer_class="BertTokenizer"), "class BertTokenizer"),
        (lambda f: set_json(f / "tokenizer_config.json", pre_tokenizer="nonsense"), "'nonsense' is not known"),
        (lambda f: set_json(f / "tokenizer_config.json", eos_token="<no>", bos_token="<nor>"), "(?s)'<nor>'.*'<no>'"),
        (lambda f: set_json(f / "added_tokens.json", **{"<x>": 5000}), "'<x>' should have id 5000"),
        (lambda f: set_json(f / "vocab.json", **{"<far>": 9000}), "run to 9000"),
        (lambda f: os.truncate(f / "merges.txt", 30 * 2**30), "merges.txt has 32,212,254,720 bytes"),
    ],
)
def test_damaged_files_are_named(tiny, tmp_path, damage, expected):
    damage(tiny)
    for load in (load_backend, lambda folder: AquilaTokenizer.from_pretrained(str(folder))):
        with pytest.raises(TokenizerError, match=expected):
            load(tiny)
    with pytest.raises(TokenizerError, match=expected):
        write_tokenizer(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


SETTINGS = {
    "bos_token": [5, ["a"], {"x": 1}, {"content": None}, {"content": "a", "lstrip": "yes"}],
    "tokenizer_class": [["a"], 5],
    "pre_tokenizer": [["gpt-2"]],
    "add_bos_token": ["false", 1],
    "model_max_length": ["long", True],
    "chat_template": [5, ["a"], [{"name": "default"}]],
    "additional_special_tokens": [5, "a", [5], {"a": 1}],
    "added_tokens": [{"x": "y"}, {"x": -1}, {"x": 2**70}, {"x": True}, [1]],
    "added_tokens_decoder": [[1, 2], {"abc": "x"}, {"-1": "x"}, {"9" * 5000: "x"}, {"90": 5}, {"90": {"x": "a"}}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in SETTINGS.items() for value in values])
def test_settings_of_another_kind_are_named(tiny, tmp_path, key, value):
    set_json(tiny / "tokenizer_config.json", **{key: value})
    for load in (load_backend, AquilaTokenizer.from_pretrained, lambda folder: write_tokenizer(folder, tmp_path / "o")):
        with pytest.raises(TokenizerError, match=f"(?s)settings in .*tiny cannot be used:\n  {key} is .*, not "):
            load(tiny)


def test_all_settings_of_another_kind_are_named_together(tiny):
    set_json(tiny / "tokenizer_config.json", bos_token=5, eos_token="a", add_bos_token="no")
    (tiny / "added_tokens.json").write_text('{"x": "y"}')
    with pytest.raises(TokenizerError) as error:
        load_backend(tiny)
    assert [line.split()[0] for line in str(error.value).splitlines()[1:-1]] == [
        "bos_token",
        "add_bos_token",
        "added_tokens",
    ]


def test_settings_that_are_null_say_nothing(tiny):
    set_json(tiny / "tokenizer_config.json", **dict.fromkeys(SETTINGS))
    assert load_backend(tiny).encode("the cat").tokens == ["the", "Ġcat"]


@pytest.mark.parametrize("token", ["<x>", {"content": "<x>", "special": False, "later": [1]}], ids=["text", "object"])
def test_a_listed_token_is_added_however_it_is_spelled(tiny, token):
    size = len(json.loads((tiny / "vocab.json").read_text(encoding="utf-8")))
    set_json(tiny / "tokenizer_config.json", bos_token="a", eos_token="b", added_tokens_decoder={str(size): token})
    assert load_backend(tiny).encode("a<x>").ids[-1] == size


def test_a_tokenizer_json_without_end_is_not_read(tiny):
    with (tiny / "tokenizer.json").open("wb") as file:
        file.truncate(30 * 2**30)  # takes no place on the disk
    with pytest.raises(TokenizerError, match=r"tokenizer.json has 32,212,254,720 bytes; more than 256,000,000"):
        load_backend(tiny)


def test_tokenizer_files_imports_neither_paddle_nor_torch():
    code = (
        "import sys, aquila_pd.tokenization.convert; "
        "print(sorted({'paddle', 'torch', 'gguf', 'paddlenlp', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
