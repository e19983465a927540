"""The charts of single runs: their curves, what they cost, how they were tuned, and what was left out."""

import numpy as np
import pandas as pd
import pytest
from support.charts import is_whole, named, num_bytes
from support.demo_runs import BUDGETS, demo_runs, no_excluded

from dlm.core.errors import UserError
from dlm.report.charts.cost import Planned, cost_chart, planned_of
from dlm.report.charts.curves import HISTORY, MOST_POINTS, curves_chart, read_history, thinned
from dlm.report.charts.excluded import excluded_summary
from dlm.report.charts.tuning import tuning_chart
from dlm.report.interactive import as_plotly

WORST_JSON = 1_500_000  # bytes


def history_of(names, *, steps=50, seed=0):
    """Return a history: a noisy training loss at each step, and a validation loss at the last one."""
    rng = np.random.default_rng(seed)
    step = np.tile(np.arange(1, steps + 1), len(names))
    train = 2 + 3 / step + 0.1 * rng.standard_normal(len(step))
    validation = np.where(step == steps, 2.1, np.nan)
    columns = (np.repeat(names, steps), 2048 * step, train, validation)
    return pd.DataFrame(dict(zip(HISTORY, columns, strict=True)))


def left_out(**columns):
    """Return rows of excluded.csv."""
    return pd.DataFrame(columns).reindex(columns=list(no_excluded().columns))


def test_a_curve_is_what_was_logged():
    runs = demo_runs()
    history = history_of(runs["run_id"])
    training, validation = curves_chart(history, runs).panels
    assert len(training.series) == len(BUDGETS)
    first = training.series[0]
    x, y = np.array(first.x), np.array(first.y)
    assert np.isnan(y).sum() == (runs["budget"] == BUDGETS[0]).sum() - 1  # a gap between each two runs
    logged = history[history["run_id"].isin(runs[runs["budget"] == BUDGETS[0]]["run_id"])]
    assert y[np.isfinite(y)] == pytest.approx(logged["train/loss"].to_numpy(), abs=1e-4)
    assert x[np.isfinite(x)].tolist() == logged["tokens"].tolist()
    assert first.hover[0] == runs["run_id"][0] and "loss" in first.hover[49] and "done" in first.hover[49]
    assert [one.group for one in validation.series] == [one.group for one in training.series]
    assert len(validation.series[0].x) == 2 * (runs["budget"] == BUDGETS[0]).sum() - 1


def test_losses_of_more_than_a_power_of_ten_run_along_a_logarithmic_axis():
    runs = demo_runs()
    history = history_of(runs["run_id"])
    assert not curves_chart(history, runs).panels[0].y.is_log
    history.loc[0, "train/loss"] = 100.0
    training, validation = curves_chart(history, runs).panels
    assert training.y.is_log and not validation.y.is_log


def test_thinning_keeps_the_ends_and_the_envelope():
    rng = np.random.default_rng(0)
    x, y = np.arange(1.0, 5001.0), rng.standard_normal(5000)
    y[[1234, 4321]] = 9.0, -9.0
    kept_x, kept_y = thinned(x, y, 60)
    assert len(kept_x) <= 60
    assert (kept_x[[0, -1]] == x[[0, -1]]).all() and (kept_y[[0, -1]] == y[[0, -1]]).all()
    assert kept_y.min() == -9.0 and kept_y.max() == 9.0
    for part in np.array_split(np.arange(5000), 29):
        own = np.isin(kept_x, x[part])
        assert kept_y[own].min() == y[part].min() and kept_y[own].max() == y[part].max()
    assert (np.diff(kept_x) > 0).all()


def test_two_thousand_runs_stay_small_and_the_note_says_what_is_drawn():
    runs = pd.DataFrame({"run_id": [f"mdm-170M-3e20-{place:08x}" for place in range(2000)], "status": "done"})
    runs = runs.assign(budget=np.geomspace(1e18, 1e21, 8)[np.arange(2000) % 8], loss=2.1, loss_se=0.01)
    runs = runs.assign(params=1.7e8, tokens=3.1e9, learning_rate=1.25e-4, global_batch_size=256)
    chart = curves_chart(history_of(runs["run_id"], steps=100), runs)
    assert is_whole(chart) and num_bytes(chart) < WORST_JSON
    drawn = sum(int(np.isfinite(one.y).sum()) for panel in chart.panels for one in panel.series)
    assert chart.notes[-1].startswith(f"{drawn:,} of 202,000 logged points are drawn")
    assert MOST_POINTS / 2 < drawn <= MOST_POINTS
    training = chart.panels[0].series[0]
    starts = np.flatnonzero(np.isnan([np.nan, *training.y]))
    assert {training.x[place] for place in starts} == {2048.0}


def test_runs_that_failed_stopped_or_are_left_out_are_marked_at_their_last_loss():
    runs = demo_runs()
    others = left_out(
        run_id=["größer-1", "b", "c"],
        status=["diverged", "running", "done"],
        budget=[BUDGETS[0], BUDGETS[1], np.nan],
        reason=["diverged at step 7", "running: wait", "did not learn: its loss is too high"],
    )
    history = history_of([*runs["run_id"], *others["run_id"]])
    history = history[(history["run_id"] != "größer-1") | (history["tokens"] <= 7 * 2048)]
    history.loc[(history["run_id"] == "b") & (history["tokens"] > 20 * 2048), "train/loss"] = np.nan
    chart = curves_chart(history, runs, others)
    training = chart.panels[0]
    assert is_whole(chart)
    assert named(training, "failed").x == [7 * 2048.0] and "diverged at step 7" in named(training, "failed").hover[0]
    assert named(training, "not finished").x == [20 * 2048.0]
    assert "did not learn" in named(training, "left out of the law").hover[0]
    assert named(training, "no budget")
    assert "1 failed, 1 is not finished and 1 is left out of the law." in chart.notes[0]


def test_over_a_point_the_page_shows_lines_of_text_and_over_a_curve_plotly_writes_the_position():
    runs = demo_runs().assign(learning_rate=0.01)
    curve = as_plotly(curves_chart(history_of(runs["run_id"]), runs))["data"][0]
    assert curve["hovertext"][0] == f"{runs['run_id'][0]}<br>"
    assert curve["hovertext"][49].count("<br>") == 5 and "learning rate 0.01<br>" in curve["hovertext"][49]
    assert curve["hovertemplate"].startswith(
        "%{hovertext}training tokens: %{x:,.4~r}<br>training loss, nats/token: %{y:"
    )
    point = as_plotly(cost_chart(runs))["data"][0]
    assert point["hovertext"][0].startswith("8 cells, ") and r"\n" not in str(point)


def test_without_a_usable_logged_loss_there_are_no_curves():
    runs = demo_runs()
    assert curves_chart(None, runs) is None
    assert curves_chart(history_of(["another"]), runs) is None
    empty = history_of(runs["run_id"]).assign(**{"train/loss": np.nan, "val/loss": np.inf})
    assert curves_chart(empty, runs) is None


def test_one_run_with_one_logged_step_has_a_curve():
    runs = demo_runs().head(1)
    assert is_whole(curves_chart(history_of(runs["run_id"], steps=1), runs))


def test_a_history_that_is_damaged_is_named_in_one_line(tmp_path):
    assert read_history(tmp_path) is None
    (tmp_path / "history.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match=r"history.parquet is damaged .* run `dlm collect` again") as raised:
        read_history(tmp_path)
    assert "\n" not in str(raised.value)


def test_the_sums_of_the_cost_are_those_of_the_table():
    runs = demo_runs().assign(gpu_hours=0.0)
    seconds = runs["tokens"] / runs["tokens_per_sec"]
    planned = [
        Planned(cell_id=name, sec=sec / 1.25, gpu_hours=0.0) for name, sec in zip(runs["run_id"], seconds, strict=True)
    ]
    waiting = left_out(run_id=["w"], status=["planned"], budget=[BUDGETS[2]], tokens=[1e9], tokens_per_sec=[1.0])
    chart = cost_chart(runs, waiting, [*planned, Planned(cell_id="w", sec=7200.0, gpu_hours=0.0)])
    bars, cells = chart.panels
    assert is_whole(chart) and bars.series[0].x == ["3e11", "1e12", "3e12"]
    assert named(bars, "used").y == pytest.approx(seconds.groupby(runs["budget"]).sum().to_list())
    assert sum(named(bars, "planned").y) == pytest.approx(seconds.sum() / 1.25)
    assert named(bars, "planned, cost not known yet").y == [0.0, 0.0, 7200.0]
    assert "(+25%)" in chart.sentence and "2.0 h of process time by the plan" in chart.notes[0]
    assert sum(len(one.x) for one in cells.series if one.mark == "point") == len(runs)


def test_the_cost_on_gpus_counts_failed_runs_and_what_was_done_again():
    hours = np.linspace(1.0, 3.0, len(demo_runs()))
    runs = demo_runs().assign(gpu_hours=hours, steps_redone=0)
    runs.loc[3, ["attempts", "steps_redone"]] = 4, 120
    failed = left_out(run_id=["f"], status=["diverged"], budget=[BUDGETS[2]], gpu_hours=[5.0], attempts=[1])
    planned = [Planned(cell_id=name, sec=1.0, gpu_hours=2.0) for name in [*runs["run_id"], "f"]]
    chart = cost_chart(runs, failed, planned)
    assert sum(named(chart.panels[0], "used").y) == pytest.approx(hours.sum() + 5.0)
    assert f"{len(runs) + 1} runs cost {hours.sum() + 5:,.3g} GPU-hours" in chart.sentence
    assert f"1 run took more than one attempt; 120 of {runs['steps'].sum():,.0f} steps" in chart.notes[-1]
    assert any("4 attempts, 120 steps redone" in text for one in chart.panels[1].series for text in one.hover)


def test_without_a_plan_the_cost_stands_alone_and_without_speeds_there_is_none():
    runs = demo_runs()
    chart = cost_chart(runs)
    assert len(chart.panels) == 1 and "no estimate" in chart.sentence
    assert cost_chart(runs.drop(columns=["tokens_per_sec"])) is None
    assert cost_chart(runs.head(0)) is None


def test_the_estimate_of_a_plan_is_read_without_the_cells_that_it_does_not_know():
    estimate = {"a": {"hours": 0.5, "gpu_hours": 4.0}, "b": {"hours": None, "gpu_hours": None}}
    assert planned_of(estimate) == [Planned(cell_id="a", sec=1800.0, gpu_hours=4.0)]


def tuned_runs():
    """Return runs of eight sizes at five rates, whose log loss is a parabola about 3 N^-0.5 in the log of the rate."""
    rng, rows = np.random.default_rng(0), []
    for row in demo_runs(budgets=BUDGETS[:2], sigma=0).to_dict("records"):
        best = 3 * row["params"] ** -0.5
        for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
            rise = 0.5 * 0.02 * np.log(factor * 1.1) ** 2 + 1e-4 * rng.standard_normal()
            name = f"{row['run_id']}-{factor:g}"
            own = {"run_id": name, "learning_rate": best * factor * 1.1, "loss": row["loss"] * np.exp(rise)}
            rows.append({**row, **own, "role": "tune", "global_batch_size": 64, "block_size": 32})
    return pd.DataFrame(rows)


def test_tuning_shows_the_loss_above_the_best_of_each_cell_and_the_law_of_the_best_rate():
    runs = tuned_runs()
    around, stars = tuning_chart(runs).panels
    assert len(around.series) == 16 and [one.name for one in around.series if one.name] == ["3e11 FLOPs", "1e12 FLOPs"]
    for one in around.series:
        own = runs[runs["run_id"].isin([text.split("\n")[0] for text in one.hover])]
        assert list(one.y) == pytest.approx((own["loss"] / own["loss"].min() - 1).to_list())
        assert list(one.x) == pytest.approx(own["learning_rate"].to_list())
    lines = [one for one in stars.series if one.mark == "line"]
    sizes = np.sort(np.unique(runs["params"]))[::-1]
    for one in lines:
        assert list(one.y) == pytest.approx((3 * sizes**-0.5).tolist(), rel=0.03)  # tokens rise as sizes fall
        assert all(low < best < high for low, best, high in zip(one.low, one.y, one.high, strict=True))


def test_tuning_says_why_there_is_no_law_and_needs_three_rates():
    runs = tuned_runs()
    chart = tuning_chart(runs[runs["learning_rate"] * runs["params"] ** 0.5 > 3])  # the best rate and higher ones
    assert len(chart.panels) == 1 and chart.notes[0].startswith("No law of the best settings: ")
    assert tuning_chart(runs[runs["run_id"].str.endswith("-1")]) is None
    assert tuning_chart(demo_runs()) is None  # it has no learning rates
    assert tuning_chart(runs.assign(loss=np.nan)) is None


def test_a_batch_that_is_varied_has_its_own_panel():
    runs = tuned_runs()
    batches = [runs[runs["run_id"].str.endswith("-1")].assign(global_batch_size=size) for size in (32, 64, 128)]
    chart = tuning_chart(pd.concat(batches, ignore_index=True))
    assert chart.panels[0].title == "loss over batch"
    assert list(chart.panels[0].series[0].x) == pytest.approx([1024.0, 2048.0, 4096.0])


def test_what_was_left_out_is_counted_by_cause_with_what_to_do():
    others = left_out(
        run_id=list("abcdef"),
        status=["diverged", "planned", "planned", "done", "done", "out_of_memory"],
        cause=["diverged", "planned", "planned", "did not learn", np.nan, np.nan],
    )
    found = {cause: (count, advice) for cause, count, advice in excluded_summary(others)}
    assert found["planned"] == (2, "submit it") and next(iter(found)) == "planned"
    assert found["diverged"][1].startswith("lower optimizer.lr")
    assert "tokens" in found["did not learn"][1]
    assert found["left out"] == (1, "see the reason of each run")  # an older table has no causes
    assert found["out of memory"][1].startswith("submit again")
    assert excluded_summary(None) == []


def test_a_proof_run_is_no_tuning_run():
    runs = tuned_runs()
    proof = runs.iloc[:1].assign(run_id="the-proof", role="proof", loss=0.5 * runs["loss"].min())
    chart = tuning_chart(pd.concat([runs, proof], ignore_index=True))
    assert [one.y for one in chart.panels[0].series] == [one.y for one in tuning_chart(runs).panels[0].series]
    assert not any("the-proof" in said for panel in chart.panels for one in panel.series for said in one.hover or ())
