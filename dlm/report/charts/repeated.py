"""Repeated data: the loss over epochs with the fitted law, the best epochs, and the best use of compute on a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dlm.core import text
from dlm.fit import optimum
from dlm.fit.crossing import Crossover
from dlm.fit.curves import Curve, curves
from dlm.fit.laws import LAW_NAMES, UNIQUE
from dlm.fit.points import Array
from dlm.fit.repeated import BestEpochs, Spending, best_epochs, law_of, points_of, summary
from dlm.fit.result import FitResult
from dlm.fit.turn import of_unique
from dlm.report.chart import Axis, Chart, Panel, Series
from dlm.report.table import Table

PANELS = 3  # numbers of unique tokens that are drawn
MOST_SIZES = 5  # that are drawn in a panel
LEAST_STEPS = 2  # a curve of fewer numbers of epochs is not drawn as one
MOST_POINTS = 40  # of a curve; more would not be told apart
LINE_POINTS = 60
SIZE_ANCHORS = ("#0b4f6c", "#1a936f", "#c6a800")  # from the smallest to the largest model; budgets have other colours
SIZE_SHAPES = "os^vPXph"
NOISE_ONLY = "The intervals hold the noise between runs only, not the error of the form of the law."
WITH_FORM = (
    "The intervals of the best epochs hold the noise between runs and the error of the law on curves that it had not "
    "seen."
)
MISSING = "–"


def repeated_chart(fit: FitResult) -> Chart | None:
    """Show the loss over epochs, one panel for each of up to PANELS numbers of unique tokens.

    Args:
        fit: The fit of a law of unique tokens. Without a fitted law, there is no chart.
    """
    if fit.law not in UNIQUE or fit.surface is None or fit.points is None or fit.points.unique is None:
        return None
    found = [curve for curve in curves(fit.points) if len(curve.log_epochs) >= LEAST_STEPS]
    if not found:
        return None
    shown = _spread({curve.unique for curve in found}, PANELS)
    drawn = [curve for unique in shown for curve in _of_unique_tokens(found, unique)]
    sizes = sorted({curve.params for curve in drawn})
    colours = dict(zip(sizes, _size_colours(len(sizes)), strict=True))
    shapes = {size: SIZE_SHAPES[k % len(SIZE_SHAPES)] for k, size in enumerate(sizes)}
    panels = [
        Panel(
            x=Axis(title="epochs e = D/U", is_log=True),
            y=Axis(title="validation loss, nats/token"),
            title=f"{text.count(unique)} unique tokens",
            series=[
                series
                for curve in drawn
                if curve.unique == unique
                for series in _of_curve(fit, curve, colour=colours[curve.params], shape=shapes[curve.params])
            ],
        )
        for unique in shown
    ]
    return Chart(
        name="repeated",
        title="What does it cost to read the same text again?",
        sentence=(
            f"Each curve is a model of one size that reads one text again and again; lines are the {LAW_NAMES[fit.law]}"
            f", which was chosen by its errors on left-out curves. {_turning(fit)}"
        ),
        panels=panels,
        notes=[*_not_drawn(fit, drawn), *uncertainty(fit)],
    )


def _of_unique_tokens(found: Sequence[Curve], unique: float) -> list[Curve]:
    """Return the curves of a number of unique tokens, of up to MOST_SIZES sizes."""
    own = [curve for curve in found if curve.unique == unique]
    sizes = _spread({curve.params for curve in own}, MOST_SIZES)
    return [curve for curve in own if curve.params in sizes]


def _spread(values: set[float], most: int) -> list[float]:
    """Return up to ``most`` of the values, evenly spread over their order."""
    ordered = sorted(values)
    places = np.linspace(0, len(ordered) - 1, min(most, len(ordered))).round().astype(int)
    return [ordered[place] for place in places]


def _size_colours(count: int) -> list[str]:
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    ramp = LinearSegmentedColormap.from_list("sizes", SIZE_ANCHORS)
    return [to_hex(colour) for colour in ramp(np.linspace(0, 1, count))]


def _of_curve(fit: FitResult, curve: Curve, *, colour: str, shape: str) -> list[Series]:
    """Return the points of a curve, the line of the law through them, and the best epochs if the law turns."""
    name = f"N = {text.count(curve.params)}"
    epochs, loss = np.exp(curve.log_epochs), np.exp(curve.log_loss)
    kept = _thinned(curve)
    steps = np.linspace(curve.log_epochs[0], curve.log_epochs[-1], LINE_POINTS)
    predicted = _predicted(fit, curve, steps)
    at_points = _predicted(fit, curve, curve.log_epochs)
    points = Series(
        x=epochs[kept].tolist(),
        y=loss[kept].tolist(),
        name=name,
        group=name,
        colour=colour,
        shape=shape,
        hover=[
            f"{name}, U = {text.count(curve.unique)}, {text.number(float(epochs[k]), digits=3)} epochs; the law says "
            f"{text.number(float(at_points[k]))} ({float(loss[k] / at_points[k] - 1):+.1%})"
            for k in kept
        ],
    )
    line = Series(x=np.exp(steps).tolist(), y=predicted.tolist(), mark="line", group=name, colour=colour)
    best = best_epochs(fit, curve.params, curve.unique)
    return [line, points, *([] if best.withheld else [_best(best, float(epochs[-1]), colour, name)])]


def _best(best: BestEpochs, last: float, colour: str, group: str) -> Series:
    """Return the mark at the best epochs. An interval without an upper end is drawn up to the last epoch."""
    low, high = best.ci
    is_known = math.isfinite(low)
    return Series(
        x=[best.epochs],
        y=[best.L],
        group=group,
        colour=colour,
        shape="D",
        is_outlined=True,
        low_x=[low] if is_known else None,
        high_x=[high if math.isfinite(high) else max(last, best.epochs)] if is_known else None,
        hover=[f"best epochs of {best.sentence()}"],
    )


def _predicted(fit: FitResult, curve: Curve, log_epochs: Array) -> Array:
    law = of_unique(law_of(fit), curve.unique)
    log_n = np.full((1, len(log_epochs)), np.log(curve.params))
    rows = optimum.as_rows(law, fit.params)
    return np.asarray(law.predict(rows, log_n, log_epochs[None] + np.log(curve.unique))[0], dtype=np.float64)


def _thinned(curve: Curve) -> list[int]:
    """Return the places of up to MOST_POINTS points, even in the log of the epochs, with the lowest and the ends."""
    places = curve.log_epochs
    if len(places) <= MOST_POINTS:
        return [*range(len(places))]
    wanted = np.searchsorted(places, np.linspace(places[0], places[-1], MOST_POINTS - 1)).clip(max=len(places) - 1)
    return sorted({*wanted.tolist(), int(curve.log_loss.argmin())})


def _not_drawn(fit: FitResult, drawn: Sequence[Curve]) -> list[str]:
    points = points_of(fit)
    others = len(points) - sum(len(curve.rows) for curve in drawn)
    said = []
    if others:
        said.append(
            f"{others} of the {len(points)} points are not drawn, but the law uses them: points of further sizes and "
            "numbers of unique tokens, and single points that make no curve."
        )
    thinned = sum(len(curve.log_epochs) - len(_thinned(curve)) for curve in drawn)
    if thinned:
        said.append(f"Of long curves, {MOST_POINTS} points are drawn, and the lowest: {thinned} are not.")
    return said


def _turning(fit: FitResult) -> str:
    found: list[BestEpochs] = summary(fit)["best_epochs"]
    if any(not best.withheld for best in found):
        return "A diamond is the best number of epochs, with its 95 % interval: beyond it, reading again does harm."
    most = float((points_of(fit).tokens / np.asarray(points_of(fit).unique)).max())
    return f"No model turns upward within the runs, which have up to {text.number(most, digits=3)} epochs."


def uncertainty(fit: FitResult) -> list[str]:
    """Say what the intervals hold, and which parameters mean nothing because no loss turns upward."""
    law = fit.surface
    said = []
    known = fit.choice is not None and math.isfinite(fit.choice.own.log_epochs_error)
    said.append(f"{WITH_FORM} Those of the best use of compute hold the noise only." if known else NOISE_ONLY)
    turn = getattr(law, "turn", ())
    if turn and set(turn) <= {*fit.at_bound, *fit.fixed}:
        said.append(
            f"No loss of these runs turns upward, so {text.listed(turn)} of {fit.law} are not determined and mean "
            "nothing, however narrow their intervals: this law says nothing about where overfitting starts."
        )
    return said


def repeated_tables(fits: Sequence[FitResult], crossing: Crossover | str = "") -> list[Table]:
    """Tabulate the best epochs, the best use of each C, and where one objective overtakes the other."""
    fitted = [fit for fit in fits if fit.law in UNIQUE and fit.surface is not None and fit.points is not None]
    if not fitted:
        return []
    summaries = {fit.label: summary(fit) for fit in fitted}
    best = [(label or MISSING, *_epochs_row(one)) for label, found in summaries.items() for one in found["best_epochs"]]
    spent = [
        (label or MISSING, *_spending_row(one)) for label, found in summaries.items() for one in found["allocation"]
    ]
    holds = "; ".join(dict.fromkeys(found["holds"] for found in summaries.values()))
    tables = [
        Table(
            heads=("objective", "parameters N", "best epochs", "95 % interval", "loss there"),
            rows=best,
            words=("objective",),
            caption=f"The best number of epochs of a size: {holds}.",
        ),
        Table(
            heads=("objective", "compute C", "parameters N", "epochs", "loss", "remark"),
            rows=spent,
            words=("objective", "remark"),
            caption=f"The best use of at most C on a fixed text: {holds}. {NOISE_ONLY}",
        ),
    ]
    return [*tables, *([] if isinstance(crossing, str) else [_crossings(crossing)])]


def _epochs_row(one: BestEpochs) -> tuple[str, ...]:
    if one.withheld:
        return text.count(one.N), one.withheld, MISSING, MISSING
    low, high = one.ci
    ends = f"above {text.number(low)}" if math.isfinite(low) and not math.isfinite(high) else text.interval(one.ci)
    return text.count(one.N), text.number(one.epochs, digits=3), ends, text.number(one.L)


def _spending_row(one: Spending) -> tuple[str, ...]:
    if one.withheld:
        return text.flops(one.C), MISSING, MISSING, MISSING, one.withheld
    shown = {"N": text.count(one.N), "epochs": text.number(one.epochs, digits=3), "L": text.number(one.L)}
    cells = [
        f"{value} ({text.interval(one.ci[key], 'count' if key == 'N' else 'number')})" if key in one.ci else value
        for key, value in shown.items()
    ]
    remarks = [f"N is the {one.edge} size considered"] if one.edge else []
    if one.used < 0.9 * one.C:
        remarks.append(f"spends only {text.flops(one.used)}: more raises the loss")
    return text.flops(one.C), *cells, "; ".join(remarks) or MISSING


def _crossings(found: Crossover) -> Table:
    late, early = found.names
    rows = [
        (
            text.count(one.U),
            MISSING if one.withheld else text.flops(one.C),
            MISSING if one.withheld else _ends_of_flops(one.ci),
            text.number(one.L_first),
            text.number(one.L_second),
            one.withheld.replace("the first", late) or f"{late} overtakes",
        )
        for one in found.at
    ]
    heads = ("unique tokens U", "overtakes at C", "95 % interval", f"lowest loss, {late}", f"lowest loss, {early}")
    notes = " ".join(f"{note[0].upper()}{note[1:]}." for note in found.notes)
    return Table(
        heads=(*heads, "verdict"),
        rows=rows,
        words=("verdict",),
        caption=f"Where {late} overtakes {early}, each at its own best size and epochs. {NOISE_ONLY} {notes}".strip(),
    )


def _ends_of_flops(ci: tuple[float, float]) -> str:
    low, high = ci
    if math.isnan(low) or (low <= 0 and math.isinf(high)):
        return "no interval"
    if low <= 0:
        return f"below {text.flops(high)}"
    return f"above {text.flops(low)}" if math.isinf(high) else f"{text.flops(low)} to {text.flops(high)}"


def of_label(fits: Mapping[str, FitResult], label: str) -> FitResult | None:
    """Return the fit of repeated data of an objective, if there is one."""
    return next((fit for fit in fits.values() if fit.label == label), None)
