"""solver: many weighted Chinchilla fits -> their minima, all at once. Called by surface and resample.

L(N, D) = E + A/N^alpha + B/D^beta (Hoffmann et al. 2203.15556, approach 3). theta = (a, alpha, b, beta, e) is
on centred logs x, y, where it is well scaled: L = exp(a - alpha x) + exp(b - beta y) + exp(e). Functions
take R replicates of n points: theta_R5, target_Rn, weight_Rn. Newton's steps use the exact Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dlm.fit.points import Array, Points

CHUNK = 500  # replicates held in cache together
STEEPEST = 1e8  # bound on a scaled Hessian entry: eigenvalues of wilder ones may not converge
LONGEST = 5.0  # bound on a step in any of theta: e to the 5 is far enough at once
L1_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6)  # |r| as the limit of Huber's norm


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What is minimised: sum of weight * norm(prediction - target) over the points."""

    x: Array  # log N, centred
    y: Array  # log D, centred
    centre: tuple[float, float]  # mean log N, mean log D
    space: str  # 'log' or 'raw'
    norm: str  # 'huber', 'mse' or 'l1'
    delta: float


def problem_of(points: Points, *, space: str, norm: str, delta: float) -> Problem:
    """Centre the logs of the points."""
    log_n, log_d = np.log(points.params), np.log(points.tokens)
    centre = float(log_n.mean()), float(log_d.mean())
    return Problem(x=log_n - centre[0], y=log_d - centre[1], centre=centre, space=space, norm=norm, delta=delta)


def target_of(problem: Problem, loss: Array) -> Array:
    """The loss in the space of the residuals."""
    return np.log(loss) if problem.space == "log" else loss


def predict(problem: Problem, theta: Array) -> Array:
    """Predictions, shape (R, n), in the space of the residuals."""
    _, total = _terms(problem, theta)
    return np.log(total) if problem.space == "log" else total


def natural(problem: Problem, theta: Array) -> Array:
    """theta -> (E, A, B, alpha, beta), shape (R, 5)."""
    a, alpha, b, beta, e = theta.T
    log_a, log_b = a + alpha * problem.centre[0], b + beta * problem.centre[1]
    with np.errstate(over="ignore"):
        return np.stack([np.exp(e), np.exp(log_a), np.exp(log_b), alpha, beta], axis=1)


def value(problem: Problem, theta: Array, target: Array, weight: Array) -> Array:
    """The objective, shape (R,): sums over the points, inf where theta is unusable."""
    with np.errstate(all="ignore"):
        rho, _, _ = _norm(problem, predict(problem, theta) - target)
        total = _sum(weight * rho)
    return np.where(np.isfinite(total), total, np.inf)


def derivatives(problem: Problem, theta: Array, target: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Objective (R,), gradient (R, 5) and Hessian (R, 5, 5).

    With u = (a - alpha x, b - beta y, e) and g = dL/du (raw: exp u; log: softmax u) the Hessian in u is
    (psi' - [log] psi) g g' + psi diag(g); x and y then carry it to theta.
    """
    terms, total = _terms(problem, theta)
    log_space = problem.space == "log"
    g1, g2, g3 = (t / total for t in terms) if log_space else terms
    rho, psi, slope = _norm(problem, (np.log(total) if log_space else total) - target)
    first = weight * psi
    second = weight * slope - (first if log_space else 0.0)
    return _sum(weight * rho), *_assemble(problem, first, second, g1, g2, np.broadcast_to(g3, g1.shape))


def minimise(
    problem: Problem,
    theta: Array,
    target: Array,
    weight: Array,
    *,
    max_steps: int = 200,
    tolerance: float = 1e-10,
) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """Damped Newton from theta_R5 -> (theta, objective, converged), in chunks that fit the cache."""
    weight, target = (np.broadcast_to(v, (len(theta), len(problem.x))) for v in (weight, target))
    found = [
        _minimise(problem, theta[i : i + CHUNK], target[i : i + CHUNK], weight[i : i + CHUNK], max_steps, tolerance)
        for i in range(0, len(theta), CHUNK)
    ]
    thetas, values, done = (np.concatenate(part) for part in zip(*found, strict=True))
    return thetas, values, done


def _minimise(
    problem: Problem, theta: Array, target: Array, weight: Array, max_steps: int, tolerance: float
) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    if problem.norm != "l1":
        return _newton(problem, theta, target, weight, max_steps, tolerance)
    for delta in L1_DELTAS:
        smooth = replace(problem, norm="huber", delta=delta)
        theta, _, done = _newton(smooth, theta, target, weight, max_steps, tolerance)
    return theta, value(problem, theta, target, weight), done


def _newton(
    problem: Problem, theta: Array, target: Array, weight: Array, max_steps: int, tolerance: float
) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """Per-row Levenberg damping on |Hessian|; a row leaves when the decrease it can still expect is
    negligible.
    """
    theta, done, live = theta.copy(), np.zeros(len(theta), dtype=bool), np.arange(len(theta))
    with np.errstate(all="ignore"):
        best, grad, hess = derivatives(problem, theta, target, weight)
        damping = np.full(len(theta), 1e-4)
        exact = np.finfo(float).eps ** 2 * _sum(weight * target**2)  # an objective that rounding cannot tell from 0
        for _ in range(max_steps):
            step, promise = _step(grad[live], hess[live], damping[live])
            done[live] = (promise <= tolerance * best[live] + exact[live]) | (damping[live] > 1e12)
            keep = ~done[live]
            live, step = live[keep], step[keep]
            if not len(live):
                break
            trial = theta[live] + step
            new, new_grad, new_hess = derivatives(problem, trial, target[live], weight[live])
            good = new < best[live]
            rows = live[good]
            theta[rows], best[rows], grad[rows], hess[rows] = (
                trial[good],
                new[good],
                new_grad[good],
                new_hess[good],
            )
            damping[live] = np.where(good, damping[live] / 10, damping[live] * 8)
            damping[live] = np.maximum(damping[live], 1e-12)
    return theta, best, done & np.isfinite(best)


def _step(grad: Array, hess: Array, damping: Array) -> tuple[Array, Array]:
    """The damped step and the decrease that an undamped one would promise; the Hessian's eigenvalues made
    positive.
    """
    scale = 1.0 / np.sqrt(np.maximum(np.abs(np.einsum("rii->ri", hess)), 1e-300))
    scaled = hess * scale[:, :, None] * scale[:, None, :]
    values, vectors = np.linalg.eigh(np.clip(np.nan_to_num(scaled, nan=0.0), -STEEPEST, STEEPEST))
    curved = np.maximum(np.abs(values), 1e-10)
    along = np.einsum("rij,ri->rj", vectors, grad * scale)
    step = np.einsum("rij,rj->ri", vectors, along / (curved + damping[:, None]))
    promise = 0.5 * np.einsum("rj,rj->r", along, along / curved)
    step = step * scale
    return -step * np.minimum(1.0, LONGEST / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300)), promise


def _terms(problem: Problem, theta: Array) -> tuple[tuple[Array, Array, Array], Array]:
    a, alpha, b, beta, e = (theta[:, k : k + 1] for k in range(5))
    size, tokens, floor = np.exp(a - alpha * problem.x), np.exp(b - beta * problem.y), np.exp(e)
    return (size, tokens, floor), size + tokens + floor


def _norm(problem: Problem, residual: Array) -> tuple[Array, Array, Array]:
    """The norm of the residual with its first and second derivative."""
    if problem.norm == "mse":
        return residual * residual, 2.0 * residual, np.full_like(residual, 2.0)
    if problem.norm == "l1":
        return np.abs(residual), np.sign(residual), np.zeros_like(residual)
    inner = np.clip(residual, -problem.delta, problem.delta)
    return inner * (residual - 0.5 * inner), inner, (inner == residual).astype(np.float64)


def _assemble(problem: Problem, first: Array, second: Array, g1: Array, g2: Array, g3: Array) -> tuple[Array, Array]:
    """Carry gradient and Hessian from u to theta = (a, alpha, b, beta, e)."""
    x, y = problem.x, problem.y
    one = np.ones_like(x)
    by_x, by_y = np.stack([one, -x, x * x], axis=1), np.stack([one, -y, y * y], axis=1)
    d1, d2, d3 = first * g1, first * g2, first * g3
    s1, s2 = second * g1, second * g2
    grad = np.concatenate([d1 @ by_x[:, :2], d2 @ by_y[:, :2], _sum(d3)[:, None]], axis=1)
    size, tokens = (s1 * g1 + d1) @ by_x, (s2 * g2 + d2) @ by_y
    cross = (s1 * g2) @ np.stack([one, -x, -y, x * y], axis=1)
    with_e = np.concatenate([(s1 * g3) @ by_x[:, :2], (s2 * g3) @ by_y[:, :2]], axis=1)
    last = _sum(second * g3 * g3 + d3)
    rows = [
        [size[:, 0], size[:, 1], cross[:, 0], cross[:, 2], with_e[:, 0]],
        [size[:, 1], size[:, 2], cross[:, 1], cross[:, 3], with_e[:, 1]],
        [cross[:, 0], cross[:, 1], tokens[:, 0], tokens[:, 1], with_e[:, 2]],
        [cross[:, 2], cross[:, 3], tokens[:, 1], tokens[:, 2], with_e[:, 3]],
        [with_e[:, 0], with_e[:, 1], with_e[:, 2], with_e[:, 3], last],
    ]
    return grad, np.stack([np.stack(row, axis=1) for row in rows], axis=1)


def _sum(values: Array) -> Array:
    return np.asarray(values.sum(axis=1), dtype=np.float64)
