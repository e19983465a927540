"""Draw the isoFLOP curves of a fit, and N*, D* and L* of several fits against C.

matplotlib is imported by the functions that draw.
"""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm.core import text
from dlm.core.files import write_atomic
from dlm.core.names import inside
from dlm.fit.fitted import Minimum, Optimum
from dlm.fit.isoflop.fit import curve_of
from dlm.fit.laws import LAW_NAMES
from dlm.fit.optimum import as_rows, optima
from dlm.fit.points import UNBOUNDED, Array
from dlm.fit.result import FitResult
from dlm.report.look import (
    BUDGET_SHAPES,
    FAINT,
    FONTS_IN_FILES,
    INK,
    LAW_COLOURS,
    PAPER,
    Size,
    budget_colours,
    drawing,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


BAND_POINTS = 14  # number of values of C at which lines and bands are computed
MINIMUM = "minimum, 95 % interval"
PANELS = {
    "N": "best size N*, parameters",
    "D": "best training length D*, tokens",
    "L": "loss L* there, nats/token",
}


METADATA: Mapping[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


Fits = Mapping[str, FitResult] | Iterable[FitResult]


def isoflop_figure(
    isoflop: FitResult,
    surface: FitResult | None = None,
    *,
    loss_se: Sequence[float] | None = None,
    size: str = "page",
    style: str | None = None,
) -> Figure:
    """Draw the loss over model size: the runs, the curve, and the minimum with its 95 % interval for each budget.

    Args:
        isoflop: A fit with isoFLOP minima. A curve without a usable minimum is dashed, with hollow points.
        surface: A fitted surface, drawn as a dotted line for each budget.
        loss_se: The Monte Carlo standard error of each point of ``isoflop``, drawn as a bar; NaN where unknown.
        size: 'page', 'single_column', 'double_column' or 'slides' (``look.SIZES``).
        style: A matplotlib style file, or the name of one of its styles, which changes dlm's own style.
    """
    import matplotlib.pyplot as plt

    drawn_surface = surface if surface is not None and surface.params else None
    with drawing(size, style) as chosen:
        figure, axes = plt.subplots(figsize=(chosen.width, chosen.height), layout="constrained")
        colours, shapes = budget_colours(len(isoflop.minima)), itertools.cycle(BUDGET_SHAPES)
        for minimum, colour, shape in zip(isoflop.minima, colours, shapes, strict=False):  # the shapes never end
            _curve(axes, isoflop, minimum, chosen, colour=colour, shape=shape, loss_se=loss_se)
            if drawn_surface is not None:
                _surface_curve(axes, isoflop, drawn_surface, minimum, chosen, colour)
        axes.set(xscale="log", xlabel="parameters N", ylabel="validation loss, nats/token")
        _log_axis(axes.xaxis, text.count, labelled=(1.0, 2.0, 5.0))
        axes.margins(x=0.09)
        _legend(axes, chosen, curve=isoflop.curve, has_surface=drawn_surface is not None)
    plt.close(figure)  # pyplot would keep the figure in memory, and a notebook would show it twice
    return figure


def allocation_figure(fits: Fits, *, size: str = "page", style: str | None = None) -> Figure:
    """Draw N*, D* and L* against C: the minima with their intervals, and the line and 95 % band of each method.

    The area beyond the highest budget of the runs is grey. ``size`` and ``style`` are as in ``isoflop_figure``.
    """
    import matplotlib.pyplot as plt

    listed = fits.values() if isinstance(fits, Mapping) else fits
    drawn = [fit for fit in listed if fit.points is not None]
    budgets = [c for fit in drawn if fit.points is not None for c in fit.points.budgets().tolist()]
    levels = [*budgets, *(c for fit in drawn for c in fit.at)]
    compute = np.geomspace(min(levels), max(levels), BAND_POINTS)
    lines = [(fit, optima(fit, compute)) for fit in drawn]
    with drawing(size, style) as chosen:
        shape = (len(PANELS) // chosen.across, chosen.across)
        figure, panels = plt.subplots(*shape, figsize=(chosen.width, chosen.panels), layout="constrained")
        for axes, (key, name) in zip(panels.flat, PANELS.items(), strict=True):
            is_lowest = chosen.across > 1 or axes is panels.flat[-1]
            axes.set(xscale="log", title=name, xlabel="compute C, FLOPs" if is_lowest else "")
            for fit, line in lines:
                _law(axes, fit, key, line, chosen)
            _beyond(axes, max(budgets), compute[-1], chosen)
            _log_axis(axes.xaxis, text.flops, labelled=(1.0,), marked=(3.0,))
            if key != "L":
                axes.set_yscale("log")
                _log_axis(axes.yaxis, text.count, labelled=(1.0, 2.0, 5.0))
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), chosen.legend))
    plt.close(figure)
    return figure


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write NAME.png, NAME.svg and NAME.pdf without dates, so that the same figure gives the same bytes.

    ``name`` is a ``slug``, or made of slugs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kind in METADATA:
        write_atomic(inside(folder, f"{name}.{kind}"), _bytes(figure, kind, name))


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an <svg> element that adopts the colours and the typeface of the page.

    Args:
        figure: The figure.
        name: The prefix of all ids, a ``slug`` or made of slugs, so that several figures can stand on one page.
        description: The text for screen readers.
    """
    svg = _bytes(figure, "svg", name).decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"""font: ([0-9.]+)px [^;"]*""", r"font-size: \1px; font-family: inherit", svg)
    svg = svg.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)


def _bytes(figure: Figure, kind: str, name: str) -> bytes:
    import matplotlib as mpl

    buffer = io.BytesIO()
    face = "none" if kind == "svg" else "white"
    with mpl.rc_context({**FONTS_IN_FILES, "svg.hashsalt": name}):
        figure.savefig(buffer, format=kind, metadata=METADATA[kind], dpi=180, facecolor=face)
    return buffer.getvalue()


def _curve(
    axes: Axes,
    fit: FitResult,
    minimum: Minimum,
    size: Size,
    *,
    colour: str,
    shape: str,
    loss_se: Sequence[float] | None,
) -> None:
    assert fit.points is not None
    rows = fit.points.budget == minimum.budget
    sizes, loss = fit.points.params[rows], fit.points.loss[rows]
    bars = None if loss_se is None else np.nan_to_num(np.asarray(loss_se, dtype=float)[rows])
    face = colour if minimum.usable else PAPER
    axes.errorbar(
        sizes, loss, yerr=bars, fmt=shape, color=colour, mfc=face, mew=1.2 * size.line, elinewidth=size.line, zorder=3
    )
    if np.isfinite(minimum.centre):
        width, dashes = (1.7, "-") if minimum.usable else (1.0, "--")
        axes.plot(*curve_of(fit, minimum), color=colour, lw=width * size.line, ls=dashes)
    end = max(zip(sizes, loss, strict=True))
    note = text.flops(minimum.budget) + ("" if minimum.usable else ", refused")
    place = (0.6 * size.text, 0.9 * size.text)
    axes.annotate(note, end, place, textcoords="offset points", color=colour, va="center", fontsize=0.9 * size.text)
    if minimum.usable:
        _minimum(axes, minimum, size, colour)


def _minimum(axes: Axes, minimum: Minimum, size: Size, colour: str) -> None:
    ends = minimum.ci.get("N")
    if ends is not None and np.isfinite(ends).all():
        axes.plot(ends, [minimum.L] * 2, color=INK, lw=1.4 * size.line, solid_capstyle="butt", zorder=4)
    axes.plot(minimum.N, minimum.L, "D", ms=7.5 * size.line, color=colour, mec=INK, mew=1.4 * size.line, zorder=5)


def _surface_curve(
    axes: Axes, isoflop: FitResult, surface: FitResult, minimum: Minimum, size: Size, colour: str
) -> None:
    assert isoflop.points is not None and surface.surface is not None
    sizes = isoflop.points.params[isoflop.points.budget == minimum.budget]
    grid = np.linspace(np.log(sizes.min()), np.log(sizes.max()), 80)
    log_d = np.log(minimum.budget) - surface.cost.log_per_token(grid)
    loss = surface.surface.predict(as_rows(surface.surface, surface.params), grid[None], log_d[None])[0]
    axes.plot(np.exp(grid), loss, color=colour, lw=1.2 * size.line, ls=(0, (1, 2)), alpha=0.9)


def _legend(axes: Axes, size: Size, *, curve: str, has_surface: bool) -> None:
    """Draw the legend of the shapes; the budgets are written next to their curves."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], marker="o", ls="", color=FAINT, label="run"),
        Line2D([], [], color=FAINT, label=f"{curve or 'curve'} of one budget"),
        Line2D([], [], marker="D", color=INK, mfc=FAINT, mew=1.4 * size.line, ms=7 * size.line, label=MINIMUM),
    ]
    if has_surface:
        handles.append(Line2D([], [], color=FAINT, lw=1.2 * size.line, ls=(0, (1, 2)), label="combined law"))
    axes.figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), size.legend))


def _law(axes: Axes, fit: FitResult, key: str, line: Mapping[float, Optimum], size: Size) -> None:
    """Draw N, D or L (``key``) of one method: the line with its band, and the minima with their intervals."""
    colour, name = LAW_COLOURS[fit.law], LAW_NAMES[fit.law]
    if line:
        values, ends = _values(line.values(), key)
        axes.plot(list(line), values, color=colour, label=name, ls="-" if fit.law == "combined" else "--")
        axes.fill_between(list(line), ends[:, 0], ends[:, 1], color=colour, alpha=0.15, lw=0)
    if fit.usable:
        values, ends = _values(fit.usable, key)
        bars = np.nan_to_num(np.abs(ends - values[:, None])).T
        label = "isoFLOP minima" if fit.law == "isoflop" else None
        axes.errorbar(
            [m.budget for m in fit.usable], values, yerr=bars, fmt="D", ms=5.5 * size.line, color=colour, mec=INK,
            mew=0.9 * size.line, capsize=2.5 * size.line, elinewidth=size.line, label=label, zorder=4,
        )  # fmt: skip


def _values(best: Iterable[Optimum | Minimum], key: str) -> tuple[Array, Array]:
    """Return N, D or L of n optima, (n,), and the ends of their intervals, (n, 2), NaN without an interval."""
    pairs = [(getattr(one, key), one.ci.get(key, UNBOUNDED)) for one in best]
    return np.array([value for value, _ in pairs]), np.array([ends for _, ends in pairs])


def _beyond(axes: Axes, top: float, right: float, size: Size) -> None:
    """Shade the area from the highest budget of the runs to the C at which the lines end."""
    if right > 1.05 * top:
        axes.axvspan(top, right, color=FAINT, alpha=0.13, lw=0)
        middle = (np.sqrt(top * right), 0.03)
        axes.annotate(
            "beyond the runs", middle, xycoords=("data", "axes fraction"), ha="center", fontsize=0.85 * size.text
        )


def _log_axis(
    axis: Axis, show: Callable[[float], str], *, labelled: Sequence[float], marked: Sequence[float] = ()
) -> None:
    """Place labels and unlabelled marks on a logarithmic axis at multiples of the powers of ten.

    Args:
        axis: The axis.
        show: Formats a value for its label.
        labelled: The multiples with a label.
        marked: The multiples with a mark and no label.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    axis.set_major_locator(LogLocator(subs=labelled, numticks=20))
    axis.set_minor_locator(LogLocator(subs=marked, numticks=20) if marked else NullLocator())
    axis.set_major_formatter(lambda value, _: show(value))
    axis.set_minor_formatter(NullFormatter())
