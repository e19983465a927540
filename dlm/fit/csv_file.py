"""Write tables as CSV and read them, so that all texts survive, and none is a formula to a spreadsheet."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import pandas as pd

from dlm.core.names import as_cell, from_cell

__all__ = ["as_csv", "read_csv"]


def as_csv(table: pd.DataFrame) -> str:
    """Return a table as CSV. See ``as_cell`` for texts that a program would read as something else."""
    written = _with_texts(table, _texts(table), as_cell)
    # pandas leaves a carriage return without quotes, and reads it as the end of the row.
    has_return = any("\r" in v for name in _texts(written) for v in written[name] if isinstance(v, str))
    content: str = written.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC if has_return else csv.QUOTE_MINIMAL)
    return content


def read_csv(source: Path | IO[str] | IO[bytes], **options: Any) -> pd.DataFrame:
    """Read a CSV file, of dlm or of anybody. ``options`` are those of ``pandas.read_csv``."""
    table = pd.read_csv(source, **options)
    marked = [name for name in _texts(table) if table[name].str.startswith("'", na=False).any()]
    return _with_texts(table, marked, from_cell)


def _with_texts(table: pd.DataFrame, names: Iterable[str], change: Callable[[str], str]) -> pd.DataFrame:
    """Return a table in which the texts of some columns are changed."""
    changed = {name: [change(v) if isinstance(v, str) else v for v in table[name]] for name in names}
    return table.assign(**changed)


def _texts(table: pd.DataFrame) -> list[str]:
    """Return the names of the columns that hold a text."""
    others = [name for name, kind in table.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
    return [str(name) for name in others if any(isinstance(v, str) for v in table[name])]
