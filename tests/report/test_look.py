"""The figures for a paper and for slides, and the matplotlib styles that change them."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from support.demo_runs import demo_runs, no_excluded

from dlm.core.errors import UserError
from dlm.fit.laws import LAW_NAMES
from dlm.fit.table import fit_sweep
from dlm.report import figures, look
from dlm.report.page import write_report

POINTS_PER_INCH = 72

FIGURES = ("isoflop", "allocation", "surface", "residuals", "holdout", "cost")  # of a finished sweep without curves


@pytest.fixture(scope="module")
def fits():
    return fit_sweep(demo_runs(), bootstrap=100)


@pytest.mark.parametrize("size", look.SIZES)
def test_files_have_the_width_of_their_size_and_embed_truetype_fonts(fits, tmp_path, size):
    isoflop, combined = fits.values()
    figures.save(figures.isoflop_figure(isoflop, combined, size=size), tmp_path, "one")
    pdf = (tmp_path / "one.pdf").read_bytes()
    width = float(re.search(rb"/MediaBox \[ 0 0 ([0-9.]+)", pdf)[1])
    assert width == pytest.approx(look.SIZES[size].width * POINTS_PER_INCH, abs=0.1)
    assert b"/Type3" not in pdf and b"/FontFile2" in pdf


def test_the_panels_of_a_single_column_stand_below_each_other(fits):
    boxes = [axes.get_position() for axes in figures.allocation_figure(fits, size="single_column").axes]
    assert len({round(box.x0, 3) for box in boxes}) == 1
    assert [box.y0 for box in boxes] == sorted((box.y0 for box in boxes), reverse=True)


def test_the_runs_of_each_budget_have_a_shape_of_their_own(fits):
    axes = figures.isoflop_figure(next(iter(fits.values()))).axes[0]
    shapes = [line.get_marker() for line in axes.lines if line.get_marker() in look.BUDGET_SHAPES]
    assert len(shapes) == len(set(shapes)) == 3


def test_no_text_overlaps_another_or_leaves_the_figure(fits):
    for size in look.SIZES:
        for figure in (figures.allocation_figure(fits, size=size), figures.isoflop_figure(*fits.values(), size=size)):
            figure.canvas.draw()
            titles = [axes._left_title.get_window_extent() for axes in figure.axes]
            for one in titles:
                assert one.x1 <= figure.bbox.x1, size
                assert not any(one.overlaps(other) for other in titles if other is not one and other.width), size


def test_every_law_has_a_colour():
    assert look.LAW_COLOURS.keys() == LAW_NAMES.keys()


def test_a_report_for_a_paper_writes_each_figure_in_each_size(tmp_path, fits, monkeypatch):
    monkeypatch.setattr(figures, "_bytes", lambda figure, kind, name, dots_per_inch=0: b"<svg></svg>")
    paper = look.asked_for(wanted=True, style=None)
    write_report(tmp_path, demo_runs(), no_excluded(), fits, title="any", paper=paper)
    folder = tmp_path / "report" / "figures"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    named = {f"{name}-masked_diffusion.{kind}" for name in FIGURES for kind in ("png", "svg", "pdf")}
    sizes = look.SIZES.keys() - {"page"}
    assert files == named | {f"{size}/{name}" for size in sizes for name in named}


def test_a_style_changes_the_figures_for_a_paper_alone(tmp_path, fits, monkeypatch):
    style = tmp_path / "journal.mplstyle"
    style.write_text("axes.facecolor: 00ff00\npdf.fonttype: 3\n")
    faces = {}

    def kept(figure, folder, name):
        faces.setdefault(folder.name, []).append(figure)
        return {"svg": b"<svg></svg>", "png": b""}

    monkeypatch.setattr(figures, "save", kept)
    paper = look.asked_for(wanted=False, style=str(style))
    write_report(tmp_path, demo_runs(), no_excluded(), fits, title="any", paper=paper)
    green = {name: {axes.get_facecolor()[:3] == (0, 1, 0) for axes in one.axes} for name, (one, *_) in faces.items()}
    assert green == {"figures": {False}, "single_column": {True}, "double_column": {True}, "slides": {True}}
    assert b"/Type3" not in figures._bytes(faces["slides"][0], "pdf", "any")
    assert plt.rcParams["axes.facecolor"] == "white"  # nothing of it stays


def test_a_style_may_be_one_of_matplotlibs():
    assert look.asked_for(wanted=False, style="ggplot") == look.Paper(style="ggplot")
    assert look.asked_for(wanted=False, style=None) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is neither a file nor a style"),
        ("axes.grid: maybe\n", "axes.grid"),
        ("no.such.key: 3\n", "Bad key no.such.key"),
        ("hello world\n", "Missing colon"),
        ("\xff\xfe", "is no style file"),
    ],
)
def test_a_bad_style_is_one_line_that_says_what_is_wrong(tmp_path, content, said):
    style = tmp_path / "bad.mplstyle"
    if content is not None:
        style.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(said)) as error:
        look.asked_for(wanted=True, style=str(style))
    assert "\n" not in str(error.value)


def test_a_misspelt_style_of_matplotlib_is_told_the_near_ones():
    with pytest.raises(UserError, match="did you mean ggplot"):
        look.check_style("gplot")


def test_a_style_that_needs_latex_is_refused_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    style = tmp_path / "tex.mplstyle"
    style.write_text("text.usetex: True\n")
    with pytest.raises(UserError, match="no latex on the PATH"):
        look.check_style(str(style))


def test_a_law_is_drawn_with_a_scale_for_the_colours_of_its_points(fits):
    figure = list(fits.values())[1].plot()
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert "parameters N" in labels
    assert np.isfinite(figure.get_size_inches()).all()
