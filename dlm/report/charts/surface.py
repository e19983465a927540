"""Describe the fitted loss L(N, D) as contours, with the runs on it and the line of the best sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from dlm.core import text
from dlm.fit.fitted import Fitted
from dlm.fit.laws import LAW_NAMES
from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.laws.epochs import Epochs
from dlm.fit.optimum import TOP, as_rows, bottom_of, optima, top_of
from dlm.fit.points import UNBOUNDED, Array, Mask, Points
from dlm.fit.predict import fitted_losses
from dlm.report.chart import Axis, Chart, Contours, Panel, Series
from dlm.report.charts.runs import Group, budget_of, groups, hover, rows_of_points
from dlm.report.look import INK

if TYPE_CHECKING:
    import pandas as pd

CELLS = 48  # places of the grid along each axis
MARGIN = 1.6  # the grid extends beyond the runs by this factor
LEVELS = 16  # contours, at most
LINE_POINTS = 24  # of a line of equal compute
BEST_POINTS = 8  # of the line of best sizes, which is nearly straight and takes a search for each point


def surface_chart(fit: Fitted, runs: pd.DataFrame | None = None, *, budgets: Sequence[float] = ()) -> Chart | None:
    """Describe the surface of a fit; None for lines without a surface and for runs that support no law.

    Args:
        fit: A fitted surface, or the combined law.
        runs: The rows of runs.csv, by which the runs are named.
        budgets: All budgets of the page, so that they look the same in each chart.
    """
    if fit.surface is None or fit.points is None or not fit.params:
        return None
    keep, notes = _of_one_unique(fit)
    if np.ptp(fit.points.params[keep]) == 0 or np.ptp(fit.points.tokens[keep]) == 0:
        return None
    shown = fit.points.take(keep)
    n, d = _grid(shown.params), _grid(shown.tokens)
    z = fit.surface.predict(as_rows(fit.surface, fit.params), *(np.log(v).reshape(1, -1) for v in np.meshgrid(n, d)))
    rows = [row for row, is_shown in zip(rows_of_points(fit, runs), keep, strict=True) if is_shown]
    law = fitted_losses(fit)[keep]
    texts = [hover(row, f"the law says {loss:.4f}") for row, loss in zip(rows, law, strict=True)]
    spent = budget_of(fit)[keep]
    series: list[Series] = []
    for group in groups(spent, budgets):
        series += [*_equal_compute(fit, group, n, d), _cells(shown, group, texts)]
    best, more = _best(fit)
    panel = Panel(
        x=Axis(title="parameters N", kind="count", is_log=True),
        y=Axis(title="tokens D", kind="count", is_log=True),
        series=[*series, *best],
        contours=Contours(
            x=_short(n),
            y=_short(d),
            z=[_short(row) for row in z.reshape(len(d), len(n))],
            title=f"loss by the {LAW_NAMES[fit.law]}, nats/token",
            levels=_levels(min(law.min(), z.min()), law.max()),
        ),
    )
    return Chart(
        name="surface",
        title="Which loss does each size and number of tokens reach?",
        sentence=(
            f"Colours and contours show the loss by the {LAW_NAMES[fit.law]}, marks the runs; along a dotted line the "
            "compute stays the same, and the dark line leads through the best size at each compute."
        ),
        panels=[panel],
        notes=[*notes, *more],
    )


def _of_one_unique(fit: Fitted) -> tuple[Mask, list[str]]:
    """Which runs lie on the surface, (n,): under a law of unique tokens, those with the number that it is drawn for."""
    points, law = fit.points, fit.surface
    assert points is not None
    if not isinstance(law, DataConstrained | Epochs) or points.unique is None:
        return np.ones(len(points), dtype=bool), []
    keep = (points.unique == law.unique) | ((points.unique == points.tokens) & (points.tokens <= law.unique))
    if not keep.any():
        return np.ones(len(points), dtype=bool), []
    left_out = int((~keep).sum())
    said = f"The surface is that of {text.count(law.unique)} unique tokens."
    return keep, [f"{said} {text.counted(left_out, 'run')} on fewer are not shown." if left_out else said]


def _grid(values: Array) -> Array:
    return np.geomspace(values.min() / MARGIN, values.max() * MARGIN, CELLS)


def _short(values: Array) -> list[float]:
    """Numbers with five digits, which a figure cannot tell from the full ones."""
    return [float(f"{value:.5g}") for value in values]


def _levels(low: float, high: float) -> list[float]:
    """Even, round levels from the lowest loss of the grid to the highest of the runs, above which the fit is steep."""
    rough = max((high - low) / LEVELS, 1e-6)
    unit = 10.0 ** np.floor(np.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * (1 - 1e-9))
    first, last = int(np.floor(low / step)), int(np.ceil(high / step))
    return [float(f"{place * step:.10g}") for place in range(first, last + 1)]


def _cells(points: Points, group: Group, texts: Sequence[str]) -> Series:
    return Series(
        x=points.params[group.rows].tolist(),
        y=points.tokens[group.rows].tolist(),
        name=group.name,
        group=group.name,
        colour=group.look.colour,
        shape=group.look.shape,
        hover=[said for said, own in zip(texts, group.rows, strict=True) if own],
        is_outlined=True,
    )


def _equal_compute(fit: Fitted, group: Group, n: Array, d: Array) -> list[Series]:
    """The N and D that cost the budget of a group, within the grid; none for runs without a budget."""
    points = fit.points
    if not np.isfinite(group.budget) or points is None or points.budget is None or group.budget not in points.budget:
        return []
    sizes = np.geomspace(n[0], n[-1], LINE_POINTS)
    tokens = group.budget / np.exp(fit.cost.log_per_token(np.log(sizes)))
    inside = (tokens >= d[0]) & (tokens <= d[-1])
    x, y = _short(sizes[inside]), _short(tokens[inside])
    return [Series(x=x, y=y, mark="line", group=group.name, colour=group.look.colour, dash="dot")] if len(x) > 1 else []


def _best(fit: Fitted) -> tuple[list[Series], list[str]]:
    """The line of the best sizes within the compute of the runs, with the reported optima on it and their intervals."""
    if isinstance(fit.surface, Epochs):
        return [], [
            "No line of best sizes: on a fixed number of unique tokens, the best use of C may be to spend less."
        ]
    top = top_of(fit)
    reported = {flops: best for flops, best in fit.at.items() if flops <= TOP * top}
    for best in (*reported.values(), *optima(fit, [top]).values()):
        if not np.isfinite(best.N):
            return [], [f"No line of best sizes: {best.withheld}."]
    line = optima(_without_draws(fit), np.geomspace(bottom_of(fit), top, BEST_POINTS))
    series = [
        Series(
            x=_short(np.array([best.N for best in line.values()])),
            y=_short(np.array([best.D for best in line.values()])),
            mark="line",
            name="best size N*",
            group="best",
            colour=INK,
            hover=[f"best use of {text.flops(flops)} FLOPs, loss {best.L:.4f}" for flops, best in line.items()],
        )
    ]
    if reported:
        ends = [best.ci.get("N", UNBOUNDED) for best in reported.values()]
        series.append(
            Series(
                x=[best.N for best in reported.values()],
                y=[best.D for best in reported.values()],
                low_x=[low for low, _ in ends],
                high_x=[high for _, high in ends],
                group="best",
                colour=INK,
                shape="D",
                hover=[
                    f"best use of {text.flops(flops)} FLOPs\nN* {text.count(best.N)} ({text.interval(pair, 'count')})\n"
                    f"D* {text.count(best.D)}, loss {best.L:.4f}"
                    for (flops, best), pair in zip(reported.items(), ends, strict=True)
                ],
                is_outlined=True,
            )
        )
    return series, []


def _without_draws(fit: Fitted) -> Fitted:
    """The same law without its resampled ones, which take time and say nothing about the line itself."""
    combination = fit.combination
    if combination is not None and combination.line is not None:
        combination = replace(combination, line=replace(combination.line, draws=None))
    return replace(fit, draws=None, verdict=None, combination=combination)
