"""Describe how far each run lies from the law, by budget and by size, and from the isoFLOP curve of its budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dlm.core import text
from dlm.fit.fitted import Fitted
from dlm.fit.isoflop.fit import curve_losses
from dlm.fit.laws import LAW_NAMES
from dlm.fit.points import Array
from dlm.fit.predict import fitted_losses
from dlm.report.chart import Axis, Chart, Panel, Series
from dlm.report.charts.runs import Row, budget_of, column, groups, hover, rows_of_points
from dlm.report.look import FAINT, INK

if TYPE_CHECKING:
    import pandas as pd

SIZE = Axis(title="parameters N", kind="count", is_log=True)
COMPUTE = Axis(title="compute C, FLOPs", kind="flops", is_log=True)


def residuals_chart(
    fit: Fitted, isoflop: Fitted | None = None, runs: pd.DataFrame | None = None, *, budgets: Sequence[float] = ()
) -> Chart | None:
    """Describe the residuals of a surface or of the combined law; None for a fit without a surface.

    Args:
        fit: A fitted surface, or the combined law.
        isoflop: The isoFLOP curves of the same runs, whose residuals are shown next to those of the law.
        runs: The rows of runs.csv, by which the runs are named.
        budgets: All budgets of the page, so that they look the same in each chart.
    """
    if fit.surface is None or fit.points is None or not fit.params:
        return None
    points = fit.points
    residual = points.loss / fitted_losses(fit) - 1.0
    rows = rows_of_points(fit, runs)
    off = Axis(title="loss over that of the law − 1", kind="percent")
    scatter = fit.noise.residual
    panels = [
        Panel(
            x=x,
            y=off,
            title=title,
            series=[
                *_band(values, scatter, is_named=x is COMPUTE),
                *_points(values, residual, rows, budget_of(fit), budgets, fit.outliers),
            ],
        )
        for x, values, title in ((COMPUTE, points.flops, "by compute"), (SIZE, points.params, "by size"))
    ]
    about = None if isoflop is None else _about_curves(isoflop, runs, budgets)
    panels += [] if about is None else [about]
    worst = int(np.abs(residual).argmax())
    name = rows[worst].get("run_id")
    furthest = f"{name}, " if name else ""
    return Chart(
        name="residuals",
        title="Where does the law miss the runs?",
        sentence=(
            f"Each mark is how far the loss of a run lies above (+) or below (−) the {LAW_NAMES[fit.law]}; a law of "
            "the right form leaves marks on both sides of zero at every budget and size."
        ),
        panels=panels,
        notes=[
            f"The root mean square of the residuals is {np.sqrt((residual**2).mean()):.2%}; the largest is "
            f"{residual[worst]:+.2%} ({furthest}N {text.count(points.params[worst])}).",
            *_legend(scatter, rows, len(fit.outliers)),
        ],
    )


def _legend(scatter: float, rows: Sequence[Row], num_far: int) -> list[str]:
    said = [f"The band is twice the scatter of the runs about the law, ± {2 * scatter:.2%}."] if scatter > 0 else []
    has_bars = bool(np.isfinite(column(rows, "loss_se")).any())
    if num_far:
        said.append(f"{text.counted(num_far, 'run')} far from the law {'is' if num_far == 1 else 'are'} hollow.")
    if has_bars:
        said.append("A bar is one Monte Carlo standard error of the measured loss.")
    return said


def _band(values: Array, scatter: float, *, is_named: bool) -> list[Series]:
    """The line at zero, with a band of twice the scatter where it is known."""
    ends = [float(values.min()), float(values.max())]
    half = [2 * scatter] * 2 if scatter > 0 else None
    return [
        Series(
            x=ends,
            y=[0.0, 0.0],
            mark="line",
            name="± 2 × scatter" if half and is_named else "",
            group="scatter" if half else "",
            colour=INK if half is None else FAINT,
            low=None if half is None else [-width for width in half],
            high=half,
        )
    ]


def _points(
    x: Array, residual: Array, rows: Sequence[Row], spent: Array, budgets: Sequence[float], outliers: Sequence[int]
) -> list[Series]:
    """The runs of each budget; runs that lie far from the law are hollow."""
    share = column(rows, "loss_se") / column(rows, "loss")
    far = np.zeros(len(x), dtype=bool)
    far[list(outliers)] = True
    found = []
    for group in groups(spent, budgets):
        for rest, is_far in ((group.rows & ~far, False), (group.rows & far, True)):
            places = np.flatnonzero(rest).tolist()
            if not places:
                continue
            bars = share[places] if np.isfinite(share[places]).any() else None
            found.append(
                Series(
                    x=x[places].tolist(),
                    y=residual[places].tolist(),
                    name="" if is_far and (group.rows & ~far).any() else group.name,
                    group=group.name,
                    colour=group.look.colour,
                    shape=group.look.shape,
                    low=None if bars is None else (residual[places] - bars).tolist(),
                    high=None if bars is None else (residual[places] + bars).tolist(),
                    hover=[_said(rows[place], residual[place], is_far=is_far) for place in places],
                    is_hollow=is_far,
                )
            )
    return found


def _said(row: Row, residual: float, *, is_far: bool) -> str:
    return hover(row, f"{residual:+.2%} from the law{': far from it' if is_far else ''}")


def _about_curves(isoflop: Fitted, runs: pd.DataFrame | None, budgets: Sequence[float]) -> Panel | None:
    """The residuals of the isoFLOP curves by size; None if no budget has a curve."""
    points = isoflop.points
    if points is None or points.budget is None:
        return None
    fitted = np.full(len(points), np.nan)
    for minimum in isoflop.minima:
        if np.isfinite(minimum.centre):
            fitted[points.budget == minimum.budget] = curve_losses(isoflop, minimum)
    has_curve = np.isfinite(fitted)
    if not has_curve.any():
        return None
    rows = [row for row, has in zip(rows_of_points(isoflop, runs), has_curve, strict=True) if has]
    sizes, residual = points.params[has_curve], points.loss[has_curve] / fitted[has_curve] - 1.0
    return Panel(
        x=SIZE,
        y=Axis(title="loss over that of the curve − 1", kind="percent"),
        title=f"from the {isoflop.curve or 'curve'}",
        series=[
            *_band(sizes, float("nan"), is_named=False),
            *_points(sizes, residual, rows, points.budget[has_curve], budgets, ()),
        ],
    )
