"""Lay out results for a terminal and for a notebook: tables, lists and rounded numbers."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

import numpy as np

from dlm.core.names import printable
from dlm.core.table import laid_out


def two_digits(value: float, towards: np.ufunc) -> float:
    """Round the value to two significant digits by `towards`, ``np.floor`` or ``np.ceil``; NaN stays NaN."""
    unit = 10.0 ** (np.floor(np.log10(value)) - 1)
    return float(f"{towards(value / unit) * unit:.1e}")


def text_table(rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """The lines of a table whose columns are aligned; the first row holds the column headings.

    On a terminal that has not as many columns as the table needs, ``width``, the rows are stacked.
    """
    return list(laid_out(rows, width).lines)


def within(width: int | None, indent: int = 2) -> int | None:
    """The width that is left for a table that is indented on a terminal of this width."""
    return None if width is None else width - indent


def escaped(words: str) -> str:
    """Text for HTML, which shows it as it is."""
    return html.escape(printable(words))


def html_block(*parts: str) -> str:
    """Parts of HTML as one block, in which a notebook does not typeset what stands between two $."""
    return f'<div class="tex2jax_ignore mathjax_ignore">{"".join(parts)}</div>'


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of the rows; the first row holds the column headings."""
    tags = ["th", *["td"] * (len(rows) - 1)]
    lines = ["".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in row) for tag, row in zip(tags, rows, strict=True)]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def html_list(items: Iterable[str]) -> str:
    """An HTML list of the items."""
    return f"<ul>{''.join(f'<li>{escaped(item)}</li>' for item in items)}</ul>"
