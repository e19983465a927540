"""Read the documents of JSON files: one object on each line, or one array of objects."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dlm.data.prepare.bad import MIB, Bad, Report, text_of, too_long, unreadable
from dlm.data.prepare.compressed import BUFFER_BYTES, open_bytes, skip_line

START_BYTES = 4096  # the bytes at the beginning of a .json file, which show whether it is an array
ARRAY_CHARS = 1024 * 1024  # how much of an array is read at a time


class _Twice(dict[str, Any]):
    """An object in which a key stands twice."""


def read_json(path: Path, text_key: str, report: Report, *, limit: int) -> Iterator[str]:
    """Yield the texts of a .json file, whose rows may have ``limit`` bytes each."""
    with open_bytes(path) as stream:
        start = stream.read(START_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"{") and _is_one_object(path, text_key, limit):
        what = f"is one JSON object without the key '{text_key}', or over several lines"
        raise unreadable(path, what, "write one object a line, or one array of objects")
    if not start.startswith(b"["):
        yield from read_lines(path, text_key, report, limit=limit)
        return
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as array:
        for number, row in enumerate(_elements(path, array, limit), start=1):
            text = _text(row, text_key, f"{path} element {number}", report)
            if text is not None:
                yield text


def _is_one_object(path: Path, text_key: str, limit: int) -> bool:
    """Return whether a .json file holds one object that is no row: over several lines, or alone and without text."""
    with open_bytes(path) as stream:
        first, second = stream.readline(limit + 1), stream.readline(START_BYTES).strip()
    if _is_cut(first, limit):
        return False  # the reader of lines says that it is too long
    if second:
        return not second.startswith(b"{")
    try:
        return text_key not in json.loads(first)
    except (ValueError, RecursionError):
        return False  # the reader of lines says what is wrong


# What stands before the first and before any other element of an array, and what stands at its end.
_FIRST, _NEXT = re.compile(r"\s*\[\s*(?=[^\s\]])"), re.compile(r"\s*,\s*(?=\S)")
_EMPTY, _LAST = re.compile(r"\s*\[\s*\]\s*"), re.compile(r"\s*\]\s*")


def _elements(path: Path, array: IO[str], limit: int) -> Iterator[object]:
    """Yield the elements of a JSON array, without holding all of it in memory.

    The library ijson does so too, but it turns half of a surrogate pair into a question mark.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    held, place, is_whole, before, number = "", 0, False, _FIRST, 1
    try:
        while True:
            end = -1
            if begin := before.match(held, place):
                try:
                    element, end = decoder.raw_decode(held, begin.end())
                except json.JSONDecodeError:  # the element is perhaps not read to its end
                    if is_whole:
                        raise
            if end >= 0 and (is_whole or end < len(held)):  # a number at the end of `held` may go on
                yield element
                place, before, number = end, _NEXT, number + 1
            elif len(held) - place > limit:
                what = f"is longer than {limit / MIB:g} MiB at element {number}, which is --max-document"
                raise unreadable(path, what, "raise --max-document")
            elif not is_whole:
                left = len(held) - place
                more = array.read(min(max(ARRAY_CHARS, left), limit + 1 - left))
                held, place, is_whole = held[place:] + more, 0, not more
            elif (_EMPTY if before is _FIRST else _LAST).fullmatch(held, place):
                return
            else:
                raise ValueError(f"it does not go on with a comma or end with ], but with {held[place:][:20]!r}")
    except (ValueError, RecursionError) as error:
        raise unreadable(path, f"is no valid JSON array ({_said(error)})", "correct it") from error


def read_lines(
    path: Path, text_key: str, report: Report, *, limit: int, start: int = 0, stop: int | None = None
) -> Iterator[str]:
    """Yield the texts of the lines that begin at a byte from ``start`` up to ``stop``, or up to the end.

    A line of more than ``limit`` bytes is reported, and never held in memory.
    """
    with open_bytes(path) as stream:
        position, number = start, 0
        if position:
            stream.seek(position - 1)
            position += skip_line(stream) - 1
        while (stop is None or position < stop) and (line := stream.readline(limit + 1)):
            number, size = number + 1, len(line)
            if _is_cut(line, limit):
                line = b""  # the next line may be as long
                size += skip_line(stream)
                report(too_long(_Place(path, number, start), limit))
            elif not line.isspace():
                text = _document(line, text_key, _Place(path, number, start), report)
                if text is not None:
                    yield text
            position += size


def _is_cut(line: bytes, limit: int) -> bool:
    """Return whether a line that was read up to ``limit + 1`` bytes is longer than ``limit``."""
    return len(line) > limit and not line.endswith(b"\n")


@dataclass(frozen=True)
class _Place:
    """The position of a line. The line number within the file is computed only for a message."""

    path: Path
    number: int  # line number within the slice, from 1
    start: int  # first byte of the slice

    def __str__(self) -> str:
        if not self.start:
            return f"{self.path}:{self.number}"
        with open(self.path, "rb") as stream:
            left, before = self.start - 1, 0
            while part := stream.read(min(left, BUFFER_BYTES)):
                left, before = left - len(part), before + part.count(b"\n")
            skip_line(stream)
        return f"{self.path}:{before + 1 + self.number}"


def _document(line: bytes, text_key: str, place: _Place, report: Report) -> str | None:
    try:
        row = json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        report(Bad(where=str(place), what=f"is not valid JSON ({_said(error)})"))
        return None
    return _text(row, text_key, place, report)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    return row if len(row) == len(pairs) else _Twice(row)


def _said(error: Exception) -> str:
    """Return what Python says about invalid JSON, without its advice to programmers."""
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition("; use ")[0]


def _text(row: object, text_key: str, place: object, report: Report) -> str | None:
    """Return the text of a row; report the row and return None if it has none."""
    if not isinstance(row, dict):
        report(Bad(where=str(place), what="is no JSON object with the text under --text-key"))
    elif text_key not in row:
        what = f"has no key '{text_key}': it has {', '.join(row) or 'none'}"
        report(Bad(where=str(place), what=what, advice="set --text-key, correct that row"))
    elif isinstance(row, _Twice):
        report(Bad(where=str(place), what="has a key twice, so its text is in doubt"))
    else:
        return text_of(row[text_key], text_key, place, report)
    return None
