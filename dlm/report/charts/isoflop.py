"""The loss over model size at each budget: the runs, the fitted curves and their minima."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from dlm.core import text
from dlm.fit.fitted import Minimum
from dlm.fit.isoflop.fit import curve_of
from dlm.fit.optimum import as_rows
from dlm.fit.points import NAN, UNBOUNDED
from dlm.fit.result import FitResult
from dlm.report.chart import Axis, Chart, Panel, Series
from dlm.report.look import BUDGET_SHAPES, FAINT, budget_colours

MINIMUM = "minimum, 95 % interval"
COMBINED = "combined law"
CURVE_POINTS = 40
SENTENCE = (
    "Each curve spends one budget, in FLOPs, on models of different sizes. To the left of a minimum the model is too "
    "small; to the right it sees too few tokens."
)
OPEN = "The runs of a hollow, dashed curve do not enclose a minimum, and the law leaves that curve out."


def isoflop_chart(
    isoflop: FitResult,
    surface: FitResult | None = None,
    *,
    loss_se: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    budgets: Sequence[float] = (),
) -> Chart | None:
    """Describe the loss over model size, with a curve and its minimum for each budget.

    Args:
        isoflop: A fit with isoFLOP minima.
        surface: A fitted surface, drawn as a dotted line for each budget.
        loss_se: The Monte Carlo standard error of each point of ``isoflop``, drawn as a bar; NaN where unknown.
        names: What is shown over each point of ``isoflop``.
        budgets: All budgets of the page, so that each looks the same in every chart.

    Returns:
        The chart; None for a fit without stored points or without budgets.
    """
    if isoflop.points is None or not isoflop.minima:
        return None
    drawn_surface = surface if surface is not None and surface.params else None
    levels = sorted({*budgets, *(minimum.budget for minimum in isoflop.minima)})
    pairs = zip(budget_colours(len(levels)), itertools.cycle(BUDGET_SHAPES), strict=False)  # the shapes never end
    looks = dict(zip(levels, pairs, strict=True))
    series: list[Series] = _keys(isoflop, has_surface=drawn_surface is not None)
    for minimum in isoflop.minima:
        colour, shape = looks[minimum.budget]
        series += _runs(isoflop, minimum, colour, shape, loss_se=loss_se, names=names)
        if drawn_surface is not None:
            series.append(_surface_curve(isoflop, drawn_surface, minimum, colour))
        if minimum.usable:
            series.append(_minimum(minimum, colour))
    return Chart(
        name="isoflop",
        title="Where the minimum lies at each budget",
        sentence=SENTENCE,
        panels=[
            Panel(
                x=Axis(title="parameters N", kind="count", is_log=True),
                y=Axis(title="validation loss, nats/token"),
                series=series,
            )
        ],
        notes=[] if all(minimum.usable for minimum in isoflop.minima) else [OPEN],
    )


def _keys(isoflop: FitResult, *, has_surface: bool) -> list[Series]:
    """Return the entries of the legend on paper, where the budgets are written beside their curves."""
    keys = [
        Series(x=[], y=[], colour=FAINT, name="run"),
        Series(x=[], y=[], colour=FAINT, mark="line", name=f"{isoflop.curve or 'curve'} of one budget"),
        Series(x=[], y=[], colour=FAINT, shape="D", is_outlined=True, name=MINIMUM),
    ]
    return keys + ([Series(x=[], y=[], colour=FAINT, mark="line", dash="dot", name=COMBINED)] if has_surface else [])


def _runs(
    fit: FitResult,
    minimum: Minimum,
    colour: str,
    shape: str,
    *,
    loss_se: Sequence[float] | None,
    names: Sequence[str] | None,
) -> list[Series]:
    """Return the runs of one budget, and the curve through them."""
    assert fit.points is not None
    rows = np.flatnonzero(fit.points.budget == minimum.budget).tolist()
    loss = fit.points.loss[rows]
    error = np.full(len(rows), NAN) if loss_se is None else np.asarray(loss_se, dtype=float)[rows]
    said = text.flops(minimum.budget) + ("" if minimum.usable else ", refused")
    found = []
    if np.isfinite(minimum.centre):
        sizes, fitted = curve_of(fit, minimum, CURVE_POINTS)
        dash = "solid" if minimum.usable else "dash"
        found.append(
            Series(x=sizes.tolist(), y=fitted.tolist(), mark="line", dash=dash, colour=colour, group=said)  # type: ignore[arg-type]
        )
    runs = Series(
        x=fit.points.params[rows].tolist(),
        y=loss.tolist(),
        low=None if loss_se is None else (loss - error).tolist(),
        high=None if loss_se is None else (loss + error).tolist(),
        name=said,
        group=said,
        label=said,
        colour=colour,
        shape=shape,
        is_hollow=not minimum.usable,
        hover=[] if names is None else [names[row] for row in rows],
    )
    return [*found, runs]


def _minimum(minimum: Minimum, colour: str) -> Series:
    low, high = minimum.ci.get("N", UNBOUNDED)
    has_ends = bool(np.isfinite(low) and np.isfinite(high))
    said = f"minimum at {text.flops(minimum.budget)}: N* {text.interval((low, high), 'count')}"
    return Series(
        x=[minimum.N],
        y=[minimum.L],
        low_x=[low] if has_ends else None,
        high_x=[high] if has_ends else None,
        group=text.flops(minimum.budget),
        colour=colour,
        shape="D",
        is_outlined=True,
        hover=[said if has_ends else f"minimum at {text.flops(minimum.budget)}"],
    )


def _surface_curve(isoflop: FitResult, surface: FitResult, minimum: Minimum, colour: str) -> Series:
    assert isoflop.points is not None and surface.surface is not None
    sizes = isoflop.points.params[isoflop.points.budget == minimum.budget]
    grid = np.linspace(np.log(sizes.min()), np.log(sizes.max()), CURVE_POINTS)
    log_d = np.log(minimum.budget) - surface.cost.log_per_token(grid)
    loss = surface.surface.predict(as_rows(surface.surface, surface.params), grid[None], log_d[None])[0]
    return Series(
        x=np.exp(grid).tolist(), y=loss.tolist(), mark="line", dash="dot", colour=colour, name=COMBINED,
        label="", group=COMBINED, opacity=0.9,
    )  # fmt: skip
