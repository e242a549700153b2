"""Rows by source and by the language they are written in."""

import json
from functools import cache

import pytest
from effort import tries
from hypothesis import given, settings
from hypothesis import strategies as st
from sft_rows_factory import said

from aquila_pd.data.filters import (
    LANGUAGE_UNSURE,
    OTHER_LANGUAGE,
    SOURCE_EXCLUDED,
    SOURCE_NOT_ASKED,
    LanguageFilter,
    SourceFilter,
    sample,
)
from aquila_pd.utils.errors import DataError

ENGLISH = "The quick brown fox jumps over the lazy dog, and then it sleeps for the rest of the day."
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund und schläft dann den Rest des Tages."
FRENCH = "Le renard brun saute par-dessus le chien paresseux, puis il dort pendant le reste de la journée."
CHINESE = "敏捷的棕色狐狸跳过了懒狗，然后睡了一整天。"
TRADITIONAL = "敏捷的棕色狐狸跳過了懶狗，然後睡了一整天。"
JAPANESE = "素早い茶色の狐は怠け者の犬を飛び越え、それから一日中眠りました。"
KOREAN = "빠른 갈색 여우가 게으른 개를 뛰어넘고 나서 하루 종일 잠을 잤다."
RUSSIAN = "Быстрая коричневая лиса прыгает через ленивую собаку, а потом спит весь оставшийся день."


@cache
def _english_and_chinese() -> LanguageFilter:
    return LanguageFilter(("en", "zh"))


@pytest.fixture
def english_and_chinese() -> LanguageFilter:
    return _english_and_chinese()


# ---------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("wanted", "excluded", "source", "rule"),
    [
        ((), (), "anything", None),
        ((), (), "", None),
        (("a",), (), "a", None),
        (("a",), (), "A", SOURCE_NOT_ASKED),
        (("a",), (), "", SOURCE_NOT_ASKED),
        (("flan*",), (), "flan_v2", None),
        (("flan*",), (), "xflan", SOURCE_NOT_ASKED),
        ((), ("*gsm8k*",), "meta_gsm8k_aug", SOURCE_EXCLUDED),
        ((), ("*gsm8k*",), "math", None),
        (("*",), ("a",), "a", SOURCE_EXCLUDED),
        (("a[1]",), (), "a[1]", None),  # the name itself, before it is a glob
        (("a[1]",), (), "a1", None),
    ],
)
def test_sources(wanted, excluded, source, rule):
    assert SourceFilter(wanted, excluded).why_not(source) == rule


def test_names_that_fit_no_row_are_known():
    sources = SourceFilter(("math", "flan*"), ("gsm8k", "code"))
    for source in ("math", "code", "math", "other"):
        sources.why_not(source)
    assert sources.unmet == ["flan*", "gsm8k"]


# -------------------------------------------------------------------------------------------------------- languages


@pytest.mark.parametrize(
    ("text", "language"),
    [(ENGLISH, "en"), (GERMAN, "de"), (FRENCH, "fr"), (CHINESE, "zh"), (TRADITIONAL, "zh"), (JAPANESE, "ja"),
     (KOREAN, "ko"), (RUSSIAN, "ru"), (CHINESE + " def add(a, b): return a + b", "zh"),
     (CHINESE + " the quick brown fox jumps over", "zh"),
     (ENGLISH + " 你好", "en"), ("1 + 1 = 2", None), ("OK", None), ("", None), ("你好吗", "zh")],
)  # fmt: skip
def test_languages_of_texts(english_and_chinese, text, language):
    assert english_and_chinese.language(text) == language


def test_rows_of_other_languages_are_dropped(english_and_chinese):
    rules = {text: english_and_chinese.judge(said(text, text)) for text in (ENGLISH, CHINESE, GERMAN, JAPANESE, KOREAN)}
    assert rules == {ENGLISH: None, CHINESE: None, GERMAN: OTHER_LANGUAGE, JAPANESE: OTHER_LANGUAGE,
                     KOREAN: OTHER_LANGUAGE}  # fmt: skip
    assert LanguageFilter(("de",)).judge(said(GERMAN, GERMAN)) is None  # control: it is asked for that decides


def test_short_texts_stay_when_their_script_is_asked_for(english_and_chinese):
    assert english_and_chinese.judge(said("OK?", "Yes.")) == LANGUAGE_UNSURE
    assert english_and_chinese.judge(said("1 + 1", "2")) == LANGUAGE_UNSURE
    assert english_and_chinese.judge(said("Да?", "Нет.")) == OTHER_LANGUAGE
    assert LanguageFilter(("ru",)).judge(said("OK?", "Yes.")) == OTHER_LANGUAGE
    assert LanguageFilter(("ru",)).judge(said("1 + 1", "2")) == LANGUAGE_UNSURE  # arithmetic is in every language


def test_code_and_what_the_system_says_do_not_count(english_and_chinese):
    code = "```python\n" + "for item in items: print(item)\n" * 50 + "```"
    messages = [{"role": "system", "content": ENGLISH * 5}, *said(code + GERMAN, GERMAN)]
    assert english_and_chinese.judge(messages) == OTHER_LANGUAGE
    assert "print" not in sample(messages) and "quick" not in sample(messages)


def test_a_column_that_is_wrong_is_not_believed(english_and_chinese):
    assert english_and_chinese.judge(said(FRENCH, FRENCH)) == OTHER_LANGUAGE  # whatever the row's langdetect says


def test_megabytes_of_text_are_not_all_looked_at():
    assert len(sample(said("x " * 2_000_000, "`" * 1_000_000))) < 2_000


@settings(max_examples=tries(66, 200), deadline=None, derandomize=True)
@given(st.text(st.characters(), max_size=60))
def test_every_text_is_judged(text):
    known = _english_and_chinese()
    assert known.judge(said(text, text)) in (None, OTHER_LANGUAGE, LANGUAGE_UNSURE)
    assert known.judge(said(text, text)) == known.judge(said(text, text))


def test_a_language_that_is_not_known_is_named():
    with pytest.raises(DataError, match=r"languages: chinese, xx: no such language"):
        LanguageFilter(("chinese", "en", "xx"))


def test_real_rows_are_english(shared, english_and_chinese):
    rules = []
    for line in (shared / "data" / "alpaca_sharegpt.jsonl").read_text(encoding="utf-8").splitlines():
        texts = [turn["value"] for turn in json.loads(line)["conversations"]]
        rules.append(english_and_chinese.judge(said(*texts)))
    assert rules.count(OTHER_LANGUAGE) <= 4  # exercises in French and Spanish
    assert rules.count(LANGUAGE_UNSURE) <= 25
