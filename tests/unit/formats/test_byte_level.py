"""The byte-level alphabet beside that of the tokenizers library."""

from tokenizers import pre_tokenizers

from aquila_pd.formats.byte_level import LETTERS


def spelled(text: str) -> str:
    """A text in the library's letters."""
    return "".join(part for part, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text))


def test_every_byte_of_utf_8_has_the_library_s_letter():
    text = "".join(map(chr, [*range(0x100), *range(0x100, 0xD800, 61), *range(0xE000, 0x110000, 997)]))
    letters = spelled(text)
    assert bytes(LETTERS[letter] for letter in letters) == text.encode("utf-8")
    never_in_utf_8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert {LETTERS[letter] for letter in letters} == {*range(256)} - never_in_utf_8


def test_the_alphabet_is_the_library_s():
    assert sorted(LETTERS) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(LETTERS.values()) == list(range(256))
