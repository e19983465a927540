"""The charts of a law: its surface, its residuals and what it predicted for held-out budgets."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from support.charts import is_whole, named, points
from support.demo_runs import BUDGETS, demo_runs, flops_per_token

from dlm.core import text
from dlm.fit import fit_isoflop, fit_surface
from dlm.fit.predict import fitted_losses
from dlm.fit.table import fit_runs, fit_sweep
from dlm.report.charts.holdout import holdout_chart
from dlm.report.charts.residuals import residuals_chart
from dlm.report.charts.runs import groups, rows_of_points
from dlm.report.charts.surface import surface_chart

FOUR = (1e11, *BUDGETS)


@pytest.fixture(scope="module")
def swept():
    """Runs of four budgets with a known law, their combined law and their isoFLOP curves."""
    runs = demo_runs(budgets=FOUR).assign(learning_rate=0.01)
    return runs, *(fit_runs(runs, law=law, bootstrap=0, conventions=False) for law in ("combined", "isoflop"))


def test_the_surface_shows_every_run_on_the_loss_of_the_law(swept):
    runs, combined, _ = swept
    chart = surface_chart(combined, runs)
    (panel,) = chart.panels
    assert is_whole(chart)
    cells = [one for one in panel.series if one.mark == "point" and one.group != "best"]
    assert [one.name for one in cells] == [f"{text.flops(budget)} FLOPs" for budget in FOUR]
    assert len({one.colour for one in cells}) == len({one.shape for one in cells}) == len(FOUR)
    places = {(n, d) for one in cells for n, d in zip(one.x, one.y, strict=True)}
    assert places == set(zip(runs["params"], runs["tokens"], strict=True))
    said = "\n".join(hover for one in cells for hover in one.hover)
    assert all(name in said for name in runs["run_id"]) and "learning rate 0.01" in said and "done" in said
    z = panel.contours
    nearest = [
        z.z[int(np.abs(np.log(z.y) - np.log(d)).argmin())][int(np.abs(np.log(z.x) - np.log(n)).argmin())]
        for n, d in zip(combined.points.params, combined.points.tokens, strict=True)
    ]
    assert nearest == pytest.approx(fitted_losses(combined), rel=0.05)
    assert min(z.levels) <= min(combined.points.loss) and max(z.levels) >= max(combined.points.loss) * 0.98
    assert np.allclose(np.diff(z.levels), np.diff(z.levels)[0])


def test_lines_of_equal_compute_cost_the_budget_and_the_best_sizes_are_those_of_the_law(swept):
    runs, combined, _ = swept
    (panel,) = surface_chart(combined, runs).panels
    lines = [one for one in panel.series if one.dash == "dot"]
    assert [one.group for one in lines] == [f"{text.flops(budget)} FLOPs" for budget in FOUR]
    for one, budget in zip(lines, FOUR, strict=True):
        assert flops_per_token(np.array(one.x)) * np.array(one.y) == pytest.approx(budget, rel=0.03)
    (reported,) = [one for one in panel.series if one.group == "best" and one.mark == "point"]
    assert list(reported.x) == [best.N for flops, best in combined.at.items() if flops <= FOUR[-1]]
    best = named(panel, "best size N*")
    assert np.interp(np.log(reported.x), np.log(best.x), np.log(best.y)) == pytest.approx(np.log(reported.y), rel=0.01)


def test_where_the_runs_do_not_bound_the_best_size_the_surface_has_no_line_of_it(swept):
    runs, combined, _ = swept
    withheld = {
        c: replace(best, N=np.nan, withheld="resampled runs do not bound it") for c, best in combined.at.items()
    }
    chart = surface_chart(replace(combined, at=withheld), runs)
    assert not [one for one in chart.panels[0].series if one.group == "best"]
    assert chart.notes == ["No line of best sizes: resampled runs do not bound it."]


def test_residuals_are_measured_over_predicted_loss(swept):
    runs, combined, isoflop = swept
    chart = residuals_chart(combined, isoflop, runs)
    assert is_whole(chart)
    by_compute, by_size, about = chart.panels
    residual = combined.points.loss / fitted_losses(combined) - 1
    for panel, places in ((by_compute, combined.points.flops), (by_size, combined.points.params)):
        x, y, hover = points(panel)
        assert sorted(zip(x, y, strict=True)) == sorted(zip(places, residual, strict=True))
        assert len(set(hover)) == len(runs)
    row = runs.iloc[int(np.abs(residual).argmax())]
    assert row["run_id"] in chart.notes[0] and f"{np.sqrt((residual**2).mean()):.2%}" in chart.notes[0]
    _, off, _ = points(about)
    assert len(off) == sum(m.num_points for m in isoflop.minima if np.isfinite(m.centre))
    assert np.abs(off).max() < 0.03
    assert named(by_compute, "± 2 × scatter").high == [2 * combined.noise.residual] * 2


def test_the_bar_of_a_residual_is_the_error_of_the_loss_as_a_share_of_it(swept):
    runs, combined, _ = swept
    panel = residuals_chart(combined, runs=runs).panels[0]
    one = named(panel, f"{text.flops(FOUR[0])} FLOPs")
    own = runs[runs["budget"] == FOUR[0]]
    half = sorted((np.array(one.high) - np.array(one.low)) / 2)
    assert half == pytest.approx(sorted(own["loss_se"] / own["loss"]))


def test_a_run_far_from_the_law_is_hollow(swept):
    runs = swept[0].copy()
    runs.loc[11, "loss"] *= 1.2
    law = fit_runs(runs, law="chinchilla", bootstrap=0, conventions=False, holdout=False)
    chart = residuals_chart(law, None, runs)
    (far,) = [one for one in chart.panels[0].series if one.is_hollow]
    assert len(far.x) == 1 and "far from it" in far.hover[0] and runs.loc[11, "run_id"] in far.hover[0]
    assert "1 run far from the law is hollow." in chart.notes


def test_each_of_many_budgets_has_one_entry_in_the_legend():
    runs = demo_runs(budgets=np.geomspace(1e11, 3e12, 9))  # more budgets than there are shapes
    law = fit_runs(runs, law="chinchilla", bootstrap=0, conventions=False, holdout=False)
    assert len([one for one in residuals_chart(law, None, runs).panels[0].series if "FLOPs" in one.name]) == 9


def test_the_hold_out_shows_the_runs_that_were_held_out_and_what_was_predicted(swept):
    runs, combined, isoflop = swept
    chart = holdout_chart(combined, isoflop, runs)
    assert is_whole(chart)
    losses, errors, sizes = chart.panels
    top = named(losses, "without the top budget")
    own = runs[runs["budget"] == FOUR[-1]]
    assert sorted(top.x) == sorted(own["loss"])
    share = np.array(top.y) / np.array(top.x) - 1
    assert share.mean() == pytest.approx(combined.holdout["without_top_1"]["L_error"])
    two = named(losses, "without the top two budgets")
    assert len(two.x) == (runs["budget"] >= FOUR[-2]).sum()
    (same,) = [one for one in errors.series if one.group == top.name]
    assert list(same.y) == pytest.approx(share.tolist())
    predicted = named(sizes, "without the top budget")
    assert predicted.y[0] / predicted.x[0] - 1 == pytest.approx(isoflop.holdout["without_top_1"]["N_error"])
    assert len(chart.notes) == len(combined.holdout)
    errors = combined.holdout["without_top_1"]
    assert f"is off by {errors['L_error']:+.2%} ({errors['L_rms_error']:.2%} root mean square)" in chart.notes[0]


def test_a_fit_without_a_law_gives_no_charts():
    one_budget = demo_runs(budgets=[1e12])
    fits = fit_sweep(one_budget, bootstrap=0)
    combined, isoflop = fits["masked_diffusion/combined"], fits["masked_diffusion/isoflop"]
    assert surface_chart(combined, one_budget) is None
    assert residuals_chart(combined, isoflop, one_budget) is None
    assert holdout_chart(combined, isoflop, one_budget) is None
    assert surface_chart(isoflop) is None


def test_two_budgets_hold_none_out():
    runs = demo_runs(budgets=FOUR[:2])
    fits = fit_sweep(runs, bootstrap=0)
    assert holdout_chart(fits["masked_diffusion/combined"], fits["masked_diffusion/isoflop"], runs) is None


def test_a_bare_table_without_names_and_budgets_is_drawn_by_powers_of_ten():
    runs = demo_runs(budgets=np.geomspace(1e11, 3e12, 14), skip=())[["params", "tokens", "loss"]]
    law = fit_surface(runs["params"], runs["tokens"], runs["loss"])
    names = [one.name for one in surface_chart(law, runs).panels[0].series if one.name]
    assert names == ["1e10 to 1e11 FLOPs", "1e11 to 1e12 FLOPs", "1e12 to 1e13 FLOPs", "best size N*"][-len(names) :]
    assert is_whole(residuals_chart(law))


def test_names_that_are_not_ascii_and_replicates_are_told_apart(swept):
    runs = swept[0].assign(run_id=[f"läuft-模型-{place}" for place in range(len(swept[0]))])
    twice = pd.concat([runs, runs.assign(run_id=runs["run_id"] + "-b")], ignore_index=True)
    law = fit_surface(twice["params"], twice["tokens"], twice["loss"], flops=twice["flops"])
    assert sorted(row["run_id"] for row in rows_of_points(law, twice)) == sorted(twice["run_id"])


def test_a_budget_looks_the_same_in_charts_with_other_runs():
    (only,) = groups(np.array([1e12, 1e12]), FOUR)
    assert only.look == groups(np.array(FOUR))[2].look
    assert groups(np.array([1e12, np.nan]))[-1].name == "no budget"


def test_isoflop_curves_of_another_loss_have_their_own_residuals():
    n = np.geomspace(1e4, 1e5, 5)
    budgets = np.repeat([1e11, 1e12], 5)
    sizes = np.tile(n, 2)
    loss = 3 + 0.1 * (np.log(sizes) - np.log(3e4)) ** 2 - 0.1 * np.log10(budgets / 1e11)
    loss[7] += 0.01
    isoflop = fit_isoflop(sizes, budgets / 6 / sizes, loss, budgets)
    surface = fit_surface(sizes, budgets / 6 / sizes, loss, budget=budgets)
    x, y, _ = points(residuals_chart(surface, isoflop).panels[2])
    assert np.abs(y[x == n[2]]).max() == pytest.approx(
        0.01 * (1 - 17 / 35) / loss[7], rel=0.05
    )  # its leverage is 17/35
    assert np.abs(y[:5]).max() < 1e-12
