"""Fit the laws of a sweep to its runs."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from dlm.fit.result import FitResult


def fits_of(runs: pd.DataFrame) -> dict[str, FitResult]:
    """Fit the laws of a sweep to its runs, without its proof runs. Equal runs are not fitted twice by one command."""
    from dlm.fit.csv_file import as_csv
    from dlm.fit.rows import PROOF

    return _fitted(as_csv(runs[runs["role"] != PROOF]))


@functools.lru_cache(maxsize=1)
def _fitted(csv: str) -> dict[str, FitResult]:
    from dlm.fit.csv_file import read_csv
    from dlm.fit.table import fit_sweep

    return fit_sweep(read_csv(io.StringIO(csv), float_precision="round_trip"))
