"""Describe how well the lower budgets predict the top ones, which were held out (leave-future-out)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dlm.core import text
from dlm.fit.combined.origin import Origin
from dlm.fit.combined.origins import levels_of
from dlm.fit.fitted import Fitted
from dlm.fit.laws.combined import Combined
from dlm.fit.points import UNBOUNDED, Mask
from dlm.fit.result import WITHOUT
from dlm.report.chart import Axis, Chart, Panel, Series
from dlm.report.charts.runs import Row, hover, rows_of_points
from dlm.report.look import FAINT, INK

if TYPE_CHECKING:
    import pandas as pd

LOOKS = ((INK, "o"), ("#6b7785", "s"), (FAINT, "^"))  # of the hold-outs, the top budget alone first
MEASURED, PREDICTED = Axis(title="measured loss, nats/token"), Axis(title="predicted loss, nats/token")
PERCENT = Axis(title="predicted over measured − 1", kind="percent")
SIZE = Axis(title="parameters N", kind="count", is_log=True)


def holdout_chart(
    combined: Fitted | None, isoflop: Fitted | None = None, runs: pd.DataFrame | None = None
) -> Chart | None:
    """Describe what the law of the lower budgets predicted for the runs of the top one, two and three budgets.

    Args:
        combined: The combined law, which keeps what it missed when it held out the top budgets.
        isoflop: The isoFLOP curves of the same runs, whose line through the lower minima predicts N* at the top budget.
        runs: The rows of runs.csv, by which the runs are named.

    Returns:
        The chart; None if too few budgets were run to hold one out.
    """
    panels = [] if combined is None else _losses(combined, runs)
    sizes = None if isoflop is None else _sizes(isoflop)
    panels += [] if sizes is None else [sizes]
    if not panels:
        return None
    return Chart(
        name="holdout",
        title="Would the lower budgets have predicted the top ones?",
        sentence=(
            "The law was fitted again without the top budgets and asked for the runs that it had not seen; marks on "
            "the line of equal values are predictions that came true."
        ),
        panels=panels,
        notes=[] if combined is None else _notes(combined),
    )


def _losses(combined: Fitted, runs: pd.DataFrame | None) -> list[Panel]:
    """Predicted against measured loss, and the relative error against N, a series for each hold-out."""
    points = combined.points
    if combined.combination is None or not isinstance(combined.surface, Combined) or points is None:
        return []
    held = combined.combination.held
    if not held:
        return []
    rows, weights = rows_of_points(combined, runs), combined.surface.weights
    pairs: list[Series] = []
    errors: list[Series] = []
    for origin, (colour, shape) in zip(held, LOOKS, strict=False):
        out = _held_out(combined, origin)
        measured, error = points.loss[out], np.expm1(origin.of(weights))
        predicted = measured * (1 + error)
        texts = [
            hover(row, f"predicted {loss:.4f} ({share:+.2%})")
            for row, loss, share in zip(_of(rows, out), predicted, error, strict=True)
        ]
        for series, x, y in ((pairs, measured, predicted), (errors, points.params[out], error)):
            series.append(
                Series(
                    x=x.tolist(),
                    y=y.tolist(),
                    name=_name(origin, combined) if series is pairs else "",
                    group=_name(origin, combined),
                    colour=colour,
                    shape=shape,
                    hover=texts,
                )
            )
    return [
        Panel(x=MEASURED, y=PREDICTED, title="loss", series=[_equal(pairs), *pairs]),
        Panel(x=SIZE, y=PERCENT, title="error by size", series=[_zero(errors), *errors]),
    ]


def _held_out(combined: Fitted, origin: Origin) -> Mask:
    """Which runs of the fit were held out, (n,)."""
    assert combined.points is not None
    return np.asarray(levels_of(combined.points) >= origin.level.min())


def _of(rows: Sequence[Row], keep: Mask) -> list[Row]:
    return [row for row, is_kept in zip(rows, keep, strict=True) if is_kept]


def _name(origin: Origin, combined: Fitted) -> str:
    """Name a hold-out by the number of budgets that it leaves out."""
    assert combined.points is not None
    levels = np.unique(levels_of(combined.points))
    count = int((levels >= origin.level.min()).sum())
    return f"without {WITHOUT.get(f'without_top_{count}', f'the top {count} budgets')}"


def _equal(series: Sequence[Series]) -> Series:
    """The line on which prediction and measurement are equal, as long as the marks need it."""
    values = [float(value) for one in series for ends in (one.x, one.y, one.low_x, one.high_x) for value in ends or ()]
    values = [value for value in values if np.isfinite(value)]
    ends = [min(values), max(values)]
    return Series(x=ends, y=ends, mark="line", name="predicted = measured", group="equal", colour=INK, dash="dash")


def _zero(series: Sequence[Series]) -> Series:
    values = [float(value) for one in series for value in one.x]
    return Series(x=[min(values), max(values)], y=[0.0, 0.0], mark="line", group="equal", colour=INK, dash="dash")


def _sizes(isoflop: Fitted) -> Panel | None:
    """The best size of the top budget: that of the line through the lower minima, against its own minimum."""
    held = [(name, errors["N_error"]) for name, errors in isoflop.holdout.items() if "N_error" in errors]
    if not held or not isoflop.usable:
        return None
    top = isoflop.usable[-1]
    low, high = top.ci.get("N", UNBOUNDED)
    found = [
        Series(
            x=[top.N],
            y=[top.N * (1 + error)],
            low_x=[low],
            high_x=[high],
            name=f"without {WITHOUT.get(name, name)}",
            group=f"without {WITHOUT.get(name, name)}",
            colour=colour,
            shape=shape,
            hover=[
                f"N* at {text.flops(top.budget)} FLOPs\nits own minimum {text.count(top.N)}\n"
                f"predicted {text.count(top.N * (1 + error))} ({error:+.1%})"
            ],
            is_outlined=True,
        )
        for (name, error), (colour, shape) in zip(held, LOOKS, strict=False)
    ]
    return Panel(
        x=Axis(title="N* of its own curve, parameters", kind="count", is_log=True),
        y=Axis(title="predicted N*, parameters", kind="count", is_log=True),
        title=f"best size at {text.flops(top.budget)} FLOPs",
        series=[_equal(found), *found],
    )


def _notes(combined: Fitted) -> list[str]:
    notes = []
    for name, errors in combined.holdout.items():
        if "num_held_out" in errors:
            runs = text.counted(int(errors["num_held_out"]), "held-out run")
            mean, rms = errors["L_error"], errors["L_rms_error"]
            left_out = WITHOUT.get(name, name)
            notes.append(f"Without {left_out}, the loss of {runs} is off by {mean:+.2%} ({rms:.2%} root mean square).")
    return notes
