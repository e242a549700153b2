"""SentencePiece tokenizers: the ids of sentencepiece itself, LLaMA's ways around a text, folders there and back.

Every model is trained here, in a fraction of a second, from a few lines of English and Chinese.
"""

import functools
import importlib
import io
import json
import random
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers

from aquila_pd import AquilaTokenizer
from aquila_pd.formats.sentencepiece import (
    USER_DEFINED,
    build_backend,
    check_model,
    doubts,
    is_charsmap,
    parse_model,
    scores_of,
)
from aquila_pd.formats.sentencepiece_merges import recover_merges
from aquila_pd.tokenization.convert import doubts as tokenizer_doubts
from aquila_pd.tokenization.convert import from_gguf, load_backend, write_tokenizer, write_torch_tokenizer
from aquila_pd.utils.errors import TokenizerError
from conftest import SEED

LINES = [
    "the cat and the dog, the end of the world",
    "北京是中国的首都。北京的大学在北京。",
    "人工智能大模型的训练，天鹰模型",
    "hello world, hello again 1234 3.14",
    "def f(x): return x + 1  # a comment",
    "an open model speaks Chinese and English",
]
LLAMA = {
    "model_type": "bpe",
    "vocab_size": 400,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
CHAT = {"user_defined_symbols": ["<human>", "<bot>"]}
VARIANTS = {
    "llama": {},
    "without a space in front": {"add_dummy_prefix": False},
    "without extra spaces": {"remove_extra_whitespaces": True},
    "with symbols of its own": CHAT,
    "with symbols, without extra spaces": {**CHAT, "remove_extra_whitespaces": True},
    "with nmt_nfkc": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "without bytes": {"byte_fallback": False, "vocab_size": 140},
    "unigram": {"model_type": "unigram", "vocab_size": 340},
    "unigram without bytes": {"model_type": "unigram", "byte_fallback": False, "vocab_size": 84},
}
TEXTS = [
    "",
    " ",
    "    ",
    "the cat",
    " the cat",
    "the cat   ",
    "  hello   world  ",
    "\n",
    "a\nb\r\n\tc \t d",
    "北京是中国的首都。",
    "北京 the 大模型 1234",
    "🙂🧑‍🚀 é ß",
    "ภาษาไทย ქართული",  # no piece holds these
    "<human>:hello\n<bot>:北京",
    "x<human> <bot>y",
    "<human><human>",
    "▁ is how a space is spelled",
    "ﬁ Ａ １ … ½",  # nfkc changes these
    "<unknown> </x>",
]


def train(**options: object) -> bytes:
    """A tokenizer.model of LLaMA's kind, apart from the options."""
    writer = io.BytesIO()
    settings = {**LLAMA, "minloglevel": 2, "num_threads": 1, "hard_vocab_limit": False, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=writer, **settings)
    return writer.getvalue()


def random_texts(count: int) -> list[str]:
    """Words of the lines, their letters, spaces and characters that no piece holds, in any order."""
    draw = random.Random(SEED)
    words = " ".join(LINES).split(" ")
    parts = [
        *words,
        *"thecatdogn   北京是中国的首都人工智能\n\t▁é🙂ก",
        "<human>",
        "  ",
        *(f" {word}" for word in words),
    ]
    return ["".join(draw.choices(parts, k=draw.randint(1, 30))) for _ in range(count)]


def differing(backend: Tokenizer, theirs: sentencepiece.SentencePieceProcessor, texts: list[str]) -> list[str]:
    return [text for text in texts if backend.encode(text).ids != theirs.encode(text)]


def changed(data: bytes, change) -> bytes:
    """The model after `change`, written by the protobuf library."""
    from transformers.utils import sentencepiece_model_pb2_new

    message = sentencepiece_model_pb2_new.ModelProto.FromString(data)
    change(message)
    return message.SerializeToString()


@pytest.fixture(scope="module")
def llama() -> bytes:
    return train()


@pytest.fixture
def ziya(tmp_path: Path) -> Path:
    """A folder with tokenizer.model, two symbols in it and a third token beside it."""
    folder = tmp_path / "ziya"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(train(**CHAT))
    size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    config = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 77, "sp_model_kwargs": {}, "bos_token": ""}
    write_json(folder / "tokenizer_config.json", {**config, "chat_template": "{{ messages[0]['content'] }}?"})
    write_json(folder / "added_tokens.json", {"<pad>": size, "[more]": size + 1})
    write_json(folder / "special_tokens_map.json", {"pad_token": {"content": "<pad>", "normalized": True}})
    return folder


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------- sentencepiece's own ids


@pytest.mark.parametrize("name", VARIANTS)
def test_ids_and_texts_are_those_of_sentencepiece(name):
    data = train(**VARIANTS[name])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    model = parse_model(data)
    check_model(model, Path("tokenizer.model"))
    assert doubts(model) == []
    backend = build_backend(model)
    symbols = VARIANTS[name].get("user_defined_symbols", ())
    texts = [text for text in [*TEXTS, *random_texts(1500)] if text.strip(" ▁") not in symbols]  # see the next test
    for ours in (backend, Tokenizer.from_str(backend.to_str())):  # and as tokenizer.json
        assert differing(ours, theirs, texts) == []
    unknown = theirs.unk_id()
    for ids in map(theirs.encode, texts):
        if unknown not in ids:
            assert backend.decode(ids) == theirs.decode(ids)


def test_a_text_that_is_a_symbol_and_nothing_else_has_no_space_in_front():
    """The one known difference from sentencepiece for user-defined symbols."""
    data = train(**CHAT)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = build_backend(parse_model(data))
    assert theirs.encode("<human>", out_type=str) == ["▁", "<human>"]
    assert ours.encode("<human>").tokens == ["<human>"]
    assert differing(ours, theirs, ["<human>a", "a<human>", " <human>", "<human> ", "<human><bot>"]) == []


def test_what_is_read_is_what_sentencepiece_reads():
    data = train(**CHAT, pad_id=3, bos_piece="<begin>")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    model = parse_model(data)
    ids = range(theirs.get_piece_size())
    assert model.pieces == [theirs.id_to_piece(i) for i in ids]
    assert model.scores == [theirs.get_score(i) for i in ids]
    kinds = {2: theirs.is_unknown, 3: theirs.is_control, 5: theirs.is_unused, 6: theirs.is_byte}
    for kind, says in kinds.items():
        assert [found == kind for found in model.types] == [says(i) for i in ids]
    assert model.of_type(USER_DEFINED) == ["<human>", "<bot>"]
    assert model.names == {"bos_token": "<begin>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def test_control_merges_in_another_order_are_noticed(llama):
    theirs = sentencepiece.SentencePieceProcessor(model_proto=llama)
    backend = build_backend(parse_model(llama))
    stored = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in stored["merges"]]
    random.Random(SEED).shuffle(merges)
    backend.model = models.BPE(stored["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    assert len(differing(backend, theirs, random_texts(300))) > 20


def test_control_a_lost_space_in_front_is_noticed(llama):
    theirs = sentencepiece.SentencePieceProcessor(model_proto=llama)
    backend = build_backend(parse_model(llama))
    backend.normalizer = normalizers.Replace(" ", "▁")
    assert len(differing(backend, theirs, TEXTS)) == len(TEXTS) - 1  # all but the empty one


def test_each_piece_is_made_in_one_way_and_by_score():
    scores = {"a": -9.0, "b": -9.0, "c": -9.0, "ab": -1.0, "bc": -2.0, "abc": -0.5, "xy": 0.0, "aac": 0.0}
    merges = recover_merges(scores)
    assert merges.ordered == [("ab", "c"), ("a", "b"), ("b", "c")]  # nothing makes (a, bc), and nothing makes aac
    assert merges.spelled_otherwise == ["xy"]


# --------------------------------------------------------------------------------------------------- equal scores

LETTERS = "abcd"


@functools.cache
def bare_model() -> bytes:
    return train(add_dummy_prefix=False)


def model_of(scores: dict[str, float]) -> bytes:
    """A model with these pieces, four letters and the 256 bytes."""

    def replace(message) -> None:
        kept = [piece for piece in message.pieces if piece.type != 1]
        pieces = [(piece.piece, piece.score, piece.type) for piece in kept]
        del message.pieces[:]
        for piece, score, kind in [*pieces, *((letter, -99.0, 1) for letter in LETTERS)]:
            message.pieces.add(piece=piece, score=score, type=kind)
        for piece, score in scores.items():
            message.pieces.add(piece=piece, score=score)

    return changed(bare_model(), replace)


def random_pieces(draw: random.Random) -> list[str]:
    """Pieces made of letters and of each other, in any order."""
    pool = list(LETTERS)
    for _ in range(draw.randint(3, 9)):
        pool.append("".join(draw.choices(pool, k=2)))
    pieces = sorted({piece for piece in pool if 1 < len(piece) < 8})
    return draw.sample(pieces, len(pieces))


def ordered_by_id(model) -> models.BPE:
    """The merges with the lower id first among those of one score."""
    scores, ids = scores_of(model), {piece: i for i, piece in enumerate(model.pieces)}
    cuts = {"".join(cut): cut for cut in recover_merges(scores).ordered}
    merges = [cuts[piece] for piece in sorted(cuts, key=lambda piece: (-scores[piece], ids[piece]))]
    return models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def test_equal_scores_are_followed_wherever_there_is_no_doubt():
    """Models of random pieces with few scores; sentencepiece is asked for 60 texts of each."""
    draw = random.Random(SEED)
    wrong = {"sure": 0, "doubted": 0, "control": 0}
    for _ in range(80):
        data = model_of({piece: -float(draw.randint(0, 2)) for piece in random_pieces(draw)})
        theirs, model = sentencepiece.SentencePieceProcessor(model_proto=data), parse_model(data)
        texts = ["".join(draw.choices(LETTERS, k=draw.randint(3, 16))) for _ in range(60)]
        backend, doubted = build_backend(model), bool(doubts(model))
        wrong["doubted" if doubted else "sure"] += len(differing(backend, theirs, texts))
        backend.model = ordered_by_id(model)
        wrong["control"] += 0 if doubted else len(differing(backend, theirs, texts))
    assert wrong["sure"] == 0
    assert wrong["doubted"] > 10 and wrong["control"] > 10, wrong  # there is reason for both, doubt and order


def test_a_vocabulary_extended_by_single_characters_is_exact(llama, tmp_path):
    """As Ziya's: thousands of Chinese characters behind LLaMA's pieces, all with one score."""
    characters = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]

    def extend(message) -> None:
        known = {piece.piece for piece in message.pieces}
        for character in characters:
            if character not in known:
                message.pieces.add(piece=character, score=0.0)

    data = changed(llama, extend)
    (tmp_path / "tokenizer.model").write_bytes(data)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    draw = random.Random(SEED)
    texts = [text + "".join(draw.choices([*characters, text], k=9)) for text in random_texts(500)]
    assert differing(build_backend(parse_model(data)), theirs, texts) == []
    assert tokenizer_doubts(tmp_path) == []


WORDS = ["北京", "京大", "大北", "中国", "国人"]  # the first three go round in a circle: two of them cannot be right


def extended(data: bytes, words: list[str]) -> bytes:
    """With these words and their characters behind the model's pieces, all with one score."""

    def extend(message) -> None:
        known = {piece.piece for piece in message.pieces}
        for piece in dict.fromkeys([*"".join(words), *words]):
            if piece not in known:
                message.pieces.add(piece=piece, score=1.0)

    return changed(data, extend)


@pytest.mark.parametrize(("words", "count"), [(WORDS, 2), (WORDS[3:], 0), (WORDS[:2], 0)], ids=str)
def test_words_of_one_score_are_doubted_where_no_order_is_right(tmp_path, words, count):
    data = extended(model_of({}), words)
    (tmp_path / "tokenizer.model").write_bytes(data)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    draw = random.Random(SEED)
    texts = ["".join(draw.choices("北京大中国人", k=12)) for _ in range(300)]
    wrong = differing(build_backend(parse_model(data)), theirs, texts)
    if not count:
        assert (wrong, tokenizer_doubts(tmp_path)) == ([], [])
        return
    assert wrong
    (doubt,) = tokenizer_doubts(tmp_path)
    assert doubt.startswith(f"{count} pieces share their score") and "--architecture llama" in doubt
    write_tokenizer(tmp_path, tmp_path / "out")
    assert tokenizer_doubts(tmp_path / "out") == []  # tokenizer.json says what is done


# --------------------------------------------------------------------------------------------- LLaMA's tokenizer


@pytest.fixture
def llama_fast(monkeypatch):
    """transformers' LlamaTokenizerFast made from a tokenizer.model.

    Its converter asks for sentencepiece's generated reader, which may not load beside the installed protobuf;
    transformers brings the same reader in an older form.
    """
    from transformers import LlamaTokenizerFast
    from transformers.utils import sentencepiece_model_pb2_new

    for name in ("convert_slow_tokenizer", "models.llama.tokenization_llama"):
        module = importlib.import_module(f"transformers.{name}")
        monkeypatch.setattr(module, "import_protobuf", lambda *_: sentencepiece_model_pb2_new)
    return LlamaTokenizerFast.from_pretrained


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"add_bos_token": False, "add_eos_token": True},
        {"legacy": False},
        {"add_prefix_space": False},
    ],
    ids=str,
)
def test_calls_agree_with_llamas_tokenizer(llama, llama_fast, tmp_path, said):
    (tmp_path / "tokenizer.model").write_bytes(llama)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **said})
    theirs = llama_fast(str(tmp_path), **{"legacy": True, **said})
    write_tokenizer(tmp_path, tmp_path / "out")
    texts = [*TEXTS, "<s>the cat</s> 北京<s>", *random_texts(200)]
    for folder in (tmp_path, tmp_path / "out"):
        ours = AquilaTokenizer.from_pretrained(str(folder))
        assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]
        for text in filter(None, texts):
            found, expected = (each(text, return_offsets_mapping=True) for each in (ours, theirs))
            assert found["offset_mapping"] == expected["offset_mapping"]
            assert ours.tokenize(text) == theirs.tokenize(text)
        ids = theirs(texts)["input_ids"]
        for skip in (False, True):
            assert ours.batch_decode(ids, skip_special_tokens=skip) == theirs.batch_decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
        pair = ours("the cat", "北京", return_token_type_ids=True)
        assert pair["input_ids"] == theirs("the cat", "北京")["input_ids"]


def test_spaces_survive_encoding_and_decoding(llama, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama)
    tokenizer = AquilaTokenizer.from_pretrained(str(tmp_path))
    for text in (" a", "  a", "a  b ", "\n a"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer("a")["input_ids"]) == "<s> a"  # as LLaMA's tokenizers have it


# ------------------------------------------------------------------------------------------------------- folders


def test_a_converted_folder_loads_encodes_and_decodes(ziya, tmp_path):
    from paddlenlp.transformers import AutoTokenizer

    names = write_tokenizer(ziya, tmp_path / "out")
    expected = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"}
    assert set(names) == expected == {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (ziya / "tokenizer.model").read_bytes()
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(ziya / "tokenizer.model"))
    (tmp_path / "out" / "tokenizer.model").unlink()  # tokenizer.json says it all
    for tokenizer in (
        AquilaTokenizer.from_pretrained(str(ziya)),
        AquilaTokenizer.from_pretrained(str(tmp_path / "out")),
        AutoTokenizer.from_pretrained(str(tmp_path / "out")),
    ):
        assert isinstance(tokenizer, AquilaTokenizer)
        assert tokenizer(TEXTS)["input_ids"] == [[1, *theirs.encode(text)] for text in TEXTS]
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
        size = theirs.get_piece_size()
        assert (tokenizer.pad_token_id, tokenizer.vocab_size, len(tokenizer)) == (size, size, size + 2)
        assert tokenizer("a[more]b")["input_ids"][2:] == [size + 1, *theirs.encode("b")]
        assert tokenizer.model_max_length == 77
        assert tokenizer.apply_chat_template("hm", tokenize=False) == "hm?"
        batch = tokenizer(["the cat", "北京 hello world"], padding=True, return_tensors="np")
        first = [1, *theirs.encode("the cat")]
        np.testing.assert_array_equal(
            batch["input_ids"][0], [size] * (batch["input_ids"].shape[1] - len(first)) + first
        )
        assert batch["attention_mask"][0].sum() == len(first)
        text = "<human>:  hello 北京🙂\n<bot>:"
        assert tokenizer.decode(tokenizer(text + "</s>")["input_ids"], skip_special_tokens=True).strip() == text


def test_a_model_alone_is_a_folder(llama, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama)
    write_tokenizer(tmp_path, tmp_path / "out")
    assert AquilaTokenizer.from_pretrained(str(tmp_path / "out"))("")["input_ids"] == [1]
    config = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")


def test_saving_keeps_the_model_file_and_the_ids(ziya, tmp_path):
    tokenizer = AquilaTokenizer.from_pretrained(str(ziya))
    saved = {Path(name).name for name in tokenizer.save_pretrained(str(tmp_path / "saved"))}
    assert saved == {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"}
    again = AquilaTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    again.save_pretrained(str(tmp_path / "saved"))  # onto itself
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == (ziya / "tokenizer.model").read_bytes()
    assert str(tmp_path) not in (tmp_path / "saved" / "tokenizer_config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("said", [{}, {"add_bos_token": False, "add_eos_token": True}, {"legacy": False}], ids=str)
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_transformers_gives_the_same_ids_after_the_way_back(ziya, tmp_path, said, kind):
    from transformers import AutoTokenizer

    if kind == "unigram":
        (ziya / "tokenizer.model").write_bytes(train(**VARIANTS["unigram"]))
        (ziya / "added_tokens.json").unlink()
        (ziya / "special_tokens_map.json").unlink()
    write_json(ziya / "tokenizer_config.json", {**read_json(ziya / "tokenizer_config.json"), **said})
    write_tokenizer(ziya, tmp_path / "paddle")
    names = write_torch_tokenizer(tmp_path / "paddle", tmp_path / "torch")
    assert set(names) == {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"}
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "torch"))
    ours = AquilaTokenizer.from_pretrained(str(tmp_path / "paddle"))
    assert type(theirs).__name__ == "LlamaTokenizerFast"
    texts = [*TEXTS, "a[more]b<pad>", "<s>the cat</s>", *random_texts(200)]
    assert dict(theirs(texts)) == dict(ours(texts))
    assert theirs.get_vocab() == ours.get_vocab()
    assert theirs.apply_chat_template([{"role": "user", "content": "hm"}], tokenize=False) == "hm?"
    slow = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "torch" / "tokenizer.model"))
    assert slow.get_piece_size() == ours.vocab_size
    write_tokenizer(tmp_path / "torch", tmp_path / "again")
    assert AquilaTokenizer.from_pretrained(str(tmp_path / "again"))(texts)["input_ids"] == ours(texts)["input_ids"]


def test_a_tokenizer_json_beside_the_model_goes_first(ziya, tmp_path):
    write_tokenizer(ziya, tmp_path / "out")
    (tmp_path / "out" / "tokenizer.model").write_bytes(b"not looked into")
    assert load_backend(tmp_path / "out").encode("the cat").ids == load_backend(ziya).encode("the cat").ids
    assert "tokenizer.model" in write_tokenizer(tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, False), (False, True)])
def test_bos_and_eos_follow_the_config_beside_a_tokenizer_json(ziya, tmp_path, bos, eos):
    from transformers import AutoTokenizer

    write_tokenizer(ziya, tmp_path / "paddle")
    write_torch_tokenizer(ziya, tmp_path / "torch")
    for folder in ("paddle", "torch"):
        config = read_json(tmp_path / folder / "tokenizer_config.json")
        write_json(tmp_path / folder / "tokenizer_config.json", {**config, "add_bos_token": bos, "add_eos_token": eos})
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "torch"))
    for folder in ("paddle", "torch"):
        ours = AquilaTokenizer.from_pretrained(str(tmp_path / folder))
        assert ours(["the cat", ""])["input_ids"] == theirs(["the cat", ""])["input_ids"]
    assert theirs("")["input_ids"] == [1] * bos + [2] * eos


# ---------------------------------------------------------------------------------------------------------- GGUF


def write_gguf(path: Path, data: bytes, **changes: object) -> Path:
    """A GGUF file with the tokenizer of a model and no weights."""
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    ids = range(theirs.get_piece_size())
    kinds = {2: theirs.is_unknown, 3: theirs.is_control, 5: theirs.is_unused, 6: theirs.is_byte}
    types = [next((kind for kind, holds in kinds.items() if holds(i)), 1) for i in ids]
    types = [4 if theirs.id_to_piece(i) in CHAT["user_defined_symbols"] else kind for i, kind in enumerate(types)]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([theirs.id_to_piece(i) for i in ids])
    writer.add_token_scores(changes.get("scores", [theirs.get_score(i) for i in ids]))
    writer.add_token_types(changes.get("types", types))
    writer.add_bos_token_id(theirs.bos_id())
    writer.add_eos_token_id(theirs.eos_id())
    writer.add_unk_token_id(theirs.unk_id())
    if "prefix" in changes:
        writer.add_add_space_prefix(changes["prefix"])
    if "bos" in changes:
        writer.add_add_bos_token(changes["bos"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama", "without a space in front", "with symbols of its own"])
def test_a_gguf_file_gives_the_ids_of_the_model_it_was_made_from(tmp_path, name):
    data = train(**VARIANTS[name])
    prefix = "space" not in name
    source = write_gguf(tmp_path / "model.gguf", data, prefix=prefix)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    names = write_tokenizer(source, tmp_path / "out")
    assert "tokenizer.json" in names and "vocab.json" not in names and "tokenizer.model" not in names
    texts = [text for text in [*TEXTS, *random_texts(500)] if text.strip(" ▁") not in CHAT["user_defined_symbols"]]
    for tokenizer in (
        AquilaTokenizer.from_pretrained(str(source)),
        AquilaTokenizer.from_pretrained(str(tmp_path / "out")),
    ):
        assert tokenizer(texts)["input_ids"] == [[theirs.bos_id(), *theirs.encode(text)] for text in texts]
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer_doubts(source) == []
    other = write_gguf(tmp_path / "other.gguf", data, prefix=not prefix, bos=False)
    assert from_gguf(other)[0].encode("the cat").ids != from_gguf(source)[0].encode("the cat").ids


def test_a_gguf_file_with_words_of_one_score_is_doubted(tmp_path):
    source = write_gguf(tmp_path / "model.gguf", extended(model_of({}), WORDS))
    (doubt,) = tokenizer_doubts(source)
    assert doubt.startswith("2 pieces share their score") and "--architecture" not in doubt  # it has no tokenizer.model


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scores": [0.0]}, "tokenizer.ggml.scores has 1 entries for"),
        ({"scores": [1, 2]}, "tokenizer.ggml.scores is no list of numbers"),
        ({"types": [1]}, "tokenizer.ggml.token_type has 1 entries for"),
        ({"types": [1] * 400}, "0 pieces for unknown text"),
    ],
    ids=["one score", "whole numbers", "one type", "no unknown"],
)
def test_a_gguf_file_whose_model_is_not_complete_is_named(llama, tmp_path, changes, expected):
    with pytest.raises(TokenizerError, match=expected):
        from_gguf(write_gguf(tmp_path / "model.gguf", llama, **changes))


# ------------------------------------------------------------------------------------------- models and bad input


def test_pieces_of_characters_that_are_no_pieces_are_counted(llama, tmp_path):
    data = changed(llama, lambda message: message.pieces.add(piece="龘龘", score=1.0))
    (tmp_path / "tokenizer.model").write_bytes(data)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert "龘龘" in theirs.encode("龘龘", out_type=str)
    assert "龘龘" not in load_backend(tmp_path).encode("龘龘").tokens
    (doubt,) = tokenizer_doubts(tmp_path)
    assert doubt.startswith("1 pieces hold characters that are no pieces themselves")


def test_symbols_that_the_normalizer_changes_are_counted():
    model = parse_model(train(normalization_rule_name="nmt_nfkc", user_defined_symbols=["①", "<bot>"]))
    assert doubts(model) == ["the normalizer changes 1 user-defined pieces: text behind them begins anew"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: setattr(m.trainer_spec, "model_type", 3), "it is of kind 'word'"),
        (lambda m: setattr(m.trainer_spec, "treat_whitespace_as_suffix", True), "at the end of words"),
        (lambda m: setattr(m.normalizer_spec, "escape_whitespaces", False), "does not escape spaces"),
        (lambda m: setattr(m.denormalizer_spec, "precompiled_charsmap", b"x"), "changes decoded text"),
        (lambda m: setattr(m.pieces[300], "type", 5), "1 of its pieces are marked as unused"),
        (lambda m: setattr(m.pieces[7], "type", 1), "has 255 of the 256 pieces"),
        (lambda m: setattr(m.pieces[0], "type", 3), "0 pieces for unknown text"),
        (lambda m: setattr(m.pieces[300], "piece", m.pieces[301].piece), "lists 1 pieces twice"),
        (lambda m: setattr(m.pieces[300], "piece", ""), "without any character"),
        (lambda m: setattr(m.pieces[300], "score", float("nan")), "scores of 1 pieces are no numbers"),
        (lambda m: setattr(m.pieces[300], "score", float("-inf")), "scores of 1 pieces are no numbers"),
        (lambda m: m.pieces.add(piece="a" * 400_000, score=-1), "a piece of 400,000 characters"),
        (lambda m: [m.pieces.add(piece=f"{i:0256}", score=-1) for i in range(16_000)], "characters together"),
    ],
)
def test_a_model_that_would_give_other_ids_is_an_error(llama, tmp_path, change, expected):
    (tmp_path / "tokenizer.model").write_bytes(changed(llama, change))
    with pytest.raises(TokenizerError, match=expected):
        write_tokenizer(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def charsmap(*units: int, texts: bytes = b"a\0") -> bytes:
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + texts


LEAF, HAS_LEAF, SOUND = 1 << 31, 1 << 8, [0] * 255
CHARSMAPS = {
    "too short": b"x",
    "without a trie": charsmap(),
    "cut off": charsmap(*SOUND, 0)[:500],
    "with a block cut off": charsmap(*SOUND),
    "with a far block": charsmap(2**20 << 10, *SOUND),
    "with a text beyond the end": charsmap(LEAF | 9, HAS_LEAF, *SOUND[1:], texts=b"a\0"),
    "with a text from within a character": charsmap(HAS_LEAF | 1 << 10, LEAF | 1, *SOUND[1:], texts="é\0".encode()),
    "with texts that are not UTF-8": charsmap(*SOUND, 0, texts=b"\xff\0"),
}


@pytest.mark.parametrize("kind", CHARSMAPS)
def test_a_normalizers_table_that_leads_out_of_itself_is_named(llama, tmp_path, capfd, kind):
    change = lambda m: setattr(m.normalizer_spec, "precompiled_charsmap", CHARSMAPS[kind])  # noqa: E731
    (tmp_path / "tokenizer.model").write_bytes(changed(llama, change))
    with pytest.raises(TokenizerError, match="precompiled_charsmap"):
        write_tokenizer(tmp_path, tmp_path / "out")
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("rule", ["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf"])
def test_control_the_tables_of_sentencepiece_are_sound(rule):
    table = parse_model(train(normalization_rule_name=rule)).charsmap
    assert is_charsmap(table)
    damaged = bytearray(table)
    damaged[4:8] = struct.pack("<I", 2**21 - 1 << 10)  # the first step leads out of the trie
    assert not is_charsmap(bytes(damaged))


NUMBER, BYTES = 0, 2  # how protobuf stores a value


def part(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | BYTES, len(content)]) + content


@pytest.mark.parametrize(
    "more",
    [
        part(3, bytes([2 << 3 | NUMBER, 5])),
        part(3, part(3, b"A")),
        part(2, part(3, b"A")),
        part(2, bytes([0xE8, 0x02, 5])),  # field 45, a name, as a number
        part(1, part(1, b"qq") + part(3, b"A")),
        part(1, part(1, b"qq") + bytes([2 << 3 | NUMBER, 65])),
        part(1, bytes([1 << 3 | NUMBER, 65])),
    ],
    ids=["charsmap", "prefix", "kind", "name", "type", "score", "piece"],
)
def test_a_field_stored_as_a_value_of_another_kind_is_named(llama, tmp_path, more):
    (tmp_path / "tokenizer.model").write_bytes(llama + more)
    with pytest.raises(TokenizerError, match=r"is not a SentencePiece model .*another kind"):
        load_backend(tmp_path)


def test_a_model_without_end_is_not_read(tmp_path):
    with (tmp_path / "tokenizer.model").open("wb") as file:
        file.truncate(30 * 2**30)  # takes no place on the disk
    with pytest.raises(TokenizerError, match="32,212,254,720 bytes; more than 64,000,000"):
        load_backend(tmp_path)


@pytest.mark.timeout(30)
def test_thousands_of_symbols_are_made_in_seconds(llama, tmp_path):
    def add(message) -> None:
        for i in range(6000):
            message.pieces.add(piece=f"<u{i}>", type=4)

    (tmp_path / "tokenizer.model").write_bytes(changed(llama, add))
    write_json(tmp_path / "added_tokens.json", {f"[{i}]": 400 + 6000 + i for i in range(1000)})
    begin = time.monotonic()
    assert load_backend(tmp_path).encode("<u5999>[999]").ids[-2:] == [400 + 5999, 400 + 6999]
    assert time.monotonic() - begin < 30  # one by one it was a minute, together half a second


@pytest.mark.parametrize("cut", [1, 50, 3000, -1])
def test_a_damaged_model_is_named(llama, tmp_path, cut):
    (tmp_path / "tokenizer.model").write_bytes(llama[:cut])
    with pytest.raises(TokenizerError, match=r"tokenizer.model is not a SentencePiece model \(it ends inside"):
        AquilaTokenizer.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("data", [b"", b"pieces", b"\x0a\x02\x08\x01", b"\x08\x01", bytes(range(200))])
def test_bytes_that_are_no_model_are_named(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(TokenizerError, match="is not a SentencePiece model"):
        load_backend(tmp_path)


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(TokenizerError, match="Git LFS pointer"):
        load_backend(tmp_path)


def test_a_class_whose_way_with_bos_is_not_known_is_asked_about(llama, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer"})
    with pytest.raises(TokenizerError, match="the class T5Tokenizer; whether it puts bos"):
        load_backend(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "add_bos_token": False})
    assert load_backend(tmp_path).encode("").ids == []


def test_added_tokens_that_cannot_have_their_ids_are_named(ziya):
    write_json(ziya / "added_tokens.json", {"<pad>": 9000})
    with pytest.raises(TokenizerError, match="'<pad>' should have id 9000"):
        load_backend(ziya)
    write_json(ziya / "added_tokens.json", {})
    with pytest.raises(TokenizerError, match="pad_token   '<pad>'"):
        load_backend(ziya)
