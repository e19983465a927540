"""Find a and b of one table of runs under every count of N and C that the table allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm.core.errors import UserError
from dlm.fit.counts import Counts, counts_of
from dlm.fit.engine.newton import Norm
from dlm.fit.exponents import Conventions, Exponents
from dlm.fit.points import Points, as_points
from dlm.fit.recount import Refit, refit_curves, refit_surface

if TYPE_CHECKING:
    import pandas as pd

ISOFLOP = "isoflop"
# The forms that are refitted for each law. The other laws have no table: an envelope is a line through single runs, and
# the optimum of a data-constrained law depends on the unique tokens too.
FORMS = {"combined": (ISOFLOP, "chinchilla"), ISOFLOP: (ISOFLOP,)} | {
    law: (law,) for law in ("chinchilla", "skaling", "tied")
}


def conventions_of(
    frame: pd.DataFrame,
    law: str,
    *,
    how: Norm,
    fixed: Mapping[str, float] | None = None,
    weights: str | None = None,
    curve: str = "parabola",
) -> Conventions | None:
    """Refit the law under every count of N and C; None if the table allows one of each, or for a law without a table.

    Args:
        frame: The runs of a fit, with their budgets if they have any.
        law: As in `fit_runs`; the combined law is shown by isoFLOP curves and by a Chinchilla surface.
        how: How the residuals of a surface count.
        fixed: Parameters that are held fixed. Those besides E hold for one count of N only, so there is no table then.
        weights: 'compute', or None to use the column `weight` if the table has it.
        curve: The curve of isoFLOP fits.
    """
    pins = dict(fixed or {})
    if law not in FORMS or set(pins) - {"E"}:
        return None
    if "weight" in frame:
        frame = frame[frame["weight"] > 0]
    counts = counts_of(frame)
    if not counts.are_several:
        return None
    rows, remarks = [], []
    for form in FORMS[law]:
        if form == ISOFLOP and not has_budgets(frame):
            continue
        try:
            rows += _of_form(frame, counts, form, how=how, fixed=pins, weights=weights, curve=curve)
        except UserError as error:
            remarks.append(f"{form} under other counts of N and C: {error}")
    if not rows:
        return None
    return Conventions(
        rows=tuple(rows),
        size={name: count.source for name, count in counts.size.items()},
        compute={name: count.source for name, count in counts.compute.items() if name in {row.C for row in rows}},
        own=counts.own,
        remarks=tuple(remarks),
    )


def has_budgets(frame: pd.DataFrame) -> bool:
    """Whether some runs have a budget, so that they form isoFLOP curves."""
    return "budget" in frame and bool(frame["budget"].notna().any())


def _of_form(frame: pd.DataFrame, counts: Counts, form: str, **options: Any) -> list[Exponents]:
    tokens, rows = frame["tokens"].to_numpy(dtype=float), []
    for size in counts.size:
        refit = refit_of(frame, counts, size, form, **options)
        for compute, (a, b) in refit.exponents().items():
            if compute == "6n_head" != counts.own:  # no convention of dlm: shown where the table itself uses it
                continue
            is_proportional = counts.is_proportional(size, compute, tokens)
            rows.append(Exponents(N=size, C=compute, by=form, a=float(a), b=float(b), is_proportional=is_proportional))
    return rows


def refit_of(
    frame: pd.DataFrame,
    counts: Counts,
    size: str,
    form: str,
    *,
    how: Norm,
    fixed: Mapping[str, float] | None = None,
    weights: str | None = None,
    curve: str = "parabola",
) -> Refit:
    """Refit one form with N counted as `size`. Raises UserError if the runs do not support the form."""
    points = _points(frame, counts, size, weights)
    if form != ISOFLOP:
        compute = {name: count.values for name, count in counts.compute.items()}
        return refit_surface(points, form, compute, how, fixed or {})
    assert points.budget is not None, "isoFLOP curves need budgets"
    return refit_curves(points, counts.own, curve=curve)


def _points(frame: pd.DataFrame, counts: Counts, size: str, weights: str | None) -> Points:
    own = counts.compute[counts.own].values
    weight = frame.get("weight") if weights is None else weights
    points = as_points(counts.size[size].values, frame["tokens"], frame["loss"], flops=own, weights=weight)
    return replace(points, budget=frame["budget"].to_numpy(dtype=np.float64)) if has_budgets(frame) else points
