"""The verdict: what it gives where the form is right, where it is wrong, and where it cannot be checked."""

import json
from dataclasses import replace

import numpy as np
import pytest
from support.diffusion import BUDGETS, diffusion
from support.worlds import worlds

from dlm.fit import bootstrap, fit_isoflop, fit_surface, judge, optima, optimum, verdict
from dlm.fit.layout import two_digits


def judged(n, d, loss, c, **options):
    fitted = fit_surface(n, d, loss, norm="mse", budget=c, **options)
    return judge(bootstrap(fitted, replicates=300, seed=0), replicates=300)


@worlds(4, 12)
def test_a_wrong_form_is_covered_where_its_own_interval_is_not(worlds):
    alone, gated = [], []
    for seed in range(worlds):
        n, d, loss, c, best = diffusion(seed)
        plain = bootstrap(fit_surface(n, d, loss, norm="mse", budget=c, at=[1e20]), replicates=300, seed=0)
        result = judge(plain, replicates=300)
        at = [1e20, 0.99 * result.verdict.reach]
        for flops, found in optima(result, at).items():
            low, high = found.ci["L"]
            gated.append(low <= best(flops)[2] <= high)
        low, high = plain.at[1e20].ci["L"]
        alone.append(low <= best(1e20)[2] <= high)
    assert np.mean(alone) <= 0.25  # Chinchilla's form taken for granted
    assert np.mean(gated) >= 0.9


def test_beyond_its_reach_the_loss_is_withheld_with_a_reason():
    n, d, loss, c, _ = diffusion(3)
    result = judged(n, d, loss, c, at=[1e20, 1e22])
    seen = result.verdict
    assert 1e20 <= seen.reach < 1e22
    assert "mostly because the forms differ" in seen.limit
    assert np.isfinite(result.at[1e20].L)
    far = result.at[1e22]
    assert np.isnan(far.L) and np.isnan(far.ci["L"]).all() and "beyond the reach" in far.withheld
    assert np.isfinite(far.ci["N"]).all()
    low, high = optima(result, [seen.reach])[seen.reach].ci["L"]
    assert high / low - 1 <= verdict.WIDEST
    low, high = optimum.loss_interval(result, seen.forms, seen.missed, 1.3 * seen.reach, 0.95)
    assert high / low - 1 > verdict.WIDEST
    assert seen.aicc["skaling"] < seen.aicc["chinchilla"]
    said = json.loads(json.dumps(result.to_dict()))
    assert said["verdict"]["sentence"] == seen.sentence() and seen.sentence() in result.report()
    assert said["at"]["1e+22"]["L"] is None


def test_a_right_form_reaches_far(world):
    n, d, loss, c = world.grid(BUDGETS, sizes=7, sigma=0.001)
    result = judged(n, d, loss, c, at=[1e21])
    assert result.verdict.reach >= 5e21
    low, high = result.at[1e21].ci["L"]
    assert low <= world.loss(*world.best(1e21)) <= high
    assert result.verdict.differ_n < 1.1 and result.verdict.missed < 0.005
    assert result.at[1e21].regret >= 0


def test_the_hull_holds_every_method(world):
    n, d, loss, c = world.grid(BUDGETS, sizes=7, sigma=0.003, seed=4)
    result = judged(n, d, loss, c, at=[1e20])
    assert [m.law for m in result.verdict.methods] == ["chinchilla", "skaling", "isoflop"]
    low, high = result.at[1e20].ci["N"]
    for method in result.verdict.methods:
        own = optimum.own_optimum(method, 1e20, 0.95).ci["N"]
        assert low <= own[0] and own[1] <= high


def test_isoflop_minima_that_are_not_bounded_take_no_part(world):
    n, d, loss, c = world.grid(BUDGETS, sizes=5, sigma=0.03, width=2.0)
    result = judged(n, d, loss, c, at=[1e20])
    assert "isoflop" not in [m.law for m in result.verdict.methods]
    assert np.isfinite(result.at[1e20].ci["N"]).all()


def test_an_isoflop_law_is_judged_by_both_forms(world):
    n, d, loss, c = world.grid(BUDGETS, sizes=7, sigma=0.003)
    line = judge(bootstrap(fit_isoflop(n, d, loss, c, at=[1e20, 1e21]), replicates=300), replicates=300)
    assert np.isfinite(line.at[1e20].ci["L"]).all()
    assert "no floor" in line.at[1e21].withheld
    assert set(line.verdict.forms) == {"chinchilla", "skaling"}


def test_what_cannot_be_checked_is_not_extrapolated(world):
    n, d, loss, c = world.grid([1e18, 1e19], sizes=7, sigma=0.002)
    result = judged(n, d, loss, c, at=[1e19, 1e20])
    assert result.verdict.reach == result.verdict.top
    assert "no budget can be held out" in result.verdict.limit
    assert "within the runs" in result.verdict.sentence() and np.isnan(result.at[1e20].L)
    n, d, loss, c = world.grid([1e18, 1e19], sizes=3, sigma=0.002)
    few = judged(n, d, loss, c, at=[1e19])
    assert "skaling cannot be fitted to check the form (6 points" in few.verdict.limit


def test_a_form_that_is_not_bounded_does_not_take_the_intervals_of_the_other(world, monkeypatch):
    n, d, loss, c = world.grid(BUDGETS, sizes=6, sigma=0.002)
    real = verdict.bootstrap

    def unbounded(fit, **options):
        drawn = real(fit, **options)
        return drawn if fit.law != "skaling" else replace(drawn, draws=np.full_like(drawn.draws, np.nan))

    monkeypatch.setattr(verdict, "bootstrap", unbounded)
    for law in ("chinchilla", "isoflop"):
        fitted = (
            fit_isoflop(n, d, loss, c, at=[c.max()])
            if law == "isoflop"
            else fit_surface(n, d, loss, budget=c, at=[c.max()])
        )
        result = judge(bootstrap(fitted, replicates=200), replicates=200)
        assert np.isfinite([*result.at[c.max()].ci["N"], *result.at[c.max()].ci["L"]]).all()
        assert "skaling cannot check the form" in result.verdict.limit


def test_laws_without_a_second_form_come_back_as_they_are(world):
    n, d, loss, c = world.grid(BUDGETS, sizes=5, sigma=0.002)
    for options in ({"law": "tied"}, {"fixed": {"alpha": 0.34}}):
        result = bootstrap(fit_surface(n, d, loss, at=[1e20], **options), replicates=200)
        assert judge(result) is result
    pinned = judged(n, d, loss, c, at=[1e21], fixed={"E": 1.69})
    assert all(form.fixed == {"E": 1.69} for form in pinned.verdict.forms.values())


@pytest.mark.parametrize("value", [1.234e20, 9.999e21, 1e18, 3.0e19])
def test_a_reach_is_rounded_down_to_two_digits_and_a_need_up(value):
    down, up = two_digits(value, np.floor), two_digits(value, np.ceil)
    assert 0.9 * value < down <= value * (1 + 1e-9) and value * (1 - 1e-9) <= up < 1.1 * value
    assert float(f"{down:.1e}") == down and float(f"{up:.1e}") == up
    assert (down == up) == (value in (1e18, 3.0e19))
