"""Plain values of a file become what their types say, and any other value is named with the type that it must have."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import pytest

from dlm.core.errors import UserError
from dlm.core.typed import MisfitError, Unsigned, read_log, read_typed, typed


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    share: float = 0.5
    inner: Inner | None = None
    inners: Mapping[str, Inner] = field(default_factory=dict)
    pair: tuple[int, str] | None = None


@pytest.mark.parametrize(
    ("kind", "value", "read"),
    [
        (bool, True, True),
        (int, -(2**63), -(2**63)),
        (int, 2**63 - 1, 2**63 - 1),
        (Unsigned, 2**64 - 1, 2**64 - 1),
        (float, 3, 3),
        (str, "é\N{GRINNING FACE}\n", "é\N{GRINNING FACE}\n"),
        (Any, {"a": [float("nan")]}, None),
        (Colour, "red", Colour.RED),
        (Literal["a", 2], 2, 2),
        (int | str | None, "x", "x"),
        (int | str | None, None, None),
        (tuple[int, ...], [1, 2], (1, 2)),
        (Sequence[int], [], []),
        (tuple[int, str], [1, "x"], (1, "x")),
        (Mapping[str, float], {"a": 1.5}, {"a": 1.5}),
        (Outer, {"name": "x", "newer": 1}, Outer(name="x")),
        (
            Outer,
            {"name": "x", "share": 1, "inner": {"size": 2}, "inners": {"a": {"size": 3}}, "pair": [1, "b"]},
            Outer(name="x", share=1, inner=Inner(size=2), inners={"a": Inner(size=3)}, pair=(1, "b")),
        ),
    ],
)
def test_a_value_of_the_type_is_read(kind, value, read):
    found = typed(kind, value)
    assert found is value if kind is Any else (found == read and type(found) is type(read))


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (bool, 1, "the content is 1, and must be true or false"),
        (int, True, "the content is true, and must be a whole number"),
        (int, 1.0, "the content is 1.0, and must be a whole number"),
        (int, 2**63, "the content is 9223372036854775808, and must be a whole number"),
        (int, -(2**63) - 1, "the content is -9223372036854775809, and must be a whole number"),
        (Unsigned, 2**64, "the content is 18446744073709551616, and must be a whole number from 0 to 2**64 - 1"),
        (Unsigned, -1, "the content is -1, and must be a whole number from 0 to 2**64 - 1"),
        (float, False, "the content is false, and must be a finite number"),
        (float, float("nan"), "the content is nan, and must be a finite number"),
        (float, float("-inf"), "the content is -inf, and must be a finite number"),
        (float, 10**400, "the content is 1000"),
        (str, 1, "the content is 1, and must be text"),
        (str, "a\ud800", r"the content is 'a\ud800', and must be text"),
        (Colour, "blue", "the content is 'blue', and must be one of red"),
        (Literal["a", 2], [], "the content is [], and must be one of a, 2"),
        (int | str | None, 1.5, "the content is 1.5, and must be text"),
        (tuple[int, ...], "12", "the content is '12', and must be a list"),
        (tuple[int, ...], [1, None], "[1] is null, and must be a whole number"),
        (tuple[int, str], [1], "the content is [1], and must be a list of 2 values"),
        (Mapping[str, float], [], "the content is [], and must be keys with values"),
        (Mapping[str, float], {1: 1.5}, "a key of the content is 1, and must be text"),
        (Outer, {"share": 1}, "name is missing"),
        (Outer, {"name": "x", "inner": {}}, "inner.size is missing"),
        (Outer, {"name": "x", "inners": {"a": {"size": "3"}}}, "inners.a.size is '3', and must be a whole number"),
        (Outer, {"name": "x", "inners": {"a": []}}, "inners.a is [], and must be keys with values"),
        (Outer, {"name": "x", "inners": {2: {}}}, "a key of inners is 2, and must be text"),
        (Outer, {"name": "x", "pair": [1, 2]}, "pair[1] is 2, and must be text"),
    ],
)
def test_another_value_is_named(kind, value, words):
    with pytest.raises(MisfitError) as error:
        typed(kind, value)
    assert str(error.value).startswith(words) and len(str(error.value)) < 200
    if not words.startswith(("the content", "a key", "[")):
        with pytest.raises(MisfitError, match=f"^{re.escape(f'of.it.{words}')}"):
            typed(kind, value, "of.it")


def test_a_file_and_a_log_name_the_place_and_what_to_do(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"size": null}')
    with pytest.raises(UserError, match=re.escape(f"{path} is damaged (size is null, and must be a whole number): re")):
        read_typed(path, Inner)
    with pytest.raises(UserError, match=r"x\.json is no plan \(size is null, .*\): plan again$"):
        read_typed(path, Inner, what="plan", otherwise="plan again")
    path.write_text(json.dumps({"size": 1}) + '\n{"size": \n{"size": 2}\n')
    assert read_log(path, Inner, otherwise="") == [Inner(size=1), Inner(size=2)]
    path.write_text('{"size": 1}\n[]\n')
    with pytest.raises(UserError, match=r"x\.json, line 2, is damaged \(the content is \[\], .*\): delete it$"):
        read_log(path, Inner, otherwise="delete it")
