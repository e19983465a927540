import numpy as np
import pytest
import scipy.optimize

from dlm.fit import scan, solver
from dlm.fit.points import as_points

THETA = np.array([[-0.4, 0.34, -0.2, 0.28, 0.5], [-1.0, 0.5, 0.1, 0.2, 0.3]])


def make(world, space, norm, *, sigma=0.02, delta=1e-3):
    n, d, loss, _ = world.grid(np.geomspace(1e18, 1e20, 3), sigma=sigma, sizes=8)
    problem = solver.problem_of(as_points(n, d, loss), space=space, norm=norm, delta=delta)
    return problem, loss, solver.target_of(problem, loss)[None], np.linspace(0.5, 2.0, len(n))[None]


def central(function, theta, step=1e-5):
    """Central differences of a function of theta_R5, along the last axis."""
    bumps = step * np.eye(5)
    return np.stack([(function(theta + b) - function(theta - b)) / (2 * step) for b in bumps], axis=-1)


@pytest.mark.parametrize("space", ["log", "raw"])
@pytest.mark.parametrize("norm", ["mse", "huber"])
def test_derivatives_equal_finite_differences(world, space, norm):
    problem, _, target, weight = make(world, space, norm, delta=0.3)
    value, grad, hess = solver.derivatives(problem, THETA, target, weight)
    np.testing.assert_allclose(value, solver.value(problem, THETA, target, weight), rtol=1e-12)
    np.testing.assert_allclose(grad, central(lambda t: solver.value(problem, t, target, weight), THETA), rtol=1e-6)
    slopes = central(lambda t: solver.derivatives(problem, t, target, weight)[1], THETA)
    np.testing.assert_allclose(hess, slopes, rtol=1e-4, atol=1e-5)


def test_scan_is_least_squares_at_each_cell(world):
    problem, loss, _, weight = make(world, "raw", "mse")
    theta, squares = scan.grid(problem, loss[None], weight)
    cell = 32 * 13 + 17
    alpha, beta = theta[0, cell, 1], theta[0, cell, 3]
    columns = np.stack([np.ones_like(loss), np.exp(-alpha * problem.x), np.exp(-beta * problem.y)], axis=1)
    root = np.sqrt(weight[0] / weight.sum())
    solved, rss, *_ = np.linalg.lstsq(columns * root[:, None], loss * root)
    np.testing.assert_allclose(np.exp(theta[0, cell, [4, 0, 2]]), solved, rtol=1e-7)
    np.testing.assert_allclose(squares[0, cell], rss[0], rtol=1e-6)


@pytest.mark.parametrize(("space", "norm"), [("log", "huber"), ("raw", "mse")])
def test_never_above_scipy_on_resampled_points(world, space, norm):
    problem, loss, target, _ = make(world, space, norm)
    weight = np.random.default_rng(1).multinomial(len(loss), np.full(len(loss), 1 / len(loss)), size=6).astype(float)
    begin, usable = scan.starts(problem, loss[None], weight)
    assert usable.all()
    _, ours, done = solver.minimise(problem, begin, target, weight)
    assert done.all()
    for row, found in enumerate(ours):

        def objective(t, w=weight[row : row + 1]):
            value, grad, _ = solver.derivatives(problem, t[None], target, w)
            return 1e4 * value[0], 1e4 * grad[0]  # scaled: L-BFGS stops early otherwise

        options = {"maxiter": 3000, "ftol": 1e-15, "gtol": 1e-10}
        starts = (begin[row], np.array([-1.0, 0.5, -0.5, 0.5, 0.4]))
        peer = min(
            scipy.optimize.minimize(objective, s, jac=True, options=options, method="L-BFGS-B").fun for s in starts
        )
        assert found <= peer / 1e4 * (1 + 1e-6)


def test_l1_cannot_be_lowered_along_any_axis(world):
    problem, loss, target, weight = make(world, "raw", "l1")
    starts = scan.many_starts(problem, loss, weight[0], target[0])
    theta, values, _ = solver.minimise(problem, starts, target, weight)
    best = theta[[values.argmin()]]
    for nudge in np.vstack([np.eye(5), -np.eye(5)]) * 1e-4:
        assert solver.value(problem, best + nudge, target, weight)[0] >= values.min() * (1 - 1e-7)
