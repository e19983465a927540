"""Lay out tables and sentences for a terminal of any width, in columns of characters as a terminal shows them.

A table that is too wide loses its less important columns. If that is not enough, its rows are stacked: each row becomes
a few lines of `heading: value`. No value is cut, and a table in columns has one line for each row.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

GAP = 2  # columns of characters between two columns of a table, and the indentation of a stacked row
_WORD = re.compile(r"\s*\S+")  # a word and the space before it

Rows = Sequence[Sequence[str]]  # the first row holds the headings


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The lines of a table that was laid out."""

    lines: tuple[str, ...]  # the first one holds the headings, unless the rows are stacked
    missing: tuple[str, ...] = ()  # the headings of the columns that did not fit, the least important one first
    is_stacked: bool = False


def columns_of(words: str) -> int:
    """Return how many columns of a terminal a text takes; a Chinese or Japanese character takes two."""
    if words.isascii():
        return len(words)
    from rich.cells import cell_len

    return cell_len(words)


def laid_out(
    rows: Rows,
    width: int | None = None,
    *,
    left: Collection[str] | None = None,
    expendable: Sequence[str] = (),
    gap: int = GAP,
) -> Layout:
    """Lay out a table.

    Args:
        rows: The headings, then the rows. The first column names a row.
        width: The width of the terminal in columns of characters; None: whatever the table needs.
        left: The headings of the columns that are aligned on the left; None: all of them.
        expendable: The headings of the columns that may be left out, the least important one first.
        gap: The spaces between two columns.
    """
    heads = rows[0]
    widths = [max(map(columns_of, values)) for values in zip(*rows, strict=True)]
    kept, order = list(range(len(heads))), [head for head in expendable if head in heads]
    missing: list[str] = []
    while width is not None and sum(widths[at] + gap for at in kept) - gap > width:
        if not order:
            return Layout(lines=tuple(_stacked(rows, width)), is_stacked=True)
        missing.append(order.pop(0))
        kept = [at for at in kept if heads[at] not in missing]
    lines = []
    for row in rows:
        cells = [_padded(row[at], widths[at], at_left=left is None or heads[at] in left) for at in kept]
        lines.append((" " * gap).join(cells).rstrip())
    return Layout(lines=tuple(lines), missing=tuple(missing))


def _padded(words: str, width: int, *, at_left: bool) -> str:
    space = " " * (width - columns_of(words))
    return words + space if at_left else space + words


def _stacked(rows: Rows, width: int) -> Iterator[str]:
    """Yield the lines of all rows: what names a row, with its heading if there is room, then its values."""
    heads = [head.strip() for head in rows[0]]
    has_room = all(columns_of(f"{heads[0]}: {row[0].strip()}") <= width for row in rows[1:])
    for row in rows[1:]:
        name, *values = (value.strip() for value in row)
        yield f"{heads[0]}: {name}" if heads[0] and has_room else name
        yield from _flowing([f"{head}: {value}" for head, value in zip(heads[1:], values, strict=True)], width)


def _flowing(parts: Sequence[str], width: int) -> Iterator[str]:
    """Yield indented lines, each with as many of the parts as fit."""
    space, line = " " * GAP, ""
    for part in parts:
        if line and columns_of(line + space + part) > width:
            yield from wrapped(line, width)
            line = ""
        line += space + part
    if line:
        yield from wrapped(line, width)


def wrapped(line: str, width: int | None, *, indent: int | None = None) -> list[str]:
    """Break a line between words so that no part is wider than ``width``.

    Only a word that is wider than a whole line is broken itself.

    Args:
        line: A line of text.
        width: The width in columns of characters; None: the line stays whole.
        indent: The indentation of the lines after the first; None: that of the first line and GAP more.
    """
    if width is None or columns_of(line) <= width:
        return [line]
    begin = len(line) - len(line.lstrip())
    room = max(width, 1)
    ahead = " " * min(begin + GAP if indent is None else indent, room // 3)
    lines, last = list[str](), ""
    for match in _WORD.finditer(line):
        word = match[0]
        if last.strip() and columns_of(last + word) > room:
            lines.append(last)
            last, word = ahead, word.lstrip()
        last += word
        while columns_of(last) > room:
            head = _head(last, room)
            lines.append(head)
            last = ahead + last[len(head) :]
    return [*lines, last]


def _head(words: str, width: int) -> str:
    """Return the longest beginning of a text that is not wider than ``width``, but at least its first visible part."""
    least = len(words) - len(words.lstrip()) + 1
    end = max(width, least)
    while end > least and columns_of(words[:end]) > width:
        end -= 1
    return words[:end]
