"""Place a chart on the page: save its files, draw it for paper, and describe it for the script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.report import figures
from dlm.report.chart import Chart
from dlm.report.drawn import draw
from dlm.report.interactive import as_plotly
from dlm.report.look import SIZES, Paper
from dlm.report.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SVG_BYTES = 90_000  # a larger drawing is an image on the page; its SVG stands next to the page in any case


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A figure of the page."""

    name: str  # of its files, unique on the page
    title: str
    sentence: str
    notes: Sequence[str]
    drawing: str  # an <svg> or <img> element: what paper and browsers without JavaScript show
    data: str  # JSON for plotly.js, safe inside a <script> element
    tables: Sequence[Table] = field(default_factory=tuple)

    @property
    def files(self) -> dict[str, str]:
        """The files of the figure relative to the page, by their kind."""
        return {kind: f"figures/{self.name}.{kind}" for kind in figures.METADATA}


def placed(
    chart: Chart, slug: str, folder: Path, *, paper: Paper | None = None, tables: Sequence[Table] = ()
) -> Placed:
    """Draw and save a chart, and return it for the page.

    Args:
        chart: The chart.
        slug: The slug of the section; with the name of the chart it makes the name of the files.
        folder: The folder for the files.
        paper: Also write FOLDER/SIZE/*, the same figure for a paper and for slides.
        tables: The tables below the figure.
    """
    name, drawing = f"{chart.name}-{slug}", draw(chart)
    saved = figures.save(drawing, folder, name)
    if paper is not None:
        for size in [size for size in SIZES if size != "page"]:
            figures.save(draw(chart, size=size, style=paper.style), folder / size, name)
    return Placed(
        name=name,
        title=chart.title,
        sentence=chart.sentence,
        notes=chart.notes,
        drawing=_element(saved, drawing, name, chart.title),
        data=for_script(as_plotly(chart)),
        tables=[table for table in tables if table.rows],
    )


def _element(saved: dict[str, bytes], drawing: Figure, name: str, description: str) -> str:
    svg = figures.inline_svg(saved["svg"], name, description)
    if len(svg) <= MOST_SVG_BYTES:
        return svg
    return figures.inline_png(drawing, description)


def for_script(value: Any) -> str:
    """Return JSON that no text in it can end: '</script>' and '<!--' have no '<'."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")
