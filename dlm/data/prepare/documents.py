"""Read the documents of a unit of work: several small files, one file, or a slice of a large file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dlm.data.prepare.bad import MAX_DOCUMENT, MIB, Report, UnreadableError, naming_damage, refuse, unreadable
from dlm.data.prepare.compressed import open_bytes, read_at_most
from dlm.data.prepare.kinds import FORMATS
from dlm.data.prepare.rows import read_json, read_lines
from dlm.data.prepare.tables import read_arrow, read_parquet


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A unit of work: files of one kind, or a slice of one file."""

    split: str | None  # None: the hash of each document decides
    kind: str  # the suffix of the files, such as ".jsonl.zst"
    paths: tuple[str, ...]
    size: int  # bytes of the sources, for the progress bar
    start: int = 0  # first byte (lines) or row group (parquet) of a slice
    stop: int | None = None  # end of a slice, exclusive; None: the unit is not a slice
    num_documents: int | None = None  # only so many documents, from the first of the unit's only file; None: all


def read_unit(unit: Unit, text_key: str, report: Report = refuse, *, max_document: int = MAX_DOCUMENT) -> Iterator[str]:
    """Yield the documents of a unit in order.

    Args:
        unit: What to read.
        text_key: The key or column of the text.
        report: Called with every row that holds no text and every file of which the rest cannot be read. By default,
            it raises a UserError that names the file and the row.
        max_document: MiB that a row or a text file may have. No more of it is ever held in memory.
    """
    for path in map(Path, unit.paths):
        try:
            with naming_damage(path, unit.kind):
                yield from itertools.islice(_read(path, unit, text_key, report, max_document * MIB), unit.num_documents)
        except UnreadableError as error:
            report(error.bad)


def _read(path: Path, unit: Unit, text_key: str, report: Report, limit: int) -> Iterator[str]:
    form = FORMATS[unit.kind]
    if form == "lines":
        return read_lines(path, text_key, report, limit=limit, start=unit.start, stop=unit.stop)
    if form == "parquet":
        return read_parquet(path, text_key, report, limit=limit, start=unit.start, stop=unit.stop)
    return {"json": read_json, "arrow": read_arrow, "text": _read_text}[form](path, text_key, report, limit=limit)


def _read_text(path: Path, text_key: str, report: Report, *, limit: int) -> Iterator[str]:
    with open_bytes(path) as stream:
        content = read_at_most(stream, limit + 1)
    if len(content) > limit:
        what = f"is one document of more than {limit / MIB:g} MiB, which is --max-document"
        raise unreadable(path, what, "raise --max-document, divide the file")
    try:
        yield content.decode()
    except UnicodeDecodeError as error:
        raise unreadable(path, f"is not UTF-8 text (byte {error.start})", "convert it, move it away") from error
