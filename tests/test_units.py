"""qlora/units.py: sizes as users write them."""

import pytest

from qlora.units import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("7.5GB", 7_500_000_000), ("6000MiB", 6000 * 2**20), (" 1 MB ", 10**6), ("0.5 GiB", 2**29)],
)
def test_size_is_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["8", "8G", "GiB", "-1GiB", "eight GiB", "1.2.3GB", "1e3MB", ""])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match=rf"^{text}: expected a number with a unit, such as 8GiB"):
        parse_size(text)
