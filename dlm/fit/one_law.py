"""Fit one law to the rows of a table: which columns each kind of fit reads, and what it does without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit import laws
from dlm.fit.combined.fit import fit_combined
from dlm.fit.envelope import fit_envelope
from dlm.fit.isoflop.fit import fit_isoflop
from dlm.fit.result import FitResult
from dlm.fit.rows import cells, unique_tokens
from dlm.fit.surface import repeated
from dlm.fit.surface.fit import fit_surface

COMBINED = "combined"


def columns_of(frame: pd.DataFrame) -> dict[str, Any]:
    """The arguments that every fit takes from the table; convention and label are the first values in their columns."""
    said = {name: frame[name].dropna().astype(str) for name in ("convention", "objective") if name in frame}
    first = {name: values.iloc[0] for name, values in said.items() if len(values)}
    columns = {name: frame[name] for name in ("params", "tokens", "loss")}
    label = first.get("objective", "")
    return {**columns, "flops": frame.get("flops"), "convention": first.get("convention"), "label": label}


def _known(frame: pd.DataFrame, *names: str) -> dict[str, Any]:
    """The named columns that have a value in every row."""
    return {name: frame[name] for name in names if name in frame and frame[name].notna().all()}


def surface_of(frame: pd.DataFrame, law: str, **options: Any) -> FitResult:
    """Fit a surface to the columns that it reads; `options` are the other arguments of `fit_surface`."""
    repeats = law in (repeated.REPEATED, *laws.UNIQUE)
    unique = frame.get("unique_tokens") if repeats else None
    if unique is not None and unique.isna().any():
        empty = int(unique.isna().sum())
        raise UserError(f"{law} needs the unique tokens of every run: {empty} rows have no unique_tokens")
    columns = {**columns_of(frame), **_known(frame, "budget", "loss_se", "loss_se_own"), "cluster": _clusters(frame)}
    columns["cell"] = cells(frame)
    unique = None if unique is None else unique_tokens(frame)
    asked = options.pop("unique", None)
    if law == COMBINED:
        return fit_combined(**columns, **options)
    if law in repeated.NAMES:
        return repeated.fit_repeated(**columns, **options, law=law, unique=asked, unique_tokens=unique)
    return fit_surface(**columns, **options, law=law, unique_tokens=unique, unique=asked)


def without_outliers(frame: pd.DataFrame, result: FitResult, weights: str | None) -> pd.DataFrame:
    """The rows without those that lie far from a fitted surface, and a warning that names these."""
    used = frame[frame["weight"] > 0] if "weight" in frame and weights is None else frame
    far = used.iloc[list(result.outliers)]
    if far.empty:
        return frame
    names = [
        str(row["run_id"])
        if "run_id" in far
        else f"N {text.count(row['params'])}, D {text.count(row['tokens'])}, loss {text.number(row['loss'])}"
        for row in far.to_dict("records")
    ]
    kept = frame.drop(index=far.index).reset_index(drop=True)
    kept.attrs = {name: list(lines) for name, lines in frame.attrs.items()}
    count = "1 run" if len(far) == 1 else f"{len(far)} runs"
    kept.attrs["warnings"].append(f"dropped {count} far from the law: {'; '.join(names)}")
    return kept


def _clusters(frame: pd.DataFrame) -> pd.Series[str] | None:
    """The cluster label of each run: the branches of one trunk, and the points of one run, share noise."""
    if "run_id" not in frame:
        return None
    own = frame["run_id"].astype(str)
    return own if "parent" not in frame else frame["parent"].fillna(own).astype(str)


def isoflop_of(frame: pd.DataFrame, **options: Any) -> FitResult:
    """Fit isoFLOP curves to the columns that they read; `options` are the other arguments of `fit_isoflop`."""
    known = frame["budget"].notna()
    if not known.all():
        frame.attrs["warnings"].append(f"{int((~known).sum())} rows without a budget are in no isoFLOP curve")
    frame = frame[known]
    columns = {**columns_of(frame), **_known(frame, "loss_se", "loss_se_own")}
    return fit_isoflop(**columns, budget=frame["budget"], weights=frame.get("weight"), **options)


def envelope_of(frame: pd.DataFrame, at: Sequence[float]) -> FitResult:
    """Fit the envelope to the columns that it reads; `at` is as in `fit_envelope`."""
    if "weight" in frame:
        frame.attrs["warnings"].append(
            "an envelope knows no weights: runs of weight 0 are left out, others count alike"
        )
        frame = frame[frame["weight"] > 0]
    named: dict[str, Any] = {name: frame[name].astype(str).tolist() for name in ("run_id", "schedule") if name in frame}
    return fit_envelope(**columns_of(frame), **named, at=at)
