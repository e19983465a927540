"""Show a and b of one table of runs under every count of N and C that the table allows, and say what stays the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit.counts import Counts, counts_of
from dlm.fit.engine.newton import Norm
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

    def lines(self) -> list[str]:
        """A table of at most 80 columns with 'a b' in each cell: rows are counts of N, and columns counts of C."""
        names = [*self.compute]
        widths = [max(len(name), 11) for name in names]
        found = {(row.by, row.N, row.C): row.shown() for row in self.rows}
        lines = ["a and b under other counts of N (rows) and C (columns):"]
        for form in dict.fromkeys(row.by for row in self.rows):
            heads = [name.ljust(width) for name, width in zip(names, widths, strict=True)]
            lines.append(f"  {form:<15}  {'  '.join(heads)}".rstrip())
            for size in self.size:
                cells = [
                    found.get((form, size, name), "-").ljust(width) for name, width in zip(names, widths, strict=True)
                ]
                lines.append(f"  {size:<15}  {'  '.join(cells)}".rstrip())
        return [*lines, *self.remarks, *self.sentences()]


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
