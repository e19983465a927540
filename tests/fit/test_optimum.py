import numpy as np
import pytest
import scipy.optimize

from dlm.core.errors import UserError
from dlm.core.flops import flops_per_token
from dlm.core.objectives import objective_info
from dlm.core.paths import sweeps_dir
from dlm.core.shape import load_shape
from dlm.fit import bootstrap, fit_isoflop, fit_surface, judge, optima, optimum
from dlm.fit.draws import hull
from dlm.fit.laws.chinchilla import Chinchilla
from dlm.fit.points import Cost, as_points, cost_of
from dlm.plan.definition import load_sweep


def row(world):
    return optimum.as_rows(Chinchilla(), vars(world))


@pytest.mark.parametrize("flops", [1e15, 1e20, 1e26])
def test_closed_form_is_the_minimum(world, flops):
    def loss(log_n):
        return world.loss(np.exp(log_n), flops / 6 / np.exp(log_n))

    peer = scipy.optimize.minimize_scalar(loss, bracket=(5, 20, 35), tol=1e-12)
    n, d, lowest = optimum.best(Chinchilla(), row(world), flops, Cost())[0]
    assert np.log(n) == pytest.approx(peer.x, abs=1e-5)
    assert lowest == pytest.approx(peer.fun, rel=1e-12)
    assert 6 * n * d == pytest.approx(flops, rel=1e-12)


def with_head(n):
    return 6 * n + 3 * 256 * np.sqrt(n / 24)


def test_other_conventions_minimise_under_their_cost(world):
    sizes = np.geomspace(4e3, 4e6, 200)
    points = as_points(sizes, 1e9 / sizes, np.linspace(2, 1, 200), flops=with_head(sizes) * 1e9 / sizes)
    cost, flops = cost_of(points), 1e14
    assert not cost.is_6nd

    def loss(log_n):
        return world.loss(np.exp(log_n), flops / with_head(np.exp(log_n)))

    peer = scipy.optimize.minimize_scalar(loss, bracket=(np.log(4e3), 13, np.log(4e6)), tol=1e-12)
    n, d, lowest = optimum.best(Chinchilla(), row(world), flops, cost)[0]
    assert np.log(n) == pytest.approx(peer.x, abs=0.02)  # the interpolated cost has corners
    assert lowest == pytest.approx(peer.fun, rel=1e-7)
    assert with_head(n) * d == pytest.approx(flops, rel=1e-3)


def test_the_search_agrees_with_the_closed_form_when_the_ratio_is_constant(world):
    constant = Cost(log_params=np.array([10.0, 20.0]), log_extra=np.full(2, np.log(0.5)))
    found = optimum.best(Chinchilla(), row(world), 1.5e20, constant)[0]
    np.testing.assert_allclose(found[:2], world.best(1e20), rtol=1e-6)
    assert optimum.exponents(Chinchilla(), row(world), (1e18, 1e20), constant)[0, 0] == pytest.approx(
        0.28 / 0.62, abs=1e-6
    )


def test_a_result_says_how_it_allocated(world):
    n, d, loss, _ = world.grid([1e18, 1e19, 1e20], sizes=6)
    assert fit_surface(n, d, loss, flops=6 * n * d * 1.004).allocation.how.startswith("closed form")


def test_exponents_follow_the_cost(world):
    def ratio(n):
        return 1 + (1e8 / n) ** 0.5

    def best_log_n(flops):
        def loss(log_n):
            return world.loss(np.exp(log_n), flops / (6 * np.exp(log_n) * ratio(np.exp(log_n))))

        return scipy.optimize.minimize_scalar(loss, bracket=(10, 18, 28), tol=1e-12).x

    n, d, loss, _ = world.grid(np.geomspace(1e18, 1e21, 4), sizes=9)
    flops = 6 * n * d * ratio(n)
    share = fit_surface(n, d, loss, flops=flops).allocation
    slope = (best_log_n(flops.max()) - best_log_n(flops.min())) / np.log(flops.max() / flops.min())
    assert share.how.startswith("numerical")
    assert share.a == pytest.approx(slope, abs=0.003)
    assert abs(share.a - 0.28 / 0.62) > 0.01  # so the closed form would have been wrong


def test_the_cost_continues_beyond_the_sizes():
    sizes = np.geomspace(4e3, 4e5, 6)
    cost = cost_of(as_points(sizes, np.full(6, 1e6), np.linspace(2, 1, 6), flops=with_head(sizes) * 1e6))
    for n in (5e2, 3e4, 1e8):
        assert np.exp(cost.log_per_token(np.log([n]))[0]) == pytest.approx(with_head(n), rel=1e-9)
    below = cost_of(as_points(sizes, np.full(6, 1e6), np.linspace(2, 1, 6), flops=3 * sizes * 1e6))
    assert np.exp(below.log_per_token(np.log([1e8]))[0]) == pytest.approx(3e8, rel=1e-9)


def test_every_result_reports_what_optima_gives(world):
    n, d, loss, c = world.grid(np.geomspace(1e18, 1e20, 5), sizes=5, sigma=0.003)
    for fitted in (fit_surface(n, d, loss, budget=c, at=[1e20, 1e23]), fit_isoflop(n, d, loss, c, at=[1e20, 1e23])):
        resampled = bootstrap(fitted, replicates=100)
        for result in (fitted, resampled, judge(resampled, replicates=100)):
            assert repr(optima(result, result.at)) == repr(dict(result.at))  # as text, because NaN is not NaN
            assert result.at[1e23].withheld and not result.at[1e20].withheld
    with pytest.raises(UserError, match=r"at is -1\.0: give compute in FLOPs"):
        optima(fitted, [-1])


def test_of_two_minima_beside_each_other_the_lower_is_found():
    """The cost per token is interpolated between the sizes that were run, so that it has a corner at each of them."""
    info = objective_info("masked_diffusion")
    shapes = [load_shape(name) for name in load_sweep(sweeps_dir() / "mdm_vs_ar.yaml").models]
    sizes = np.array([shape.num_params for shape in shapes], dtype=float)
    per_token = [
        float(flops_per_token(shape, convention="full_masked_head", block_size=128, objective=info)) for shape in shapes
    ]
    cost = cost_of(
        as_points(sizes, 1e9 / sizes, np.linspace(2, 1, len(sizes)), flops=np.array(per_token) * 1e9 / sizes)
    )
    rng, law = np.random.default_rng(0), Chinchilla()
    log_n = np.linspace(6.0, 16.0, 20_001)
    # In the first law, 40k parameters and 60k differ by 8e-5 nats.
    worlds = [(1.5, 8.7026, 171.63, 0.25719, 0.45887)]
    worlds += [(1.5, *rng.uniform(5, 50, 1), *rng.uniform(50, 500, 1), *rng.uniform(0.2, 0.5, 2)) for _ in range(100)]
    for values in worlds:
        one = optimum.as_rows(law, dict(zip(law.params, values, strict=True)))
        along = law.predict(one, log_n[None], np.log(3e11) - cost.log_per_token(log_n)[None])[0]
        lowest = optimum.best(law, one, 3e11, cost)[0, 2]
        assert lowest <= along.min() + 1e-9


def test_a_hull_is_unknown_where_one_of_its_intervals_is():
    assert hull([(1.0, 2.0), (0.5, 1.5)]) == (0.5, 2.0)
    assert np.isnan(hull([(1.0, 2.0), (np.nan, np.nan)])).all()
