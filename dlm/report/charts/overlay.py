"""Several groups of runs in one figure, such as two objectives or two sweeps: their laws, minima and multiplier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dlm.core import text
from dlm.core.objectives import OBJECTIVES
from dlm.fit.fitted import Minimum, Optimum
from dlm.fit.isoflop.fit import curve_of
from dlm.fit.multiplier import Multiplier
from dlm.fit.optimum import optima
from dlm.fit.result import FitResult
from dlm.report.chart import Axis, Chart, Panel, Series
from dlm.report.table import Table

COLOURS = ("#0b7285", "#b3541e", "#5c940d", "#862e9c", "#495057", "#c2255c")  # of the groups; they repeat
SHAPES = "os^D"
LINE_POINTS = 12  # values of C at which a law is drawn
MISSING = "–"
BOUND = (
    "The loss of masked diffusion is an upper bound on −log p, and the loss of the autoregressive model is exact: a "
    "part of the gap, and of the multiplier, is due to the bound."
)


@dataclass(frozen=True, kw_only=True)
class Side:
    """A group of runs that is compared with others."""

    name: str
    fits: Mapping[str, FitResult]  # by the name of the law: 'isoflop', 'combined'

    @property
    def objective(self) -> str:
        """The objective of the runs, '' if the table names none."""
        return next((fit.label for fit in self.fits.values()), "")

    @property
    def convention(self) -> str | None:
        """How the FLOPs of the runs are counted; None if there is no law."""
        known = [fit.points.convention for fit in self.fits.values() if fit.points is not None]
        return known[0] if known else None


def objectives_of(fits: Mapping[str, FitResult], labels: Mapping[str, str]) -> list[Side]:
    """Return a side for each objective of the fits of a sweep; ``labels`` are the names to show."""
    names = dict.fromkeys(fit.label for fit in fits.values())
    return [
        Side(name=labels.get(name) or name, fits={fit.law: fit for fit in fits.values() if fit.label == name})
        for name in names
    ]


def objectives_chart(sides: Sequence[Side], multiplier: Multiplier | str = "") -> Chart | None:
    """Overlay the laws of several objectives, with the compute multiplier at equal loss.

    Args:
        sides: One for each objective.
        multiplier: That of the second side against the first, or why there is none.
    """
    drawn = [side for side in sides if _law_of(side) is not None]
    if len(sides) < 2 or not drawn:
        return None
    return Chart(
        name="objectives",
        title="Which objective makes more of the same compute?",
        sentence=f"The law of each objective, with its runs and isoFLOP minima. {_said(multiplier)}",
        panels=growth_panels(drawn, multiplier),
        notes=bound_notes(sides),
    )


def _said(multiplier: Multiplier | str) -> str:
    if isinstance(multiplier, Multiplier):
        return _sentence(multiplier.verdict())
    return _sentence(f"no compute multiplier is given: {multiplier}") if multiplier else ""


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:].rstrip('.')}."


def bound_notes(sides: Sequence[Side]) -> list[str]:
    """Say that a loss is a bound where exact losses are compared with bounds."""
    bounds = {OBJECTIVES[side.objective].is_bound for side in sides if side.objective in OBJECTIVES}
    return [BOUND] if len(bounds) > 1 else []


def growth_panels(sides: Sequence[Side], multiplier: Multiplier | str) -> list[Panel]:
    """Return L*(C) and N*(C) of all sides, and the multiplier over the loss if there is one."""
    compute = Axis(title="compute C, FLOPs", kind="flops", is_log=True)
    best = [_along(law) if (law := _law_of(side)) else {} for side in sides]  # takes seconds with many draws
    panels = [
        Panel(
            x=compute,
            y=Axis(title="loss, nats/token") if key == "L" else Axis(title="parameters", kind="count", is_log=True),
            title="lowest loss L*" if key == "L" else "best size N*",
            series=[one for k, side in enumerate(sides) for one in _of_side(side, k, key, best[k])],
        )
        for key in "LN"
    ]
    return [*panels, *([_multiplier_panel(multiplier)] if isinstance(multiplier, Multiplier) else [])]


def _law_of(side: Side) -> FitResult | None:
    """Return the law that is drawn: the combined one, or that of the isoFLOP minima."""
    found = (side.fits.get(name) for name in ("combined", "isoflop"))
    return next((fit for fit in found if fit is not None and fit.params and fit.points is not None), None)


def _of_side(side: Side, place: int, key: str, best: Mapping[float, Optimum]) -> list[Series]:
    """Return the law of a side, its runs and its minima; runs of one budget have no law."""
    law, isoflop = _law_of(side), side.fits.get("isoflop")
    colour, shape = look_of(place)
    series = [_line(side, best, key, colour)] if best else []
    runs = next((fit for fit in (law, *side.fits.values()) if fit is not None and fit.points is not None), None)
    if key == "L" and runs is not None:
        series.append(_runs(side, runs, colour, shape))
    minima = [] if isoflop is None else isoflop.usable
    series += [_minima(side, minima, key, colour, shape)] if minima else []
    return [replace(one, name=side.name) for one in series[:1]] + series[1:]  # the entry in the legend


def look_of(place: int) -> tuple[str, str]:
    """Return the colour and the shape of the group at a place in the order of the groups."""
    return COLOURS[place % len(COLOURS)], SHAPES[place % len(SHAPES)]


def _along(law: FitResult) -> Mapping[float, Optimum]:
    """Return the best use of each C at which the law is drawn."""
    assert law.points is not None
    spent = law.points.flops
    return optima(law, np.geomspace(spent.min(), spent.max(), LINE_POINTS).tolist())


def _line(side: Side, best: Mapping[float, Optimum], key: str, colour: str) -> Series:
    low, high = _ends(list(best.values()), key)
    return Series(
        x=list(best),
        y=[getattr(one, key) for one in best.values()],
        mark="line",
        group=side.name,
        colour=colour,
        low=low,
        high=high,
    )


def _ends(found: Sequence[Optimum | Minimum], key: str) -> tuple[list[float] | None, list[float] | None]:
    """Return the ends of the intervals; None if one of them is not known."""
    ends = np.array([one.ci.get(key, (np.nan, np.nan)) for one in found], dtype=np.float64)
    if not len(ends) or not np.isfinite(ends).all():
        return None, None
    return ends[:, 0].tolist(), ends[:, 1].tolist()


def _runs(side: Side, fit: FitResult, colour: str, shape: str) -> Series:
    assert fit.points is not None
    points, ids = fit.points, fit.runs.get("run_id", ()) if fit.runs else ()
    hover = [
        f"{side.name}{f', {ids[k]}' if len(ids) == len(points) else ''}: N = {text.count(float(points.params[k]))}, "
        f"D = {text.count(float(points.tokens[k]))}"
        for k in range(len(points))
    ]
    return Series(
        x=points.flops.tolist(), y=points.loss.tolist(), group=side.name, colour=colour, shape=shape, opacity=0.35,
        hover=hover,
    )  # fmt: skip


def _minima(side: Side, minima: Sequence[Minimum], key: str, colour: str, shape: str) -> Series:
    low, high = _ends(minima, key)
    return Series(
        x=[one.budget for one in minima],
        y=[getattr(one, key) for one in minima],
        group=side.name,
        colour=colour,
        shape=shape,
        is_outlined=True,
        low=low,
        high=high,
        hover=[
            f"{side.name}, isoFLOP minimum: N* = {text.count(one.N)}, D* = {text.count(one.D)}, "
            f"L* = {text.number(one.L)}"
            for one in minima
        ],
    )


def _multiplier_panel(found: Multiplier) -> Panel:
    low, high = np.array(found.ci, dtype=np.float64).T
    is_known = bool(np.isfinite(low).all() and np.isfinite(high).all())
    first, second = found.names
    return Panel(
        x=Axis(title="loss that both reach, nats/token"),
        y=Axis(title="compute multiplier"),
        title="compute multiplier at equal loss",
        series=[
            Series(
                x=found.losses,
                y=found.multiplier,
                mark="line and point",
                colour="#1f2933",
                low=low.tolist() if is_known else None,
                high=high.tolist() if is_known else None,
                hover=[
                    f"{second} needs {text.number(times, digits=3)} times the compute of {first}: "
                    f"{text.flops(other)} against {text.flops(own)} FLOPs"
                    for times, own, other in zip(found.multiplier, found.C_first, found.C_second, strict=True)
                ],
            )
        ],
    )


def isoflop_overlay(sides: Sequence[Side]) -> Chart | None:
    """Overlay the isoFLOP curves of several groups, one colour for each group."""
    series = [one for k, side in enumerate(sides) for one in _curves(side, k)]
    if not series:
        return None
    return Chart(
        name="isoflop-minima",
        title="Where do their minima lie?",
        sentence=(
            "Each curve spends one budget on models of several sizes; one colour is one group of runs, and an outlined "
            "mark is a minimum with its 95 % interval."
        ),
        panels=[
            Panel(
                x=Axis(title="parameters N", kind="count", is_log=True),
                y=Axis(title="validation loss, nats/token"),
                series=series,
            )
        ],
    )


def _curves(side: Side, place: int) -> list[Series]:
    fit = side.fits.get("isoflop")
    if fit is None or fit.points is None or not fit.minima:
        return []
    colour, shape = look_of(place)
    series: list[Series] = []
    for minimum in fit.minima:
        rows = fit.points.at_budget(minimum.budget)
        is_first = not series
        budget = f"{side.name}, {text.flops(minimum.budget)} FLOPs"
        points = Series(
            x=rows.params.tolist(), y=rows.loss.tolist(), name=side.name if is_first else "", group=side.name,
            colour=colour, shape=shape, opacity=0.6, is_hollow=not minimum.usable, hover=[budget] * len(rows),
        )  # fmt: skip
        series.append(points)
        if minimum.usable:
            x, y = curve_of(fit, minimum)
            line = Series(x=x.tolist(), y=y.tolist(), mark="line", group=side.name, colour=colour, opacity=0.8)
            low, high = _ends([minimum], "N")
            best = Series(
                x=[minimum.N], y=[minimum.L], group=side.name, colour=colour, shape=shape, is_outlined=True,
                low_x=low, high_x=high, hover=[f"{budget}: N* = {text.count(minimum.N)}"],
            )  # fmt: skip
            series += [line, best]
    return series


def multiplier_table(found: Multiplier) -> Table:
    """Tabulate the compute that both need for equal loss."""
    first, second = found.names
    rows = [
        (text.number(loss), text.flops(own), text.flops(other), text.number(times, digits=3), _interval(ci))
        for loss, own, other, times, ci in zip(
            found.losses, found.C_first, found.C_second, found.multiplier, found.ci, strict=True
        )
    ]
    heads = ("loss", f"C of {first}", f"C of {second}", "multiplier", f"{found.level:.0%} interval")
    return Table(heads=heads, rows=rows, words=(), caption=_sentence(found.verdict()))


def _interval(ci: tuple[float, float]) -> str:
    return text.interval([float(f"{end:.3g}") for end in ci])
