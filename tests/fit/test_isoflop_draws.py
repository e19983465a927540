import numpy as np
import pytest
import scipy.stats
from support.worlds import least_share, worlds

from benchmarks import coverage_isoflop as coverage
from dlm.core.errors import UserError
from dlm.fit import bootstrap, fit_isoflop
from dlm.fit.isoflop import resample
from dlm.fit.isoflop.curves import CURVES
from dlm.fit.isoflop.minima import AXES

BUDGETS = np.array([1e18, 3e18, 1e19, 3e19])
SOME = {  # two small designs, and one with few budgets; widths where the shape of each curve is no error
    "parabola": coverage.Design(budgets=coverage.FIVE, sizes=5),
    "cubic": coverage.Design(budgets=coverage.FIVE, sizes=6, width=8.0, curve="cubic"),
    "akima": coverage.Design(budgets=coverage.THREE, sizes=7, width=8.0, curve="akima", axis="tokens"),
}


@worlds(50, 250)
@pytest.mark.parametrize("design", SOME.values(), ids=list(SOME))
def test_intervals_hold_the_truth(design, worlds):
    """Intervals of exponent, sizes and losses hold the truth in 95 % of the worlds, less three standard errors."""
    count, laws, _ = coverage.measure(design, worlds=worlds, replicates=300, seed=3)
    assert laws == worlds
    for name, (held, given) in count.items():
        assert given >= 0.85 * worlds, name
        assert held / given >= least_share(worlds), name


def test_the_minimum_of_a_parabola_has_fiellers_interval(world):
    """One budget's interval against the roots of (c1 + 2 c2 x)^2 = t^2 s^2 (v11 + 4 x v12 + 4 x^2 v22)."""
    n, d, loss, c = world.grid(BUDGETS, sizes=7, width=5, sigma=0.004, seed=1)
    result = bootstrap(fit_isoflop(n, d, loss, c), replicates=40_000)
    fractions, rows = [], []
    for m in result.minima:
        here = c == m.budget
        z = np.log(n[here]) - m.centre
        fitted = np.polyval(m.coefficients[::-1], z)
        fractions.append(loss[here] / fitted - 1)
        rows.append(z)
    dof = 4 * (7 - 3)
    share = (np.concatenate(fractions) ** 2).sum() / dof
    for m, z in zip(result.minima, rows, strict=True):
        v = np.linalg.inv(np.vander(z, 3, increasing=True).T @ np.vander(z, 3, increasing=True)) * share * m.L**2
        t2 = scipy.stats.t.ppf(0.975, dof) ** 2
        _, c1, c2 = m.coefficients
        square = [4 * (c2**2 - t2 * v[2, 2]), 4 * (c1 * c2 - t2 * v[1, 2]), c1**2 - t2 * v[1, 1]]
        ends = np.sort(np.roots(square))
        assert np.log(m.ci["N"]) - m.centre == pytest.approx(ends, abs=0.03 * np.ptp(ends))
        assert abs(ends[0] + ends[1] - 2 * (np.log(m.N) - m.centre)) > 0  # asymmetric, as a ratio is


def test_noise_is_a_fraction_of_the_loss():
    """A budget whose losses, curve and noise are all half as large has as wide an interval of N*."""
    z, sizes = np.linspace(-1.5, 1.5, 9), np.exp(np.linspace(-1.5, 1.5, 9)) * 1e9
    noise = 0.004 * np.random.default_rng(0).standard_normal(9)
    shape = (3 + 0.05 * z**2) * (1 + noise)
    n, loss, c = np.tile(sizes, 2), np.concatenate([shape, shape / 2]), np.repeat([1e20, 2e20], 9)
    result = bootstrap(fit_isoflop(n, c / 6 / n, loss, c), replicates=20_000)
    wide, half = (np.ptp(np.log(m.ci["N"])) for m in result.minima)
    assert half == pytest.approx(wide, rel=0.03)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("curve", ["parabola", "cubic"])
def test_draws_stay_where_a_minimum_is_accepted(world, curve, axis):
    """None is further out than the sizes tried, and N and D of each spend the budget (logs of N, D, L)."""
    n, d, loss, c = world.grid(BUDGETS, sizes=7, width=4 if curve == "parabola" else 7, sigma=0.012, seed=8)
    fitted = fit_isoflop(n, d, loss, c, curve=curve, axis=axis)
    found = resample.draw(fitted, 2000, "auto", np.random.default_rng(0)).vertices
    assert len(fitted.usable) == 4
    for k, m in enumerate(fitted.usable):
        sizes = np.log(n[c == m.budget])
        assert np.isfinite(found[:, k]).all()
        assert sizes.min() < found[:, k, 0].min() < found[:, k, 0].max() < sizes.max()
        assert np.log(6) + found[:, k, 0] + found[:, k, 1] == pytest.approx(np.full(2000, np.log(m.budget)))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("curve", CURVES)
def test_the_seed_decides_everything(world, curve, axis):
    n, d, loss, c = world.grid(BUDGETS, sizes=7, width=5, sigma=0.005, seed=4)
    fitted = fit_isoflop(n, d, loss, c, curve=curve, axis=axis, at=[1e20])
    first, again, other = (bootstrap(fitted, replicates=400, seed=s) for s in (1, 1, 2))
    assert first.to_dict() == again.to_dict()
    assert first.ci != other.ci
    assert first.ci["a"][0] < first.allocation.a < first.ci["a"][1]
    for m in first.usable:
        assert np.prod([m.ci["N"], m.ci["D"][::-1]], axis=0) * 6 == pytest.approx([m.budget] * 2, rel=1e-6)


def test_the_interval_of_a_bent_line_of_losses_holds_the_truth(world):
    """L*(C) of a law with a floor, nearly without noise: the straight line misses it, and its interval does not."""
    budgets = np.geomspace(1e18, 1e20, 5)
    n, d, loss, c = world.grid(budgets, sizes=7, width=3, sigma=0.0003)
    result = bootstrap(fit_isoflop(n, d, loss, c, at=[1e18, 1e19, 1e20]), replicates=2000)
    for flops, best in result.at.items():
        truth = world.loss(*world.best(flops))
        assert abs(best.L / truth - 1) > 0.002
        assert best.ci["L"][0] < truth < best.ci["L"][1]
        assert np.ptp(best.ci["L"]) < 0.02 * truth


def test_minima_that_scatter_widen_the_line():
    """Hardly any noise, but minima off their line: the interval of a is that of a regression with n - 2 degrees."""
    budgets = np.geomspace(1e18, 1e21, 7)
    off = np.array([0.2, -0.1, -0.3, 0.25, 0.1, -0.25, 0.1])
    z = np.linspace(-1.5, 1.5, 7)
    n = (0.1 * budgets[:, None] ** 0.5 * np.exp(z + off[:, None])).ravel()
    c = np.repeat(budgets, 7)
    noise = 1 + 1e-5 * np.random.default_rng(0).standard_normal(49)
    result = bootstrap(fit_isoflop(n, c / 6 / n, np.tile(3 + 0.05 * z**2, 7) * noise, c), replicates=20_000)
    line = scipy.stats.linregress(np.log(budgets), np.log([m.N for m in result.minima]))
    half = scipy.stats.t.ppf(0.975, 5) * line.stderr
    assert result.ci["a"] == pytest.approx((line.slope - half, line.slope + half), abs=0.05 * half)
    assert result.ci["b"] == pytest.approx((1 - line.slope - half, 1 - line.slope + half), abs=0.05 * half)


def test_minima_on_their_line_do_not_widen_it(world):
    """The exponent's interval where only noise moves the minima, against the spread of many worlds."""
    found, widths = [], []
    for seed in range(160):
        n, d, loss, c = world.grid(BUDGETS, sizes=7, width=4, sigma=0.003, seed=seed)
        fitted = fit_isoflop(n, d, loss, c)
        found.append(fitted.allocation.a)
        if seed < 20:
            widths.append(np.ptp(bootstrap(fitted, replicates=200).ci["a"]))
    assert np.median(widths) == pytest.approx(2 * 2.12 * np.std(found), rel=0.2)  # t of 16 degrees


def test_a_budget_that_noise_leaves_without_a_minimum_is_left_out_of_the_lines(world):
    """More than a quarter of a budget's draws have no minimum: it gives none, and the others keep their intervals."""
    n, d, loss, c = world.grid(BUDGETS, sizes=7, width=5, sigma=0.002)
    flat = c == 1e19
    z = np.log(n[flat]) - np.log(n[flat]).mean()
    rough = np.array([0.0, 0.004, -0.002, -0.004, 0.003, -0.001, 0.002])
    loss[flat] = 2.5 + 0.0005 * z**2 + rough - np.polyval(np.polyfit(z, rough, 2), z)
    result = bootstrap(fit_isoflop(n, d, loss, c, at=[1e20]), replicates=500)
    assert result.minima[2].reason == "not_bounded" and len(result.usable) == len(BUDGETS) - 1
    assert any("left out: budget 1e19: resampled runs do not bound" in w for w in result.warnings)
    others = bootstrap(fit_isoflop(*(v[~flat] for v in (n, d, loss, c)), at=[1e20]), replicates=500)
    assert result.params == pytest.approx(others.params)
    assert np.isfinite([result.minima[1].ci["N"], result.ci["a"], result.at[1e20].ci["N"]]).all()
    assert np.ptp(result.ci["a"]) == pytest.approx(np.ptp(others.ci["a"]), rel=0.25)


def test_pairs_draw_points_again(world):
    n, d, loss, c = world.grid(BUDGETS, sizes=14, width=6, sigma=0.004)
    for curve in ("parabola", "cubic"):
        fitted = fit_isoflop(n, d, loss, c, curve=curve, axis="tokens")
        pairs, student = (bootstrap(fitted, replicates=1000, method=m) for m in ("pairs", "auto"))
        assert (pairs.interval_method, student.interval_method) == ("pairs", "residuals")
        assert 0.6 < np.ptp(pairs.ci["a"]) / np.ptp(student.ci["a"]) < 1.7
    with pytest.raises(UserError, match=r"'pairs' leaves sizes out.*use 'residuals'"):
        bootstrap(fit_isoflop(n, d, loss, c, curve="akima"), replicates=200, method="pairs")
