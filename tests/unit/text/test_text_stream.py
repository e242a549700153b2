"""Text streamed out of tokens: what goes out is what decode() says, and nothing that a later token would change."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from chat_factory import write_aquila_tokenizer, write_sentencepiece_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from aquila_pd.text.text_stream import TextStream
from aquila_pd.tokenizer import AquilaTokenizer
from aquila_pd.utils.errors import GenerationError, TokenizerError

FAMILY = "👨‍👩‍👧"
SAMPLES = [
    "你好，世界",
    "🙂",
    FAMILY,
    "👋🏽 hi",
    " a  b",
    "\n\n",
    "é",
    "ᠮᠣᠩ",
    "Human: x###",
    "\ufffd",
    "<|endofpiece|>",
]
MANY = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> AquilaTokenizer:
    return AquilaTokenizer.from_pretrained(str(write_aquila_tokenizer(tmp_path_factory.mktemp("bytes"))))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> AquilaTokenizer:
    return AquilaTokenizer.from_pretrained(str(write_sentencepiece_tokenizer(tmp_path_factory.mktemp("pieces"))))


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request) -> AquilaTokenizer:
    return request.getfixturevalue(request.param)


def plain_ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)["input_ids"]


def decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def cut(text: str, stop) -> str:
    places = [text.find(s) for s in stop if s in text]
    return text[: min(places)] if places else text


def pieces_of(stream: TextStream, ids: list[int]) -> list[str]:
    return [*(stream.push(i) for i in ids), stream.finish()]


def check(tokenizer, ids: list[int], stop=()) -> None:
    stream = TextStream(tokenizer, stop)
    pieces = pieces_of(stream, ids)
    whole = decoded(tokenizer, ids)
    assert "".join(pieces) == stream.text == cut(whole, stop)
    assert (stream.stop_string is None) == (stream.text == whole)
    assert stream.stop_string is None or whole[len(stream.text) :].startswith(stream.stop_string)


def mixtures(tokenizer):
    """Ids of texts, of texts cut anywhere, and any ids at all: damaged characters, special tokens, none at all."""
    anything = st.lists(st.integers(0, len(tokenizer) + 3), max_size=12)
    texts = st.one_of(st.sampled_from(SAMPLES), st.text(max_size=8)).map(lambda text: plain_ids(tokenizer, text))
    cut_texts = st.tuples(texts, st.integers(0, 9), st.integers(0, 9)).map(lambda t: t[0][t[1] : len(t[0]) - t[2]])
    return st.lists(st.one_of(texts, cut_texts, anything), max_size=6).map(lambda parts: list(chain(*parts)))


@MANY
@given(data=st.data())
def test_any_ids_give_what_decode_says(tokenizer, data):
    check(tokenizer, data.draw(mixtures(tokenizer)))


@MANY
@given(data=st.data())
def test_any_ids_are_cut_before_the_stop_string_that_begins_first(tokenizer, data):
    ids = data.draw(mixtures(tokenizer))
    whole = decoded(tokenizer, ids) or "x"
    inside = st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 6)).map(lambda t: whole[t[0] : t[0] + t[1]])
    check(tokenizer, ids, data.draw(st.lists(st.one_of(inside, st.text("ab#\n ", min_size=1, max_size=4)), max_size=4)))


@MANY
@given(data=st.data())
def test_nothing_that_went_out_changes_when_more_tokens_come(tokenizer, data):
    """What is out after some tokens begins the text of these tokens with any others behind them."""
    ids, more = data.draw(mixtures(tokenizer)), data.draw(mixtures(tokenizer))
    stream = TextStream(tokenizer)
    out = "".join(map(stream.push, ids))
    assert decoded(tokenizer, ids + more).startswith(out)


def token_by_token(tokenizer, ids: list[int]) -> str:
    return "".join(decoded(tokenizer, [i]) for i in ids)


def growing_text(tokenizer, ids: list[int]) -> str:
    """The usual shortcut: decode everything each time and give out what is longer than before."""
    out = ""
    for end in range(1, len(ids) + 1):
        out += decoded(tokenizer, ids[:end])[len(out) :]
    return out


@pytest.mark.parametrize("naive", [token_by_token, growing_text])
def test_control_the_naive_ways_fail_on_the_same_texts(tokenizer, naive):
    wrong = [text for text in SAMPLES if naive(tokenizer, plain_ids(tokenizer, text)) != text]
    assert {"🙂", FAMILY} <= set(wrong)
    for text in SAMPLES:
        check(tokenizer, plain_ids(tokenizer, text))


def test_a_character_appears_with_its_last_token(byte_level):
    ids = plain_ids(byte_level, "ᠮ🦄x")
    assert len(ids) == 7  # three bytes; four bytes, two of them in one token; a letter
    stream = TextStream(byte_level)
    assert [stream.push(i) for i in ids] == ["", "", "ᠮ", "", "", "🦄", "x"]


def test_emoji_of_several_characters_may_be_split_between_them_never_inside_one(byte_level):
    pieces = [piece for piece in pieces_of(TextStream(byte_level), plain_ids(byte_level, FAMILY)) if piece]
    assert "".join(pieces) == FAMILY
    assert len(pieces) > 1 and not any("\ufffd" in piece for piece in pieces)


def test_ordinary_text_is_not_held_back(byte_level):
    stream = TextStream(byte_level, stop=["###"])
    for i in plain_ids(byte_level, "The quick brown fox, 2 + 2."):
        assert stream.push(i) == decoded(byte_level, [i])


def test_a_damaged_character_goes_out_once_it_is_certain(byte_level):
    half = plain_ids(byte_level, "🦄")[:2]
    stream = TextStream(byte_level)
    assert [stream.push(half[0]), stream.push(half[1])] == ["", ""]
    assert stream.push(plain_ids(byte_level, "x")[0]) == "\ufffdx"
    assert TextStream(byte_level).finish() == ""


def test_special_tokens_give_no_text_wherever_they_stand(byte_level):
    a, b = plain_ids(byte_level, "你"), plain_ids(byte_level, "!")
    special = byte_level.convert_tokens_to_ids("<|startofpiece|>")
    assert "".join(pieces_of(TextStream(byte_level), [special, *a[:1], special, *a[1:], *b, special])) == "你!"
    typed = plain_ids(byte_level, "<|start") + plain_ids(byte_level, "ofpiece|>")  # of ordinary tokens: text
    assert "".join(pieces_of(TextStream(byte_level), typed)) == "<|startofpiece|>"


def test_all_golden_texts_come_back(shared):
    tokenizer = AquilaTokenizer.from_pretrained(str(shared / "tokenizer"))
    lines = Path(shared, "tokenizer", "golden_dev.jsonl").read_text(encoding="utf-8").splitlines()
    split = 0
    for row in map(json.loads, lines):
        pieces = pieces_of(TextStream(tokenizer), row["ids"])
        assert "".join(pieces) == decoded(tokenizer, row["ids"])
        split += "\ufffd" in token_by_token(tokenizer, row["ids"]) and "\ufffd" not in "".join(pieces)
    assert len(lines) == 400
    assert split > 10  # texts a naive way would have damaged
    for ids in np.random.default_rng(0).integers(0, 100_010, (200, 24)).tolist():
        check(tokenizer, ids)


# ------------------------------------------------------------------------------------------------ stop strings


def streamed(tokenizer, text: str, stop, **options) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop, **options)
    return pieces_of(stream, plain_ids(tokenizer, text)), stream


def test_a_stop_string_over_many_tokens_is_never_seen(byte_level):
    pieces, stream = streamed(byte_level, "你好### Human: more", ["### Human:"])
    assert "".join(pieces) == "你好" and stream.stop_string == "### Human:"
    assert "#" not in "".join(pieces)


def test_the_beginning_of_a_stop_string_that_goes_on_otherwise_is_text(byte_level):
    pieces, stream = streamed(byte_level, "a ## b ##", ["###"])
    assert "".join(pieces) == "a ## b ##" and stream.stop_string is None


def test_the_earliest_of_overlapping_stop_strings_wins_even_when_it_ends_last(byte_level):
    assert streamed(byte_level, "0abcdef", ["cd", "bcde"])[1].text == "0a"
    assert streamed(byte_level, "0abcdxf", ["cd", "bcde"])[1].text == "0ab"  # control: the long one did not come
    assert streamed(byte_level, "0abcd", ["cd", "bcde"])[1].text == "0ab"  # nor here, at the end
    assert streamed(byte_level, "0abcdef", ["bcde"])[1].stop_string == "bcde"


def test_after_the_stop_string_nothing_more_comes(byte_level):
    stream = TextStream(byte_level, ["b"])
    assert [stream.push(i) for i in plain_ids(byte_level, "a b c")][-1] == ""
    assert stream.finish() == "" and stream.text == "a "


def test_an_empty_stop_string_is_an_error(byte_level):
    with pytest.raises(GenerationError, match="empty stop string"):
        TextStream(byte_level, ["x", ""])


def test_white_space_before_the_answer_is_left_out_when_asked(tokenizer):
    assert streamed(tokenizer, " \n\n a b \n", [], strip_start=True)[1].text == "a b \n"
    assert streamed(tokenizer, "\n\nfirst\nsecond", ["\n"], strip_start=True)[1].text == "first"
    assert streamed(tokenizer, "\n\nfirst", ["\n"])[1].text == ""  # control
    assert streamed(tokenizer, " \n ", [], strip_start=True)[1].text == ""


# ----------------------------------------------------------------------------------------------- SentencePiece


def test_the_space_in_front_is_stripped_once_and_kept_where_text_follows_another(sentencepiece):
    ids = plain_ids(sentencepiece, "hello world")
    assert sentencepiece.convert_ids_to_tokens(ids)[0].startswith("\u2581")
    assert "".join(pieces_of(TextStream(sentencepiece), ids)) == "hello world"
    assert "".join(pieces_of(TextStream(sentencepiece, follows=True), ids)) == " hello world"


def test_a_run_of_bytes_goes_out_when_it_has_ended(sentencepiece):
    ids = plain_ids(sentencepiece, "🦄世")
    tokens = sentencepiece.convert_ids_to_tokens(ids)
    assert [t for t in tokens if t.startswith("<0x")] == ["<0xF0>", "<0x9F>", "<0xA6>", "<0x84>"]
    stream = TextStream(sentencepiece)
    pieces = [stream.push(i) for i in ids]
    assert [piece for piece in pieces if piece] == ["🦄世"]
    # why not before: one wrong byte more, and decode() takes back the whole run
    byte = sentencepiece.convert_tokens_to_ids("<0xF0>")
    assert decoded(sentencepiece, [*ids[:-1], byte]) == "\ufffd" * 5


# --------------------------------------------------------------------------------------- tokenizers of other kinds


def test_added_tokens_whose_letters_look_like_bytes_are_written_as_they_are(tmp_path):
    tokenizer = AquilaTokenizer.from_pretrained(str(write_aquila_tokenizer(tmp_path)))
    tokenizer.add_tokens(["né"])
    ids = [*plain_ids(tokenizer, "🦄")[:2], tokenizer.convert_tokens_to_ids("né"), *plain_ids(tokenizer, "é")]
    check(tokenizer, ids)
    assert decoded(tokenizer, ids) == "\ufffdnéé"


def test_a_decoder_that_is_not_known_is_an_error(tmp_path):
    tokenizer = AquilaTokenizer.from_pretrained(str(write_aquila_tokenizer(tmp_path)))
    tokenizer.backend.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="WordPiece"):
        TextStream(tokenizer)
