import numpy as np
import pytest
import scipy.optimize

from dlm.fit.engine import newton, scan, search
from dlm.fit.laws import LAWS, UNIQUE
from dlm.fit.laws.chinchilla import Chinchilla
from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.laws.law import Law
from dlm.fit.points import as_points

TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28, "R": 1.3, "k": 0.6, "R_D": 6.0, "R_N": 3.0}
TRUTH |= {"kappa": 0.2, "e0": 2.0, "P": 0.01, "delta": 0.4, "epsilon": 0.7, "K": 0.7, "u": 0.5, "n": 0.4, "s": 0.5}


def law_of(name):
    if name in UNIQUE:
        return DataConstrained(TRUTH, 3e9) if name == "data-constrained" else LAWS[name](3e9)
    return LAWS[name]()


def make(world, space, norm, *, sigma=0.02, delta=1e-3, law=None, under=1.0):
    n, d, loss, _ = world.grid(np.geomspace(1e18, 1e20, 3), sigma=sigma, sizes=8)
    points = as_points(n, d, loss, unique_tokens=np.full(len(n), 3e9))
    problem = newton.problem_of(
        points, law or Chinchilla(), newton.Norm(space=space, norm=norm, delta=delta, under_tuned=under)
    )
    return problem, loss, newton.target_of(problem, loss)[None], np.linspace(0.5, 2.0, len(n))[None]


def central(function, theta, step=1e-5):
    """Central differences of a function of theta (R, p), along the last axis."""
    bumps = step * np.eye(theta.shape[1])
    return np.stack([(function(theta + b) - function(theta - b)) / (2 * step) for b in bumps], axis=-1)


@pytest.mark.parametrize("under", [1.0, 0.3])
@pytest.mark.parametrize("space", ["log", "raw"])
@pytest.mark.parametrize("norm", ["mse", "huber"])
@pytest.mark.parametrize("name", LAWS)
def test_derivatives_equal_finite_differences(world, name, space, norm, under):
    law = law_of(name)
    problem, _, target, weight = make(world, space, norm, delta=0.3, law=law, under=under)
    rows = np.array([[TRUTH[k] for k in law.params], [1.1 * TRUTH[k] for k in law.params]])
    theta = law.theta(rows, problem.centre)
    np.testing.assert_allclose(law.rows(theta, problem.centre), rows, rtol=1e-12)
    value, grad, hess = newton.derivatives(problem, theta, target, weight)
    np.testing.assert_allclose(value, newton.value(problem, theta, target, weight), rtol=1e-12)
    slope = central(lambda t: newton.value(problem, t, target, weight), theta)
    np.testing.assert_allclose(grad, slope, rtol=1e-6, atol=1e-8 * np.abs(grad).max())
    slopes = central(lambda t: newton.derivatives(problem, t, target, weight)[1], theta)
    np.testing.assert_allclose(hess, slopes, rtol=1e-5, atol=1e-7 * np.abs(hess).max())


@pytest.mark.parametrize("name", ["chinchilla", "skaling", "tied", "data-constrained"])  # whose jets take complex theta
def test_the_curvature_of_a_law_equals_that_by_complex_steps(world, name):
    law = law_of(name)
    problem, *_ = make(world, "raw", "mse", law=law)
    theta = law.theta(np.array([[TRUTH[k] for k in law.params]]), problem.centre)
    pull = np.random.default_rng(0).standard_normal((1, len(problem.x[0])))
    _, slopes = law.jet(theta, problem.x)
    np.testing.assert_allclose(
        law.bend(theta, problem.x, slopes, pull), Law.bend(law, theta, problem.x, slopes, pull), rtol=1e-10, atol=1e-12
    )


def test_a_step_solves_the_damped_system_and_promises_the_undamped_decrease():
    rng = np.random.default_rng(0)
    root, grad = rng.standard_normal((3, 4, 4)), rng.standard_normal((3, 4)) / 10
    hess, damping = root @ root.transpose(0, 2, 1) + np.eye(4), np.array([1e-4, 0.1, 3.0])
    hess[2] -= 3 * np.eye(4)  # no longer positive
    step, promise = newton._step(grad, hess, damping, np.ones(4, dtype=bool))
    scale = np.sqrt(np.abs(np.einsum("rii->ri", hess)))
    scaled, pull = hess / scale[:, :, None] / scale[:, None], grad / scale
    values, vectors = np.linalg.eigh(scaled)
    assert (values[2] < 0).any()
    assert (values[:2] > 0).all()
    along = np.einsum("rij,ri->rj", vectors, pull)
    expected = -np.einsum("rij,rj->ri", vectors, along / (np.abs(values) + damping[:, None])) / scale
    np.testing.assert_allclose(step, expected, rtol=1e-9)
    np.testing.assert_allclose(promise, (along**2 / np.abs(values)).sum(axis=1) / 2, rtol=1e-9)


def test_skaling_with_k_one_is_chinchilla(world):
    n, d = np.log(np.geomspace(1e7, 1e9, 9)), np.log(np.geomspace(1e9, 1e10, 9))
    plain = np.array([[1.69, 406.4, 410.7, 0.34, 0.28]])
    mixed = np.array([[1.69, 406.4, 410.7 / 406.4, 0.34, 0.28, 1.0]])
    found, same = LAWS["skaling"](), Chinchilla()
    np.testing.assert_allclose(
        found.predict(mixed, n[None], d[None]), same.predict(plain, n[None], d[None]), rtol=1e-13
    )
    half = np.array([[1.69, 20.0, 2.0, 0.34, 0.28, 0.4]])
    direct = 1.69 + 20.0 * (np.exp(-0.34 * n) + 2.0 * np.exp(-0.28 * d)) ** 0.4
    np.testing.assert_allclose(found.predict(half, n[None], d[None])[0], direct, rtol=1e-13)


def test_data_constrained_is_the_published_formula():
    """2305.16264, equations 5 and 6, written out."""
    law = law_of("data-constrained")
    row = np.array([[TRUTH[k] for k in law.params]])
    n, d, unique = 2e9, 4e10, 3e9
    g = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
    un = min(n, g * (unique * g) ** (0.28 / 0.34))
    d_worth = unique + unique * 6.0 * (1 - np.exp(-(d / unique - 1) / 6.0))
    n_worth = un + un * 3.0 * (1 - np.exp(-(n / un - 1) / 3.0))
    expected = 1.69 + 406.4 / n_worth**0.34 + 410.7 / d_worth**0.28
    assert law.predict(row, np.log([n]), np.log([d]))[0] == pytest.approx(expected, rel=1e-12)
    assert un < n


def test_scan_is_least_squares_at_each_cell(world):
    problem, loss, _, weight = make(world, "raw", "mse")
    theta, squares = scan.grid(problem, loss[None], weight)
    cell = 32 * 13 + 17
    alpha, beta = theta[0, cell, 1], theta[0, cell, 3]
    columns = np.stack([np.ones_like(loss), np.exp(-alpha * problem.x[0]), np.exp(-beta * problem.x[1])], axis=1)
    root = np.sqrt(weight[0] / weight.sum())
    solved, rss, *_ = np.linalg.lstsq(columns * root[:, None], loss * root)
    np.testing.assert_allclose(np.array([theta[0, cell, 4], *np.exp(theta[0, cell, [0, 2]])]), solved, rtol=1e-7)
    np.testing.assert_allclose(squares[0, cell], rss[0], rtol=1e-6)


@pytest.mark.parametrize(("space", "norm"), [("log", "huber"), ("raw", "mse")])
def test_minima_of_resampled_points_lie_never_above_scipy_s(world, space, norm):
    problem, loss, target, _ = make(world, space, norm)
    weight = np.random.default_rng(1).multinomial(len(loss), np.full(len(loss), 1 / len(loss)), size=6).astype(float)
    begin, usable = scan.starts(problem, loss[None], weight)
    assert usable.all()
    _, ours, done = newton.minimise(problem, begin, target, weight)
    assert done.all()
    for row, found in enumerate(ours):

        def objective(t, w=weight[row : row + 1]):
            value, grad, _ = newton.derivatives(problem, t[None], target, w)
            return 1e4 * value[0], 1e4 * grad[0]  # scaled: L-BFGS stops early otherwise

        options = {"maxiter": 3000, "ftol": 1e-15, "gtol": 1e-10}
        starts = (begin[row], np.array([-1.0, 0.5, -0.5, 0.5, 0.4]))
        peer = min(
            scipy.optimize.minimize(objective, s, jac=True, options=options, method="L-BFGS-B").fun for s in starts
        )
        assert found <= peer / 1e4 * (1 + 1e-6)


def test_l1_cannot_be_lowered_along_any_axis(world):
    problem, loss, target, weight = make(world, "raw", "l1")
    starts = scan.many_starts(problem, loss, weight[0])
    theta, values, _ = newton.minimise(problem, starts, target, weight)
    best = theta[[values.argmin()]]
    for nudge in np.vstack([np.eye(5), -np.eye(5)]) * 1e-4:
        assert newton.value(problem, best + nudge, target, weight)[0] >= values.min() * (1 - 1e-7)


def test_where_few_starts_disagree_many_are_tried(reference):
    """These runs, under-tuned ones held down, have three minima within .1 %; the few starts miss the lowest."""
    frame = reference("porian_main.csv")
    frame = frame[(frame["hparams"] == "tuned") & (frame["decay"] == "const")]
    points = as_points(frame["params"], frame["tokens"], frame["loss"])
    found = search.solve(points, Chinchilla(), search.Norm(under_tuned=0.2))
    assert found.value <= 0.0021658309078
    assert len(found.rivals) == 2
