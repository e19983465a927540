"""Numbers and lists, written the way people read them."""

import math

import pytest

from dlm.core import text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (40, "40 s"),
        (119, "119 s"),
        (120, "2.0 min"),
        (12_345, "3.4 h"),
        (3600 * 30, "30 h"),
        (86_400 * 2.5, "2.5 days"),
        (365.25 * 86_400 * 3, "3.0 years"),
        (None, "-"),
        (math.nan, "-"),
    ],
)
def test_a_duration_is_written_in_its_largest_unit(seconds, words):
    assert text.duration(seconds) == words
