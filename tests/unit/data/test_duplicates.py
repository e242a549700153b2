"""Of rows that are the same, or nearly, the first one stays; what is nearly the same, sets of shingles tell."""

import random

import numpy as np
import pytest
from effort import tries
from hypothesis import given, settings
from hypothesis import strategies as st
from sft_rows_factory import said

from aquila_pd.data import duplicates
from aquila_pd.data.duplicates import (
    NUMBERS,
    ExactIndex,
    Examples,
    NearIndex,
    Signer,
    bands_for,
    digest,
    shingles,
)
from aquila_pd.data.ngrams import hashes, joined, runs, words

VOCABULARY = [f"word{number}" for number in range(3000)]
CHINESE = [chr(0x4E00 + number) for number in range(3000)]


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer()


def jaccard(one: list[dict], other: list[dict]) -> float:
    """The share of runs of three words, as plain Python sets have it."""
    sets = []
    for messages in (one, other):
        told = [word for m in messages for word in (f"<{m['role']}>", *words(m["content"]))]
        sets.append({tuple(told[place : place + 3]) for place in range(len(told) - 2)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def changed(text: list[str], count: int, rng: random.Random, vocabulary: list[str]) -> list[str]:
    found = list(text)
    for place in rng.sample(range(len(text)), count):
        found[place] = rng.choice(vocabulary)
    return found


# ------------------------------------------------------------------------------------------------------------ words


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Janet’s 1,000 ducks!", ["janets", "1000", "ducks"]),
        ("janets 1000 DUCKS", ["janets", "1000", "ducks"]),
        ("ＡＢＣ１２３", ["abc123"]),
        ("你好，世界 x2", ["你", "好", "世", "界", "x2"]),
        ("カタカナ", ["カ", "タ", "カ", "ナ"]),
        ("3.5 a_b 1,00", ["3", "5", "a", "b", "1", "00"]),
        ("한국어 텍스트", ["한국어", "텍스트"]),
        ("!?…", []),
    ],
)
def test_words_have_one_form(text, found):
    assert words(text) == found


def test_words_are_joined_for_people():
    assert joined(["a", "b", "你", "好", "c"]) == "a b 你好 c"


@settings(max_examples=tries(50, 100), deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=60), st.integers(1, 20))
def test_equal_runs_have_equal_numbers_and_others_have_not(numbers, length):
    found = runs(np.array(numbers, dtype=np.uint64), length)
    told = [tuple(numbers[place : place + length]) for place in range(len(numbers) - length + 1)]
    assert len(found) == len(told)
    assert len(set(found.tolist())) == len(set(told))
    one = runs(np.array(numbers[1:], dtype=np.uint64), length)  # wherever a run begins
    assert one.tolist() == found[1:].tolist()


# ------------------------------------------------------------------------------------------------------------ exact


def test_the_digest_says_who_said_what():
    different = [
        said("a", "b"),
        said("a", "b", "a", "b"),
        said("ab", ""),
        said("", "ab"),
        said("a assistant 1 b"),
        [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}],
        said("a", "b "),
        said("A", "b"),
    ]
    assert len({digest(messages) for messages in different}) == len(different)
    assert digest(said("a", "b")) == digest([dict(reversed(message.items())) for message in said("a", "b")])


def test_the_index_finds_what_a_dictionary_finds():
    rng = random.Random(1)
    index, known, groups = ExactIndex(), {}, set()
    for number in range(20_000):
        key = rng.randrange(1, 8_000).to_bytes(16, "little")
        assert index.first(key, (3, number)) == known.get(key)
        groups |= {key} if key in known else set()
        known.setdefault(key, (3, number))
    assert len(index) == len(known) and index.groups == len(groups)
    assert index.find(b"\xff" * 16) is None and len(index) == len(known)


def test_places_of_the_largest_files_fit():
    index = ExactIndex()
    place = ((1 << 23) - 1, (1 << 40) - 1)
    index.first(b"\0" * 16, place)
    assert index.find(b"\0" * 16) == index.find(b"\0" * 16) == place and index.groups == 1


def test_the_exact_index_costs_what_is_said():
    index = ExactIndex()
    rng = np.random.default_rng(0)
    for number in range(30_000):
        index.first(rng.bytes(16), (0, number))
    assert (index._keys.nbytes + index._places.nbytes) / len(index) <= 16 * 2.9


# ------------------------------------------------------------------------------------------------------------- near


def test_signatures_are_those_of_the_library(signer):
    from datasketch import MinHash

    text = " ".join(random.Random(0).choices(VOCABULARY, k=6000))  # longer than a batch
    plain = MinHash(NUMBERS, seed=1, hashfunc=int)
    for number in shingles(said(text, text)).tolist():
        plain.update(number)
    assert np.array_equal(signer.sign(said(text, text)), plain.hashvalues)


def test_shingles_are_runs_of_three_words():
    messages = said("one two three four five six", "seven eight nine ten eleven")
    told = ["<user>", *words(messages[0]["content"]), "<assistant>", *words(messages[1]["content"])]
    assert len(shingles(messages)) == len(told) - 2
    assert set(shingles(messages).tolist()) == set((runs(hashes(told), 3) >> np.uint64(32)).tolist())


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.99])
def test_bands_let_rows_at_the_threshold_meet(threshold):
    bands, width = bands_for(threshold)
    assert bands * width <= NUMBERS
    assert 1 - (1 - threshold**width) ** bands >= 0.95
    assert 1 - (1 - threshold ** (width + 1)) ** (NUMBERS // (width + 1)) < 0.95  # no wider ones would do


@pytest.mark.parametrize("vocabulary", [VOCABULARY, CHINESE], ids=["words", "characters"])
def test_near_duplicates_are_those_that_sets_of_shingles_show(signer, vocabulary):
    rng = random.Random(2)
    separator = "" if vocabulary is CHINESE else " "
    index, rows = NearIndex(0.8), []
    found = {"like": 0, "unlike": 0}
    for number in range(150):
        original = rng.choices(vocabulary, k=90)
        for count in (0, 1, 3, 20):
            text = changed(original, count, rng, vocabulary)
            rows.append(said("Please do this " + separator.join(text[:40]), separator.join(text[40:])))
            kept = index.first(signer.sign(rows[-1]), (0, len(rows) - 1))
            if count:
                likeness = jaccard(rows[-1], rows[4 * number])
                # 128 numbers: a standard error of 0.035; three of them, and the rows between prove nothing
                if likeness > 0.9:
                    assert kept is not None and kept[1] // 4 == number, likeness
                    found["like"] += 1
                elif likeness < 0.7:
                    assert kept is None, likeness
                    found["unlike"] += 1
            elif number:
                assert kept is None  # other texts have nothing in common but the beginning
    assert min(found.values()) > 100
    assert index.groups == 150


def test_every_row_that_goes_is_like_one_that_stays(signer):
    """A chain, each row a little further from the first: the far ones are not like what was kept, and stay."""
    rng = random.Random(3)
    text, rows, kept_for = rng.choices(VOCABULARY, k=100), [], []
    index = NearIndex(0.8)
    for number in range(60):
        rows.append(said(" ".join(text), "the same answer"))
        kept_for.append(index.first(signer.sign(rows[-1]), (0, number)))
        text = changed(text, 1, rng, VOCABULARY)
    dropped = [(number, place[1]) for number, place in enumerate(kept_for) if place]
    assert 10 < len(dropped) < 57 and kept_for[0] is None
    for number, kept in dropped:
        assert kept_for[kept] is None and kept < number
        assert jaccard(rows[number], rows[kept]) > 0.7  # three standard errors below the threshold


def test_of_two_kept_rows_the_more_alike_is_named(signer):
    rng = random.Random(4)
    text = rng.choices(VOCABULARY, k=200)
    places = rng.sample(range(200), 18)
    first, second, between = (list(text) for _ in range(3))
    for number, place in enumerate(places):
        second[place] = rng.choice(VOCABULARY)
        between[place] = second[place] if number < 11 else text[place]
    messages = [said(" ".join(words), "ok") for words in (first, second, between)]
    assert jaccard(*messages[:2]) < 0.61 < 0.7 < jaccard(messages[0], messages[2]) < jaccard(messages[1], messages[2])
    index = NearIndex(0.65)
    assert [index.first(signer.sign(m), (0, n)) for n, m in enumerate(messages)] == [None, None, (0, 1)]


def test_short_rows_are_not_compared(signer):
    assert signer.sign(said("2 + 2", "4")) is None and signer.sign(said("😀", "!!!")) is None
    assert signer.sign(said("a b c d e", "f g h i j")) is not None  # ten words


def test_a_table_that_has_grown_finds_the_same(monkeypatch):
    """Rows that are found after growing several times are those that a table large from the start finds."""
    rng = np.random.default_rng(5)
    signatures = rng.integers(0, 2**32, (6_000, NUMBERS), dtype=np.uint64).astype(np.uint32)
    signatures[3_000:] = signatures[rng.permutation(3_000)]
    signatures[3_000:, :20] = 0  # like, not equal
    monkeypatch.setattr(duplicates, "CHUNK", 1024)
    small, large = NearIndex(0.8), NearIndex(0.8)
    large._make(1 << 18)
    for number, signature in enumerate(signatures):
        place = (1, number)
        assert small.first(signature, place) == large.first(signature, place)
    assert len(small) == len(large) == 3_000 and small.groups == large.groups == 3_000
    assert len(small._rows) < len(large._rows)


def test_rows_that_meet_in_one_band_of_many_are_found():
    rng = np.random.default_rng(8)
    signatures = rng.integers(0, 2**32, (2_000, NUMBERS), dtype=np.uint64).astype(np.uint32)
    index = NearIndex(0.5)
    bands, width = bands_for(0.5)
    for number, signature in enumerate(signatures):
        assert index.first(signature, (0, number)) is None
    for number, signature in enumerate(signatures):
        other = signature.copy()
        other[: bands * width : width] += 1  # one number of each band
        other[number % bands * width] -= 1
        assert index.first(other, (1, number)) == (0, number)


def test_rows_that_share_a_band_only_do_not_make_searches_long(monkeypatch):
    """A thousand rows that begin alike and are otherwise unlike: each search ends, and none is dropped."""
    rng = np.random.default_rng(6)
    signatures = rng.integers(0, 2**32, (1_000, NUMBERS), dtype=np.uint64).astype(np.uint32)
    signatures[:, :14] = 7  # two bands at 0.8
    index = NearIndex(0.8)
    fetched = []
    get = duplicates._Signatures.__getitem__
    monkeypatch.setattr(
        duplicates._Signatures, "__getitem__", lambda self, number: fetched.append(number) or get(self, number)
    )
    assert all(index.first(signature, (0, n)) is None for n, signature in enumerate(signatures))
    assert len(fetched) <= 1_000 * 2 * duplicates.PROBES * 1.2


def test_the_near_index_costs_what_is_said():
    rng = np.random.default_rng(7)
    index = NearIndex(0.8)
    for number in range(4_000):
        index.first(rng.integers(0, 2**32, NUMBERS, dtype=np.uint64).astype(np.uint32), (0, number))
    assert 18 * 5 <= (index._rows.nbytes + index._tags.nbytes) / len(index) <= 310


def test_examples_are_few():
    examples = Examples()
    for number in range(1000):
        for other in range(20):
            examples.add((0, number), (1, other))
    assert examples.rows == 20_000 and len(examples.groups) == duplicates.EXAMPLES
    assert {len(members) for members in examples.groups.values()} == {duplicates.MEMBERS}
