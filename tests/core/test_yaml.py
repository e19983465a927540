"""YAML files: what YAML would misread without a word is refused, and every message is one line with the place."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dlm.core.configs import load_mapping, parse_yaml
from dlm.core.errors import UserError


def refused(text: str | bytes, path) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load_mapping(path)
    said = str(error.value)
    assert said.startswith(str(path)) and "\n" not in said and "unicode string" not in said, said
    return said.removeprefix(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nset: {}\nb: 1\nset: {}\n", " has the key 'set' in lines 2 and 4: keep one of them"),
        ("set:\n  optimizer.lr: 1\n  'optimizer.lr': 2\n", " has the key 'optimizer.lr' in lines 2 and 3: keep"),
        ("set: {a: 1, a: 2}\n", " has the key 'a' in line 1, twice: keep one of them"),
        ("rules:\n  - {1: a}\n  - {1: a, 1: b}\n", " has the key '1' in line 3, twice"),
        ("base: &base {a: 1, a: 2}\nset: *base\n", " has the key 'a' in line 1, twice"),
        ("timeout_min: 24:00:00\n", ", line 1: YAML reads 24:00:00 as 86400: write the number in base 10"),
        ("a: 1\nseeds: [010]\n", ", line 2: YAML reads 010 as 8: write the number in base 10"),
        ("a: &a {b: *a}\n", ", line 1: what begins here contains an alias of itself: write it out"),
        ("a: 1\n\tb: 2\n", ", line 2, column 1, is not valid YAML: "),
        ("a: b: c\n", ", line 1, column 5, is not valid YAML: mapping values are not allowed in this context: put a"),
        ("a: 1\n---\na: 2\n", ", line 2, column 1, is not valid YAML: found another document: a file may hold one"),
        ("a: !!python/object:os.x 1\n", ", line 1, column 4, is not valid YAML: could not determine a constructor"),
        ("a: b\0c\n", " is not valid YAML: control characters are not allowed"),
        (b"a: 1\nb: caf\xe9\n", ", line 2, is not UTF-8 text: save the file as UTF-8"),
        ("a: 1\n".encode("utf-16"), ", line 1, is not UTF-8 text"),
        ("", " is empty: it must hold keys and values, KEY: VALUE"),
        ("# a comment\n", " is empty"),
        ("- a\n- b\n", " holds a list: it must hold keys and values"),
        ("a\n", " holds one value: it must hold keys and values"),
    ],
)
def test_a_file_that_says_something_else_than_it_seems_is_refused(text, said, tmp_path):
    assert refused(text, tmp_path / "x.yaml").startswith(said)


@pytest.mark.parametrize(
    "text",
    [
        "﻿a: 1\nb: [1e19, 1_000]\n",  # a byte order mark
        "a: 1\r\nb: [1e19, 1_000]\r\n",
        "---\na: 1\nb: [1e19, 1_000]\n...\n",
        "one: &one {a: 2, b: 3}\n<<: *one\na: 1\nb: [1e19, 1_000]\n",  # a key stands over one that it merges
        "a: 07\nb:\t[1e19, 1_000]\n",
    ],
)
def test_a_file_that_is_only_unusual_is_read(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode())
    content = load_mapping(path)
    assert content["b"] == [1e19, 1000] and content["a"] in (1, 7)


@given(st.text(alphabet="0123456789.eE+-_:xo~ynofTrue ", min_size=1, max_size=9))
def test_a_word_is_the_same_number_or_text_as_for_hydra(word):
    text = f"a: {word}"
    try:
        ours = parse_yaml(text, "x")
    except UserError as error:
        assert "YAML reads" in str(error) or "not valid YAML" in str(error)
        return
    theirs = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    assert repr(ours) == repr(theirs)


@given(st.text(alphabet="ab: \n\t-[]{}'\"#&*!|>%@`?,<\0é1", max_size=30))
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        parse_yaml(text, "x")
    except UserError as error:
        assert re.match("x[, ]", str(error)) and "\n" not in str(error)
