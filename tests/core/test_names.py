"""Text from elsewhere: what is shown of it, and the names of files."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hostile import NAMES

from dlm.core.errors import UserError
from dlm.core.files import complaint
from dlm.core.names import inside, printable, printable_lines, slug


@pytest.mark.parametrize("name", NAMES)
def test_what_a_terminal_would_obey_is_shown(name):
    shown = printable(name)
    assert not any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in shown)
    assert shown.isprintable() and printable(shown) == shown
    assert shown == name or re.search(r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\[tnr]", shown)


def test_lines_and_tabs_of_several_lines_stay():
    assert printable_lines("a\tb\n\x1b[1m\r\ud800") == "a\tb\n\\x1b[1m\\r\\ud800"


def test_an_error_is_one_line_whatever_it_quotes():
    assert complaint(UserError("no run \x1b[2Ja\nb")) == "no run \\x1b[2Ja\\nb"


def test_no_two_names_have_the_same_file_even_where_case_does_not_count(tmp_path):
    names = [*NAMES, "", *(slug(name) for name in NAMES if slug(name) != name)]
    slugs = {name: slug(name, reserved=("runs",)) for name in names}
    assert len({one.casefold() for one in slugs.values()}) == len(set(names))
    for one in slugs.values():
        assert re.fullmatch("[a-z0-9_][a-z0-9_.-]*", one)
        (tmp_path / one).write_text("")
    assert len(list(tmp_path.iterdir())) == len(set(names))


@given(st.lists(st.text(max_size=80), unique=True, max_size=5))
def test_slugs_are_names_of_files_and_differ(names):
    slugs = [slug(name) for name in names]
    assert len({one.casefold() for one in slugs}) == len(names)
    assert all(re.fullmatch("[a-z0-9_][a-z0-9_.-]*", one) and len(one) <= 80 for one in slugs)


def test_names_of_dlm_stay_as_they_are():
    assert [slug(name) for name in ("masked_diffusion", "autoregressive")] == ["masked_diffusion", "autoregressive"]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/x", "a/b", "nul\0", "x" * 256, "a\ud800"])
def test_a_path_with_such_a_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot be the name of a file in") as refused:
        inside(tmp_path, name)
    assert complaint(refused.value).isprintable()
    assert inside(tmp_path, "a", "b c") == tmp_path / "a" / "b c"
