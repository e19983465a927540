"""What the charts of runs share: how the runs of a budget look, and what is shown over a run."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm.core import text
from dlm.fit.fitted import Fitted
from dlm.fit.points import Array, Mask
from dlm.report.look import BUDGET_SHAPES, FAINT, budget_colours

if TYPE_CHECKING:
    import pandas as pd

MOST_BUDGETS = 12  # with more values of C than this, runs are grouped by powers of ten
NO_BUDGET = "no budget"
Row = Mapping[str, Any]  # a row of runs.csv without its missing values


@dataclass(frozen=True, kw_only=True)
class Look:
    """The colour and the marker of the runs of one budget."""

    colour: str
    shape: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The runs that share an entry of the legend: those of one budget, of one power of ten of C, or without a C."""

    name: str
    budget: float  # FLOPs; NaN for runs without a budget
    look: Look
    rows: Mask  # which runs belong to it, (n,)


def looks(budgets: Iterable[float]) -> dict[float, Look]:
    """Return the look of each budget. Charts of one page that pass the same budgets show them alike."""
    levels = sorted({float(budget) for budget in budgets if np.isfinite(budget)})
    pairs = zip(levels, budget_colours(len(levels)), itertools.cycle(BUDGET_SHAPES), strict=False)  # shapes never end
    return {level: Look(colour=colour, shape=shape) for level, colour, shape in pairs}


def groups(flops: Array, known: Sequence[float] = ()) -> list[Group]:
    """Group runs by budget, the lowest first and runs without a budget last.

    Args:
        flops: The budget of each run, or the FLOPs that it spent, (n,); NaN where neither is known.
        known: All budgets of the page, so that a budget looks the same in each of its charts.
    """
    levels = np.array(flops, dtype=np.float64)
    finite = levels[np.isfinite(levels)]
    is_by_ten = len(np.unique(finite)) > MOST_BUDGETS
    if is_by_ten:
        levels = 10.0 ** np.floor(np.log10(levels) + 1e-9)
    found = np.unique(levels[np.isfinite(levels)]).tolist()
    styles = looks(found if is_by_ten else [*known, *found])
    grouped = [
        Group(name=_name(level, is_by_ten=is_by_ten), budget=level, look=styles[level], rows=levels == level)
        for level in found
    ]
    rest = ~np.isfinite(levels)
    if rest.any():
        look = Look(colour=FAINT, shape="o")
        grouped.append(Group(name=NO_BUDGET, budget=float("nan"), look=look, rows=rest))
    return grouped


def _name(level: float, *, is_by_ten: bool) -> str:
    return f"{text.flops(level)} to {text.flops(10 * level)} FLOPs" if is_by_ten else f"{text.flops(level)} FLOPs"


def column(rows: Sequence[Row], name: str) -> Array:
    """Return the numbers of a column, (n,); NaN where a row has none."""
    return np.array([float(row.get(name, np.nan)) for row in rows], dtype=np.float64)


def rows_of(runs: pd.DataFrame | None) -> list[Row]:
    """Return the rows of a table without their missing values."""
    if runs is None:
        return []
    columns = [str(name) for name in runs.columns]
    known = runs.notna().to_numpy()
    values = zip(runs.itertuples(index=False, name=None), known, strict=True)
    return [
        {name: value for name, value, has in zip(columns, row, is_known, strict=True) if has}
        for row, is_known in values
    ]


def rows_of_points(fit: Fitted, runs: pd.DataFrame | None) -> list[Row]:
    """Find the row of each run that a law was fitted to, by N, D and the measured loss; N, D and L alone if none fits.

    The points of a fit hold no names of runs, and their losses may be those at the best learning rate.
    """
    points = fit.points
    assert points is not None
    measured = fit.runs.get("loss", ())
    losses = measured if len(measured) == len(points) else points.loss.tolist()
    by_place: dict[tuple[float, float, float], list[Row]] = defaultdict(list)
    for row in reversed(rows_of(runs)):
        by_place[_place(*(float(row.get(name, np.nan)) for name in ("params", "tokens", "loss")))].append(row)
    found = []
    for n, d, loss in zip(points.params.tolist(), points.tokens.tolist(), losses, strict=True):
        same = by_place[_place(n, d, loss)]
        found.append(same.pop() if same else {"params": n, "tokens": d, "loss": loss})
    return found


def _place(*values: float) -> tuple[float, float, float]:
    n, d, loss = (float(f"{value:.9g}") for value in values)
    return n, d, loss


def hover(row: Row, *more: str) -> str:
    """Describe a run in a few short lines: its name, N, D, loss, learning rate and state, and what is added."""
    size = [
        f"{label} {text.count(float(row[name]))}" for name, label in (("params", "N"), ("tokens", "D")) if name in row
    ]
    error = f" ± {float(row['loss_se']):.4f}" if row.get("loss_se") else ""
    recipe = [f"learning rate {text.number(float(row['learning_rate']), digits=3)}"] if "learning_rate" in row else []
    recipe += [f"batch {row['global_batch_size']}"] if "global_batch_size" in row else []
    lines = [
        str(row.get("run_id", "")),
        ", ".join(size),
        f"loss {float(row['loss']):.4f}{error}" if "loss" in row else "",
        ", ".join(recipe),
        str(row.get("status", "")),
        *more,
    ]
    return "\n".join(line for line in lines if line)


def budget_of(fit: Fitted) -> Array:
    """Return the budget of each run of a fit, or the FLOPs that it spent if the table has no budgets, (n,)."""
    points = fit.points
    assert points is not None
    return points.flops if points.budget is None else points.budget
