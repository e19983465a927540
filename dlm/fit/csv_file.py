"""Write tables as CSV and read them, so that all texts survive, and none is a formula to a spreadsheet."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import IO, Any

import pandas as pd

from dlm.core.names import as_cell, from_cell


def as_csv(table: pd.DataFrame) -> str:
    """Return a table as CSV. See ``as_cell`` for texts that a program would read as something else."""
    written = _with_texts(table, as_cell)
    # pandas leaves a carriage return without quotes, and reads it as the end of the row.
    has_return = any(isinstance(v, str) and "\r" in v for name in _texts(written) for v in written[name])
    content: str = written.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC if has_return else csv.QUOTE_MINIMAL)
    return content


def read_csv(source: Path | IO[str] | IO[bytes], **options: Any) -> pd.DataFrame:
    """Read a CSV file, of dlm or of anybody. ``options`` are those of ``pandas.read_csv``."""
    return _with_texts(pd.read_csv(source, **options), from_cell)


def _with_texts(table: pd.DataFrame, change: Any) -> pd.DataFrame:
    changed = {name: [change(v) if isinstance(v, str) else v for v in table[name]] for name in _texts(table)}
    same = {name for name, values in changed.items() if all(a is b for a, b in zip(values, table[name], strict=True))}
    return table.assign(**{name: values for name, values in changed.items() if name not in same})


def _texts(table: pd.DataFrame) -> list[Any]:
    """Return the names of the columns that may hold text."""
    return [name for name, kind in table.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
