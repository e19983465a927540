"""Fit the laws of a sweep to its runs."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from dlm.fit.result import FitResult


def fits_of(runs: pd.DataFrame) -> dict[str, FitResult]:
    """Fit the laws of a sweep to its runs, without its proof runs. Equal runs are not fitted twice by one command.

    Without runs, there are no fits.
    """
    return {} if runs.empty else _fitted(_without_proofs(runs))


def repeats_of(runs: pd.DataFrame) -> dict[str, FitResult]:
    """Fit laws of repeated data to the runs of a sweep, where they repeat texts; like ``fits_of``, only once."""
    return {} if runs.empty else _fitted_to_repeats(_without_proofs(runs))


def _without_proofs(runs: pd.DataFrame) -> str:
    from dlm.fit.csv_file import as_csv
    from dlm.fit.rows import PROOF

    return as_csv(runs[runs["role"] != PROOF])


@functools.lru_cache(maxsize=1)
def _fitted(csv: str) -> dict[str, FitResult]:
    from dlm.fit.csv_file import read_csv
    from dlm.fit.table import fit_sweep

    return fit_sweep(read_csv(io.StringIO(csv), float_precision="round_trip"))


@functools.lru_cache(maxsize=1)
def _fitted_to_repeats(csv: str) -> dict[str, FitResult]:
    from dlm.fit.between import fit_repeats
    from dlm.fit.csv_file import read_csv

    return fit_repeats(read_csv(io.StringIO(csv), float_precision="round_trip"))


def tables_fits(path: Path) -> tuple[dict[str, FitResult], dict[str, FitResult]]:
    """Fit the laws to a CSV file of runs: (those of a sweep, those of repeated data)."""
    from dlm.fit.between import fit_repeats
    from dlm.fit.table import fit_sweep

    return fit_sweep(path), fit_repeats(path)
