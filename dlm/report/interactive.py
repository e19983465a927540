"""Describe a chart for plotly.js, which draws it on a page: plain JSON without plotly's Python library."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from dlm.core.names import printable
from dlm.report import ticks
from dlm.report.chart import Axis, Chart, Contours, Panel, Series
from dlm.report.look import CONTOUR_COLOURS, FAINT, INK, PAPER

SYMBOLS = {  # plotly's names of matplotlib's markers
    "o": "circle", "s": "square", "^": "triangle-up", "v": "triangle-down", "P": "cross", "X": "x", "p": "pentagon",
    "h": "hexagon", "D": "diamond",
}  # fmt: skip
MODES = {"point": "markers", "line": "lines", "line and point": "lines+markers"}
CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
}
FORMATS = {"number": ":.5~g", "count": ":,.4~r", "flops": ":.3~e", "percent": ":.2%"}  # of a position over a line
GRID = "rgba(154,165,177,0.25)"  # FAINT, faint enough for light and dark pages
GAP = 0.09  # between two panels, as a part of the width


def as_plotly(chart: Chart) -> dict[str, Any]:
    """Return what ``Plotly.newPlot`` takes: data, layout and config, without NaN, ready for ``json.dumps``.

    The colours INK, FAINT and PAPER stand for those of the page, which replaces them. ``layout.meta`` holds
    the number of panels, which a narrow page places below each other, and whether they have titles, which need room.
    """
    data: list[dict[str, Any]] = []
    is_titled = any(panel.title for panel in chart.panels)
    layout: dict[str, Any] = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": INK, "size": 13},
        "margin": {"l": 64, "r": 24, "t": 64 if is_titled else 40, "b": 54},
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": FAINT, "font": {"color": INK}, "align": "left"},
        "legend": {"orientation": "h", "x": 0, "y": 1.0, "xref": "container", "yref": "container", "yanchor": "top"},
        "hovermode": "closest",
        "barmode": "group",
        "uirevision": "keep",  # a zoom stays when the colours change
        "meta": {"panels": len(chart.panels), "titled": is_titled},
        "shapes": [],
        "annotations": [],
    }
    seen: set[str] = set()
    width = (1 - GAP * (len(chart.panels) - 1)) / len(chart.panels)
    for index, panel in enumerate(chart.panels):
        left = index * (width + GAP)
        _panel(layout, data, panel, index=index, domain=[left, min(left + width, 1.0)], seen=seen)
    return {"data": data, "layout": layout, "config": CONFIG}


def _panel(
    layout: dict[str, Any], data: list[dict[str, Any]], panel: Panel, *, index: int, domain: list[float], seen: set[str]
) -> None:
    suffix = "" if index == 0 else str(index + 1)
    places = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
    layout[f"xaxis{suffix}"] = _axis(
        panel.x, _spread(panel, "x"), anchor=places["yaxis"], most=8 if domain == [0, 1] else 5
    ) | {"domain": domain}
    layout[f"yaxis{suffix}"] = _axis(panel.y, _spread(panel, "y"), anchor=places["xaxis"])
    if any(isinstance(x, str) for series in panel.series for x in series.x):
        layout[f"xaxis{suffix}"]["type"] = "category"  # plotly would read the name 3e11 as a number
    if panel.contours is not None:
        data.append(_contours(panel.contours) | places)
    for series in panel.series:
        if len(series.x):
            data.extend(trace | places for trace in _traces(series, panel, seen))
    for zone in panel.zones:
        span = {"xref": places["xaxis"], "yref": f"{places['yaxis']} domain"}
        shape = {"type": "rect", "x0": zone.start, "x1": zone.end, "y0": 0, "y1": 1, "layer": "below"}
        layout["shapes"].append(shape | span | {"fillcolor": FAINT, "opacity": 0.15, "line": {"width": 0}})
        middle = (zone.start + zone.end) / 2
        if panel.x.is_log:
            middle = (math.log10(zone.start) + math.log10(zone.end)) / 2
        layout["annotations"].append(
            {"text": words(zone.label), "x": middle, "y": 0.02, "yanchor": "bottom", "showarrow": False} | span
        )
    if panel.title:
        span = {"xref": f"{places['xaxis']} domain", "yref": f"{places['yaxis']} domain"}
        place = {"x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom", "showarrow": False, "font": {"size": 14}}
        layout["annotations"].append({"text": f"<b>{words(panel.title)}</b>"} | place | span)


def words(said: str) -> str:
    """Return a text as plotly draws it letter by letter: it would obey some HTML."""
    return html.escape(printable(said), quote=False)


def _axis(axis: Axis, spread: tuple[float, float] | None, *, anchor: str, most: int = 8) -> dict[str, Any]:
    found: dict[str, Any] = {
        "title": {"text": words(axis.title), "standoff": 10},
        "type": "log" if axis.is_log else "-",
        "anchor": anchor,
        "automargin": True,
        "gridcolor": GRID,
        "tickangle": 0,
        "linecolor": FAINT,
        "zeroline": False,
        "showline": True,
        "exponentformat": "e" if axis.kind == "flops" else "B",  # 3e11 FLOPs, and 1.2B tokens rather than 1.2G
    }
    if axis.kind == "percent":
        found["tickformat"] = "~%"
    if spread is not None and (axis.is_log or axis.kind in ("count", "flops", "duration")):
        low, high = spread
        at = ticks.positions(low, high, axis, most=most)
        found |= {"tickvals": [rounded(value) for value in at], "ticktext": ticks.labels(at, axis)}
    return found


def _spread(panel: Panel, key: str) -> tuple[float, float] | None:
    """Return the lowest and the highest value along an axis; None for texts, or without any value."""
    values: list[float] = []
    ends = ("x", "low_x", "high_x") if key == "x" else ("y", "low", "high")
    for series in panel.series:
        for name in ends:
            values += [value for value in getattr(series, name) or () if not isinstance(value, str)]
    if panel.contours is not None:
        values += getattr(panel.contours, key)
    if key == "x":
        values += [end for zone in panel.zones for end in (zone.start, zone.end)]
    is_log = (panel.x if key == "x" else panel.y).is_log
    usable = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)]
    return (min(usable), max(usable)) if usable else None


def _traces(series: Series, panel: Panel, seen: set[str]) -> Iterable[dict[str, Any]]:
    """Return the traces of a series: its band first, and then its points, line or bars."""
    group = series.group or series.name
    shared = {"legendgroup": words(group), "opacity": series.opacity} if group else {"opacity": series.opacity}
    if series.mark == "line" and series.low is not None and series.high is not None:
        yield _band(series) | shared
    entry = series.group or series.name
    is_listed = bool(series.name) and entry not in seen
    if is_listed:
        seen.add(entry)
    trace: dict[str, Any] = {
        "type": "bar" if series.mark == "bar" else "scatter",
        "x": [words(x) if isinstance(x, str) else rounded(x) for x in series.x],
        "y": [rounded(y) for y in series.y],
        "name": words(series.name),
        "showlegend": is_listed,
        "legendrank": 1001 if series.mark == "line" else 1000,  # runs stand before the laws
        **_hover(series, panel),
        **shared,
    }
    if series.mark == "bar":
        face = "rgba(0,0,0,0)" if series.is_hollow else series.colour
        trace["marker"] = {"color": face, "line": {"color": series.colour, "width": 1}}
    else:
        trace |= {"mode": MODES[series.mark], "line": {"color": series.colour, "dash": series.dash, "width": 2}}
    if "point" in series.mark:
        trace["marker"] = _marker(series)
    if series.mark != "line":
        trace |= _bars(series)
    yield trace


def _marker(series: Series) -> dict[str, Any]:
    outline = {"color": INK if series.is_outlined else series.colour, "width": 1.5}
    size = 11 if series.is_outlined else 8
    face = PAPER if series.is_hollow else series.colour
    return {"symbol": SYMBOLS[series.shape], "size": size, "color": face, "line": outline}


def _bars(series: Series) -> dict[str, Any]:
    """Return the bars of the intervals of points."""
    found: dict[str, Any] = {}
    colour = INK if series.is_outlined else series.colour
    for name, at, low, high in (
        ("error_y", series.y, series.low, series.high),
        ("error_x", series.x, series.low_x, series.high_x),
    ):
        if low is None or high is None:
            continue
        middle = np.asarray(at, dtype=float)
        found[name] = {
            "type": "data",
            "symmetric": False,
            "array": [rounded(value) for value in np.asarray(high, dtype=float) - middle],
            "arrayminus": [rounded(value) for value in middle - np.asarray(low, dtype=float)],
            "color": colour,
            "thickness": 1.5,
            "width": 3 if series.is_outlined else 0,
        }
    return found


def _band(series: Series) -> dict[str, Any]:
    """Return the band along a line as closed areas, one for each stretch without a gap."""
    x, low, high = (np.asarray(values, dtype=float) for values in (series.x, series.low, series.high))
    there = np.isfinite(low) & np.isfinite(high) & np.isfinite(x)
    xs: list[float | None] = []
    ys: list[float | None] = []
    for part in np.split(np.arange(len(x)), np.flatnonzero(np.diff(there)) + 1):
        if not there[part[0]] or len(part) < 2:
            continue
        gap: list[float | None] = [None] if xs else []
        xs += [*gap, *map(rounded, x[part]), *map(rounded, x[part][::-1])]
        ys += [*gap, *map(rounded, high[part]), *map(rounded, low[part][::-1])]
    red, green, blue = (int(series.colour[place : place + 2], 16) for place in (1, 3, 5))
    return {
        "type": "scatter", "x": xs, "y": ys, "mode": "lines", "line": {"width": 0}, "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},0.15)", "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip


def _hover(series: Series, panel: Panel) -> dict[str, Any]:
    """Return the texts over the points: what the series says of each, and its position.

    plotly itself writes the position along a line, whose many points would otherwise make the page large.
    """
    said = list(series.hover) or [""] * len(series.x)
    name = "" if series.name and not series.hover else "<extra></extra>"
    if "line" in series.mark and "duration" not in (panel.x.kind, panel.y.kind):
        axes = (("x", panel.x, panel.x.title), ("y", panel.y, _height(panel)))
        places = [f"{words(title)}: %{{{key}{FORMATS.get(axis.kind, '')}}}" for key, axis, title in axes]
        return {"hovertext": [*map(_lines, said)], "hovertemplate": "%{hovertext}" + "<br>".join(places) + name}
    pairs = zip(said, list(series.x), list(series.y), strict=True)
    over = [_lines(more) + _position(x, y, panel) for more, x, y in pairs]
    return {"hovertext": over, "hovertemplate": "%{hovertext}" + name}


def _height(panel: Panel) -> str:
    """Return the quantity along y; a panel whose title names it has an axis without a title."""
    return panel.y.title or panel.title


def _lines(said: str) -> str:
    """Return the lines of a text, each with a break after it."""
    return "".join(f"{words(line)}<br>" for line in said.split("\n")) if said else ""


def _position(x: Any, y: float, panel: Panel) -> str:
    across = words(x) if isinstance(x, str) else f"{words(panel.x.title)}: {ticks.shown(float(x), panel.x)}"
    return f"{across}<br>{words(_height(panel))}: {ticks.shown(float(y), panel.y)}"


def _contours(contours: Contours) -> dict[str, Any]:
    """Return the filled contours. plotly knows only even levels: it gets the place of each value among the levels."""
    z, levels = np.asarray(contours.z, dtype=float), np.asarray(contours.levels, dtype=float)
    place = np.where(np.isfinite(z), np.interp(np.nan_to_num(z), levels, np.arange(len(levels))), np.nan)
    every = max(1, len(levels) // 8)
    return {
        "type": "contour",
        "x": [rounded(value) for value in contours.x],
        "y": [rounded(value) for value in contours.y],
        "z": [[rounded(value, digits=4) for value in row] for row in place],
        "hovertext": [[f"{value:.4g}" if math.isfinite(value) else "" for value in row] for row in z],
        "hovertemplate": words(contours.title) + ": %{hovertext}<extra></extra>",
        "colorscale": [[index / (len(CONTOUR_COLOURS) - 1), colour] for index, colour in enumerate(CONTOUR_COLOURS)],
        "contours": {"start": 0, "end": len(levels) - 1, "size": 1},
        "line": {"width": 0.5, "color": PAPER},
        "colorbar": {
            "title": {"text": words(contours.title), "side": "right"},
            "thickness": 12,
            "outlinewidth": 0,
            "tickvals": list(range(0, len(levels), every)),
            "ticktext": [f"{value:.4g}" for value in levels[::every]],
        },
    }


def rounded(value: float, *, digits: int = 7) -> float | None:
    """Return a number with few digits, which keeps the page small; None, which leaves a gap, for NaN and infinity."""
    return float(f"{float(value):.{digits}g}") if math.isfinite(value) else None
