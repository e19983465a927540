"""The forecast of a proof run: which fit makes it, when there is none, what it holds, and how the run is graded."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from support.demo_runs import demo_runs, flops_per_token, true_loss

from dlm.core.errors import UserError
from dlm.fit.frozen import checked, load, z_of
from dlm.fit.optimum import optima
from dlm.fit.proof import NOT_YET, Proof, best_size, freeze_proof, headline
from dlm.fit.table import fit_runs, fit_sweep, read_runs, score_forecast, score_runs

C = 9e12
SIZES = (130_000, 260_000, 520_000)  # the best size at C and its half and double


@pytest.fixture(scope="module")
def fits():
    return list(fit_sweep(demo_runs(), bootstrap=100).values())


def cells(sizes=(48_000,)):
    return [{"num_params": n, "tokens": int(C / flops_per_token(n))} for n in sizes]


@pytest.fixture(scope="module")
def forecast(fits):
    return freeze_proof(fits, C, cells(), notes=[])


def with_proofs(runs, sizes=(48_000,), off=0.0):
    """The runs and proof runs of these sizes, whose losses are off the true law by this share."""
    rows = []
    for cell in cells(sizes):
        n, d = cell["num_params"], cell["tokens"]
        loss = true_loss(n, d) * (1 + off)
        row = {**runs.iloc[0], "run_id": f"proof-{n}", "params": n, "tokens": d, "flops": d * flops_per_token(n)}
        rows.append({**row, "budget": C, "loss": loss, "role": "proof"})
    return pd.concat([runs, pd.DataFrame(rows)], ignore_index=True)


def test_the_headline_is_the_judged_surface(fits):
    main = headline(fits)
    assert main.law == "combined" and main.verdict is not None
    best, why = best_size(fits, C)
    assert why == "" and pytest.approx(optima(main, [C])[C].N) == best.N
    assert headline([fit for fit in fits if fit.law != "combined"]) is None


def test_fits_that_do_not_determine_the_best_size_give_the_reason(fits):
    main = headline(fits)
    _, why = best_size(list(fit_sweep(demo_runs(budgets=[1e12])[:2], bootstrap=100).values()), C)
    assert why.startswith("there is no law to predict from:")
    assert "no intervals" in best_size([replace(main, draws=None, verdict=None)], C)[1]
    draws = main.draws * np.where(np.arange(len(main.draws)) % 3 == 0, np.nan, 1.0)[:, None]
    lost = replace(main, draws=draws)
    assert "best size at 9e12 FLOPs is not known: resampled runs do not bound it" in best_size([lost], C)[1]
    spread = np.exp(8 * np.random.default_rng(0).standard_normal(len(main.draws)))
    is_size = [name.endswith(".A") for name in main.surface.params]
    wide = replace(main, draws=np.where(is_size, main.draws * spread[:, None], main.draws))
    assert "the interval of N* spans a factor above 10" in best_size([wide], C)[1]


def test_a_forecast_holds_the_prediction_of_the_run_the_line_and_the_hold_outs(fits, forecast):
    assert json.loads(json.dumps(forecast, allow_nan=False)) == forecast
    (run,) = forecast["proof"]["runs"]
    assert run["low"] < true_loss(run["params"], run["tokens"]) < run["high"]
    line = next(fit for fit in fits if fit.law == "isoflop")
    assert forecast["proof"]["line"]["L"] == pytest.approx(line.params["L0"] * C ** line.params["c"])
    held = {(one["law"], one["name"]): one["L_error"] for one in forecast["proof"]["holdouts"]}
    assert held["combined", "without_top_1"] == headline(fits).holdout["without_top_1"]["L_error"]
    checked(forecast, "proof.json")
    with pytest.raises(UserError, match="has been changed since it was written"):
        checked({**forecast, "proof": {**forecast["proof"], "line": None}}, "proof.json")
    without = [replace(fit, params={}) if fit.law == "isoflop" else fit for fit in fits]
    assert freeze_proof(without, C, cells())["proof"]["line"] is None


def test_the_interval_of_a_run_holds_all_noise_of_the_runs(fits):
    """It is wider than the residual about the law, of which the Monte Carlo error of a validation is a part."""
    main = headline(fits)
    (run,) = freeze_proof(fits, C, cells())["proof"]["runs"]
    half = math.log(run["high"] / run["low"]) / 2
    assert half > 1.96 * main.noise.residual
    noisier = replace(main, noise=replace(main.noise, residual=2 * main.noise.residual))
    (wider,) = freeze_proof([noisier], C, cells())["proof"]["runs"]
    assert math.log(wider["high"] / wider["low"]) / 2 > half


def test_a_proof_run_never_enters_a_fit_and_a_note_says_so(forecast, tmp_path):
    runs = with_proofs(demo_runs(), off=0.5)
    plain, fitted = (fit_runs(table, law="chinchilla", bootstrap=0) for table in (demo_runs(), runs))
    assert fitted.params == plain.params and fitted.n == plain.n and fitted.status == plain.status
    assert "note: 1 proof run left out" in fitted.report() and fitted.to_dict()["notes"]
    assert len(read_runs(runs, proofs=True)) == len(runs)
    with pytest.raises(UserError, match="holds proof runs only"):
        read_runs(runs[runs["role"] == "proof"])
    (tmp_path / "proof.json").write_text(json.dumps({"forecasts": [forecast]}))
    assert [row["inside"] for row in score_runs(tmp_path / "proof.json", runs).rows] == [False]
    (tmp_path / "proof.json").write_text(json.dumps({"forecasts": [forecast, forecast]}))
    with pytest.raises(UserError, match="several objectives"):
        load(tmp_path / "proof.json")


def test_z_is_beyond_the_quantile_exactly_outside_the_interval():
    row = {"predicted": 2.0, "low": 1.9, "high": 2.2}
    assert z_of(row, 2.2, 0.95) == pytest.approx(1.959964) and z_of(row, 1.9, 0.95) == pytest.approx(-1.959964)
    assert z_of(row, 2.0, 0.95) == 0 and z_of(row, 2.21, 0.95) > 1.96 and z_of(row, 1.89, 0.95) < -1.96


def proof_of(forecast, runs, **more):
    score = score_forecast(forecast, runs[runs["role"] == "proof"])
    return Proof(label="masked_diffusion", forecast=forecast, rows=score.rows, sizes=score.sizes, **more)


def test_the_outcome_is_one_sentence_beside_the_line_and_the_hold_outs(forecast):
    runs = with_proofs(demo_runs())
    proof = proof_of(forecast, runs, notes=["a note"])
    (run,) = forecast["proof"]["runs"]
    said = f"predicted {run['predicted']:.3f} ({run['low']:.3f} to {run['high']:.3f}), measured "
    assert proof.sentence().startswith(said) and abs(proof.measured["z"]) < 1.96
    assert proof.sentence().endswith(f"z = {proof.measured['z'] + 0.0:.1f}")
    line = forecast["proof"]["line"]["L"] / runs["loss"].iloc[-1] - 1
    report = proof.report()
    assert f"{forecast['proof']['line']['L']:.3f}, off by {line:+.1%}" in report and "a note" in report
    assert report.startswith("masked_diffusion: Proof run at 9e12 FLOPs with 48k parameters: predicted")
    assert "hold-out: combined law without the top budget: off by" in report
    waiting = Proof(label="", forecast=forecast, why=NOT_YET)
    assert waiting.sentence().endswith(NOT_YET) and waiting.measured is None
    assert Proof(label="", why="no law").report() == "No proof run: no law"


def test_the_outcome_says_whether_the_forecast_held_and_whether_it_could_have_failed(forecast):
    def meaning(loss_above_the_interval, *, off=0.0, line=forecast["proof"]["line"]):
        lowest = {"flops": 3e12, "loss": forecast["proof"]["runs"][0]["high"] + loss_above_the_interval}
        rows = proof_of(forecast, with_proofs(demo_runs(), off=off)).rows
        changed = {**forecast, "proof": {**forecast["proof"], "lowest": lowest, "line": line}}
        return Proof(label="", forecast=changed, rows=rows).meaning()

    held, strong = meaning(0.01)
    assert re.fullmatch(
        r"The forecast held: it was 0\.\d% too (high|low), and the run lies inside its interval\.", held
    )
    assert re.fullmatch(
        r"It could have failed: a loss as high as .* at 3e12 FLOPs \(\d\.\d+\) would have been outside.", strong
    )
    assert meaning(-0.001)[1].startswith("This is a weak test, because")
    undecided = meaning(0.01, line={"N": 1e4, "L": forecast["proof"]["runs"][0]["predicted"]})
    assert undecided[:2] == [held, strong] and "does not choose between them" in undecided[2]
    missed = r"The forecast missed: it was \d+\.\d% too {}, and the run lies {} its interval\."
    assert re.fullmatch(missed.format("low", "above"), meaning(0.01, off=0.5)[0])
    assert re.fullmatch(missed.format("high", "below"), meaning(0.01, off=-0.5)[0])
    runs = demo_runs()
    lowest = forecast["proof"]["lowest"]
    assert lowest["loss"] == runs[runs.flops >= 0.9 * runs.flops.max()].loss.min()
    assert Proof(label="", forecast=forecast, why=NOT_YET).meaning() == []


def test_a_forecast_without_an_interval_neither_holds_nor_misses(forecast):
    (run,) = forecast["proof"]["runs"]
    empty = {"low": None, "high": None}
    lost = {**forecast, "proof": {**forecast["proof"], "runs": [{**run, **empty}]}}
    lost["forms"] = [
        {**form, "draws": [[None] * len(row) if k % 10 == 0 else row for k, row in enumerate(form["draws"])]}
        for form in forecast["forms"]
    ]
    proof = proof_of(lost, with_proofs(demo_runs()))
    assert proof.measured["inside"] is None and math.isnan(proof.measured["z"])
    loss = proof.measured["loss"]
    assert proof.sentence() == f"predicted {run['predicted']:.3f} (no interval), measured {loss:.3f}"
    (said,) = proof.meaning()
    assert said.endswith("It has no interval, so it neither held nor missed.")
    assert "(no interval); the proof run has not" in Proof(label="", forecast=lost, why=NOT_YET).sentence()


def test_three_sizes_test_the_best_size_itself(fits):
    three = freeze_proof(fits, C, cells(SIZES))
    proof = proof_of(three, with_proofs(demo_runs(), SIZES))
    assert proof.measured["params"] == SIZES[1]  # the run at N*
    (size,) = proof.sizes
    assert SIZES[0] < size["vertex"] < SIZES[-1] and size["between"] == (SIZES[0], SIZES[2])
    assert "a parabola through the 3 proof runs has its minimum at" in proof.tests_of_size()[0]
