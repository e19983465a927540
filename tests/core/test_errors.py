"""What error messages must not hold."""

import pytest

from dlm.core.errors import without_passwords


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("no login at W&B (https://me:word@host:8/x): 401", "no login at W&B (https://***@host:8/x): 401"),
        ("http://token@a and git+ssh://b:c@d", "http://***@a and git+ssh://***@d"),
        ("http://me:p@ss@w:o@host/x?y=z@a https://me:%2F@[::1]:8", "http://***@host/x?y=z@a https://***@[::1]:8"),
        ("hf://datasets/me/x@main, mail me@example.org", "hf://datasets/me/x@main, mail me@example.org"),
    ],
)
def test_the_passwords_of_urls_are_not_shown(words, shown):
    assert without_passwords(words) == shown
