"""Sizes, counts and durations."""

import pytest

from aquila_pd.utils.errors import ConfigError
from aquila_pd.utils.units import counted, duration, megabytes, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("1.5 gb", 15 * 10**8), ("2GiB", 2**31), ("500MB", 5 * 10**8), ("7", 7), (12, 12), ("3b", 3)],
)
def test_a_size_is_decimal_unless_it_says_i(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5G", "5TiB", "1e9", "9999TB", "NaN", "５XB"])
def test_what_is_no_size_is_named(text):
    with pytest.raises(ConfigError, match="cannot be read") as raised:
        parse_size(text)
    assert repr(text) in str(raised.value)


def test_numbers_as_messages_have_them():
    assert (counted(1, "tensor"), counted(1234, "tensor")) == ("1 tensor", "1,234 tensors")
    assert (megabytes(2_690_000_000), megabytes(12_300_000)) == ("2.69 GB", "12.3 MB")
    assert [duration(s) for s in (8.4, 59.6, 185, 3599, 7830)] == [
        "8 s",
        "1 min 0 s",
        "3 min 5 s",
        "59 min 59 s",
        "2 h 10 min",
    ]
