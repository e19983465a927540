"""A table of the report, apart from how it is laid out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the page."""

    heads: Sequence[str]  # the column headings
    rows: Sequence[Sequence[str]]
    words: Collection[str]  # the headings of the columns that hold words; the other columns hold numbers
    caption: str = ""
    is_wide: bool = False
