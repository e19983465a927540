import numpy as np
import pytest
import scipy.optimize

from dlm.fit import fit_surface, optimum
from dlm.fit.points import Cost, as_points, cost_of


def row(world):
    return optimum.as_rows("chinchilla", vars(world))


@pytest.mark.parametrize("flops", [1e15, 1e20, 1e26])
def test_closed_form_is_the_minimum(world, flops):
    def loss(log_n):
        return world.loss(np.exp(log_n), flops / 6 / np.exp(log_n))

    peer = scipy.optimize.minimize_scalar(loss, bracket=(5, 20, 35), tol=1e-12)
    n, d, lowest = optimum.best("chinchilla", row(world), flops, Cost())[0]
    assert np.log(n) == pytest.approx(peer.x, abs=1e-5)
    assert lowest == pytest.approx(peer.fun, rel=1e-12)
    assert 6 * n * d == pytest.approx(flops, rel=1e-12)


def with_head(n):
    return 6 * n + 3 * 256 * np.sqrt(n / 24)


def test_other_conventions_minimise_under_their_cost(world):
    sizes = np.geomspace(4e3, 4e6, 200)
    points = as_points(sizes, 1e9 / sizes, np.ones(200), flops=with_head(sizes) * 1e9 / sizes)
    cost, flops = cost_of(points), 1e14
    assert not cost.is_6nd

    def loss(log_n):
        return world.loss(np.exp(log_n), flops / with_head(np.exp(log_n)))

    peer = scipy.optimize.minimize_scalar(loss, bracket=(np.log(4e3), 13, np.log(4e6)), tol=1e-12)
    n, d, lowest = optimum.best("chinchilla", row(world), flops, cost)[0]
    assert np.log(n) == pytest.approx(peer.x, abs=0.02)  # the interpolated cost has corners
    assert lowest == pytest.approx(peer.fun, rel=1e-7)
    assert with_head(n) * d == pytest.approx(flops, rel=1e-3)


def test_the_search_agrees_with_the_closed_form_when_the_ratio_is_constant(world):
    constant = Cost(np.array([10.0, 20.0]), np.full(2, np.log(1.5)))
    found = optimum.best("chinchilla", row(world), 1.5e20, constant)[0]
    np.testing.assert_allclose(found[:2], world.best(1e20), rtol=1e-6)
    assert optimum.exponents("chinchilla", row(world), (1e18, 1e20), constant)[0, 0] == pytest.approx(0.28 / 0.62, abs=1e-6)


def test_a_result_says_how_it_allocated(world):
    n, d, loss, _ = world.grid([1e18, 1e19, 1e20], sizes=6)
    assert fit_surface(n, d, loss, flops=6 * n * d * 1.004).allocation.how.startswith("closed form")
    other = fit_surface(n, d, loss, flops=6 * n * d * (1 + (1e8 / n) ** 0.5)).allocation
    assert other.how.startswith("numerical")
    assert other.a + other.b < 1 + 0.1
    assert other.a > 0.28 / 0.62 + 0.02  # small models cost more than 6 N: the best size grows faster with C
