"""Make the content of damaged files for Hypothesis: random bytes, random JSON, and changes of a valid file."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

ODD = (None, True, 0, -1, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "a\nb", "../../x", [],
       {}, [[]], {"": None}, "9" * 5000)  # fmt: skip

json_values = st.recursive(
    st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
random_json = json_values.map(lambda value: json.dumps(value).encode())
large_json = st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"[1, NaN, Infinity]"])
random_bytes = st.binary(max_size=200) | random_json | st.sampled_from([b"", b"\0" * 100])


@st.composite
def changed_json(draw: st.DrawFn, valid: Any) -> Any:
    """A copy of a JSON value in which one to three values are replaced or removed, at any depth."""
    content = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        content = _changed_once(draw, content)
    return content


def _changed_once(draw: st.DrawFn, content: Any) -> Any:
    inside = (
        list(content) if isinstance(content, dict) else list(range(len(content))) if isinstance(content, list) else []
    )
    if not inside or draw(st.integers(0, 5)) == 0:
        return copy.deepcopy(draw(json_values))  # a later change must not reach the shared values of ODD
    key = draw(st.sampled_from(inside))
    if draw(st.integers(0, 4)) == 0:
        del content[key]
    else:
        content[key] = _changed_once(draw, content[key])
    return content


@st.composite
def changed_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """A copy of the bytes that is cut, or in which a few bytes are replaced, removed or repeated."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        how = draw(st.sampled_from(["cut", "replace", "insert", "remove"]))
        if how == "cut" and draw(st.booleans()):
            del content[at:]
        elif how == "replace":
            content[at : at + 1] = draw(st.binary(min_size=1, max_size=8))
        elif how == "insert":
            content[at:at] = draw(st.binary(max_size=8))
        else:
            del content[at : at + draw(st.integers(1, 30))]
    return bytes(content)


def damaged(valid: bytes) -> st.SearchStrategy[bytes]:
    """Return contents of a file whose valid content is given: of JSON, of a log of JSON lines, or of another format."""
    strategies = [random_bytes, large_json, changed_bytes(valid)]
    lines = valid.splitlines()
    try:
        strategies.append(changed_json(json.loads(valid)).map(lambda value: json.dumps(value).encode()))
    except ValueError:
        if lines and lines[0].startswith(b"{") and lines[0].endswith(b"}"):
            strategies.append(_changed_line(lines))
    return st.one_of(strategies)


@st.composite
def _changed_line(draw: st.DrawFn, lines: list[bytes]) -> bytes:
    place = draw(st.integers(0, len(lines) - 1))
    line = json.dumps(draw(changed_json(json.loads(lines[place])))).encode()
    return b"\n".join([*lines[:place], line, *lines[place + 1 :]]) + b"\n"
