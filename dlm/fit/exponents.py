"""Show a and b under every count of N and C, and say what stays the same (`conventions.py` finds them)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlm.core import text
from dlm.fit.layout import text_table, within


@dataclass(frozen=True, kw_only=True)
class Exponents:
    """a and b of one form, under one count of N and one of C."""

    N: str
    C: str
    by: str  # the form
    a: float
    b: float
    is_proportional: bool  # whether C = k N D with this N, so that a + b = 1

    def shown(self) -> str:
        """'0.537 0.463'."""
        return f"{self.a:.3f} {self.b:.3f}"


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """The exponents under every count of N and C, and where these counts come from."""

    rows: tuple[Exponents, ...]
    size: Mapping[str, str]  # the source of each count of N
    compute: Mapping[str, str]  # the source of each count of C
    own: str  # the count of C that the budgets are in
    remarks: tuple[str, ...] = ()  # why a form is missing

    def sentences(self) -> list[str]:
        """What the counts change, and what they do not change."""
        pairs = dict.fromkeys(f"{row.N} with {row.C}" for row in self.rows if row.is_proportional)
        here = text.listed([*pairs]) if pairs else "for none of these rows"
        return [
            "all rows are of the same runs: they differ by how N and C are counted, not by noise",
            "invariant: b of isoFLOP curves at one count of C, with their vertex in log D, is the same for every N",
            f"a + b = 1 only if C = k N D with that N: {here}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """The numbers, their sources and what they mean, for JSON."""
        return {
            "exponents": [vars(row) for row in self.rows],
            "N": self.size,
            "C": self.compute,
            "budgets_in": self.own,
            "meaning": self.sentences(),
            "remarks": self.remarks,
        }

    def lines(self, width: int | None = None) -> list[str]:
        """A table with 'a b' in each cell: rows are counts of N, and columns counts of C. It fits ``width`` columns."""
        found = {(row.by, row.N, row.C): row.shown() for row in self.rows}
        lines = ["a and b under other counts of N (rows) and C (columns):"]
        for form in dict.fromkeys(row.by for row in self.rows):
            heads = [f"{form:<15}", *(f"{name:<11}" for name in self.compute)]  # columns of one width in all forms
            rows = [[size, *(found.get((form, size, name), "-") for name in self.compute)] for size in self.size]
            lines += [f"  {line}" for line in text_table([heads, *rows], within(width))]
        return [*lines, *self.remarks, *self.sentences()]
