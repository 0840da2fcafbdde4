"""Sizes that are easy to read."""

import pytest

from edgekit.doctor.finding import size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.0 MB"), (1_250_000, "1.2 MB"), (999_949_999, "999.9 MB"), (10**9, "1.0 GB"), (24.0e9, "24.0 GB")],
)
def test_sizes_have_the_unit_that_suits_them(count, text):
    assert size(count) == text
