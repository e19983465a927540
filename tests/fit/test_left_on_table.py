"""The loss that badly tuned runs leave on the table, and what it does to the exponents."""

import json

import numpy as np
import pandas as pd
import pytest

from dlm.core.errors import UserError
from dlm.fit import reconcile
from dlm.fit.frozen import forecast
from dlm.fit.hparams import untuned
from dlm.fit.table import fit_runs, fit_sweep, score_forecast

X, Y, CURVATURE = -0.7, 0.3, 0.03  # the best rate is .01 at N = 1e8, D = 2e9, and drifts as N^X D^Y
ALPHA, BETA = 0.34, 0.30
A = BETA / (ALPHA + BETA)  # of tuned runs
BUDGETS = np.geomspace(1e18, 1e20, 5)
FACTORS = (0.25, 0.5, 1, 2, 4)


def best_rate(n, d):
    return 0.01 * (n / 1e8) ** X * (d / 2e9) ** Y


def run(budget, size, rate, rng, *, role=None):
    """A run of `size` times the size in the middle of a budget; its loss has the excess of its rate."""
    n = np.sqrt(budget / 120) * size
    d = budget / 6 / n
    loss = (1.7 + 400 / n**ALPHA + 400 / d**BETA) * np.exp(0.5 * CURVATURE * np.log(rate / best_rate(n, d)) ** 2)
    name = f"{role or 'run'}-{budget:.3g}-{size:.3g}-{rate:.3g}"
    facts = {"run_id": name, "objective": "masked_diffusion", "status": "done", "role": role, "budget": budget}
    recipe = {"learning_rate": rate, "global_batch_size": 256, "block_size": 1024}
    return {**facts, **recipe, "params": n, "tokens": d, "flops": budget, "loss": loss * np.exp(rng.normal(0, 5e-4))}


def table(*, sizes=(0.5, 2.0), at=(BUDGETS[0], BUDGETS[-1]), factors=FACTORS, seed=0):
    """Runs with one rate at five budgets, and tuning runs about the best rate of these sizes and budgets."""
    rng = np.random.default_rng(seed)
    law = [run(c, size, 0.01, rng) for c in BUDGETS for size in np.geomspace(1 / 4, 4, 7)]
    tuning = [(c, size, np.sqrt(c / 120) * size) for c in at for size in sizes]
    rates = [(c, size, f * best_rate(n, c / 6 / n)) for c, size, n in tuning for f in factors]
    return pd.DataFrame([*law, *(run(*one, rng, role="tune") for one in rates)])


def warned(result):
    return " ".join(result.warnings)


@pytest.mark.parametrize("law", ["isoflop", "chinchilla"])
def test_a_drift_of_the_best_rate_bends_a_and_the_term_undoes_it(law):
    fitted = fit_runs(table(), law=law, bootstrap=0)
    a = fitted.tuning["a"]
    assert a["with"] == fitted.allocation.a == pytest.approx(A, abs=0.015)
    assert a["without"] == fit_runs(table().query("role != 'tune'"), law=law, bootstrap=0).allocation.a
    assert a["without"] < A - 0.05 and 0 < a["error"] < 0.01


def test_runs_off_the_frontier_are_named_with_their_excess():
    frame = table()
    fitted = fit_runs(frame, law="isoflop", bootstrap=0)
    own = frame[frame["role"].isna()].set_index("run_id")
    flagged = fitted.tuning["flagged"]
    assert len(flagged) > 5 and [one["excess"] for one in flagged] == sorted(
        (f["excess"] for f in flagged), reverse=True
    )
    for one in flagged:
        row = own.loc[one["run_id"]]
        true = np.expm1(0.5 * CURVATURE * np.log(row["learning_rate"] / best_rate(row["params"], row["tokens"])) ** 2)
        assert one["excess"] == pytest.approx(true, rel=0.1) and one["excess"] >= 0.005
    said = fitted.tuning["sentence"]
    assert f"tuning: {said}" in fitted.report() and flagged[0]["run_id"] in said and said in fitted._repr_html_()
    shown = json.loads(json.dumps(fitted.to_dict(), allow_nan=False))["tuning"]
    assert shown["tuned"] and shown["num_tuning"] == 20 and shown["hparams"]["laws"]["lr"]["params"] < -0.6


def test_tuning_runs_enter_the_law_only_with_the_recipe_of_its_runs():
    frame = table(sizes=(1.0,))
    assert fit_runs(frame, law="isoflop", bootstrap=0).n == 35
    again = (
        frame[(frame["budget"] == BUDGETS[0]) & frame["role"].isna()]
        .iloc[[3]]
        .assign(role="tune", run_id="again", loss=3)
    )
    fitted = fit_runs(pd.concat([frame, again]), law="isoflop", bootstrap=0)
    assert fitted.n == 36 and fitted.runs["loss"][-1] == 3  # a known run is recognised by its measured loss


def test_one_tuned_size_per_budget_cannot_show_what_moves_a_and_the_result_says_so():
    fitted = fit_runs(table(sizes=(1.0,)), law="isoflop", bootstrap=0)
    assert "tune a second size at a budget" in fitted.tuning["sentence"]
    assert "does not show the exponents of N and D apart" in warned(fitted)
    assert "the best settings are extrapolated" in warned(fitted)


def test_tuning_runs_on_one_side_of_the_best_give_no_term_and_say_what_to_run():
    fitted = fit_runs(table(factors=(1 / 16, 1 / 8, 1 / 4)), law="isoflop", bootstrap=0)
    assert fitted.n == 35 and not fitted.tuning["tuned"]
    assert "do not show what other runs leave on the table: no tuning cell" in warned(fitted) and "(add" in warned(
        fitted
    )


def test_no_term_is_used_far_outside_the_tuned_sizes():
    frame = table(at=(BUDGETS[0],), sizes=(0.25,))
    fitted = fit_runs(frame, law="isoflop", bootstrap=0)
    assert "no law of the rate is used beyond 10 times" in warned(fitted) and not fitted.tuning["tuned"]


def test_a_table_of_tuning_runs_only_is_refused():
    with pytest.raises(UserError, match="all runs are tuning runs"):
        fit_runs(table().query("role == 'tune'"), law="isoflop", bootstrap=0)


def test_the_fits_of_a_report_use_the_term():
    fits = fit_sweep(table(), laws=("isoflop",), bootstrap=100)
    fitted = fits["masked_diffusion/isoflop"]
    assert fitted.tuning["tuned"] and fitted.ci["a"][0] < A + 0.01 and fitted.verdict is not None


def test_without_tuning_runs_a_fit_says_how_far_tuning_could_move_a():
    frame = table().query("role != 'tune'")
    fitted = fit_runs(frame, law="chinchilla", bootstrap=0)
    low, high = fitted.tuning["a_moves"]
    assert fitted.tuning["sentence"].startswith("untuned: these exponents describe this recipe") and low < 0 < high
    assert f"tuning would move a by {low:+.2f} to {high:+.2f}" in fitted.report()
    assert fit_runs(frame.drop(columns="learning_rate"), law="chinchilla", bootstrap=0).tuning is None


def test_the_sensitivity_is_the_shift_that_one_rate_for_all_runs_makes():
    """The shift of a by the drift of this world, from the exponent and the curvature that its runs show."""
    fitted = fit_runs(table(seed=1).query("role != 'tune'"), law="chinchilla", bootstrap=0)
    curvature = untuned._curvature(fitted)
    shift = untuned.shift_of_a(fitted.allocation.a, curvature, CURVATURE, X, Y)
    assert fitted.allocation.a + shift == pytest.approx(A, abs=0.03) and shift > 0.05


def test_tuning_runs_are_not_graded_against_predictions_for_the_best_recipe():
    frame = table()
    predicted = forecast(fit_runs(frame, law="chinchilla", bootstrap=100), [1e21])
    scored = score_forecast(predicted, frame)
    assert (scored.known, scored.rows) == (35, ()) and "20 tuning runs not graded: they vary the recipe" in scored.notes
    n = np.sqrt(1e21 / 120)
    later = pd.DataFrame([run(1e21, 1.0, best_rate(n, 1e21 / 6 / n), np.random.default_rng(1))])
    assert [row["params"] for row in score_forecast(predicted, pd.concat([frame, later])).rows] == [pytest.approx(n)]


def test_reconcile_takes_the_runs_as_a_fit_does_without_what_they_leave_on_the_table():
    frames = [table(), table(seed=1).assign(objective="autoregressive")]
    found = reconcile(frames, forms=["isoflop"], replicates=50)
    (cell,) = found.common
    for frame, values in zip(frames, found.exponents["a"], strict=True):
        assert values[cell][0] == pytest.approx(fit_runs(frame, law="isoflop", bootstrap=0).allocation.a, abs=1e-9)
    assert [one.num_runs for one in found.sets] == [35, 35]
    assert "the losses are those at the best learning rate, by 20 tuning runs" in found.report()


def test_runs_of_one_size_and_length_at_several_rates_are_said_to_be_averaged():
    runs = table(at=[])
    both = pd.concat([runs, runs.assign(learning_rate=2 * runs["learning_rate"], loss=runs["loss"] + 0.01)])

    def said(frame):
        fitted = fit_runs(frame, law="chinchilla", bootstrap=0, conventions=False)
        return [line for line in fitted.warnings if "differ in learning_rate" in line]

    assert said(runs.assign(learning_rate=runs["params"] ** -0.5)) == []  # a rate that follows the size
    (line,) = said(both)
    assert "the law describes their average" in line
