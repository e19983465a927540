"""A chart is drawn alike for paper (matplotlib) and for the page (plotly), from one description."""

import json
import math

import numpy as np
import pytest

from dlm.report import ticks
from dlm.report.chart import Axis, Chart, Contours, Panel, Series, Zone
from dlm.report.drawn import draw
from dlm.report.interactive import as_plotly
from dlm.report.placed import for_script

NAN = math.nan
SIZE, LOSS = Axis(title="N", kind="count", is_log=True), Axis(title="loss")


def chart(*series, x=SIZE, y=LOSS, **panel):
    return Chart(name="any", title="any", sentence="", panels=[Panel(x=x, y=y, series=series, **panel)])


def traces(described):
    return json.loads(json.dumps(as_plotly(described), allow_nan=False))["data"]


def test_both_renderers_draw_the_same_points_and_intervals():
    one = Series(x=[1e6, 1e7], y=[3.0, 2.5], low=[2.9, NAN], high=[3.2, NAN], name="runs")
    (trace,) = traces(chart(one))
    assert (trace["x"], trace["y"]) == ([1e6, 1e7], [3.0, 2.5])
    assert trace["error_y"]["array"] == pytest.approx([0.2, None]) or trace["error_y"]["array"][1] is None
    (axes,) = draw(chart(one)).axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1e6, 3.0], [1e7, 2.5]])
    (low, high), (at, same) = axes.collections[0].get_segments()
    assert (low[1], high[1]) == pytest.approx((2.9, 3.2))
    assert at[1] == same[1]  # no interval, no bar


def test_a_band_has_a_gap_where_there_is_no_interval():
    line = Series(x=[1.0, 2.0, 3.0, 4.0, 5.0], y=[1.0] * 5, mark="line", low=[0, 0, NAN, 0, 0], high=[2, 2, NAN, 2, 2])
    band, _ = traces(chart(line))
    assert band["fill"] == "toself"
    assert band["x"] == [1, 2, 2, 1, None, 4, 5, 5, 4]


def test_series_of_one_group_have_one_entry_in_the_legend():
    group = [Series(x=[1.0], y=[1.0], name="a", group="g"), Series(x=[2.0], y=[1.0], name="a", group="g")]
    assert [trace["showlegend"] for trace in traces(chart(*group))] == [True, False]
    assert {trace["legendgroup"] for trace in traces(chart(*group))} == {"g"}
    (legend,) = draw(chart(*group)).legends
    assert [entry.get_text() for entry in legend.get_texts()] == ["a"]


def test_a_series_without_points_is_an_entry_of_the_legend_on_paper_alone():
    described = chart(Series(x=[], y=[], name="key"), Series(x=[1.0], y=[1.0], name="own", label="own"))
    assert [trace["name"] for trace in traces(described)] == ["own"]
    (legend,) = draw(described).legends
    assert [entry.get_text() for entry in legend.get_texts()] == ["key"]


def test_contours_keep_their_uneven_levels_and_say_the_true_value():
    described = chart(
        y=SIZE, contours=Contours(x=[1, 10], y=[1, 10], z=[[1.0, 2.0], [4.0, NAN]], title="loss", levels=[1, 2, 4])
    )
    (trace,) = traces(described)
    assert trace["z"] == [[0, 1], [2, None]]
    assert trace["hovertext"] == [["1", "2"], ["4", ""]]
    assert trace["colorbar"]["ticktext"] == ["1", "2", "4"]
    assert len(draw(described).axes) == 2  # the panel and its colour bar


def test_bars_stand_side_by_side_at_named_places():
    plan, real = (Series(x=["é", "$b$"], y=[1.0, 2.0], mark="bar", name=name) for name in ("plan", "real"))
    axes = draw(chart(plan, real, x=Axis(title="cell"))).axes[0]
    left = sorted(patch.get_x() for patch in axes.patches)
    assert len(set(left)) == 4
    assert [label.get_text() for label in axes.get_xticklabels()] == ["é", r"\$b\$"]
    assert [trace["x"] for trace in traces(chart(plan, real, x=Axis(title="cell")))] == [["é", "$b$"]] * 2
    budgets = chart(Series(x=["3e11", "1e12"], y=[1.0, 2.0], mark="bar"))  # names, not numbers
    assert as_plotly(budgets)["layout"]["xaxis"]["type"] == "category"


def test_a_zone_is_shaded_and_named_on_both():
    described = chart(Series(x=[1.0, 100.0], y=[1.0, 2.0]), zones=[Zone(start=10, end=1000, label="beyond")])
    layout = as_plotly(described)["layout"]
    assert (layout["shapes"][0]["x0"], layout["shapes"][0]["x1"]) == (10, 1000)
    assert layout["annotations"][0]["x"] == pytest.approx(2.0)  # of a logarithmic axis: its exponent
    assert "beyond" in [said.get_text() for said in draw(described).axes[0].texts]


def test_over_a_line_stands_what_the_panel_shows_with_few_digits():
    line = Series(x=[1e6, 2e6], y=[1.0, 2.0], mark="line")
    (trace,) = traces(chart(line, x=Axis(title="C", kind="flops"), y=Axis(title="", kind="count"), title="best size"))
    assert trace["hovertemplate"].startswith("%{hovertext}C: %{x:.3~e}<br>best size: %{y:,.4~r}")


def test_text_stays_text():
    evil = "<b>$x$</b> </script>\x1b[31m"
    described = chart(Series(x=[1.0], y=[1.0], name=evil, hover=[evil]), title=evil)
    said = json.dumps(as_plotly(described))
    assert "<b>$x$" not in said and "\x1b" not in said and "\\u001b" not in said
    draw(described).canvas.draw()  # a dollar starts no formula


@pytest.mark.parametrize(
    ("low", "high", "axis", "shown"),
    [
        (3e11, 3e13, Axis(title="", kind="flops", is_log=True), ["5e11", "1e12", "2e12", "5e12", "1e13", "2e13"]),
        (4e3, 3e5, Axis(title="", kind="count", is_log=True), ["5k", "10k", "20k", "50k", "100k", "200k"]),
        (3.02, 3.4, Axis(title="", is_log=True), ["3.05", "3.10", "3.15", "3.20", "3.25", "3.30", "3.35", "3.40"]),
        (-0.011, 0.012, Axis(title="", kind="percent"), ["-1 %", "-0.5 %", "0 %", "0.5 %", "1 %"]),
        (0, 5000, Axis(title="", kind="duration"), ["0", "15 min", "30 min", "45 min", "60 min", "75 min"]),
        (1.0, 1e60, Axis(title="", is_log=True), None),
        (
            3.1e11,
            3.15e11,
            Axis(title="", kind="flops", is_log=True),
            ["3.1e11", "3.11e11", "3.12e11", "3.13e11", "3.14e11", "3.15e11"],
        ),
        (2.0, 2.0, LOSS, ["2"]),
        (NAN, NAN, LOSS, []),
    ],
)
def test_marks_are_few_round_and_inside(low, high, axis, shown):
    at = ticks.positions(low, high, axis)
    assert len(at) <= 9
    assert all(low * (1 - 1e-9) <= value <= high * (1 + 1e-9) for value in at if low > 0)
    if shown is not None:
        assert ticks.labels(at, axis) == shown


def test_no_text_ends_the_script_element_that_holds_it():
    evil = "</script><!-- & 日本"
    held = for_script({"name": evil})
    assert "<" not in held and json.loads(held) == {"name": evil}
