"""solver: many weighted fits of one law -> their minima, all at once. Called by solve, surface_draws and profile.

Functions take R replicates of n points: theta (R, p), target and weight (R, n) or (1, n). Newton's steps use the
exact Hessian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dlm.fit.laws.law import Law
from dlm.fit.points import Array, Points

CHUNK = 250  # replicates held in cache together


STEEPEST = 1e8  # bound on a scaled Hessian entry: eigenvalues of wilder ones may not converge


GOOD_ENOUGH = 1e-3  # of the objective: a row that runs out of steps with less than that to gain has arrived


LEAST_PIVOT = 1e-10  # of a scaled Hessian that counts as positive


LONGEST = 5.0  # bound on a step in any of theta: e to the 5 is far enough at once


L1_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6)  # |r| as the limit of Huber's norm


NORMS = ("huber", "mse", "l1")


SPACES = ("log", "raw")


Extra = Callable[[Array], tuple[Array, Array, Array]]  # theta -> value, gradient and Hessian of what is added


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What is minimised: sum of weight * norm(prediction - target) over the points."""

    law: Law
    x: tuple[Array, ...]  # the law's features, centred
    centre: Array  # what was subtracted from each
    space: str  # 'log' or 'raw'
    norm: str  # 'huber', 'mse' or 'l1'
    delta: float
    under_tuned: float = 1.0  # multiplies the term of a point above the law
    fixed: dict[int, float] = field(default_factory=dict)  # columns of theta that do not move
    extra: Extra | None = None  # added to the objective, for profiles

    @property
    def free(self) -> npt.NDArray[np.int64]:
        """The columns of theta that move."""
        return np.array([k for k in range(len(self.law.params)) if k not in self.fixed], dtype=np.int64)

    @property
    def has_its_surface(self) -> bool:
        """Whether E, A, B, alpha and beta are all fixed, so that there is nothing to scan."""
        return {0, 1, 2, 3, 4} <= set(self.fixed)

    def pinned(self, theta: Array) -> Array:
        """theta with the fixed columns at their values."""
        theta = theta.copy()
        for column, value in self.fixed.items():
            theta[:, column] = value
        return theta


def problem_of(
    points: Points,
    law: Law,
    *,
    space: str,
    norm: str,
    delta: float,
    under_tuned: float = 1.0,
    fixed: dict[str, float] | None = None,
) -> Problem:
    """Centre the features of the points; `fixed` names params of the law and their values."""
    fixed = fixed or {}
    columns = {law.pins[name]: v if name in ("E", *law.exponents) else np.log(v) for name, v in fixed.items()}
    features = law.features(points)
    # A scale is a coordinate of theta only on features that are not centred.
    centred = not {"A", "B"} & set(fixed)
    centre = np.array([float(v.mean()) if centred and k < 2 else 0.0 for k, v in enumerate(features)])
    x = tuple(v - c for v, c in zip(features, centre, strict=True))
    return Problem(
        law=law, x=x, centre=centre, space=space, norm=norm, delta=delta, under_tuned=under_tuned, fixed=columns
    )


def target_of(problem: Problem, loss: Array) -> Array:
    """The loss in the space of the residuals."""
    return np.log(loss) if problem.space == "log" else loss


def predict(problem: Problem, theta: Array) -> Array:
    """Predictions, shape (R, n), in the space of the residuals."""
    return target_of(problem, problem.law.loss(theta, problem.x))


def value(problem: Problem, theta: Array, target: Array, weight: Array) -> Array:
    """The objective, shape (R,): sums over the points, inf where theta is unusable."""
    with np.errstate(all="ignore"):
        rho, _, _ = _norm(problem, predict(problem, theta) - target)
        total = _sum(weight * rho)
    return np.where(np.isfinite(total), total, np.inf)


def derivatives(problem: Problem, theta: Array, target: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Objective (R,), gradient (R, p) and Hessian (R, p, p), by all of theta."""
    loss, slopes = problem.law.jet(theta, problem.x)
    rho, first, second = _norm(problem, target_of(problem, loss) - target)
    first, second = weight * first, weight * second
    if problem.space == "log":  # d log L = dL / L, and its own curvature
        first = first / loss
        second = (second / loss - first) / loss
    grad = np.matmul(slopes, first[:, :, None])[:, :, 0]
    hess = np.matmul(slopes * second[:, None], slopes.transpose(0, 2, 1))
    hess += problem.law.bend(theta, problem.x, slopes, first)
    total = _sum(weight * rho)
    if problem.extra is not None:
        more = problem.extra(theta)
        return total + more[0], grad + more[1], hess + more[2]
    return total, grad, hess


def take(values: Array, rows: slice | npt.NDArray[np.bool_]) -> Array:
    """Rows of values, unless all replicates share one."""
    return values if len(values) == 1 else values[rows]


def minimise(
    problem: Problem,
    theta: Array,
    target: Array,
    weight: Array,
    *,
    max_steps: int = 200,
    tolerance: float = 1e-10,
) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """Damped Newton from theta -> (theta, objective, converged), in chunks that fit the cache."""
    theta = problem.pinned(theta)
    found = []
    for i in range(0, len(theta), CHUNK):
        rows = slice(i, i + CHUNK)
        found.append(_minimise(problem, theta[rows], take(target, rows), take(weight, rows), max_steps, tolerance))
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
    ends, values, done = theta.copy(), np.empty(len(theta)), np.zeros(len(theta), dtype=bool)
    free, live = problem.free, np.arange(len(theta))
    with np.errstate(all="ignore"):
        best, grad, hess = derivatives(problem, theta, target, weight)
        damping = np.full(len(theta), 1e-4)
        # an objective that rounding cannot tell from 0
        exact = np.broadcast_to(np.finfo(float).eps ** 2 * _sum(weight * target**2), best.shape)
        for _ in range(max_steps):
            _hold_floor(problem.law.floor, theta, grad, hess)
            step, promise = _step(grad[:, free], hess[:, free[:, None], free], damping, free != problem.law.floor)
            leaves = (promise <= tolerance * best + exact) | (damping > 1e12)
            if leaves.any():
                rows, keep = live[leaves], ~leaves
                ends[rows], values[rows], done[rows] = theta[leaves], best[leaves], True
                target, weight = take(target, keep), take(weight, keep)
                live = live[keep]
                theta, step, best, promise = theta[keep], step[keep], best[keep], promise[keep]
                grad, hess, damping, exact = grad[keep], hess[keep], damping[keep], exact[keep]
            if not len(live):
                break
            trial = theta.copy()
            trial[:, free] += step
            trial[:, problem.law.floor] = np.maximum(trial[:, problem.law.floor], 0.0)
            new, new_grad, new_hess = derivatives(problem, trial, target, weight)
            good = new < best
            theta[good], best[good], grad[good], hess[good] = trial[good], new[good], new_grad[good], new_hess[good]
            damping = np.maximum(np.where(good, damping / 10, damping * 8), 1e-12)
        else:  # out of steps
            ends[live], values[live], done[live] = theta, best, promise <= GOOD_ENOUGH * best
    return ends, values, done & np.isfinite(values)


def _hold_floor(floor: int, theta: Array, grad: Array, hess: Array) -> None:
    """In place, for rows whose E lies at 0 and would fall: there E does not move."""
    held = np.flatnonzero((theta[:, floor] <= 0.0) & (grad[:, floor] > 0.0))
    grad[held, floor] = 0.0
    hess[held, floor] = hess[held, :, floor] = 0.0
    hess[held, floor, floor] = 1.0


def _step(grad: Array, hess: Array, damping: Array, logs: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    """The damped step and the decrease that an undamped one would promise; the Hessian's eigenvalues made positive.
    `logs` are the coordinates whose step is bounded: E has the unit of the loss.
    """
    count, size = grad.shape
    scaled, pull, here = hess.transpose(1, 2, 0).copy(), grad.T.copy(), np.arange(size)
    scale = 1.0 / np.sqrt(np.maximum(np.abs(scaled[here, here]), 1e-300))
    scaled *= scale
    scaled *= scale[:, None]
    pull *= scale
    both = np.concatenate([scaled, scaled], axis=2)
    both[here, here, count:] += damping
    step, gain, positive = _eliminate(both, np.concatenate([pull, pull], axis=1))
    step, promise = step[:, count:], 0.5 * gain[:count]
    bent = ~positive[:count]
    if bent.any():
        step[:, bent], promise[bent] = _along_eigenvectors(scaled[:, :, bent], pull[:, bent], damping[bent])
    step *= scale
    step *= -np.minimum(1.0, LONGEST / np.abs(step[logs]).max(axis=0, initial=1e-300))
    return step.T, promise


def _eliminate(left: Array, right: Array) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """M^-1 v, v' M^-1 v and whether M is positive, for symmetric M (p, p, R) and v (p, R), both overwritten: Gauss
    without pivoting, every operation over all R at once.
    """
    size = len(right)
    for k in range(size - 1):
        share = left[k + 1 :, k] / left[k, k]
        left[k + 1 :, k + 1 :] -= share[:, None] * left[k, k + 1 :]
        right[k + 1 :] -= share * right[k]
    pivots = left[np.arange(size), np.arange(size)]
    gain = _sum((right * right / pivots).T)
    for k in reversed(range(size)):
        right[k] -= (left[k, k + 1 :] * right[k + 1 :]).sum(axis=0)
        right[k] /= pivots[k]
    return right, gain, np.asarray(pivots.min(axis=0) > LEAST_PIVOT)


def _along_eigenvectors(scaled: Array, pull: Array, damping: Array) -> tuple[Array, Array]:
    """The step and its promise where the Hessian is not positive: its eigenvalues by their size."""
    finite = np.clip(np.nan_to_num(scaled, nan=0.0), -STEEPEST, STEEPEST)
    values, vectors = np.linalg.eigh(finite.transpose(2, 0, 1))
    curved = np.maximum(np.abs(values), LEAST_PIVOT)
    along = np.einsum("rij,ir->rj", vectors, pull)
    step = np.einsum("rij,rj->ir", vectors, along / (curved + damping[:, None]))
    return step, 0.5 * np.einsum("rj,rj->r", along, along / curved)


def _norm(problem: Problem, residual: Array) -> tuple[Array, Array, Array]:
    """The norm of the residual with its first and second derivative."""
    if problem.norm == "mse":
        found = residual * residual, 2.0 * residual, np.full_like(residual, 2.0)
    elif problem.norm == "l1":
        found = np.abs(residual), np.sign(residual), np.zeros_like(residual)
    else:
        inner = np.clip(residual, -problem.delta, problem.delta)
        found = inner * (residual - 0.5 * inner), inner, (inner == residual).astype(np.float64)
    if problem.under_tuned == 1.0:
        return found
    share = np.where(residual < 0.0, problem.under_tuned, 1.0)
    return found[0] * share, found[1] * share, found[2] * share


def _sum(values: Array) -> Array:
    return np.asarray(values.sum(axis=1), dtype=np.float64)
