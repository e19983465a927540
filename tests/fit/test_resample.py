import numpy as np
import pytest
import scipy.stats
from support.worlds import worlds

from dlm.core.errors import UserError
from dlm.fit import bootstrap, fit_isoflop, fit_surface

BUDGETS = np.array([1e18, 1e19, 1e20])


def noisy(world, *, sizes=6, sigma=0.005, seed=0, width=6.0):
    return world.grid(BUDGETS, sizes=sizes, sigma=sigma, seed=seed, width=width)


def test_besiroglu_s_points_give_their_published_intervals(epoch):  # 4000 pairs bootstraps
    fitted = fit_surface(epoch["params"], epoch["tokens"], epoch["loss"], flops=epoch["flops"])
    result = bootstrap(fitted, seed=0)
    assert result.interval_method == "pairs"
    spread = dict(zip(("E", "A", "B", "alpha", "beta"), result.draws.std(axis=0), strict=True))
    assert spread["E"] == pytest.approx(0.02566, rel=0.05)
    assert (spread["alpha"], spread["beta"]) == pytest.approx((0.01540, 0.0206), rel=0.05)
    assert spread["A"] == pytest.approx(124.5, rel=0.06) and spread["B"] == pytest.approx(1293, rel=0.12)  # long tails
    published = {
        "A": (285, 744),
        "B": (1042, 5810),
        "E": (1.769, 1.871),
        "alpha": (0.317, 0.373),
        "beta": (0.331, 0.415),
    }
    for name, ends in published.items():
        assert result.ci[name] == pytest.approx(ends, rel=0.05), name
    assert result.ci["a"] == pytest.approx((0.4807, 0.5561), rel=0.01)


def test_the_same_seed_gives_the_same_numbers(world):
    n, d, loss, c = noisy(world)
    for fitted in (fit_surface(n, d, loss, at=[1e20]), fit_isoflop(n, d, loss, c, at=[1e20])):
        first, again, other = (bootstrap(fitted, replicates=200, seed=s) for s in (3, 3, 4))
        assert first.to_dict() == again.to_dict()
        assert first.ci != other.ci


def test_linear_propagation_agrees_with_isoflop_intervals(world):
    """One budget's vertex by the delta method with Student's t, against the resampled residuals."""
    n, d, loss, c = noisy(world, sizes=8, sigma=0.002)
    result = bootstrap(fit_isoflop(n, d, loss, c), replicates=20_000)
    rows, minimum, dof = c == 1e19, result.minima[1], 3 * (8 - 3)
    z = np.log(n[rows]) - minimum.centre
    basis = np.stack([np.ones_like(z), z, z * z], axis=1)
    residuals = []
    for m in result.minima:
        where = c == m.budget
        residuals.append(loss[where] - np.polyval(m.coefficients[::-1], np.log(n[where]) - m.centre))
    variance = (np.concatenate(residuals) ** 2).sum() / dof
    _, c1, c2 = minimum.coefficients
    slope = np.array([0.0, -1 / (2 * c2), c1 / (2 * c2**2)])
    half = scipy.stats.t.ppf(0.975, dof) * np.sqrt(variance * slope @ np.linalg.inv(basis.T @ basis) @ slope)
    assert np.log(minimum.ci["N"]) == pytest.approx(np.log(minimum.N) + np.array([-half, half]), abs=0.15 * half)


@worlds(12, 40)
def test_intervals_of_few_points_hold_the_truth(world, worlds):
    """95 % intervals of N* from 3 budgets x 6 sizes hold the truth in 86 % or more of the worlds."""
    hits, truth = [], world.best(1e20)[0]
    for seed in range(worlds):
        n, d, loss, _ = noisy(world, seed=seed, width=4.0)
        fit = fit_surface(n, d, loss, norm="mse", at=[1e20])
        low, high = bootstrap(fit, replicates=200, seed=seed).at[1e20].ci["N"]
        hits.append(low <= truth <= high)
    assert np.mean(hits) >= 0.86


def test_curves_that_are_lost_in_noise_are_left_out_and_named(world):
    n, d, loss, c = noisy(world, seed=2)
    result = bootstrap(fit_isoflop(n, d, loss + 0.1 * np.sin(37 * np.log(n)), c, at=[1e20]), replicates=500)
    lost = [m for m in result.minima if m.reason == "not_bounded"]
    assert lost and all(any(f"left out: {m.detail}" in w for w in result.warnings) for m in lost)
    low, high = result.ci["a"]
    assert low < world.beta / (world.alpha + world.beta) < high


def test_one_form_alone_gives_no_interval_of_the_loss_beyond_the_runs(world):
    n, d, loss, c = noisy(world)
    inside, beyond = 1e20, 2e20
    surface = bootstrap(fit_surface(n, d, loss, at=[inside, beyond]), replicates=200)
    assert np.isfinite(surface.at[inside].ci["L"]).all()
    assert np.isnan(surface.at[beyond].ci["L"]).all()
    assert "one form alone" in surface.at[beyond].withheld
    assert np.isfinite(surface.at[beyond].ci["N"]).all()
    line = bootstrap(fit_isoflop(n, d, loss, c, at=[beyond]), replicates=200)
    assert np.isnan(line.at[beyond].ci["L"]).all()
    assert any("a straight line has no floor" in note for note in line.notes)


def test_tokens_per_parameter_have_an_interval(world):
    n, d, loss, _ = noisy(world)
    best = bootstrap(fit_surface(n, d, loss, at=[1e20]), replicates=400).at[1e20]
    low, high = best.ci["tokens_per_param"]
    assert low < best.tokens_per_param < high
    assert (low, high) == pytest.approx((1e20 / 6 / best.ci["N"][1] ** 2, 1e20 / 6 / best.ci["N"][0] ** 2), rel=0.02)


def test_regret_is_the_loss_at_the_ends_of_the_interval(world):
    n, d, loss, _ = noisy(world)
    result = bootstrap(fit_surface(n, d, loss, at=[1e20]), replicates=200)
    best, p = result.at[1e20], result.params
    ends = np.array(best.ci["N"])
    there = p["E"] + p["A"] / ends ** p["alpha"] + p["B"] / (1e20 / 6 / ends) ** p["beta"]
    assert best.regret == pytest.approx(max(there) - best.L, rel=1e-9)


def test_clusters_are_drawn_whole(world):
    n, d, loss, _ = world.grid(BUDGETS, sizes=16, sigma=0.01, seed=1)
    shared = np.random.default_rng(0).standard_normal(12).repeat(4) * 0.02
    fitted = fit_surface(n, d, loss * (1 + shared), cluster=np.arange(12).repeat(4), norm="mse")
    alone = fit_surface(n, d, loss * (1 + shared), norm="mse")
    wide, narrow = (np.ptp(bootstrap(f, replicates=400, method="pairs").ci["alpha"]) for f in (fitted, alone))
    assert wide > 1.2 * narrow


def test_wrong_arguments_of_the_bootstrap_are_refused(world):
    n, d, loss, _ = noisy(world)
    fitted = fit_surface(n, d, loss)
    with pytest.raises(UserError, match="unknown bootstrap method 'pair': did you mean pairs"):
        bootstrap(fitted, method="pair")
    with pytest.raises(UserError, match="replicates is 3"):
        bootstrap(fitted, replicates=3)


def test_one_trunk_gives_no_interval(world):
    n, d, loss, _ = noisy(world)
    result = bootstrap(fit_surface(n, d, loss, cluster=np.zeros(len(n)), at=[1e20]), replicates=200)
    assert result.draws is None and any("all points are of one run or trunk" in w for w in result.warnings)
    two = fit_surface(n, d, loss, cluster=np.arange(len(n)) % 2)
    with pytest.raises(UserError, match="of 2 runs or trunks: 5 or more"):
        bootstrap(two, method="pairs", replicates=200)
    with pytest.raises(UserError, match="seed is -1"):
        bootstrap(two, seed=-1)


@worlds(8, 30)
def test_under_tuned_runs_are_drawn_by_pairs(world, worlds):
    """Symmetric noise about a law that lies low would put every draw below it."""
    hits = []
    for seed in range(worlds):
        n, d, loss, _ = world.grid(BUDGETS, sizes=7, sigma=0.004, seed=seed)
        high = np.random.default_rng(seed + 99).random(len(n)) < 0.3
        fitted = fit_surface(n, d, loss * (1 + 0.03 * high), norm="mse", under_tuned=0.1, at=[1e20], holdout=False)
        result = bootstrap(fitted, replicates=200, seed=seed + 1000)
        low, top = result.at[1e20].ci["L"]
        assert result.interval_method == "pairs" and low < result.at[1e20].L < top
        hits.append(low <= world.loss(*world.best(1e20)) <= top)
    assert np.mean(hits) >= 0.7  # biased upwards still: a tenth of the pull is not none
    with pytest.raises(UserError, match="draws symmetric noise, and under_tuned is not 1"):
        bootstrap(fitted, method="residuals", replicates=200)


@pytest.mark.parametrize("norm", ["huber", "mse"])
def test_six_points_give_wide_intervals(world, norm):
    """One more than the parameters: Student's t of one degree of freedom."""
    n, d, loss, _ = world.grid([1e18, 1e20], sizes=3, sigma=0.003)
    result = bootstrap(fit_surface(n, d, loss, norm=norm, at=[1e20]), replicates=300)
    low, high = result.ci["alpha"]
    assert result.n == 6 and not high - low < 0.05  # no interval is one too
