"""The best learning rate and batch as laws of size and tokens, in worlds where these laws are known."""

import json

import numpy as np
import pandas as pd
import pytest

from dlm.core.errors import UserError
from dlm.core.power_recipe import read_recipe
from dlm.fit import fit_hparams

X, Y, Z = -0.5, -0.1, 0.4  # exponents: lr* = e^5 N^X D^Y, B* = e^2 D^Z
GRID = [(n, c / 6 / n) for n in (1e7, 3e7, 1e8) for c in (1e18, 1e19)]
DIAGONAL = [(1e7, 1e9), (3e7, 4e9)]  # the best size at two budgets: N and D rise together


def runs(cells=GRID, *, rates=(0.25, 0.5, 1, 2, 4), batches=(), sigma=0.002, scatter=0.0, reps=1, seed=0, off=0.3):
    """Runs at multiples of a rate (and batch) that misses the best of each cell by up to a factor of e^off."""
    rng, rows = np.random.default_rng(seed), []
    for n, d in cells:
        u, v = 5 + X * np.log(n) + Y * np.log(d) + scatter * rng.standard_normal(), 2 + Z * np.log(d)
        tried = np.log(rates) + rng.uniform(-off, off)
        wide = np.log(batches) + rng.uniform(-off, off) if batches else [0.0]
        for du, dv in [(du, dv) for du in tried for dv in wide] * reps:
            excess = 0.01 * du**2 + 0.005 * dv**2 - 0.004 * du * dv
            loss = (1.7 + 400 / n**0.34 + 400 / d**0.28) * np.exp(excess + sigma * rng.standard_normal())
            batch = np.exp(v + dv) if batches else 2.0**17
            rows.append(
                {"params": n, "tokens": d, "loss": loss, "learning_rate": np.exp(u + du), "batch_tokens": batch}
            )
    return pd.DataFrame(rows)


def covered(power, name, truth):
    low, high = power.ci[name]
    return low <= truth <= high


def test_known_exponents_are_found_and_their_intervals_cover():
    hits, found = [], []
    for seed in range(40):
        law = fit_hparams(runs(seed=seed, scatter=0.15 * (seed % 2)), replicates=200).powers["lr"]
        hits.append([covered(law, "params", X), covered(law, "tokens", Y)])
        found.append([law.params, law.tokens])
    assert np.mean(found, axis=0) == pytest.approx([X, Y], abs=0.03)
    assert (np.mean(hits, axis=0) >= 0.88).all()


def test_rate_and_batch_are_fitted_together_with_their_interaction():
    hits, found = [], []
    for seed in range(25):
        fitted = fit_hparams(runs(rates=(0.5, 1, 2), batches=(0.5, 1, 2), sigma=0.001, seed=seed), replicates=200)
        rate, batch = fitted.powers["lr"], fitted.powers["batch"]
        hits.append([covered(rate, "params", X), covered(rate, "tokens", Y), covered(batch, "tokens", Z)])
        found.append([rate.params, rate.tokens, batch.tokens])
        assert batch.params == 0 and "params" not in batch.ci
    assert np.mean(found, axis=0) == pytest.approx([X, Y, Z], abs=0.02)
    assert (np.mean(hits, axis=0) >= 0.84).all()
    assert fitted.curvature == pytest.approx(np.array([[0.02, -0.004], [-0.004, 0.01]]), abs=0.003)


def test_the_batch_may_also_come_from_sequences_and_their_length():
    frame = runs(rates=(0.5, 1, 2), batches=(0.5, 1, 2))
    columns = frame.assign(global_batch_size=frame["batch_tokens"] / 128, block_size=128).drop(columns="batch_tokens")
    recipes = [fit_hparams(table).recipe() for table in (frame, columns)]
    assert recipes[1]["batch_tokens"] == pytest.approx(recipes[0]["batch_tokens"])
    assert recipes[0]["format"] == "dlm-recipe-1" and recipes[0]["range"]["params"] == [1e7, 1e8]
    bare = fit_hparams(frame.drop(columns="batch_tokens")[::3])  # one batch of each rate
    assert bare.recipe()["batch_tokens"] is None and "does not hold the batch" in bare.report()


def test_cells_that_scatter_about_the_law_widen_its_intervals():
    calm, restless = (fit_hparams(runs(scatter=s, sigma=1e-4, seed=3)).powers["lr"] for s in (0.0, 0.3))
    width = [np.diff(law.ci["params"])[0] for law in (calm, restless)]
    assert restless.scatter > 0.1 > calm.scatter and width[1] > 5 * width[0]


def test_a_cell_on_one_side_of_the_best_is_left_out_and_the_reason_says_what_to_run():
    low = runs(GRID[5:], rates=(1 / 16, 1 / 8, 1 / 4), sigma=1e-5)
    fitted = fit_hparams(pd.concat([runs(GRID[:5], sigma=1e-5), low]), replicates=100)
    (refused,) = [cell for cell in fitted.cells if not cell.usable]
    highest = low["learning_rate"].max()
    assert refused.params == 1e8 and refused.reason == f"every learning rate up to {highest:.3g} lies below the best"
    assert refused.next == f"add {2 * highest:.3g}" and any("left out: at N 100M" in w for w in fitted.warnings)
    assert len(fitted.used) == 5 and fitted.powers["lr"].params == pytest.approx(X, abs=0.01)


@pytest.mark.parametrize(("rates", "words"), [((1 / 16, 1 / 8, 1 / 4), "up to"), ((4, 8, 16), "from")])
def test_cells_that_all_lie_on_one_side_of_the_best_are_refused_with_what_to_run(rates, words):
    with pytest.raises(UserError, match=f"no tuning cell has its best.*every learning rate {words} .* \\(add 0.0"):
        fit_hparams(runs(rates=rates, sigma=1e-5))


def test_a_run_that_nearly_diverged_is_on_no_parabola():
    frame = runs(sigma=1e-4)
    worst = frame.groupby(["params", "tokens"])["learning_rate"].transform("max") == frame["learning_rate"]
    fitted = fit_hparams(frame.assign(loss=frame["loss"] * np.where(worst, 2, 1)))
    assert fitted.powers["lr"].params == pytest.approx(X, abs=0.02) and fitted.noise < 1e-3
    assert fitted.cells[0].tried["lr"][1] == pytest.approx(frame["learning_rate"][:5].max()) and fitted.num_runs == 24


def test_two_cells_give_the_law_along_their_line_and_say_so():
    fitted = fit_hparams(runs(DIAGONAL, sigma=1e-5, reps=2))
    law = fitted.powers["lr"]
    logs = np.log(np.array(DIAGONAL))
    assert law.logs(*logs.T) == pytest.approx(5 + logs @ [X, Y], abs=0.01)  # right where it was tuned
    assert law.tokens / law.params == pytest.approx(np.log(4) / np.log(3))
    assert "does not show the exponents of N and D apart" in fitted.report()
    assert "as many cells as coefficients" in fitted.report()


def test_one_size_shows_no_exponent_of_n():
    fitted = fit_hparams(runs([(1e8, 1e9), (1e8, 4e9), (1e8, 2e10)], sigma=1e-5))
    assert fitted.powers["lr"].params == 0 and fitted.powers["lr"].tokens == pytest.approx(Y, abs=0.01)
    assert "nearly one N, so the exponent of N for the learning rate is not known" in fitted.report()
    single = fit_hparams(runs([(1e8, 1e9)], sigma=1e-5)).powers["lr"]
    assert (single.params, single.tokens) == (0, 0)


def test_runs_far_from_the_best_rate_do_not_bend_the_parabola():
    frame = runs(rates=(1 / 64, 0.25, 0.5, 1, 2, 4, 64), sigma=1e-4)
    far = np.abs(
        np.log(frame["learning_rate"] / frame.groupby(["params", "tokens"])["learning_rate"].transform("median"))
    )
    frame["loss"] *= 1 + 0.3 * (far > 3)
    fitted = fit_hparams(frame)
    assert fitted.num_runs <= 30 and "12 runs of these cells left out" in fitted.report()
    assert fitted.powers["lr"].params == pytest.approx(X, abs=0.02)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.drop(columns="learning_rate"), "no column 'learning_rate': needed are params, tokens, loss"),
        (lambda f: f.assign(learning_rate=0.0), "'learning_rate' is 0 in 30 rows: give numbers above 0"),
        (lambda f: f.assign(learning_rate="fast"), "'learning_rate' holds a word"),
        (lambda f: f.assign(batch_tokens=np.nan), "'batch_tokens' is empty in 30 rows"),
        (lambda f: f.iloc[::5], "3 or more learning rates or batches"),
        (lambda f: f.assign(loss=1 / f["loss"]), "no tuning cell|does not turn upward"),
        (lambda f: f.assign(objective=["a", "b"] * 15), "several objectives"),
    ],
)
def test_runs_that_show_no_best_rate_are_refused_in_one_line(change, words):
    with pytest.raises(UserError, match=words) as caught:
        fit_hparams(change(runs()))
    assert "\n" not in str(caught.value)


def test_a_table_without_runs_is_refused():
    with pytest.raises(UserError, match=r"^there are no runs: give at least one row of params, .* and learning_rate$"):
        fit_hparams(runs().iloc[:0])


def test_a_recipe_of_a_table_without_objective_holds_for_any(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(fit_hparams(runs(), replicates=100).recipe()))
    assert read_recipe(path).objective is None


def test_the_result_as_json_has_no_number_that_json_lacks():
    few = fit_hparams(runs([(1e8, 1e9)], rates=(0.5, 1, 2), off=0.1))  # as many runs as coefficients: no noise
    content = json.loads(json.dumps(few.to_dict(), allow_nan=False))
    assert content["noise"] is None and "nothing shows the noise" in " ".join(content["warnings"])
    assert content["recipe"]["lr"]["params"] == 0


def test_runs_that_do_not_show_their_noise_have_no_line_about_it():
    found = fit_hparams(runs(cells=[GRID[0]], rates=(0.5, 1, 2)), replicates=100)
    assert "nan" not in found.report() and "nothing shows the noise" in found.report()
