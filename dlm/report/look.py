"""How figures look: their sizes, their style and their colours.

Colour-blind readers, and readers of a grey copy, can tell the budgets and the methods apart: shapes, dashes and labels
carry the same information as the colours.
"""

from __future__ import annotations

import contextlib
import logging.handlers
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlm.core.errors import UserError, hint, shown

INK, FAINT, PAPER = "#1f2933", "#9aa5b1", "#fffffe"  # the page replaces INK and PAPER with its own colours


BUDGET_ANCHORS = ("#3f6fb5", "#8561b8", "#c4508f", "#dd7630")  # from the lowest to the highest budget
CONTOUR_COLOURS = ("#f4f7fb", "#b9c9df", "#6d84a6", "#33486a")  # from light to dark, in even steps
BUDGET_SHAPES = "os^vPXph"  # of the runs of a budget; with more budgets, they repeat


LAW_COLOURS = {
    "isoflop": "#c4513b",
    "combined": "#3f6fb5",
    "chinchilla": "#3f6fb5",
    "envelope": "#2a9d8f",
    "skaling": "#7a5195",
    "tied": "#8d6e3f",
    "data-constrained": "#4f7942",
    "epochs": "#5f7d95",
    "penalty": "#b0562f",
    "onset": "#9c6b98",
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """A width for which figures are drawn. Lengths are in inches, sizes of text in points."""

    width: float
    text: float  # of axis labels; the numbers along an axis are a tenth smaller
    height: float  # of a figure with one panel
    panels: float  # height of a figure with three panels
    across: int = 3  # panels in a row
    legend: int = 4  # entries of a legend in a row
    line: float = 1.0  # widths of lines and sizes of marks, relative to those of the page


SIZES = {
    "page": Size(width=9.0, text=10, height=5.0, panels=3.4),
    "single_column": Size(width=3.25, text=7, height=2.5, panels=6.0, across=1, legend=2, line=0.6),
    "double_column": Size(width=6.75, text=8, height=3.6, panels=2.5, line=0.7),
    "slides": Size(width=12.0, text=14, height=6.4, panels=5.2, line=1.5),
}


# Text stays text in a drawing, and fonts are TrueType in a document: several journals refuse the Type 3 fonts that
# matplotlib writes by default. No style of a user changes this.
FONTS_IN_FILES: Any = {"svg.fonttype": "none", "pdf.fonttype": 42}


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Figures for a paper and for slides, in all SIZES but that of the page."""

    style: str | None = None  # as in ``drawing``


def asked_for(*, wanted: bool, style: str | None) -> Paper | None:
    """Return what `dlm report --paper --style STYLE` asks for; a style asks for such figures, too.

    Raises:
        UserError: There is no such style.
    """
    if style is not None:
        check_style(style)
    return Paper(style=style) if wanted or style is not None else None


def _style(size: Size) -> Any:
    """Return matplotlib's settings for figures of a size."""
    small = 0.9 * size.text
    return {
        "font.size": size.text,
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": FAINT,
        "axes.facecolor": "none",
        "axes.labelcolor": INK,
        "axes.labelsize": size.text,
        "axes.titlesize": 1.05 * size.text,
        "axes.titlelocation": "left",
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.labelsize": small,
        "ytick.labelsize": small,
        "xtick.major.size": 3.5 * size.line,
        "ytick.major.size": 3.5 * size.line,
        "axes.grid": True,
        "axes.linewidth": 0.8 * size.line,
        "grid.color": FAINT,
        "grid.alpha": 0.22,
        "grid.linewidth": 0.6 * size.line,
        "lines.linewidth": 1.7 * size.line,
        "lines.markersize": 4.5 * size.line,
        "legend.frameon": False,
        "legend.fontsize": small,
        "figure.dpi": 110,
    }


@contextlib.contextmanager
def drawing(size: str, style: str | None = None) -> Iterator[Size]:
    """Draw and save figures in dlm's style for a size, changed by a style of the user.

    Args:
        size: A key of SIZES.
        style: A matplotlib style file, or the name of a style that matplotlib has; see ``check_style``.
    """
    import matplotlib.pyplot as plt

    with plt.rc_context(_style(SIZES[size])):
        if style is not None:
            plt.style.use(style)
        yield SIZES[size]


def check_style(style: str) -> None:
    """Raise UserError if ``style`` is neither a matplotlib style file nor the name of a style that matplotlib has."""
    from matplotlib import style as styles

    if style in styles.library:
        return
    if not Path(style).is_file():
        near = hint(style, styles.available, otherwise="")
        raise UserError(
            f"--style {shown(style)} is neither a file nor a style of matplotlib: {near + ' ' if near else ''}"
            "give the path of a .mplstyle file"
        )
    settings, complaints = _read_style(style)
    if complaints:
        raise UserError(f"--style {shown(style)} is no style file of matplotlib: {complaints[0]}")
    if settings.get("text.usetex") and shutil.which("latex") is None:
        raise UserError(f"--style {shown(style)} sets text.usetex, and there is no latex on the PATH: remove that line")


def _read_style(path: str) -> tuple[Mapping[str, Any], list[str]]:
    """Return the settings of a style file, and the complaints of matplotlib, which only logs some of them."""
    from matplotlib import rc_params_from_file

    log, complaints = logging.getLogger("matplotlib"), logging.handlers.BufferingHandler(capacity=1000)
    log.addHandler(complaints)
    before, log.propagate = log.propagate, False
    try:
        settings: Any = rc_params_from_file(path, use_default_template=False)
    except (KeyError, ValueError, OSError) as error:
        return {}, [" ".join(str(error).split())]
    finally:
        log.removeHandler(complaints)
        log.propagate = before
    return {**settings}, [record.getMessage().strip().splitlines()[0] for record in complaints.buffer]


def budget_colours(count: int) -> list[str]:
    """Return ``count`` colours from the lowest to the highest budget, in even steps of lightness."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    ramp = LinearSegmentedColormap.from_list("budgets", BUDGET_ANCHORS)
    return [to_hex(colour) for colour in ramp(np.linspace(0, 1, count))]
