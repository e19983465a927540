"""Draw the isoFLOP curves of a fit, and N*, D* and L* of several fits against C, and save any figure.

matplotlib is imported by the functions that draw.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.core.errors import UserError
from dlm.core.files import write_atomic
from dlm.core.names import inside
from dlm.fit.result import FitResult
from dlm.report.charts.allocation import allocation_chart
from dlm.report.charts.isoflop import isoflop_chart
from dlm.report.drawn import draw
from dlm.report.look import FONTS_IN_FILES, INK, PAPER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METADATA: Mapping[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
FILE_DPI, INLINE_DPI = 180, 100  # of PNG files, and of images on the page, which must stay small
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

    Raises:
        UserError: The fit has no isoFLOP curves.
    """
    chart = isoflop_chart(isoflop, surface, loss_se=loss_se)
    if chart is None:
        raise UserError(f"a fit of {isoflop.law} has no isoFLOP curves to draw: give a fit with law 'isoflop'")
    return draw(chart, size=size, style=style)


def allocation_figure(fits: Fits, *, size: str = "page", style: str | None = None) -> Figure:
    """Draw N*, D* and L* against C: the minima with their intervals, and the line and 95 % band of each method.

    The area beyond the highest budget of the runs is grey. ``size`` and ``style`` are as in ``isoflop_figure``.

    Raises:
        UserError: No fit has an optimum.
    """
    chart = allocation_chart(fits.values() if isinstance(fits, Mapping) else fits)
    if chart is None:
        raise UserError("these fits have no best size to draw: give fits with a law or with isoFLOP minima")
    return draw(chart, size=size, style=style)


def save(figure: Figure, folder: Path, name: str) -> dict[str, bytes]:
    """Write NAME.png, NAME.svg and NAME.pdf without dates, so that the same figure gives the same bytes.

    ``name`` is a ``slug``, or made of slugs. Returns the content of each file, by its kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # type: ignore[arg-type] # the layout is found once, and not again for each kind
    saved = {kind: _bytes(figure, kind, name) for kind in METADATA}
    for kind, content in saved.items():
        write_atomic(inside(folder, f"{name}.{kind}"), content)
    return saved


def inline_svg(drawing: bytes, name: str, description: str) -> str:
    """Return an SVG file as an <svg> element that adopts the colours and the typeface of the page.

    Args:
        drawing: The file.
        name: The prefix of all ids, a ``slug`` or made of slugs, so that several figures can stand on one page.
        description: The text for screen readers.
    """
    svg = drawing.decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"""font: ([0-9.]+)px [^;"]*""", r"font-size: \1px; font-family: inherit", svg)
    svg = re.sub(r"<!--.*?-->|^ +", "", svg, flags=re.DOTALL | re.MULTILINE)
    svg = re.sub(r"(\.\d\d)\d+", r"\1", svg)  # hundredths of a point are enough for a screen and for paper
    svg = svg.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)


def inline_png(figure: Figure, description: str) -> str:
    """Return the figure as an <img> element that holds it, for a drawing with too many points for an <svg>."""
    held = base64.b64encode(_bytes(figure, "png", "inline", dots_per_inch=INLINE_DPI)).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{held}">'


def _bytes(figure: Figure, kind: str, name: str, dots_per_inch: int = FILE_DPI) -> bytes:
    import matplotlib as mpl

    buffer = io.BytesIO()
    face = "none" if kind == "svg" else "white"
    with mpl.rc_context({**FONTS_IN_FILES, "svg.hashsalt": name}):
        figure.savefig(buffer, format=kind, metadata=METADATA[kind], dpi=dots_per_inch, facecolor=face)
    return buffer.getvalue()
