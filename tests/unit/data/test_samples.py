"""Samples: on disk, whole or refused; and out of conversations longer than a pack, in one of three ways."""

from itertools import chain

import numpy as np
import pytest
from chat_factory import write_aquila_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from samples_factory import write_samples

from aquila_pd import AquilaTokenizer
from aquila_pd.data import truncation
from aquila_pd.data.samples import Samples, SamplesWriter
from aquila_pd.data.targets import encode_conversation
from aquila_pd.data.truncation import NO_TARGET, SPLIT, TOO_LONG, TRUNCATED, TURN_TOO_LONG, UNWRITABLE, fit
from aquila_pd.text.prompts import ChatPrompts, in_turns
from aquila_pd.utils.errors import DataError

# --------------------------------------------------------------------------------------------------- samples, files


def test_samples_are_read_as_they_were_written(tmp_path):
    samples = write_samples(tmp_path / "samples", [3, 1, 7], weights=[1, 2, 0.5])
    generator = np.random.default_rng(0)
    for i, length in enumerate((3, 1, 7)):
        ids, is_target = samples.sample(i)
        assert ids.tolist() == generator.integers(1, 1000, length).tolist()
        assert is_target.tolist() == (generator.random(length) < 0.5).tolist()
        assert ids.dtype == np.int32 and is_target.dtype == np.bool_
        assert samples.target_counts[i] == is_target[1:].sum()
        assert samples.origin(i) == ("rows.jsonl", i + 1, 0)
    assert samples.lengths.tolist() == [3, 1, 7] and samples.lengths.dtype == np.int64
    assert samples.records["weight"].tolist() == [1, 2, 0.5]
    assert samples.manifest["samples"] == 3 and samples.manifest["tokens"] == 11 and samples.manifest["longest"] == 7


def test_unfinished_samples_are_refused(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    with pytest.raises(RuntimeError), SamplesWriter(folder) as writer:
        writer.add(np.array([1, 2]), np.array([False, True]), file=0, row=1)
        raise RuntimeError
    with pytest.raises(DataError, match="unfinished"):
        Samples.open(folder)
    with pytest.raises(DataError, match="is not there"):
        Samples.open(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["tokens.bin", "targets.bin", "samples.bin"])
def test_damaged_samples_are_refused_by_size_and_when_asked_by_content(tmp_path, name):
    folder = write_samples(tmp_path / "samples", [3, 1, 7]).folder
    good = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes([good[0] ^ 1]) + good[1:])
    Samples.open(folder)
    with pytest.raises(DataError, match=f"{name} has other bytes"):
        Samples.open(folder, verify=True)
    (folder / name).write_bytes(good[:-1])
    with pytest.raises(DataError, match=rf"{name} has \d+ bytes, not {len(good)}"):
        Samples.open(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        Samples.open(folder)


def test_a_manifest_of_something_else_is_refused(tmp_path):
    folder = write_samples(tmp_path / "samples", [3]).folder
    text = (folder / "samples.json").read_text()
    (folder / "samples.json").write_text(text.replace('"version": 1', '"version": 99'))
    with pytest.raises(DataError, match="another version"):
        Samples.open(folder)
    (folder / "samples.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match="does not say what the files hold"):
        Samples.open(folder)
    (folder / "samples.json").write_text(text.replace('"tokens": 3', '"tokens": 4'))
    with pytest.raises(DataError, match=r"contradicts itself about tokens\.bin"):
        Samples.open(folder)


def test_equal_samples_have_equal_digests(tmp_path):
    a, b, c = (write_samples(tmp_path / n, lengths) for n, lengths in (("a", [3, 1]), ("b", [3, 1]), ("c", [3, 2])))
    assert a.digest == b.digest != c.digest


# ------------------------------------------------------------------------------------- longer than a pack


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> ChatPrompts:
    folder = write_aquila_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return ChatPrompts(AquilaTokenizer.from_pretrained(str(folder)), "aquila-v2")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def turns_of(*sizes: int, system: bool = True) -> list[dict]:
    """Turns of so many tokens each behind a system message; words of one turn tell it from the others."""
    said = [{"role": "system", "content": "S"}] if system else []
    for number, size in enumerate(sizes):
        letter = "abcdefghij"[number]
        said += [user(letter.upper() * 2), assistant(letter * (size - 5))]  # two markers, </s>, two letters
    return said


def size_of(prompts: ChatPrompts, messages: list[dict]) -> int:
    return len(encode_conversation(prompts, messages).ids)


def kept(fitted: truncation.Fitted) -> list[str]:
    """The first letters of the turns in each part."""
    return ["".join(m["content"][0] for m in part.messages if m["role"] == "assistant") for part in fitted.parts]


def without_turns(prompts: ChatPrompts, *, system: bool = True) -> int:
    """Tokens of a conversation beside its turns; the template has something to say when nobody else does."""
    return size_of(prompts, turns_of(10, system=system)) - 10


SYSTEM_SIZE = 3  # "S" and two line breaks


def test_the_sizes_in_these_tests_are_right(prompts):
    assert size_of(prompts, turns_of(10)) == SYSTEM_SIZE + 10
    assert size_of(prompts, turns_of(10, 7, 9)) == SYSTEM_SIZE + 26


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split"])
def test_what_fits_is_one_sample_and_meets_no_rule(prompts, overlong):
    for length in (SYSTEM_SIZE + 30, None):
        fitted = fit(prompts, turns_of(10, 10, 10), length=length, overlong=overlong)
        assert kept(fitted) == ["abc"] and fitted.rules == []
        assert fitted.parts[0].sample.ids.tolist() == encode_conversation(prompts, turns_of(10, 10, 10)).ids.tolist()


@pytest.mark.parametrize(
    ("overlong", "sizes", "length", "expected", "rules"),
    [
        ("drop", (10, 10, 10), 29, [], [TOO_LONG]),
        ("truncate", (10, 10, 10), 29, ["ab"], [TRUNCATED]),
        ("truncate", (10, 10, 30), 29, ["ab"], [TRUNCATED]),
        ("truncate", (30, 10, 10), 29, [], [TOO_LONG]),
        ("split", (10, 10, 10), 29, ["ab", "c"], [SPLIT]),
        ("split", (10, 10, 10, 10, 10), 20, ["ab", "cd", "e"], [SPLIT]),
        ("split", (30, 10, 10), 29, ["bc"], [TURN_TOO_LONG]),
        ("split", (10, 30, 10), 29, ["a", "c"], [SPLIT, TURN_TOO_LONG]),
        ("split", (10, 10, 30), 29, ["ab"], [TURN_TOO_LONG]),
        ("split", (30,), 29, [], [TOO_LONG]),
        ("split", (30, 30), 29, [], [TOO_LONG]),
    ],
)
def test_a_longer_conversation_is_dropped_truncated_or_split(prompts, overlong, sizes, length, expected, rules):
    fitted = fit(prompts, turns_of(*sizes), length=SYSTEM_SIZE + length, overlong=overlong)
    assert kept(fitted) == expected and fitted.rules == rules
    for part in fitted.parts:
        assert part.messages[0]["role"] == "system"
        assert part.sample.ids.tolist() == encode_conversation(prompts, part.messages).ids.tolist()


@given(sizes=st.lists(st.integers(6, 40), min_size=1, max_size=10), length=st.integers(12, 60), system=st.booleans())
@settings(max_examples=60, deadline=None)
def test_splitting_loses_only_turns_that_fit_nowhere_and_no_part_could_hold_more(prompts, sizes, length, system):
    length += without_turns(prompts, system=system)
    messages = turns_of(*sizes, system=system)
    fitted = fit(prompts, messages, length=length, overlong="split")
    head, turns = in_turns(messages)
    letters = [turn[1]["content"][0] for turn in turns]
    fits = [letter for letter, turn in zip(letters, turns, strict=True) if size_of(prompts, [*head, *turn]) <= length]
    assert "".join(kept(fitted)) == "".join(fits)
    for part in fitted.parts:
        assert len(part.sample.ids) <= length
        after = letters.index(part.messages[-1]["content"][0]) + 1
        if after < len(turns):
            assert size_of(prompts, [*part.messages, *turns[after]]) > length
    assert (SPLIT in fitted.rules) == (len(fitted.parts) > 1)
    assert (TOO_LONG in fitted.rules) == (not fits)

    truncated = fit(prompts, messages, length=length, overlong="truncate")
    first = kept(truncated)[0] if truncated.parts else ""
    assert "".join(letters).startswith(first)
    rest = turns[len(first) : len(first) + 1]
    assert not rest or size_of(prompts, [*head, *chain(*turns[: len(first) + 1])]) > length


def test_a_very_long_conversation_is_not_encoded_over_and_over(prompts, monkeypatch):
    encoded = []

    def counted(prompts, messages):
        sample = encode_conversation(prompts, messages)
        encoded.append(len(sample.ids))
        return sample

    monkeypatch.setattr(truncation, "encode_conversation", counted)
    messages = [message for _ in range(400) for message in turns_of(50, system=False)]
    fitted = fit(prompts, messages, length=without_turns(prompts, system=False) + 200, overlong="split")
    assert len(fitted.parts) == 100 and encoded[0] > 20000
    assert sum(encoded) < 12 * encoded[0]  # each part is looked for by doubling; what the system says is in each


def test_what_teaches_nothing_is_dropped_and_counted(prompts):
    assert fit(prompts, [user("a question")], length=None, overlong="split") == ([], [NO_TARGET], "")
    long = [user("a question"), user("another one"), user("b" * 50)]
    assert fit(prompts, long, length=without_turns(prompts, system=False) + 40, overlong="truncate").rules == [
        NO_TARGET
    ]
    # a part without an answer goes, the others stay
    fitted = fit(prompts, [*turns_of(20), user("x" * 15)], length=SYSTEM_SIZE + 20, overlong="split")
    assert kept(fitted) == ["a"]


def test_what_cannot_be_written_is_dropped_with_its_reason(prompts):
    fitted = fit(prompts, [user("q"), {"role": "tool", "content": "x"}], length=None, overlong="split")
    assert fitted.rules == [UNWRITABLE] and "has the role 'tool'" in fitted.reason
    fitted = fit(prompts, [user("q"), assistant("\ud800")], length=None, overlong="split")
    assert fitted.rules == [UNWRITABLE] and "surrogate" in fitted.reason
