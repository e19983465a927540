"""The parts of the noise, and every diagnosis with what triggers it."""

import numpy as np
import pytest
from support.worlds import worlds

from dlm.core.errors import UserError
from dlm.fit import bootstrap, fit_envelope, fit_isoflop, fit_surface
from dlm.fit.fitted import Noise

BUDGETS = np.geomspace(1e18, 1e20, 5)


def warned(result, words):
    return any(words in warning for warning in result.warnings)


def trunks(world, seed, *, trunk=0.01, own=0.002, sizes=7):
    """Runs of `sizes` trunks, each a size, branching at five budgets."""
    rng = np.random.default_rng(seed)
    n = np.tile(np.geomspace(2e8, 5e9, sizes), 5)
    d = np.repeat(BUDGETS, sizes) / 6 / n
    which = np.tile(np.arange(sizes), 5)
    noise = trunk * rng.standard_normal(sizes)[which] + own * rng.standard_normal(len(n))
    return n, d, world.loss(n, d) * np.exp(noise), which


def test_seeds_show_the_noise_and_whether_the_law_fits(world):
    n, d, loss, _ = world.grid(np.repeat(BUDGETS, 3), sizes=6, sigma=0.004, seed=1)
    right = fit_surface(n, d, loss, norm="mse").noise
    assert right.replicates == 60
    assert right.seed == pytest.approx(0.004, rel=0.25) and right.residual == pytest.approx(right.seed, rel=0.15)
    assert right.lack_of_fit_p > 0.05
    bent = loss * np.exp(0.012 * np.log(n / n.mean()) ** 2)
    wrong = fit_surface(n, d, bent, norm="mse")
    assert wrong.noise.lack_of_fit_p < 1e-3 and wrong.noise.lack_of_fit > 2
    assert warned(wrong, "the law misses the points by more than runs of one cell differ")
    assert np.isnan(fit_surface(*world.grid(BUDGETS, sizes=6, sigma=0.004)[:3]).noise.seed)


def test_a_lack_of_fit_is_a_warning_only_if_chance_makes_it_in_less_than_one_law_of_a_hundred():
    assert Noise(lack_of_fit=2.0, lack_of_fit_p=0.02).warnings() == []
    assert "F = 3, p = 0.005" in Noise(lack_of_fit=3.0, lack_of_fit_p=0.005).warnings()[0]


@worlds(20, 60)
def test_a_law_that_fits_seldom_shows_a_lack_of_fit(world, worlds):
    """Under the law the p-values are uniform: 5 % of them lie below .05."""
    found = []
    for seed in range(worlds):
        n, d, loss, _ = world.grid(np.repeat(BUDGETS, 2), sizes=5, sigma=0.004, seed=seed)
        found.append(fit_surface(n, d, loss, norm="mse", holdout=False).noise.lack_of_fit_p)
    assert np.mean(np.array(found) < 0.05) <= 0.15
    assert 0.35 <= np.mean(found) <= 0.65


def test_trunk_noise_is_seen_and_widens_the_intervals(world):
    n, d, loss, which = trunks(world, 3)
    shared = bootstrap(fit_surface(n, d, loss, cluster=which, norm="mse", at=[1e20]), replicates=500)
    alone = bootstrap(fit_surface(n, d, loss, norm="mse", at=[1e20]), replicates=500)
    assert (shared.interval_method, alone.interval_method) == ("nested", "residuals")
    assert 0.003 < shared.noise.trunk < 0.03
    wide, narrow = (np.ptp(np.log(r.at[1e20].ci["N"])) for r in (shared, alone))
    assert wide > 1.2 * narrow
    assert warned(shared, "35 points of 7 runs")


@worlds(12, 60)
@pytest.mark.parametrize(("trunk", "own"), [(0.006, 0.003), (0.0, 0.005)])
def test_nested_intervals_hold_the_truth(world, trunk, own, worlds):
    hits, best = [], world.best(1e19)[0]
    for seed in range(100, 100 + worlds):
        n, d, loss, which = trunks(world, seed, trunk=trunk, own=own)
        fitted = fit_surface(n, d, loss, cluster=which, norm="mse", at=[1e19], holdout=False)
        low, high = bootstrap(fitted, replicates=200, seed=seed + 1000).at[1e19].ci["N"]
        hits.append(low <= best <= high)
    assert np.mean(hits) >= 0.86


def test_shared_monte_carlo_error_moves_the_floor_only(world):
    n, d, loss, _ = world.grid(BUDGETS, sizes=7, sigma=0.002)
    size = len(n)
    fits = [
        bootstrap(fit_surface(n, d, loss, norm="mse", at=[1e20], **more), replicates=1000)
        for more in ({}, {"loss_se": np.full(size, 0.03)}, {"loss_se": [0.03] * size, "loss_se_own": [0.03] * size})
    ]
    plain, shared, own = (np.ptp(f.ci["E"]) / 2 for f in fits)
    assert shared == pytest.approx(np.hypot(plain, 1.96 * 0.03 * 1.04), rel=0.12)  # Student's t of 30 degrees on both
    assert own == pytest.approx(plain, rel=1e-9)
    assert fits[1].ci["alpha"] == fits[0].ci["alpha"] and fits[1].at[1e20].ci["N"] == fits[0].at[1e20].ci["N"]
    assert np.ptp(fits[1].at[1e20].ci["L"]) > 1.3 * np.ptp(fits[0].at[1e20].ci["L"])
    assert fits[1].noise.monte_carlo == pytest.approx(0.03 / np.median(loss), rel=0.1)
    with pytest.raises(UserError, match=r"loss_se\[0\] is -.*a finite number not below 0"):
        fit_surface(n, d, loss, loss_se=-loss)


def test_the_slopes_say_what_is_not_identified(world):
    n, d, loss, _ = world.grid([1e18, 1.3e18], sizes=4, sigma=0.02, width=1.2)
    assert warned(fit_surface(n, d, loss, norm="mse"), "is not identified: its standard error is")
    n, d, loss, _ = world.grid(BUDGETS, sizes=7, sigma=0.002)
    assert not warned(fit_surface(n, d, loss, norm="mse"), "not identified")


def test_outliers_are_shown_and_kept(world):
    n, d, loss, _ = world.grid(BUDGETS, sizes=7, sigma=0.002)
    clean = fit_surface(n, d, loss)
    assert clean.outliers == () and clean.notes == ()
    loss[17] *= 1.05
    few = fit_surface(n, d, loss)
    assert few.outliers == (17,) and few.n == 35 and few.status == "ok"
    assert "1 run lies far from the law, and still counts" in few.notes[0] and "% above the law" in few.notes[0]
    assert few.allocation.a == pytest.approx(clean.allocation.a, abs=0.01)  # which is why it is a note
    squares = fit_surface(n, d, loss, norm="mse")
    assert warned(squares, "1 run lies far from the law") and squares.allocation.a != pytest.approx(few.allocation.a)
    loss[[3, 30]] *= 0.93
    assert warned(fit_surface(n, d, loss), "3 runs lie far from the law, and still count")


def test_rounded_losses_are_noticed(world):
    n, d, loss, _ = world.grid(BUDGETS, sizes=7, sigma=0.002)
    assert warned(fit_surface(n, d, np.round(loss, 2)), "the losses are rounded to 0.01")
    assert not warned(fit_surface(n, d, np.round(loss, 4)), "rounded")


def test_few_budgets_and_points_give_a_warning(world):
    n, d, loss, c = world.grid([1e18, 1e19], sizes=4, sigma=0.002)
    result = fit_surface(n, d, loss, budget=c)
    assert warned(result, "2 budgets: three or more are needed") and warned(result, "8 points for 5 parameters")


def test_a_floor_that_is_not_seen_gives_a_warning(world):
    n, d, loss, _ = world.grid(BUDGETS, sizes=7)
    assert warned(fit_surface(n, d, loss - 1.69), "E, the loss that no run gets below, came out at zero")


def test_k_at_its_bound_gives_a_warning(world):
    """The larger of two power laws, and never their sum: k goes to zero."""
    n, d, _, _ = world.grid(BUDGETS, sizes=7, width=30.0)
    loss = 1.5 + np.maximum(400 / n**0.34, 400 / d**0.28)
    assert warned(fit_surface(n, d, loss, law="skaling", norm="mse"), "is at its bound")


def test_every_fit_refuses_what_is_not_finite(world):
    n, d, loss, c = world.grid(BUDGETS, sizes=7)
    bad = loss.copy()
    bad[3] = np.inf
    for fit in (lambda x: fit_surface(n, d, x), lambda x: fit_isoflop(n, d, x, c), lambda x: fit_envelope(n, d, x)):
        with pytest.raises(UserError, match=r"loss\[3\] is inf"):
            fit(bad)
