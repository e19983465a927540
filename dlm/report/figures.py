"""figures: FitResults -> matplotlib figures of the isoFLOP curves and of N*, D*, L* against C. Called by report.

matplotlib is imported by the functions that draw. Sequential colours and the two methods' colours stay apart for
colour-blind readers, and shapes and labels say the same as the colours do.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm.core import text
from dlm.fit import optimum
from dlm.fit.fitted import Minimum
from dlm.fit.isoflop.fit import curve_of
from dlm.fit.laws import LAW_NAMES
from dlm.fit.optimum import optima
from dlm.fit.result import FitResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK, FAINT, PAPER = "#1f2933", "#9aa5b1", "#fffffe"  # the page replaces ink and paper by its own


BUDGET_ANCHORS = ("#3f6fb5", "#8561b8", "#c4508f", "#dd7630")  # low to high


LAW_COLOURS = {
    "isoflop": "#c4513b",
    "chinchilla": "#3f6fb5",
    "envelope": "#2a9d8f",
    "skaling": "#7a5195",
    "tied": "#8d6e3f",
    "data-constrained": "#4f7942",
}


BAND_POINTS = 14


STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "figure.dpi": 110,
}


Fits = Mapping[str, FitResult] | Iterable[FitResult]


def isoflop_figure(
    isoflop: FitResult, surface: FitResult | None = None, *, loss_se: Sequence[float] | None = None
) -> Figure:
    """Loss over size, one curve per budget: runs, curve, its minimum with interval; the surface dotted.

    loss_se: the Monte Carlo standard error of each of the result's points, drawn as bars. A refused curve is hollow.
    """
    with _drawing() as (plt, figures):
        figure, axes = plt.subplots(figsize=(9.0, 5.0), layout="constrained")
        figures.append(figure)
        colours = budget_colours(len(isoflop.minima))
        for minimum, colour in zip(isoflop.minima, colours, strict=True):
            _curve(axes, isoflop, minimum, colour, loss_se)
            if surface is not None and surface.params:
                _surface_curve(axes, isoflop, surface, minimum, colour)
        _human_axis(axes, "x", text.count)
        axes.set_xlabel("parameters N")
        axes.set_ylabel("validation loss, nats/token")
        axes.margins(x=0.09)
        _explain(axes, plt, curve=isoflop.curve, has_surface=surface is not None and bool(surface.params))
    return figures[0]


def allocation_figure(fits: Fits) -> Figure:
    """N*, D* and L* against C: minima with intervals, each method's line and 95 % band; grey beyond the runs."""
    chosen = [f for f in _listed(fits) if f.points is not None]
    with _drawing() as (plt, figures):
        figure, panels = plt.subplots(1, 3, figsize=(10.2, 3.8), layout="constrained")
        figures.append(figure)
        names = (
            ("N", "best size N*, parameters"),
            ("D", "best training length D*, tokens"),
            ("L", "loss there, nats/token"),
        )
        for axes, (key, name) in zip(panels, names, strict=True):
            axes.set_xscale("log")
            axes.set_title(name)
            axes.set_xlabel("compute C, FLOPs")
            for fit in chosen:
                _law(axes, fit, key, _compute(chosen))
            _beyond(axes, chosen)
            _compute_axis(axes)
            if key != "L":
                axes.set_yscale("log")
                _human_axis(axes, "y", text.count)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figures[0]


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write NAME.png, .svg and .pdf, without dates, so that the same figure is the same file."""
    from dlm.core.files import write_atomic

    folder.mkdir(parents=True, exist_ok=True)
    for kind, metadata in (("png", {}), ("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
        write_atomic(folder / f"{name}.{kind}", _bytes(figure, kind, metadata, name))


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an <svg> element that takes the page's ink, paper and typeface; ids are prefixed with `name`."""
    svg = _bytes(figure, "svg", {"Date": None}, name).decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"""font: ([0-9.]+)px [^;"]*""", r"font-size: \1px; font-family: inherit", svg)
    svg = svg.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def budget_colours(count: int) -> list[str]:
    """`count` colours from low to high budgets, even in lightness."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    ramp = LinearSegmentedColormap.from_list("budgets", BUDGET_ANCHORS)
    return [to_hex(ramp(k / max(count - 1, 1))) for k in range(count)]


@contextmanager
def _drawing() -> Iterator[tuple[Any, list[Figure]]]:
    """pyplot in the house style; figures made inside are taken out of pyplot's keeping, so that none leaks."""
    import matplotlib.pyplot as plt

    figures: list[Figure] = []
    with plt.rc_context(STYLE):
        yield plt, figures
    for figure in figures:
        plt.close(figure)


def _listed(fits: Fits) -> list[FitResult]:
    return list(fits.values()) if isinstance(fits, Mapping) else list(fits)


def _bytes(figure: Figure, kind: str, metadata: Mapping[str, str | None], salt: str) -> bytes:
    import matplotlib as mpl

    buffer = io.BytesIO()
    face = "none" if kind == "svg" else "white"
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(buffer, format=kind, metadata=dict(metadata), dpi=180, facecolor=face)
    return buffer.getvalue()


def _curve(axes: Axes, fit: FitResult, minimum: Minimum, colour: str, loss_se: Sequence[float] | None) -> None:
    assert fit.points is not None
    rows = fit.points.budget == minimum.budget
    sizes, loss = fit.points.params[rows], fit.points.loss[rows]
    bars = None if loss_se is None else np.nan_to_num(np.asarray(loss_se, dtype=float)[rows])
    face = colour if minimum.usable else PAPER
    axes.errorbar(sizes, loss, yerr=bars, fmt="o", ms=4.5, color=colour, mfc=face, mew=1.2, elinewidth=1, zorder=3)
    if np.isfinite(minimum.centre):
        width, style = (1.7, "-") if minimum.usable else (1.0, "--")
        axes.plot(*curve_of(fit, minimum), color=colour, lw=width, ls=style)
    last = sizes.argmax()
    note = text.flops(minimum.budget) + ("" if minimum.usable else ", refused")
    axes.annotate(
        note, (sizes[last], loss[last]), (6, 9), textcoords="offset points", color=colour, va="center", fontsize=9
    )
    if minimum.usable:
        _minimum(axes, minimum, colour)


def _minimum(axes: Axes, minimum: Minimum, colour: str) -> None:
    ends = minimum.ci.get("N")
    if ends is not None and np.isfinite(ends).all():
        axes.plot(ends, [minimum.L] * 2, color=INK, lw=1.4, solid_capstyle="butt", zorder=4)
    axes.plot(minimum.N, minimum.L, "D", ms=7.5, color=colour, mec=INK, mew=1.4, zorder=5)


def _surface_curve(axes: Axes, isoflop: FitResult, surface: FitResult, minimum: Minimum, colour: str) -> None:
    assert isoflop.points is not None and surface.surface is not None
    sizes = isoflop.points.params[isoflop.points.budget == minimum.budget]
    grid = np.linspace(np.log(sizes.min()), np.log(sizes.max()), 80)
    log_d = np.log(minimum.budget) - surface.cost.log_per_token(grid)
    loss = surface.surface.predict(optimum.as_rows(surface.surface, surface.params), grid[None], log_d[None])[0]
    axes.plot(np.exp(grid), loss, color=colour, lw=1.2, ls=(0, (1, 2)), alpha=0.9)


def _explain(axes: Axes, plt: Any, *, curve: str, has_surface: bool) -> None:
    """One legend for the shapes; the budgets are written beside their curves."""
    line = plt.Line2D
    handles = [
        line([], [], marker="o", ls="", color=FAINT, ms=4.5, label="run"),
        line([], [], color=FAINT, lw=1.7, label=f"{curve or 'curve'} of one budget"),
        line([], [], marker="D", color=INK, mfc=FAINT, mec=INK, mew=1.4, ms=7, lw=1.4, label="minimum, 95 % interval"),
    ]
    if has_surface:
        handles.append(line([], [], color=FAINT, lw=1.2, ls=(0, (1, 2)), label="fitted surface"))
    axes.figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))


def _compute(fits: Sequence[FitResult]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The C at which lines and bands are drawn: from the lowest budget to the highest C reported."""
    levels = [c for f in fits if f.points is not None for c in (*f.points.budgets().tolist(), *f.at)]
    return np.geomspace(min(levels), max(levels), BAND_POINTS)


def _law(axes: Axes, fit: FitResult, key: str, compute: Iterable[float]) -> None:
    colour, name = LAW_COLOURS[fit.law], LAW_NAMES[fit.law]
    best = optima(fit, compute)
    if best:
        values = [getattr(o, key) for o in best.values()]
        axes.plot(list(best), values, color=colour, lw=1.8, label=name, ls="-" if fit.law == "chinchilla" else "--")
        ends = np.array([o.ci.get(key, (np.nan, np.nan)) for o in best.values()])
        axes.fill_between(list(best), ends[:, 0], ends[:, 1], color=colour, alpha=0.15, lw=0)
    usable = [m for m in fit.minima if m.usable]
    if usable:
        middle = np.array([getattr(m, key) for m in usable])
        ends = np.array([m.ci.get(key, (np.nan, np.nan)) for m in usable])
        bars = np.nan_to_num(np.abs(ends - middle[:, None])).T
        label = "isoFLOP minima" if fit.law == "isoflop" else None
        axes.errorbar(
            [m.budget for m in usable], middle, yerr=bars, fmt="D", ms=5.5, color=colour, mec=INK, mew=0.9, capsize=2.5,
            label=label, zorder=4,
        )  # fmt: skip


def _beyond(axes: Axes, fits: Sequence[FitResult]) -> None:
    """Grey where no run has been."""
    top = max(float(f.points.budgets()[-1]) for f in fits if f.points is not None)
    right = max((c for f in fits for c in f.at), default=top)
    if right > 1.05 * top:
        axes.axvspan(top, right, color=FAINT, alpha=0.13, lw=0)
        axes.annotate(
            "beyond the runs",
            (np.sqrt(top * right), 0.03),
            xycoords=("data", "axes fraction"),
            ha="center",
            fontsize=8.5,
        )


def _human_axis(axes: Axes, which: str, style: Any) -> None:
    """A logarithmic axis labelled 10k, 20k, 50k, 100k."""
    from matplotlib.ticker import LogLocator, NullLocator

    set_scale = axes.set_xscale if which == "x" else axes.set_yscale
    set_scale("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
    axis.set_major_formatter(lambda value, _: style(value))
    axis.set_minor_locator(NullLocator())


def _compute_axis(axes: Axes) -> None:
    """C labelled 1e11, 1e12, with marks at 3e11, 3e12."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,), numticks=12))
    axes.xaxis.set_minor_locator(LogLocator(subs=(3.0,), numticks=12))
    axes.xaxis.set_major_formatter(lambda value, _: text.flops(value))
    axes.xaxis.set_minor_formatter(NullFormatter())
