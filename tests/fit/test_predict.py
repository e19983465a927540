"""Predictions, frozen ones and their grades, profiles."""

import hashlib
import json
import re
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
from support.format_1 import as_format_1
from support.worlds import worlds

from dlm.core.errors import UserError
from dlm.fit import bootstrap, fit_isoflop, fit_surface, frozen, judge
from dlm.fit.combined.fit import fit_combined
from dlm.fit.frozen import freeze
from dlm.fit.known import match
from dlm.fit.predict import free_of, predict
from dlm.fit.profile import profile
from dlm.fit.rows import run_table
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
    narrow, wide = (predict(r, [1e9], [1e11]).ci[0] for r in (alone, both))
    assert wide[0] < narrow[0] and narrow[1] < wide[1]
    size, most, least = np.median(n), (n * d).max(), (n * d).min()
    asked = np.array([99 * most, 101 * most, least / 99, least / 101]) / size
    seen = predict(both, np.full(4, size), asked)
    assert np.isfinite(seen.loss).all()
    assert np.isfinite(seen.ci).all(axis=1).tolist() == np.isfinite(seen.pi).all(axis=1).tolist() == [True, False] * 2
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
    with pytest.raises(UserError, match="is no file of frozen predictions, as it is not valid JSON: ") as refused:
        score_runs(path, old)
    assert str(refused.value).count(str(path)) == 1 and "delete" not in str(refused.value)
    path.write_text('{"format": 9, "dlm": "7.1"}')
    with pytest.raises(
        UserError, match=r"format 9, and this dlm \(.*\) reads formats 1 and 2: use .* wrote it \(7.1\)"
    ):
        score_runs(path, old)
    for content_of_another_file in ("[]", "3", "{}", '{"forecasts": [3]}'):
        path.write_text(content_of_another_file)
        with pytest.raises(UserError, match="is no file of frozen predictions: give one that"):
            score_runs(path, old)
    for no_forecast in ('{"forecasts": []}', '{"forecasts": 3}'):
        path.write_text(no_forecast)
        with pytest.raises(UserError, match="holds no forecast"):
            score_runs(path, old)
    with pytest.raises(UserError, match="no file"):
        score_runs(tmp_path / "none.json", old)
    with pytest.raises(UserError, match="isoflop gives no prediction: freeze a surface"):
        predict_runs(old, at=[1e20], freeze=tmp_path / "other.json", law="isoflop", bootstrap=0)
    path.write_text(content)
    with pytest.raises(UserError, match="the runs count FLOPs as full, the predictions as 6n"):
        score_runs(path, old.assign(convention="full"))
    with pytest.raises(UserError, match=r"several conventions \(6n and full\)"):
        score_runs(path, old.assign(convention=["6n", "full"] * (len(old) // 2)))


def test_a_frozen_file_gives_no_interval_where_predict_gives_none(world, bootstrapped, tmp_path):
    path, product = tmp_path / "law.json", bootstrapped.points.params * bootstrapped.points.tokens
    content = freeze(bootstrapped, [1e20], path)
    n = float(np.median(bootstrapped.points.params))
    d = np.array([99 * product.max(), 101 * product.max(), product.min() / 99, product.min() / 101]) / n
    asked = np.full(4, n)
    seen, rows = predict(bootstrapped, asked, d), frozen.predicted(content, asked, d)
    given = [True, False, True, False]
    assert [bool(np.isfinite(row["low"] + row["high"])) for row in rows] == given
    assert np.isfinite(seen.pi).all(axis=1).tolist() == given
    assert [row["predicted"] for row in rows] == pytest.approx(seen.loss.tolist(), rel=1e-9)
    new = pd.DataFrame({"params": asked, "tokens": d, "loss": seen.loss, "flops": 6 * asked * d, "objective": "ar"})
    graded = score_runs(path, new)
    why = ["", frozen.UNTESTED, "", frozen.UNTESTED_BELOW]
    assert [(row["inside"], row["why"]) for row in graded.rows] == list(zip([True, None] * 2, why, strict=True))
    path.write_text(json.dumps(as_format_1(content)))  # it knows the highest C of its runs only
    assert [row["inside"] for row in score_runs(path, new).rows] == [True, None, True, True]


def test_a_size_far_beyond_the_runs_is_not_graded_and_the_reason_is_given(world, bootstrapped, tmp_path):
    freeze(bootstrapped, [1e23], tmp_path / "law.json")
    (size,) = score_runs(tmp_path / "law.json", table(world, [1e23])).sizes
    assert (size["inside"], size["why"]) == (None, frozen.UNTESTED)


def test_a_pinned_parameter_is_not_free(world, tmp_path):
    n, d, loss, c = world.grid(BUDGETS, sizes=3, sigma=0.004)
    for law, free in (("chinchilla", 4), ("combined", 5)):
        fit = fit_combined if law == "combined" else fit_surface
        result = bootstrap(fit(n, d, loss, budget=c, fixed={"E": 1.69}, holdout=False), replicates=200)
        assert free_of(result) == free
        content = freeze(result, [1e20], tmp_path / f"{law}.json")
        (row,), seen = frozen.predicted(content, [1e9], [1e10]), predict(result, [1e9], [1e10])
        assert (row["low"], row["high"]) == pytest.approx(seen.pi[0].tolist(), rel=1e-8)


@pytest.fixture
def unbounded(world, bootstrapped, tmp_path):
    """A file of predictions of which too many resampled fits found no law, so that there is no interval."""
    lost = np.arange(len(bootstrapped.draws)) % 10 == 0
    path = tmp_path / "unbounded.json"
    freeze(replace(bootstrapped, draws=np.where(lost[:, None], np.nan, bootstrapped.draws)), [1e20], path)
    return path


def test_runs_without_an_interval_are_neither_inside_nor_outside(world, unbounded):
    graded = score_runs(unbounded, table(world, [*BUDGETS, 1e20]))
    why = "20 of 200 resampled fits of chinchilla found no law"
    assert [(row["inside"], row["why"]) for row in graded.rows] == [(None, why)] * 6
    assert [(size["inside"], size["why"]) for size in graded.sizes] == [(None, why)]
    assert (graded.inside, graded.no_interval) == (0, 6)
    assert graded.sentence().startswith("6 new runs have no interval; the law was off by")
    first, *_, of_size = graded.report().splitlines()[1:]
    assert f"(no interval), off by {graded.rows[0]['error']:+.2%}: {why}" in first and "outside" not in graded.report()
    assert of_size.endswith(f"predicted no interval: {why}")
    said = json.loads(json.dumps(graded.to_dict(), allow_nan=False))
    assert (said["inside"], said["no_interval"]) == (0, 6)
    assert {(row["inside"], row["z"], row["low"], row["high"]) for row in said["rows"]} == {(None, None, None, None)}
    assert said["sizes"][0]["inside"] is None


def test_runs_with_and_without_an_interval_are_counted_apart(world, tmp_path, bootstrapped):
    freeze(bootstrapped, [1e20], tmp_path / "law.json")
    graded = score_runs(tmp_path / "law.json", table(world, [*BUDGETS, 1e20]))
    assert graded.no_interval == 0 and "no interval" not in graded.report() and graded.rows[0]["why"] == ""
    one, *others = graded.rows
    mixed = replace(graded, rows=({**one, "inside": None, "why": ""}, *others))
    assert re.match(r"\d of 5 new runs lie inside their 95% interval; 1 new run has no interval; the", mixed.sentence())


def test_a_run_is_known_by_what_was_trained_and_not_by_its_loss(world, bootstrapped, tmp_path):
    old, path = table(world, BUDGETS), tmp_path / "law.json"
    freeze(bootstrapped, [1e20], path)
    rounded = old.assign(loss=old["loss"] * (1 + 3e-9))
    graded = score_runs(path, rounded)
    assert (len(graded.rows), graded.known, graded.notes) == (0, len(old), ())
    worse = old.assign(loss=old["loss"] * np.where(old.index < 2, 1.012, 1.0))
    graded = score_runs(path, worse)
    assert graded.rows == () and graded.notes == (
        "2 known runs have another loss than when the predictions were made (by up to +1.2%): not graded",
    )
    assert graded.report().endswith(f"note: {graded.notes[0]}") and graded.to_dict()["notes"] == list(graded.notes)


@pytest.mark.parametrize(
    ("column", "before", "after"),
    [
        ("seed", 2025113001, 2025113002),  # they agree to nine digits
        ("objective", "ar", "mdm"),
        ("model", "33k", "34k"),
        ("global_batch_size", 32, 64),
        ("learning_rate", 3e-3, 1e-3),
        ("weight_decay", 0.1, 0.0),
        ("dropout", 0.0, 0.1),
        ("schedule", "wsd", "cosine"),
        ("data_hash", "ab", "cd"),
        ("unique_tokens", 1e9, 2e9),
    ],
)
def test_runs_that_differ_in_a_setting_are_new(world, column, before, after):
    old = table(world, BUDGETS[:1]).assign(**{column: before})
    other = old.assign(**{column: after})
    found = match(run_table(old), run_table(other))
    assert found.new.all() and found.lost == len(old)
    assert not match(run_table(old), run_table(old)).new.any()
    # A table that lacks the column knows the runs by the other columns.
    assert not match(run_table(old), run_table(other.drop(columns=column))).new.any()
    assert not match(run_table(old.assign(**{column: None})), run_table(other)).new.any()


def test_of_replicates_each_known_run_stands_for_the_row_with_the_nearest_loss(world):
    old = table(world, BUDGETS[:1], sizes=3)
    replicate = old.iloc[[1]].assign(loss=old["loss"][1] * 0.99)
    found = match(run_table(old), run_table(pd.concat([replicate, old])))
    assert found.new.tolist() == [True, False, False, False] and found.changes == ()
    found = match(run_table(pd.concat([old, replicate])), run_table(old))
    assert not found.new.any() and found.lost == 1
    both = pd.concat([old, replicate])
    assert not match(run_table(both), run_table(both.iloc[::-1])).new.any()


def test_files_of_format_1_are_read(world, bootstrapped, tmp_path):
    old, path = table(world, BUDGETS), tmp_path / "law.json"
    content = freeze(bootstrapped, [1e20], path)
    path.write_text(json.dumps(as_format_1(content)))
    grown = table(world, [*BUDGETS, 1e20])
    grown["loss"] = [*old["loss"], *grown["loss"][len(old) :]]
    graded = score_runs(path, grown)
    assert (len(graded.rows), graded.known) == (6, len(old))
    assert graded.notes == (
        "this file has format 1: a run that it was made from counts as new if its loss was evaluated anew",
    )
    assert score_runs(path, old).notes == ()
    assert score_runs(path, old.assign(loss=old["loss"] * 1.001)).known == 0


def test_a_frozen_file_names_its_code_and_its_runs(world, bootstrapped, tmp_path, monkeypatch):
    monkeypatch.setenv("DLM_GIT_SHA", "0" * 40)
    monkeypatch.setenv("DLM_GIT_DIRTY", "1")
    content = freeze(bootstrapped, [1e20], tmp_path / "a.json")
    assert (content["git_sha"], content["git_dirty"]) == ("0" * 40, True) and content["dlm"] == version("dlm")
    runs = content["runs"]
    assert runs["sha256"] == hashlib.sha256(json.dumps(runs["table"], sort_keys=True).encode()).hexdigest()
    assert runs["table"]["loss"] == bootstrapped.points.loss.tolist()
    monkeypatch.setattr(frozen, "running_code", lambda: None)  # dlm is not in a repository
    content = freeze(bootstrapped, [1e20], tmp_path / "b.json")
    assert content["git_sha"] is None and content["git_dirty"] is None


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
