"""What a figure shows, apart from how it is drawn: axes, series of points, lines, bands and contours.

A figure is described once, as a ``Chart``. It is drawn twice: by matplotlib, for paper and for browsers without
JavaScript, and by plotly, for the page on which one can hover, zoom and toggle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

# How the values along an axis are written: 'percent' writes 0.02 as '2 %', and 'duration' takes seconds.
Kind = Literal["number", "count", "flops", "percent", "duration"]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis of a panel."""

    title: str  # the quantity and its unit, as in 'validation loss, nats/token'
    kind: Kind = "number"
    is_log: bool = False


@dataclass(frozen=True, kw_only=True)
class Series:
    """Values that belong together: the runs of one budget, the curve of one fit, one bar for each cell.

    A series without points is an entry of the legend on paper alone, and explains a mark of other series.

    Attributes:
        x: The position of each point, (n,). Texts if ``mark`` is 'bar'.
        y: The value of each point, (n,); NaN breaks a line.
        mark: 'point', 'line', 'line and point', or 'bar'.
        name: The entry in the legend; '' for none.
        group: Series of one group are shown and hidden together by their one entry in the legend; '' for none.
        label: A word beside the last point. On paper it takes the place of the entry in the legend; on the page,
            where the legend hides and shows series, that entry stands as well.
        colour: A colour as #rrggbb. The same colour must mean the same thing on the whole page.
        shape: A marker of matplotlib, 'o', 's', '^', 'v', 'P', 'X', 'p', 'h', 'D'; shapes tell series apart in grey.
        dash: 'solid', 'dash' or 'dot'.
        low, high: The ends of the interval of each point, (n,); a band along a line, or a bar through a point.
        low_x, high_x: The same along x, for points.
        hover: What is shown over each point besides its position, (n,), in plain text; '' for nothing.
        is_hollow: Whether points are drawn without a filling, for what a law leaves out.
        is_outlined: Whether points have an outline of ink, for what was fitted rather than measured.
        opacity: From 0 to 1.
    """

    x: Sequence[float] | Sequence[str]
    y: Sequence[float]
    mark: Literal["point", "line", "line and point", "bar"] = "point"
    name: str = ""
    group: str = ""
    label: str = ""
    colour: str = "#3f6fb5"
    shape: str = "o"
    dash: Literal["solid", "dash", "dot"] = "solid"
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    low_x: Sequence[float] | None = None
    high_x: Sequence[float] | None = None
    hover: Sequence[str] = ()
    is_hollow: bool = False
    is_outlined: bool = False
    opacity: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Contours:
    """Lines of equal value over a grid, with a colour bar.

    Attributes:
        x: The grid along x, (n,).
        y: The grid along y, (m,).
        z: The value at each place, m rows of n; NaN where there is none.
        title: The title of the colour bar: the quantity and its unit.
        levels: The values of the lines, rising; the filling between them runs from light to dark.
    """

    x: Sequence[float]
    y: Sequence[float]
    z: Sequence[Sequence[float]]
    title: str
    levels: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Zone:
    """An area of a panel in grey, from ``start`` to ``end`` along x, with a word: 'beyond the runs'."""

    start: float
    end: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A pair of axes and what is drawn in them."""

    x: Axis
    y: Axis
    title: str = ""
    series: Sequence[Series] = ()
    contours: Contours | None = None
    zones: Sequence[Zone] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure of the report.

    Attributes:
        name: A short name in the style of a file name ('isoflop'), unique within a section of the page.
        title: The heading above the figure, often a question that the figure answers.
        sentence: One plain sentence below the figure: what is seen, and how to read it.
        panels: One to three panels; the legend of the first one stands for all.
        notes: Further sentences, such as what the figure leaves out and why.
    """

    name: str
    title: str
    sentence: str
    panels: Sequence[Panel]
    notes: Sequence[str] = field(default_factory=tuple)
