"""Ids by tiktoken beside ids by the tokenizers library: equal, or refused, and never equal by luck."""

import copy
import importlib.metadata
import logging
import multiprocessing
import pickle
import random
import sys
import threading

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import SHARED
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from aquila_pd import AquilaTokenizer, tokenizer
from aquila_pd.formats.byte_level import LETTERS
from aquila_pd.tokenization import tiktoken as fast
from aquila_pd.tokenization.chat_templates import Piece
from aquila_pd.tokenization.tiktoken import FastIds, NoTwin
from aquila_pd.utils import cores
from conftest import SEED

FILES = SHARED / "tokenizer"
LETTER_OF = {byte: letter for letter, byte in LETTERS.items()}
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
# One or more of each class of character, and all that the patterns name.
CHARACTERS = [
    *"aaabbstrevmld'  \n\t\r\u00a0\u3000\u20281239.,!-_<|>",
    "½",
    "é",
    "北",
    "の",
    "🙂",
    "\u0301",
    "\U0010fffe",
]
texts_of_classes = st.lists(st.text(st.sampled_from(CHARACTERS), max_size=40), min_size=1, max_size=6)


def letters(text: str) -> str:
    return "".join(LETTER_OF[byte] for byte in text.encode())


def backend_of(merges: list[tuple[str, str]], *, split=GPT2, added=(), **options) -> Tokenizer:
    """A backend whose vocabulary is all bytes and what the merges make, in this order."""
    tokens = dict.fromkeys([*LETTERS, *(left + right for left, right in merges)])
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    backend.pre_tokenizer = split
    backend.add_tokens(list(added))
    return backend


def fast_ids(backend: Tokenizer) -> FastIds:
    """With its twin built; NoTwin where there is none."""
    ids = FastIds(backend)
    ids._twin = fast.build(backend)
    return ids


def rows(ids: FastIds, texts: list[str]) -> list[list[int]] | None:
    found = ids.rows(texts)
    return None if found is None else [row.tolist() for row in found]


def library(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]


def train(texts: list[str], size: int, split=GPT2) -> Tokenizer:
    from tokenizers.trainers import BpeTrainer

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = split
    alphabet = list(LETTERS)
    backend.train_from_iterator(texts, BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    return backend


def samples(count: int) -> list[str]:
    draw = random.Random(SEED)
    return ["".join(draw.choices(CHARACTERS, k=draw.randint(0, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def aquila() -> AquilaTokenizer:
    if not FILES.is_dir():
        pytest.skip(f"no tokenizer files at {FILES}: this test did not run")
    tokenizer = AquilaTokenizer.from_pretrained(str(FILES))
    assert tokenizer.fast_ids.build()
    return tokenizer


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setattr(cores, "count", lambda: 2)
    monkeypatch.setattr(fast, "SMALLEST_BLOCK", 50)


# ----------------------------------------------------------------------------------------------- the proof's terms


def all_texts(alphabet: str, longest: int) -> list[str]:
    found = [""]
    for text in found:
        found += [text + letter for letter in alphabet] if len(text) < longest else []
    return found


def every_text_agrees(backend: Tokenizer) -> bool:
    texts = all_texts("abc", 7)
    return rows(fast_ids(backend), texts) == library(backend, texts)


ODD = [
    [("b", "c"), ("a", "b"), ("ab", "c")],  # abc is never made: bc goes first
    [("a", "b"), ("b", "c"), ("a", "bc")],  # nor here: ab goes first
    [("a", "a"), ("aa", "a"), ("aa", "aa")],  # aaa, aaaa: leftmost first
    [("ab", "ab"), ("a", "b"), ("abab", "c"), ("c", "abab")],  # a pair listed before its part can be made
    [("a", "b"), ("ab", "a"), ("b", "a"), ("aba", "ba")],
]


@pytest.mark.parametrize("merges", ODD, ids=str)
def test_lists_of_merges_that_tiktoken_would_read_otherwise_give_the_library_s_ids(merges):
    assert every_text_agrees(backend_of(merges))


def test_without_leaving_out_what_is_never_made_ids_differ(monkeypatch):
    """The control: what the proof asks for is needed."""
    monkeypatch.setattr(fast, "alone_themselves", lambda made, backend: made)
    assert not every_text_agrees(backend_of(ODD[0]))


def test_ranks_in_another_order_than_the_list_give_other_ids(monkeypatch):
    keep = fast.alone_themselves
    monkeypatch.setattr(fast, "alone_themselves", lambda *arguments: keep(*arguments)[::-1])
    assert not every_text_agrees(backend_of(ODD[4]))


def test_a_token_that_two_pairs_make_is_refused_for_a_reason():
    """abc stands first in the list and is made by the last pair: a rank for it, and the list is not followed."""
    merges = [("ab", "c"), ("b", "c"), ("bc", "d"), ("a", "bc")]
    backend = backend_of([*merges, ("a", "b")])
    with pytest.raises(NoTwin, match="two pairs"):
        fast.build(backend)
    ranks = {bytes([byte]): 100 + byte for byte in range(256)}
    ranks |= {"".join(pair).encode(): rank for rank, pair in reversed([*enumerate(merges)])}
    careless = tiktoken.Encoding("careless", pat_str=fast.WORDS, mergeable_ranks=ranks, special_tokens={})
    assert careless.decode_tokens_bytes(careless.encode("abcd")) == [b"abc", b"d"]
    assert backend.encode("abcd").tokens == ["a", "bcd"]


merge_lists = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 99), st.integers(0, 99)), max_size=9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(merge_lists, st.randoms(use_true_random=False))
def test_any_list_of_merges_in_any_order_is_equal_or_refused(draws, draw):
    parts, merges = ["a", "b", "c"], []
    for _, left, right in draws:
        pair = parts[left % len(parts)], parts[right % len(parts)]
        if pair not in merges and len("".join(pair)) <= 6:
            merges.append(pair)
            parts.append("".join(pair))
    draw.shuffle(merges)
    backend = backend_of(merges)
    made = ["".join(pair) for pair in merges]
    if len(set(made)) < len(made):
        with pytest.raises(NoTwin):
            fast.build(backend)
    else:
        texts = all_texts("abc", 5) + ["".join(draw.choices("abc", k=130)) for _ in range(5)]  # long: tiktoken's heap
        assert rows(fast_ids(backend), texts) == library(backend, texts)


def test_ids_that_follow_no_order_come_from_the_vocabulary():
    merges = [("a", "b"), ("ab", "c"), ("c", "c")]
    tokens = [*LETTERS, "ab", "abc", "cc"]
    random.Random(SEED).shuffle(tokens)
    vocab = {token: 7 * i for i, token in enumerate(tokens)}  # with gaps
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = GPT2
    texts = all_texts("abc", 5)
    assert rows(fast_ids(backend), texts) == library(backend, texts)


# ------------------------------------------------------------------------------------------------- where text is cut


def seeing_backend(split) -> Tokenizer:
    """Whose ids show whether a character is one piece with the a, 1, !, or space before it."""
    first_bytes = [LETTER_OF[byte] for byte in (*range(0x80), *range(0xC2, 0xF5))]
    return backend_of([(LETTER_OF[ord(before)], byte) for before in "a1! " for byte in first_bytes], split=split)


@pytest.mark.parametrize(("split", "others"), [(GPT2, "a1 "), (DIGITS, "a ")], ids=["gpt-2", "digits"])
def test_both_libraries_see_every_character_alike(split, others):
    """Where all of a block join the "!" before them they are neither letters, numbers nor spaces, in both libraries."""
    backend = seeing_backend(split)
    ids, mark = fast_ids(backend), backend.token_to_id("!")
    codes = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    blocks = [codes[i : i + 64] for i in range(0, len(codes), 64)]
    texts = ["!" + "!".join(block) for block in blocks]
    seen = rows(ids, texts)
    assert seen == library(backend, texts)
    classed = [block for block, row in zip(blocks, seen, strict=True) if mark in row]
    assert 130_000 < 64 * len(classed) < 200_000
    for before in others:
        texts = [before + before.join(block) for block in classed]
        assert rows(ids, texts) == library(backend, texts)


def test_a_pattern_that_counts_one_class_otherwise_would_be_seen(monkeypatch):
    wrong = fast.WORDS.replace(r"\p{N}", r"\p{Nd}")
    monkeypatch.setattr(fast, "PATTERNS", (([fast.BYTE_LEVEL], wrong),))
    backend = seeing_backend(GPT2)
    assert rows(fast_ids(backend), ["!½"]) != library(backend, ["!½"])


TRAINED = {name: train(samples(400), 700, split) for name, split in {"gpt-2": GPT2, "digits": DIGITS}.items()}
TWINS = {name: fast_ids(backend) for name, backend in TRAINED.items()}


@pytest.mark.parametrize("name", TRAINED)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(texts=texts_of_classes)
def test_text_of_every_class_of_character_is_cut_alike(name, texts):
    assert rows(TWINS[name], texts) == library(TRAINED[name], texts)


def spans(ids: FastIds, texts: list[str]) -> list[tuple[list, list]]:
    found = map(ids.encoded, texts)
    return [(encoded.ids, encoded.spans) for encoded in found]


def spans_by_the_library(backend: Tokenizer, texts: list[str]) -> list[tuple[list, list]]:
    found = backend.encode_batch(texts, add_special_tokens=False)
    return [(encoding.ids, encoding.offsets) for encoding in found]


@pytest.mark.parametrize("name", TRAINED)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(texts=texts_of_classes)
def test_spans_are_those_of_the_library(name, texts):
    assert spans(TWINS[name], texts) == spans_by_the_library(TRAINED[name], texts)


def test_spans_counted_in_bytes_would_be_seen(monkeypatch):
    """The control: without characters of several bytes any count of lengths would do."""
    keep, twin, backend = fast.spans_in, TWINS["gpt-2"], TRAINED["gpt-2"]
    monkeypatch.setattr(fast, "spans_in", lambda text, lengths: keep("x" * int(lengths.sum()), lengths))
    assert spans(twin, ["plain"]) == spans_by_the_library(backend, ["plain"])
    assert spans(twin, ["é"]) != spans_by_the_library(backend, ["é"])


@pytest.mark.parametrize("part", [r"\s+(?!\S)|", r"'re|", r"(?![^\s\p{N}])"])
def test_the_comparison_notices_a_pattern_with_a_part_missing(monkeypatch, part):
    cut = [(steps, pattern.replace(part, "")) for steps, pattern in fast.PATTERNS]
    monkeypatch.setattr(fast, "PATTERNS", cut)
    texts = [*samples(400), "we're", "a 're b"]
    backends = [*TRAINED.values(), backend_of([("'", "r")])]
    assert any(rows(fast_ids(backend), texts) != library(backend, texts) for backend in backends)


# ---------------------------------------------------------------------------------------------- Aquila's own tokenizer


def test_aquila_gives_the_same_lists_and_arrays_with_and_without(aquila, two_threads):
    plain = AquilaTokenizer(tokenizer_object=aquila.backend)
    plain.fast_ids.refuse()
    texts = [*samples(300), "", "[CLS]a</s>", " </s> <|endoftext|>x" * 3, "word " * 300, "北京" * 200]
    one = "one text 北京 </s>" * 9
    calls = [
        {},
        {"padding": True, "return_tensors": "np"},
        {"padding": True, "padding_side": "right"},
        {"truncation": True, "max_length": 7, "padding": "max_length", "return_tensors": "np"},
        {"return_attention_mask": False, "return_length": True},
    ]
    assert plain.fast_ids.rows(texts) is None and len(aquila.fast_ids.rows(texts)) == len(texts)
    for options in calls:
        ours, theirs = aquila(texts, **options), plain(texts, **options)
        assert list(ours) == list(theirs)
        for key in theirs:
            np.testing.assert_equal(ours[key], theirs[key])
            assert type(ours[key]) is type(theirs[key])
            if isinstance(theirs[key], np.ndarray):
                assert ours[key].dtype == theirs[key].dtype == np.int64
        assert dict(aquila(one)) == dict(plain(one))
    ids = aquila(texts)["input_ids"]
    assert type(ids[0][0]) is int and {100006, 100007, 0} <= {i for row in ids for i in row}
    assert dict(aquila.encode(one)) == dict(plain.encode(one))


def test_what_the_twin_cannot_take_is_left_to_the_library(aquila):
    for texts in (["a", fast.SEPARATOR], ["\ud800"], [" " * 1_000_001 + "a"]):
        assert aquila.fast_ids.rows(texts) is None and aquila.fast_ids.encoded(texts[-1]) is None
    ends = ["a\U0010fffe", "\U0010ffffb", "\U0010ffff", ""]  # halves of the separator beside it
    assert rows(aquila.fast_ids, ends) == library(aquila.backend, ends)
    with pytest.raises(Exception, match="surrogate"):
        aquila(["fine", "\ud800"])
    assert aquila([])["input_ids"] == [] and aquila([""])["input_ids"] == [[]]


def test_a_conversation_has_the_same_ids_and_spans_with_and_without(aquila, monkeypatch):
    plain = AquilaTokenizer(tokenizer_object=aquila.backend)
    plain.fast_ids.refuse()
    asked = []
    keep = FastIds.encoded
    monkeypatch.setattr(FastIds, "encoded", lambda ids, text: asked.append(keep(ids, text)) or asked[-1])
    for text in [*samples(300), "北京 </s> 🙂", "", "half of a pair: \U0001f642"]:
        pieces = [
            Piece("Human: ", False, False),
            Piece(text, False, True),
            Piece("###Assistant: ", False, False),
            Piece(text + "é", True, True),
            Piece("</s>", True, False),
        ]
        assert aquila.encode_pieces_with_spans(pieces) == plain.encode_pieces_with_spans(pieces)
    by_twin = [found for found in asked if found is not None]
    assert len(by_twin) > 300 and any(100007 in found.ids for found in by_twin)


def test_a_converted_folder_s_copy_goes_without_it(aquila, monkeypatch):
    monkeypatch.setitem(sys.modules, fast.__name__, None)
    monkeypatch.setattr(tokenizer, "fast_ids_class", tokenizer.fast_ids_class.__wrapped__)
    alone = AquilaTokenizer(tokenizer_object=aquila.backend)
    assert alone.fast_ids is None
    assert alone(["a", "北京</s>"])["input_ids"] == aquila(["a", "北京</s>"])["input_ids"]
    pieces = [Piece("北京 a</s>", True, False)]
    assert alone.encode_pieces_with_spans(pieces) == aquila.encode_pieces_with_spans(pieces)


def test_split_special_tokens_takes_the_library_s_way(aquila):
    splitting = copy.copy(aquila)
    splitting.split_special_tokens = True
    assert 100007 not in splitting(["</s>"])["input_ids"][0]
    assert aquila(["</s>"])["input_ids"] == [[100007]]


def test_nothing_is_built_before_enough_text_has_come_by(aquila, monkeypatch):
    monkeypatch.setattr(fast, "REPAID", 100)
    ids = FastIds(aquila.backend)
    assert ids.rows(["x" * 60]) is None and ids._twin is None
    assert ids.rows(["x" * 60]) is not None and ids._twin is not None
    for twin in (copy.deepcopy(ids), pickle.loads(pickle.dumps(ids))):
        assert twin.rows(["x" * 60]) is None and twin._twin is None


def test_a_token_added_later_is_found(aquila):
    tokenizer = copy.deepcopy(aquila)
    tokenizer.add_tokens(["<new>"])
    assert tokenizer.fast_ids.build()
    assert rows(tokenizer.fast_ids, ["a<new>b"]) == library(tokenizer.backend, ["a<new>b"])
    assert 100008 in rows(tokenizer.fast_ids, ["a<new>b"])[0]


def encode_in_a_child(ids: FastIds, texts: list[str], queue) -> None:
    queue.put(rows(ids, texts))


def test_a_fork_after_use_and_threads_at_once_are_safe(aquila, two_threads):
    texts = samples(200)
    wanted = rows(aquila.fast_ids, texts)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=encode_in_a_child, args=(aquila.fast_ids, texts, queue))
    child.start()
    assert queue.get(timeout=60) == wanted
    child.join(60)
    found = []
    several = [threading.Thread(target=lambda: found.append(rows(aquila.fast_ids, texts))) for _ in range(4)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    assert found == [wanted] * 4 and threading.active_count() < 10


@pytest.mark.parametrize(
    ("value", "count"), [("false", 1), ("0", 1), ("OFF", 1), ("", 1), ("true", 2), (None, 2)], ids=str
)
def test_threads_follow_the_library_s_variable(monkeypatch, value, count):
    monkeypatch.setattr(cores, "count", lambda: 2)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    if value is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
    assert fast.threads() == count


# ------------------------------------------------------------------------------------------------------- refused


def without_a_byte() -> Tokenizer:
    vocab = {token: i for i, token in enumerate(LETTERS) if token != "z"}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = GPT2
    return backend


def changed(**attributes) -> Tokenizer:
    backend = backend_of([("a", "b")])
    for name, value in attributes.items():
        setattr(backend, name, value)
    return backend


def with_setting(old: str, new: str) -> Tokenizer:
    """A backend with this changed in its JSON."""
    written = backend_of([("a", "b")]).to_str()
    assert old in written
    return Tokenizer.from_str(written.replace(old, new))


def unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram([("a", 0.0)], unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = GPT2
    return backend


def padding() -> Tokenizer:
    backend = backend_of([])
    backend.enable_padding(length=9)
    return backend


ON_SPACES = pre_tokenizers.Split(pattern=" ", behavior="isolated")
GROUPS = pre_tokenizers.Digits(individual_digits=False)
REFUSED = {  # the words of the reason, and one that has it
    "prefix space": ("cut", lambda: backend_of([], split=pre_tokenizers.ByteLevel(add_prefix_space=True))),
    "no pattern": ("cut", lambda: backend_of([], split=pre_tokenizers.ByteLevel(False, use_regex=False))),
    "another split": ("cut", lambda: backend_of([], split=pre_tokenizers.Sequence([ON_SPACES, GPT2]))),
    "digits in groups": ("cut", lambda: backend_of([], split=pre_tokenizers.Sequence([GROUPS, GPT2]))),
    "no pre-tokenizer": ("cut", lambda: Tokenizer(models.BPE(vocab=dict(LETTERS), merges=[]))),
    "normalizer": ("changed before", lambda: changed(normalizer=normalizers.NFC())),
    "padding": ("padded", padding),
    "split special tokens": ("special tokens split", lambda: changed(encode_special_tokens=True)),
    "dropout": ("merges are dropped", lambda: backend_of([("a", "b")], dropout=0.5)),
    "whole words first": ("ignore_merges", lambda: backend_of([("a", "b")], ignore_merges=True)),
    "end of words": (
        "end_of_word_suffix",
        lambda: with_setting('"end_of_word_suffix":null', '"end_of_word_suffix":"%"'),
    ),
    "missing byte": ("without 1 of the bytes", without_a_byte),
    "one id for two": ("one id for two", lambda: with_setting('"ab":256', '"ab":7')),
    "another model": ("Unigram model", unigram),
    "stripping token": ("white space", lambda: backend_of([], added=[AddedToken("<x>", lstrip=True)])),
    "whole-word token": ("whole words", lambda: backend_of([], added=[AddedToken("<x>", single_word=True)])),
    "longer token": ("begins with", lambda: backend_of([], added=["<x>", "<x>y"])),
    "overlap": ("may overlap", lambda: backend_of([], added=["<x>", AddedToken(">y", normalized=False)])),
    "half a separator": ("no characters", lambda: backend_of([], added=["a\U0010fffe"])),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_twin_would_do_otherwise_is_refused_and_said(case, caplog):
    words, make = REFUSED[case]
    ids = FastIds(make())
    with caplog.at_level(logging.INFO, logger="aquila_pd"):
        assert not ids.build()
    assert "without tiktoken" in caplog.text and words in caplog.text
    ids._asked = fast.REPAID
    assert ids.rows(["text"]) is None


@pytest.mark.parametrize("found", ["0.13.0", None])
def test_another_tiktoken_or_none_is_refused(monkeypatch, found):
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package == "tiktoken" and found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found if package == "tiktoken" else real(package)

    monkeypatch.setattr(fast, "version", version)
    with pytest.raises(NoTwin, match="tiktoken"):
        fast.build(backend_of([]))


def test_settings_changed_after_building_are_noticed():
    backend = backend_of([("a", "b")])
    ids = fast_ids(backend)
    assert rows(ids, ["ab"]) == library(backend, ["ab"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert ids.rows(["ab"]) is None
    backend.pre_tokenizer = GPT2
    backend.enable_truncation(1)
    assert ids.rows(["ab"]) is None
    backend.no_truncation()
    assert rows(ids, ["ab"]) == library(backend, ["ab"])


ADDED = ["<x>", AddedToken("</s>", special=True, normalized=False), "ab", "é!"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from([*CHARACTERS, "<x>", "</s>", "ab", "é!", "<", "x>", " "])), min_size=1))
def test_added_tokens_are_found_where_the_library_finds_them(parts):
    texts = list(map("".join, parts))
    assert rows(WITH_ADDED, texts) == library(WITH_ADDED._backend, texts)


WITH_ADDED = fast_ids(backend_of([("a", "b"), ("Ġ", "ab"), ("<", "x")], added=ADDED))
