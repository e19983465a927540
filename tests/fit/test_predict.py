"""Predictions, frozen ones and their grades, profiles."""

import json

import numpy as np
import pandas as pd
import pytest
from support.worlds import worlds

from dlm.core.errors import UserError
from dlm.fit import bootstrap, fit_isoflop, fit_surface, judge
from dlm.fit.frozen import freeze
from dlm.fit.predict import predict
from dlm.fit.profile import profile
from dlm.fit.table import predict_runs, score_runs

BUDGETS = [1e18, 3e18, 1e19, 3e19]


def table(world, budgets, *, sigma=0.004, seed=0, sizes=6):
    n, d, loss, c = world.grid(budgets, sizes=sizes, sigma=sigma, seed=seed, width=5.0)
    return pd.DataFrame({"params": n, "tokens": d, "loss": loss, "flops": c, "budget": c, "objective": "ar"})


@worlds(15, 40)
def test_a_new_run_lies_in_its_interval_as_often_as_it_says(world, worlds):
    inside, law = [], []
    for seed in range(worlds):
        n, d, loss, _ = world.grid(BUDGETS, sizes=7, sigma=0.004, seed=seed)
        result = bootstrap(fit_surface(n, d, loss, norm="mse", holdout=False), replicates=300, seed=seed)
        rng = np.random.default_rng(seed + 1000)
        new_n, new_d = np.exp(rng.uniform(18, 21, 20)), np.exp(rng.uniform(21, 24, 20))
        seen = predict(result, new_n, new_d)
        truth = world.loss(new_n, new_d)
        noisy = truth * (1 + 0.004 * rng.standard_normal(20))
        inside += ((seen.pi[:, 0] <= noisy) & (noisy <= seen.pi[:, 1])).tolist()
        law += ((seen.ci[:, 0] <= truth) & (truth <= seen.ci[:, 1])).tolist()
        assert (seen.pi[:, 0] < seen.ci[:, 0]).all() and (seen.ci[:, 1] < seen.pi[:, 1]).all()
    assert 0.91 <= np.mean(inside) <= 0.985
    assert 0.88 <= np.mean(law) <= 0.985


def test_a_judged_prediction_is_wider(world):
    n, d, loss, c = world.grid(BUDGETS, sizes=7, sigma=0.004)
    alone = bootstrap(fit_surface(n, d, loss, norm="mse", budget=c), replicates=300)
    both = judge(alone, replicates=300)
    narrow, wide = (predict(r, [1e9], [1e12]).ci[0] for r in (alone, both))
    assert wide[0] < narrow[0] and narrow[1] < wide[1]
    with pytest.raises(UserError, match="isoflop gives no prediction"):
        predict(fit_isoflop(n, d, loss, c), [1e9], [1e10])


@pytest.fixture(scope="module")
def bootstrapped(world):
    """A surface of the runs of `table`, with intervals but without a verdict."""
    runs = table(world, BUDGETS)
    fit = fit_surface(runs["params"], runs["tokens"], runs["loss"], flops=runs["flops"], convention="6n", label="ar")
    return bootstrap(fit, replicates=200)


def test_frozen_predictions_are_graded_by_new_runs(world, tmp_path):
    old, path = table(world, BUDGETS), tmp_path / "frozen" / "law.json"
    result, written = predict_runs(old, at=[1e20], freeze=path, bootstrap=300)
    assert written == json.loads(path.read_text())
    grown = pd.concat([old, table(world, [1e20], seed=7)])
    graded = score_runs(path, grown)
    assert (len(graded.rows), graded.known, len(graded.sizes)) == (6, len(old), 1)
    assert graded.inside >= 5 and graded.sizes[0]["inside"]
    seen = predict(result, grown["params"].iloc[-6:], grown["tokens"].iloc[-6:])
    assert [r["predicted"] for r in graded.rows] == pytest.approx(seen.loss.tolist(), rel=1e-9)
    assert [r["low"] for r in graded.rows] == pytest.approx(seen.pi[:, 0].tolist(), rel=0.01)  # of fewer draws
    assert "6 new runs lie inside their 95% interval" in graded.sentence()
    worse = grown.assign(loss=grown["loss"] * np.where(grown["flops"] == 1e20, 1.05, 1.0))
    assert score_runs(path, worse).inside == 0
    assert ": outside" in score_runs(path, worse).report()
    assert "no new run" in score_runs(path, old).sentence()
    assert json.loads(json.dumps(graded.to_dict(), allow_nan=False))["inside"] == graded.inside


def test_frozen_predictions_cannot_be_changed(world, bootstrapped, tmp_path):
    old, path = table(world, BUDGETS), tmp_path / "law.json"
    freeze(bootstrapped, [1e20], path)
    with pytest.raises(UserError, match="exists: frozen predictions are never overwritten"):
        freeze(bootstrapped, [1e20], path)
    content = path.read_text()
    path.write_text(content.replace('"made": "20', '"made": "19', 1))
    with pytest.raises(UserError, match="has been changed since it was written"):
        score_runs(path, old)
    path.write_text("{")
    with pytest.raises(UserError, match="is no file of frozen predictions"):
        score_runs(path, old)
    path.write_text('{"format": 9}')
    with pytest.raises(UserError, match="of format 1"):
        score_runs(path, old)
    with pytest.raises(UserError, match="no file"):
        score_runs(tmp_path / "none.json", old)
    with pytest.raises(UserError, match="isoflop gives no prediction: freeze a surface"):
        predict_runs(old, at=[1e20], freeze=tmp_path / "other.json", law="isoflop", bootstrap=0)
    path.write_text(content)
    with pytest.raises(UserError, match="the runs count FLOPs as full, the predictions as 6n"):
        score_runs(path, old.assign(convention="full"))


@pytest.mark.parametrize("norm", ["mse", "huber"])
@pytest.mark.parametrize("name", ["E", "alpha"])
def test_a_profile_is_what_pinning_gives(world, norm, name):
    n, d, loss, _ = world.grid(BUDGETS, sizes=7, sigma=0.004)
    result = fit_surface(n, d, loss, norm=norm, holdout=False)
    middle = result.params[name]
    seen = profile(result, name, low=0.9 * middle, high=1.1 * middle, places=9)
    assert seen.values == pytest.approx(np.linspace(0.9 * middle, 1.1 * middle, 9), rel=0.01)
    assert seen.rise.min() >= -1e-9 and seen.rise.argmin() == 4
    for k in (0, 3, 8):
        pinned = fit_surface(n, d, loss, norm=norm, fixed={name: seen.values[k]}, holdout=False)
        assert seen.objective[k] == pytest.approx(pinned.value, rel=1e-6)


def test_any_parameter_of_a_surface_has_a_profile(world):
    n, d, loss, _ = world.grid(BUDGETS, sizes=7, sigma=0.004)
    result = fit_surface(n, d, loss, norm="mse", law="skaling", holdout=False)
    for name in result.params:
        low, high = sorted((0.7 * result.params[name], 1.5 * result.params[name]))
        seen = profile(result, name, low=low, high=high, places=7)
        assert (np.diff(seen.values) > 0).all() and (seen.rise >= -1e-9).all()
    with pytest.raises(UserError, match="unknown parameter 'B'"):
        profile(result, "B", low=1, high=2)
    with pytest.raises(UserError, match="low is 2 and high 1"):
        profile(result, "E", low=2, high=1)
    with pytest.raises(UserError, match="isoflop has no profile"):
        profile(fit_isoflop(n, d, loss, np.repeat(BUDGETS, 7)), "a", low=1, high=2)
