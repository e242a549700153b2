"""AquilaTokenizer against the golden texts, against Hugging Face's GPT-2 tokenizer, and against damaged files."""

import copy
import json
import pickle
import random
import shutil

import numpy as np
import paddle
import pytest
from paddlenlp.transformers import PretrainedTokenizer
from paths import SHARED
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from aquila_pd import AquilaTokenizer
from aquila_pd.tokenization.convert import AQUILA_SPECIALS, load_backend
from conftest import SEED

FILES = SHARED / "tokenizer"
SPECIALS = {"<|endoftext|>": 0} | {token: 100000 + i for i, token in enumerate(AQUILA_SPECIALS)}
TEXTS = [
    "Hello, please introduce yourself.\n",
    "",
    "北京是中国的首都。 12345 3.14",
    "def f(x):\n    return x  # 🙂🧑‍🚀",
    "[CLS]a</s> b <|endoftext|>",
    "It's a test , isn't it ?",
    "word " * 40,
]


def need_shared() -> None:
    if not FILES.is_dir():
        pytest.skip(f"no tokenizer files at {FILES}: this test did not run")


@pytest.fixture(scope="module")
def golden() -> list[dict]:
    need_shared()
    return [json.loads(line) for line in (FILES / "golden_dev.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def aquila() -> AquilaTokenizer:
    """The published folder's tokenizer; tests that change it work on a copy."""
    need_shared()
    return AquilaTokenizer.from_pretrained(str(FILES))


@pytest.fixture(scope="module")
def hugging_face():
    """transformers' GPT-2 tokenizer on the same files, with the special tokens' ids written out by hand."""
    need_shared()
    from transformers import GPT2TokenizerFast

    decoder = {i: AddedToken(token, special=True, normalized=False) for token, i in SPECIALS.items()}
    names = {"bos_token": "[CLS]", "eos_token": "</s>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    files = str(FILES / "vocab.json"), str(FILES / "merges.txt")
    others = [token for token in SPECIALS if token not in names.values()]
    return GPT2TokenizerFast(
        *files, **names, additional_special_tokens=others, added_tokens_decoder=decoder, padding_side="left"
    )


def random_texts(count: int) -> list[str]:
    """Unicode from every plane without surrogates, and random bytes read as UTF-8 with replacement."""
    draw = random.Random(SEED)
    ranges = [
        (0, 0x7F),
        (0, 0x2FF),
        (0x4E00, 0x9FFF),
        (0x3040, 0x30FF),
        (0x600, 0x6FF),
        (0x1F300, 0x1FAFF),
        (0, 0x10FFFF),
    ]

    def character() -> str:
        low, high = draw.choice(ranges)
        code = draw.randint(low, high)
        return " " if 0xD800 <= code <= 0xDFFF else chr(code)

    texts = ["".join(character() for _ in range(draw.randint(0, 40))) for _ in range(count)]
    return texts + [draw.randbytes(draw.randint(0, 60)).decode("utf-8", "replace") for _ in range(count)]


# ------------------------------------------------------------------------------------------------ golden texts


def test_golden_texts_have_the_golden_ids_and_come_back(aquila, golden):
    texts = [row["text"] for row in golden]
    assert len(texts) == 400
    ids = aquila(texts)["input_ids"]
    wrong = [row["text"] for row, found in zip(golden, ids, strict=True) if found != row["ids"]]
    assert wrong == []
    assert aquila.batch_decode(ids) == texts
    assert [aquila.decode(row) for row in ids] == texts


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("decode", {}),
        ("decode_skip_special", {"skip_special_tokens": True}),
        ("decode_cleanup", {"clean_up_tokenization_spaces": True}),
    ],
)
def test_golden_decodes(aquila, golden, field, options):
    rows = [row for row in golden if row[field] is not None]
    if field == "decode_skip_special":
        assert len(rows) > 50
    assert aquila.batch_decode([row["ids"] for row in rows], **options) == [row[field] for row in rows]


def differing(backend: Tokenizer, golden: list[dict]) -> int:
    encodings = backend.encode_batch([row["text"] for row in golden])
    return sum(e.ids != row["ids"] for e, row in zip(encodings, golden, strict=True))


def test_the_golden_check_notices_a_prefix_space(aquila, golden):
    broken = Tokenizer.from_str(aquila.backend.to_str())
    assert differing(broken, golden) == 0
    broken.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert differing(broken, golden) > 200


def test_the_golden_check_notices_merges_in_another_order(golden, tmp_path):
    for name in ("vocab.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(FILES / name, tmp_path / name)
    header, *merges = (FILES / "merges.txt").read_text(encoding="utf-8").splitlines()
    random.Random(SEED).shuffle(merges)
    (tmp_path / "merges.txt").write_text("\n".join([header, *merges, ""]), encoding="utf-8")
    assert differing(load_backend(tmp_path), golden) > 200


def test_the_golden_check_notices_special_tokens_that_start_elsewhere(golden):
    from transformers import GPT2TokenizerFast

    naive = GPT2TokenizerFast.from_pretrained(str(FILES))  # takes [CLS] for the first free id
    assert naive.convert_tokens_to_ids("[CLS]") == 100000
    assert differing(naive.backend_tokenizer, golden) > 20


def test_special_tokens_have_their_ids(aquila):
    assert (aquila.bos_token_id, aquila.eos_token_id, aquila.pad_token_id, aquila.unk_token_id) == (
        100006,
        100007,
        0,
        0,
    )
    assert {token: aquila.convert_tokens_to_ids(token) for token in SPECIALS} == SPECIALS
    assert sorted(aquila.all_special_ids) == sorted(SPECIALS.values())
    assert (aquila.vocab_size, len(aquila), len(aquila.get_vocab())) == (100000, 100008, 100008)
    just_text = aquila("[UNK] [SEP] <s>")["input_ids"]
    assert not set(just_text) & set(SPECIALS.values())
    assert len(just_text) > 3


# ------------------------------------------------------------------------------------- beside Hugging Face's tokenizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": True},
        {"padding": True, "padding_side": "right"},
        {"padding": "max_length", "max_length": 12, "truncation": True},
        {"padding": "max_length", "max_length": 50},
        {"truncation": True, "max_length": 3},
        {"padding": "longest", "pad_to_multiple_of": 16},
        {"padding": True, "return_tensors": "np"},
        {"padding": True, "truncation": "only_first", "max_length": 9, "return_tensors": "np", "padding_side": "right"},
        {"return_attention_mask": False},
        {"add_special_tokens": False},
    ],
    ids=str,
)
def test_calls_agree_with_hugging_face(aquila, hugging_face, options):
    ours, theirs = aquila(TEXTS, **options), hugging_face(TEXTS, **options)
    assert list(ours) == list(theirs)
    for key in theirs:
        if "return_tensors" in options:
            assert ours[key].dtype == theirs[key].dtype
            np.testing.assert_array_equal(ours[key], theirs[key])
        else:
            assert ours[key] == theirs[key]
    if "padding" not in options:
        one = aquila(TEXTS[0], **options)
        assert dict(one) == dict(hugging_face(TEXTS[0], **options))


@pytest.mark.parametrize(
    "options", [{"truncation": True, "max_length": 3}, {"truncation": True, "max_length": 9, "padding": True}]
)
def test_truncation_on_the_left_agrees_with_hugging_face(aquila, hugging_face, options, monkeypatch):
    monkeypatch.setattr(aquila, "truncation_side", "left")
    monkeypatch.setattr(hugging_face, "truncation_side", "left")
    assert dict(aquila(TEXTS, **options)) == dict(hugging_face(TEXTS, **options))


def test_random_text_and_random_ids_agree_with_hugging_face(aquila, hugging_face):
    texts = random_texts(300)
    ids = aquila(texts)["input_ids"]
    assert ids == hugging_face(texts)["input_ids"]
    assert aquila.batch_decode(ids) == texts
    draw = random.Random(SEED)
    rows = [[draw.randrange(100008) for _ in range(30)] for _ in range(300)]  # mostly not valid UTF-8 when joined
    for skip in (False, True):
        theirs = hugging_face.batch_decode(rows, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert aquila.batch_decode(rows, skip_special_tokens=skip) == theirs


def test_tokens_offsets_and_clean_up_agree_with_hugging_face(aquila, hugging_face):
    for text in [*TEXTS, *random_texts(30)]:
        assert aquila.tokenize(text) == hugging_face.tokenize(text)
        ours = aquila(text, return_offsets_mapping=True)["offset_mapping"]
        assert ours == hugging_face(text, return_offsets_mapping=True)["offset_mapping"]
    ids = aquila("It's a test , isn't it ?")["input_ids"]
    assert aquila.decode(ids, clean_up_tokenization_spaces=True) == "It's a test, isn't it?"
    assert aquila.decode(ids) == "It's a test , isn't it ?"


def test_ids_and_tokens_convert_like_hugging_face(aquila, hugging_face):
    ids = [100006, 5, 299, 100007, 99999]
    assert aquila.convert_ids_to_tokens(ids) == hugging_face.convert_ids_to_tokens(ids)
    assert aquila.convert_ids_to_tokens(ids, skip_special_tokens=True) == hugging_face.convert_ids_to_tokens(
        ids, skip_special_tokens=True
    )
    tokens = aquila.convert_ids_to_tokens(ids)
    assert aquila.convert_tokens_to_ids(tokens) == ids
    assert aquila.convert_tokens_to_ids("no such token") == aquila.unk_token_id
    assert aquila.convert_tokens_to_string(tokens) == hugging_face.convert_tokens_to_string(tokens)
    assert aquila.convert_ids_to_tokens(5) == hugging_face.convert_ids_to_tokens(5)


# --------------------------------------------------------------------------------------------- PaddleNLP's interface


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": True},
        {"padding": "max_length", "max_length": 20, "truncation": True, "padding_side": "right"},
        {"return_length": True},
        {"padding": True, "return_length": True},
        {"truncation": True, "max_length": 4, "return_attention_mask": False},
    ],
    ids=str,
)
def test_the_short_way_gives_what_paddlenlp_gives(aquila, options):
    """The base class tokenizes one text at a time through `tokenize`: the same result by another way."""

    class Slow(AquilaTokenizer):
        _batch_encode_plus = PretrainedTokenizer._batch_encode_plus
        _encode_plus = PretrainedTokenizer._encode_plus

    slow = copy.copy(aquila)
    slow.__class__ = Slow
    texts = [text for text in TEXTS if text]
    assert dict(aquila(texts, **options)) == dict(slow(texts, **options))
    assert dict(aquila(texts[0], **options)) == dict(slow(texts[0], **options))
    assert dict(aquila.encode(texts[0])) == dict(slow.encode(texts[0]))


def test_other_requests_take_the_base_class_way(aquila):
    a, b = "the first text", "and a second"
    ids_a, ids_b = aquila(a)["input_ids"], aquila(b)["input_ids"]
    assert aquila(a, b)["input_ids"] == ids_a + ids_b
    assert aquila([a, b], [b, a])["input_ids"] == [ids_a + ids_b, ids_b + ids_a]
    assert aquila(a, b, return_token_type_ids=True)["token_type_ids"] == [0] * len(ids_a) + [1] * len(ids_b)
    assert aquila(a, return_position_ids=True)["position_ids"] == list(range(len(ids_a)))
    assert aquila("[CLS] a", return_special_tokens_mask=True)["special_tokens_mask"] == [0, 0]
    overflow = aquila(a, max_length=2, truncation=True, return_overflowing_tokens=True)
    assert overflow["input_ids"] + overflow["overflowing_tokens"] == ids_a
    assert aquila([a, b], return_dict=False)[1]["input_ids"] == ids_b
    words = aquila([["the", " cat"], [" sat"]], is_split_into_words=True)["input_ids"]
    assert words == [aquila("the")["input_ids"] + aquila(" cat")["input_ids"], aquila(" sat")["input_ids"]]
    padded = aquila.pad({"input_ids": [[5, 6, 7], [8]]})
    assert (padded["input_ids"], padded["attention_mask"]) == ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]])


def test_tensors_are_paddle_int64_and_decode_takes_them(aquila):
    features = aquila(["short", "a longer text"], padding=True, return_tensors="pd")
    assert all(isinstance(value, paddle.Tensor) and value.dtype == paddle.int64 for value in features.values())
    assert features["attention_mask"].tolist()[0] == [0] * (features["input_ids"].shape[1] - 1) + [1]
    assert aquila.batch_decode(features["input_ids"], skip_special_tokens=True) == ["short", "a longer text"]
    assert aquila.decode(features["input_ids"][1]) == "a longer text"
    assert aquila.decode(np.array([5, 6])) == aquila.decode([5, 6])
    assert aquila.decode(5) == aquila.decode([5])
    assert aquila("one text", return_tensors="pd")["input_ids"].shape[0] == 1
    assert aquila("", return_tensors="pd")["input_ids"].shape == [1, 0]
    assert aquila([], padding=True)["input_ids"] == []
    with pytest.raises(ValueError, match="padding=True"):
        aquila(["short", "a longer text"], return_tensors="pd")


def test_added_tokens_are_whole_and_decode_as_written(aquila):
    tokenizer = copy.deepcopy(aquila)
    assert tokenizer.add_tokens(["<new>", "é!", "the"]) == 2  # "the" was in the vocabulary
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<|human|>"]}) == 1
    assert (len(tokenizer), tokenizer.vocab_size, len(aquila)) == (100011, 100000, 100008)
    text = "a<new> é!<|human|>b"
    ids = tokenizer(text)["input_ids"]
    assert {100008, 100009, 100010} <= set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.batch_decode([ids, ids], skip_special_tokens=True) == ["a<new> é!b"] * 2
    assert tokenizer.decode([5, 100007, 6], spaces_between_special_tokens=True) == "% </s> &".replace(
        "%", aquila.decode(5)
    ).replace("&", aquila.decode(6))


def test_special_tokens_can_be_split_when_asked(aquila):
    assert aquila.tokenize("[CLS]") == ["[CLS]"]
    assert "".join(aquila.tokenize("[CLS]", split_special_tokens=True)) == "[CLS]"
    assert len(aquila.tokenize("[CLS]", split_special_tokens=True)) > 1
    assert aquila.tokenize("[CLS]") == ["[CLS]"]


def test_copies_and_pickles_work_alone(aquila):
    tokenizer = copy.deepcopy(aquila)
    tokenizer.init_chat_template("{{ messages[0]['content'] }}!")
    for twin in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert twin(TEXTS)["input_ids"] == aquila(TEXTS)["input_ids"]
        assert twin.apply_chat_template("hello", tokenize=False) == "hello!"
        twin.add_tokens(["<only here>"])
    assert len(tokenizer) == len(aquila) == 100008
