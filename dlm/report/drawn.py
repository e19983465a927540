"""Draw a chart with matplotlib: for paper, for slides, and for browsers without JavaScript."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm.core.names import printable
from dlm.report import ticks
from dlm.report.chart import Axis, Chart, Contours, Panel, Series
from dlm.report.look import CONTOUR_COLOURS, FAINT, INK, PAPER, Size, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis as DrawnAxis
    from matplotlib.figure import Figure

DASHES: dict[str, Any] = {"solid": "-", "dash": "--", "dot": (0, (1, 2))}
BAR_WIDTH = 0.8  # of all bars at one place together


def draw(chart: Chart, *, size: str = "page", style: str | None = None) -> Figure:
    """Draw a chart.

    Args:
        chart: The chart.
        size: 'page', 'single_column', 'double_column' or 'slides' (``look.SIZES``).
        style: A matplotlib style file, or the name of one of its styles, which changes dlm's own style.
    """
    import matplotlib.pyplot as plt

    with drawing(size, style) as chosen:
        shape, height = _grid(len(chart.panels), chosen)
        figure, found = plt.subplots(
            *shape, figsize=(chosen.width, height), layout="constrained", squeeze=False, subplot_kw={"axisbelow": True}
        )
        for axes, panel in zip(found.flat, chart.panels, strict=True):
            _panel(axes, panel, chosen, is_small=len(chart.panels) > 1)
        _legend(figure, list(found.flat), chart, chosen)
    plt.close(figure)  # pyplot would keep the figure in memory, and a notebook would show it twice
    return figure


def _grid(count: int, size: Size) -> tuple[tuple[int, int], float]:
    """Return (rows and columns of ``count`` panels, the height of the figure)."""
    if count == 1:
        return (1, 1), size.height
    return ((1, count), size.panels) if size.across > 1 else ((count, 1), size.panels * count / 3)


def words(said: str) -> str:
    """Return a text as matplotlib draws it letter by letter: a dollar would start a formula."""
    return printable(said).replace("$", r"\$")


def _panel(axes: Axes, panel: Panel, size: Size, *, is_small: bool) -> None:
    axes.set(xlabel=words(panel.x.title), ylabel=words(panel.y.title), title=words(panel.title))
    axes.set(xscale="log" if panel.x.is_log else "linear", yscale="log" if panel.y.is_log else "linear")
    places = list(dict.fromkeys(str(x) for one in panel.series if _is_named(one) for x in one.x))
    bars = [one for one in panel.series if one.mark == "bar"]
    if panel.contours is not None:
        _contours(axes, panel.contours)
    for one in panel.series:
        if not len(one.x):
            continue
        x = np.array([places.index(str(x)) for x in one.x] if _is_named(one) else one.x, dtype=float)
        if one.mark == "bar":
            width = BAR_WIDTH / len(bars)
            shift = (bars.index(one) - (len(bars) - 1) / 2) * width if _is_named(one) else 0.0
            _bars(axes, one, x + shift, width if _is_named(one) else _bar_width(x), size)
        else:
            _marks(axes, one, x, size)
    most = 5 if is_small or size.width < 4 else 9
    for zone in panel.zones:
        _zone(axes, zone.start, zone.end, words(zone.label), size)
    if places:
        step = max(1, -(-len(places) // (most + 3)))
        axes.set_xticks(range(0, len(places), step), [words(name) for name in places[::step]])
    else:
        _place_marks(axes.xaxis, panel.x, most)
    _place_marks(axes.yaxis, panel.y, 7)
    axes.margins(x=0.09 if any(one.label for one in panel.series) else 0.05)


def _is_named(series: Series) -> bool:
    return any(isinstance(x, str) for x in series.x)


def _bar_width(x: np.ndarray) -> float:
    gaps = np.diff(np.unique(x))
    return BAR_WIDTH * float(gaps.min()) if len(gaps) else BAR_WIDTH


def _bars(axes: Axes, series: Series, x: np.ndarray, width: float, size: Size) -> None:
    y = np.asarray(series.y, dtype=float)
    face = "none" if series.is_hollow else series.colour
    axes.bar(
        x, y, width, color=face, edgecolor=series.colour, alpha=series.opacity, label=words(series.name), zorder=2,
        yerr=_lengths(y, series.low, series.high), error_kw={"ecolor": INK, "elinewidth": size.line},
    )  # fmt: skip


def _looks(series: Series, size: Size) -> dict[str, Any]:
    """Return how points and lines look, in matplotlib's words."""
    return {
        "color": series.colour,
        "alpha": series.opacity,
        "ls": DASHES[series.dash] if "line" in series.mark else "none",
        "lw": 1.7 * size.line,
        "marker": series.shape if "point" in series.mark else "none",
        "mfc": PAPER if series.is_hollow else series.colour,
        "mec": INK if series.is_outlined else series.colour,
        "mew": 1.2 * size.line,
        "ms": (7.0 if series.is_outlined else 4.5) * size.line,
        "label": words(series.name) if series.name and not series.label else "_nolegend_",
        "zorder": 5 if series.is_outlined else 3,
    }


def _marks(axes: Axes, series: Series, x: np.ndarray, size: Size) -> None:
    y, looks = np.asarray(series.y, dtype=float), _looks(series, size)
    if "point" in series.mark:
        axes.errorbar(
            x, y, yerr=_lengths(y, series.low, series.high), xerr=_lengths(x, series.low_x, series.high_x),
            ecolor=looks["mec"], elinewidth=1.2 * size.line,
            capsize=2.0 * size.line if series.is_outlined else 0.0, **looks,
        )  # fmt: skip
    else:
        axes.plot(x, y, **looks)
        if series.low is not None and series.high is not None:
            low, high = np.asarray(series.low, dtype=float), np.asarray(series.high, dtype=float)
            axes.fill_between(x, low, high, color=series.colour, alpha=0.15 * series.opacity, lw=0)
    if series.label:
        _label(axes, series, x, y, size)


def _label(axes: Axes, series: Series, x: np.ndarray, y: np.ndarray, size: Size) -> None:
    there = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if not len(there):
        return
    last = there[np.argmax(x[there])]
    axes.annotate(
        words(series.label), (x[last], y[last]), (0.6 * size.text, 0.9 * size.text), textcoords="offset points",
        color=series.colour, va="center", fontsize=0.9 * size.text,
    )  # fmt: skip


def _lengths(at: np.ndarray, low: Sequence[float] | None, high: Sequence[float] | None) -> np.ndarray | None:
    """Return the lengths of the bars to both sides of points, (2, n), 0 where there is no interval."""
    if low is None or high is None or not len(at):
        return None
    ends = np.stack([at - np.asarray(low, dtype=float), np.asarray(high, dtype=float) - at])
    return np.where(np.isfinite(ends), np.maximum(ends, 0.0), 0.0)


def _contours(axes: Axes, contours: Contours) -> None:
    from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap

    levels = list(contours.levels)
    colours = LinearSegmentedColormap.from_list("contours", CONTOUR_COLOURS)
    grid = (contours.x, contours.y, np.ma.masked_invalid(np.asarray(contours.z, dtype=float)))
    norm = BoundaryNorm(levels, colours.N, extend="both")
    filled = axes.contourf(*grid, levels=levels, cmap=colours, norm=norm, extend="both", zorder=0.5)
    axes.contour(*grid, levels=levels, colors=PAPER, linewidths=0.5, zorder=0.6)
    bar = axes.figure.colorbar(filled, ax=axes, label=words(contours.title), ticks=levels[:: max(1, len(levels) // 8)])
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    bar.outline.set_visible(False)  # type: ignore[operator]


def _zone(axes: Axes, start: float, end: float, label: str, size: Size) -> None:
    axes.axvspan(start, end, color=FAINT, alpha=0.13, lw=0)
    middle = np.sqrt(start * end) if axes.get_xscale() == "log" else (start + end) / 2
    place = (float(middle), 0.03)
    axes.annotate(label, place, xycoords=("data", "axes fraction"), ha="center", fontsize=0.85 * size.text)


def _place_marks(axis: DrawnAxis, described: Axis, most: int) -> None:
    from matplotlib.ticker import Formatter, Locator, NullFormatter, NullLocator

    class Marks(Locator):
        def __call__(self) -> list[float]:
            low, high = axis.get_view_interval()
            return ticks.positions(low, high, described, most=most)

        def tick_values(self, vmin: float, vmax: float) -> list[float]:
            return ticks.positions(vmin, vmax, described, most=most)

    class Labels(Formatter):
        def __call__(self, value: float, pos: int | None = None) -> str:
            return ticks.shown(value, described)

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return ticks.labels([float(value) for value in values], described)

    axis.set_major_locator(Marks())
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(Labels())
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, panels: Sequence[Axes], chart: Chart, size: Size) -> None:
    """Draw one legend above all panels, each name once; series without points come first."""
    from matplotlib.lines import Line2D

    keys = [one for panel in chart.panels for one in panel.series if not len(one.x)]
    entries: dict[str, Any] = {words(one.name): Line2D([], [], **_looks(one, size)) for one in keys}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        columns = min(len(entries), size.legend)
        figure.legend(list(entries.values()), list(entries), loc="outside upper left", ncols=columns)
