"""Minimise many weighted fits of one law at once, by Newton's method with the exact Hessian.

Shapes: R replicates, n points, p parameters. theta is (R, p); target and weight are (R, n), or (1, n) if all
replicates share them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dlm.fit.laws.law import Law
from dlm.fit.points import Array, Mask, Points

NORMS = ("huber", "mse", "l1")
SPACES = ("log", "raw")

CHUNK = 60_000  # entries of the arrays (R, n) that are minimised together, so that they fit the processor's cache
STEEPEST = 1e8  # bound on an entry of a scaled Hessian: with larger entries, the eigenvalues may not converge
GOOD_ENOUGH = 1e-3  # a row that runs out of steps has converged if it could gain less than this share of its objective
LEAST_PIVOT = 1e-10  # smallest pivot of a scaled Hessian that counts as positive definite
LONGEST = 5.0  # bound on one step of any logarithm or exponent in theta
L1_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6)  # the absolute value is the limit of Huber's norm for small delta

Minima = tuple[Array, Array, Mask]  # theta (R, p), objective (R,), whether it converged (R,)
Extra = Callable[[Array], tuple[Array, Array, Array]]  # theta -> value, gradient and Hessian of a term to add


@dataclass(frozen=True, kw_only=True)
class Norm:
    """How the residual of a point counts in the objective."""

    norm: str = "huber"  # one of NORMS; 'mse' is the square and 'huber' half the square up to its corner
    delta: float = 1e-3  # Huber's corner, in the unit of the residual
    space: str = "log"  # one of SPACES: residuals of log loss, or of loss
    under_tuned: float = 1.0  # factor on the term of a point that lies above the law


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """The objective that is minimised over theta: the sum of weight * norm(prediction - target) over the points."""

    law: Law
    x: tuple[Array, ...]  # the law's features, centred, each (n,)
    centre: Array  # the constant that was subtracted from each feature
    how: Norm
    fixed: dict[int, float] = field(default_factory=dict)  # columns of theta that are held fixed, and their values
    extra: Extra | None = None  # a term added to the objective

    @property
    def free(self) -> npt.NDArray[np.int64]:
        """The columns of theta that are optimised."""
        return np.array([k for k in range(len(self.law.params)) if k not in self.fixed], dtype=np.int64)

    @property
    def has_its_surface(self) -> bool:
        """Whether E, A, B, alpha and beta are all fixed, so that there are no exponents to scan."""
        return {0, 1, 2, 3, 4} <= set(self.fixed)

    def pinned(self, theta: Array) -> Array:
        """theta with its fixed columns set to their values."""
        theta = theta.copy()
        for column, value in self.fixed.items():
            theta[:, column] = value
        return theta


def problem_of(points: Points, law: Law, how: Norm, fixed: Mapping[str, float] | None = None) -> Problem:
    """Set up the fit of `law` to `points`, with the parameters in `fixed` held at the given values."""
    fixed = fixed or {}
    columns = {law.pins[name]: v if name in ("E", *law.exponents) else np.log(v) for name, v in fixed.items()}
    features = law.features(points)
    # A and B are coordinates of theta only where the features are not centred.
    centred = not {"A", "B"} & set(fixed)
    centre = np.array([float(v.mean()) if centred and k < 2 else 0.0 for k, v in enumerate(features)])
    x = tuple(v - c for v, c in zip(features, centre, strict=True))
    return Problem(law=law, x=x, centre=centre, how=how, fixed=columns)


def target_of(problem: Problem, loss: Array) -> Array:
    """Transform the loss to the space of the residuals: its log in space 'log', the loss itself in space 'raw'."""
    return in_space(loss, problem.how)


def in_space(loss: Array, how: Norm) -> Array:
    """The log of the loss in space 'log', the loss itself in space 'raw'."""
    return np.log(loss) if how.space == "log" else loss


def predict(problem: Problem, theta: Array) -> Array:
    """The predictions of each row in the space of the residuals, (R, n)."""
    return target_of(problem, problem.law.loss(theta, problem.x))


def value(problem: Problem, theta: Array, target: Array, weight: Array) -> Array:
    """The objective of each row, (R,); infinite if theta gives no finite prediction."""
    with np.errstate(all="ignore"):
        rho, _, _ = _norm(problem, predict(problem, theta) - target)
        total = _sum(weight * rho)
    return np.where(np.isfinite(total), total, np.inf)


def derivatives(problem: Problem, theta: Array, target: Array, weight: Array) -> tuple[Array, Array, Array]:
    """The objective (R,), its gradient (R, p) and its Hessian (R, p, p) with respect to all of theta."""
    loss, slopes = problem.law.jet(theta, problem.x)
    rho, first, second = _norm(problem, target_of(problem, loss) - target)
    first, second = weight * first, weight * second
    if problem.how.space == "log":  # the chain rule: d log L = dL / L, and the log is curved
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


def take(values: Array, rows: slice | Mask) -> Array:
    """The selected rows of `values`, or its only row if all replicates share one row."""
    return values if len(values) == 1 else values[rows]


def minimise(
    problem: Problem, theta: Array, target: Array, weight: Array, *, max_steps: int = 200, tolerance: float = 1e-10
) -> Minima:
    """Find the minimum that each row of theta leads to, in chunks that fit the cache.

    Args:
        problem: The law, the features and the norm.
        theta: The starts, (R, p).
        target: The losses in the space of the residuals, (R, n) or (1, n).
        weight: Factor of each point, (R, n) or (1, n).
        max_steps: Newton steps after which a row is stopped.
        tolerance: A row has converged when the predicted decrease of a step is below this share of its objective.

    Returns:
        theta (R, p), its objective (R,), and whether each row converged (R,).
    """
    theta, is_l1 = problem.pinned(theta), problem.how.norm == "l1"
    parts = chunks(len(theta), len(problem.x[0]))
    for smooth in [huber(problem, delta) for delta in L1_DELTAS] if is_l1 else [problem]:
        found = [_newton(smooth, theta[c], take(target, c), take(weight, c), max_steps, tolerance) for c in parts]
        theta, values, done = (np.concatenate(part) for part in zip(*found, strict=True))
    if is_l1:
        values = value(problem, theta, target, weight)
    return theta, values, done


def chunks(replicates: int, points: int) -> list[slice]:
    """Divide replicates into parts that fit the cache."""
    rows = max(CHUNK // points, 1)
    return [slice(i, i + rows) for i in range(0, replicates, rows)]


def huber(problem: Problem, delta: float) -> Problem:
    """The same problem under Huber's norm with its corner at `delta`."""
    return replace(problem, how=replace(problem.how, norm="huber", delta=delta))


def _newton(problem: Problem, theta: Array, target: Array, weight: Array, max_steps: int, tolerance: float) -> Minima:
    """Newton's method with Levenberg damping of |Hessian|, row by row.

    A row leaves the iteration when the predicted decrease of an undamped step is negligible.
    """
    ends, values, done = theta.copy(), np.empty(len(theta)), np.zeros(len(theta), dtype=bool)
    free, live = problem.free, np.arange(len(theta))
    with np.errstate(all="ignore"):
        best, grad, hess = derivatives(problem, theta, target, weight)
        damping = np.full(len(theta), 1e-4)
        # Below this, rounding cannot tell the objective from 0.
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
        else:  # the remaining rows ran out of steps
            ends[live], values[live], done[live] = theta, best, promise <= GOOD_ENOUGH * best
    return ends, values, done & np.isfinite(values)


def _hold_floor(floor: int, theta: Array, grad: Array, hess: Array) -> None:
    """Hold E fixed in rows where E is 0 and would fall further; `grad` and `hess` are changed in place."""
    held = np.flatnonzero((theta[:, floor] <= 0.0) & (grad[:, floor] > 0.0))
    grad[held, floor] = 0.0
    hess[held, floor] = hess[held, :, floor] = 0.0
    hess[held, floor, floor] = 1.0


def _step(grad: Array, hess: Array, damping: Array, logs: Mask) -> tuple[Array, Array]:
    """The damped Newton step, (R, p), and the predicted decrease of an undamped step, (R,).

    Negative eigenvalues of the Hessian are replaced by their absolute values. `logs` marks the coordinates whose step
    is bounded by LONGEST: all except E, which has the unit of the loss.
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


def _eliminate(left: Array, right: Array) -> Minima:
    """Solve M y = v for symmetric M (p, p, R) and v (p, R); both arrays are overwritten.

    Gaussian elimination without pivoting, with every operation over all R systems at once.

    Returns:
        M^-1 v (p, R), v' M^-1 v (R,), and whether M is positive definite (R,).
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
    """The step (p, R) and its predicted decrease (R,) for Hessians that are not positive definite."""
    finite = np.clip(np.nan_to_num(scaled, nan=0.0), -STEEPEST, STEEPEST)
    values, vectors = np.linalg.eigh(finite.transpose(2, 0, 1))
    curved = np.maximum(np.abs(values), LEAST_PIVOT)
    along = np.einsum("rij,ir->rj", vectors, pull)
    step = np.einsum("rij,rj->ir", vectors, along / (curved + damping[:, None]))
    return step, 0.5 * np.einsum("rj,rj->r", along, along / curved)


def _norm(problem: Problem, residual: Array) -> tuple[Array, Array, Array]:
    """The norm of the residuals (R, n), with its first and second derivatives."""
    how = problem.how
    if how.norm == "mse":
        found = residual * residual, 2.0 * residual, np.full_like(residual, 2.0)
    elif how.norm == "l1":
        found = np.abs(residual), np.sign(residual), np.zeros_like(residual)
    else:
        inner = np.clip(residual, -how.delta, how.delta)
        found = inner * (residual - 0.5 * inner), inner, (inner == residual).astype(np.float64)
    if how.under_tuned == 1.0:
        return found
    share = np.where(residual < 0.0, how.under_tuned, 1.0)
    return found[0] * share, found[1] * share, found[2] * share


def _sum(values: Array) -> Array:
    return np.asarray(values.sum(axis=1), dtype=np.float64)
