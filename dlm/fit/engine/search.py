"""solve: points and a law -> its global minimum, and any rival that is nearly as low. Called by surface, gate.

Variable projection over a grid of exponents finds the basins (scan), the law says where to begin in each, Newton
finishes them (solver); the lowest is the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dlm.core.errors import UserError
from dlm.fit.engine import newton, scan
from dlm.fit.laws.chinchilla import Chinchilla
from dlm.fit.laws.law import Law
from dlm.fit.points import Array, Points

NEAR = 1.01  # times the lowest objective: a minimum below it is a rival


APART = 0.1  # rivals differ by this much, relatively, in an exponent, in k or in R


NO_BOUND = 1e3  # k or R beyond it are one: nothing changes any more


MOST_STARTS = 96


SAME = 1 + 1e-6  # times the lowest objective: the same minimum


HOPEFUL = 1.02  # times the lowest objective after some steps: it may still become the lowest


Minima = tuple[Array, Array, npt.NDArray[np.bool_]]  # theta, objective, converged


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How widely minima are looked for."""

    cells: int | None  # of the scan: those whose objective is computed, all if None
    best: int  # cells that become starts
    kept: int  # starts of each kind, per start that the law makes of a cell
    steps: int  # of Newton, before the hopeless are given up
    tolerance: float  # of the minima of smoother norms
    worth: float  # times the lowest after the first steps: still hopeful


LITTLE = Effort(cells=64, best=6, kept=2, steps=10, tolerance=1e-3, worth=1.2)


MUCH = Effort(cells=None, best=16, kept=MOST_STARTS, steps=40, tolerance=1e-9, worth=HOPEFUL)


@dataclass(frozen=True, kw_only=True)
class Norm:
    """How residuals count; `fit_surface` has checked it."""

    norm: str = "huber"
    delta: float = 1e-3  # Huber's corner, in units of the residual
    space: str = "log"
    under_tuned: float = 1.0  # multiplies the terms of points above the law


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """The lowest minimum, and the others within 1 % of it whose exponents differ by over 10 %."""

    problem: newton.Problem
    theta: Array  # (1, p)
    params: dict[str, float]
    objective: float
    converged: bool
    rivals: tuple[dict[str, float], ...]  # params and objective


def solve(
    points: Points, law: Law, how: Norm, fixed: dict[str, float] | None = None, *, begin: Array | None = None
) -> Solution:
    """The global minimum over the law's free parameters. Raises UserError where no surface exists.

    begin: rows of params (S, p) to start from instead of searching, for a law that has just been fitted.
    """
    fixed = fixed or {}
    free = len(law.params) - len(fixed)
    if len(points) <= free:
        more = "" if len(points) < 2 else f", or pin some (of {', '.join(law.pins)})"
        raise UserError(
            f"{len(points)} points cannot fit {free} parameters of {law.name}: give {free + 1} or more{more}"
        )
    problem = newton.problem_of(
        points, law, space=how.space, norm=how.norm, delta=how.delta, under_tuned=how.under_tuned, fixed=fixed
    )
    target, weight = newton.target_of(problem, points.loss)[None], points.weight[None]
    if begin is None:
        thetas, values, done = _search(problem, points, target, weight)
    else:
        starts = problem.pinned(law.theta(begin, problem.centre))
        thetas, values, done = _finish(problem, starts, target, weight, MUCH)
    best = int(values.argmin())
    rows = law.rows(thetas, problem.centre)
    rivals = _rivals(law, rows, values, done, best)
    return Solution(
        problem=problem,
        theta=thetas[[best]],
        params=_named(law, rows[best]),
        objective=float(values[best]),
        converged=bool(done[best]),
        rivals=tuple(_named(law, rows[k]) | {"objective": float(values[k])} for k in rivals),
    )


def chinchilla_problem(problem: newton.Problem) -> newton.Problem:
    """The same residuals under Chinchilla's law, nothing pinned: where every law's fit begins."""
    return replace(problem, law=Chinchilla(), x=problem.x[:2], centre=problem.centre[:2], fixed={}, under_tuned=1.0)


def _search(problem: newton.Problem, points: Points, target: Array, weight: Array) -> Minima:
    """Minima from a few starts where those all end in one, as they do on most points; from many where not."""
    few, one = _starts(problem, points, target, weight, LITTLE)
    found = thetas, values, done = _finish(problem, few, target, weight, LITTLE)
    if one and done.all() and values.max() <= SAME * values.min():
        return found
    many, _ = _starts(problem, points, target, weight, MUCH)
    return _finish(problem, np.concatenate([many, thetas]), target, weight, MUCH)


def _starts(
    problem: newton.Problem, points: Points, target: Array, weight: Array, effort: Effort
) -> tuple[Array, bool]:
    """Where to begin, and whether no smoother norm speaks for two minima."""
    law = problem.law
    if problem.has_its_surface:
        begin = np.array([[problem.fixed[k] for k in range(5)]])
    else:
        plain = chinchilla_problem(problem)
        begin = scan.many_starts(plain, points.loss, points.weight, target[0], cells=effort.cells, best=effort.best)
        if not len(begin):
            raise UserError("no surface fits: the loss does not fall with params and with tokens over these points")
    starts = problem.pinned(law.starts(begin))
    starts = starts[np.argsort(newton.value(problem, starts, target, weight))[:MOST_STARTS]]
    if problem.norm == "mse":
        return starts, True
    kept = effort.kept * (len(starts) // len(begin) + 1)  # a law that begins often from one surface has more minima
    squares, values = _eased(replace(problem, norm="mse"), starts, target, weight, effort)
    wide = replace(problem, norm="huber", delta=10.0 * problem.delta)
    wider, _ = _eased(wide, squares[:kept], target, weight, effort)
    one = not (values[1:] <= HOPEFUL * values[0]).any()
    return np.concatenate([starts[:kept], squares[:kept], wider[:kept]]), one


def _eased(smooth: newton.Problem, starts: Array, target: Array, weight: Array, effort: Effort) -> tuple[Array, Array]:
    """More starts for norms with corners: the minima of a smoother one, each once, the lowest first; its values."""
    thetas, values, _ = newton.minimise(
        smooth, starts, target, weight, max_steps=effort.steps, tolerance=effort.tolerance
    )
    order = np.argsort(values)
    values = values[order]
    other = np.diff(values, prepend=-np.inf) > effort.tolerance * values
    other[0] = True  # even where no value is finite
    return thetas[order[other]], values[other]


def _finish(problem: newton.Problem, starts: Array, target: Array, weight: Array, effort: Effort) -> Minima:
    """The minima that the starts lead to, of those that are low after the first steps."""
    rough, values, _ = newton.minimise(problem, starts, target, weight, max_steps=effort.steps)
    near = _distinct(rough[values <= effort.worth * values.min()])
    return newton.minimise(problem, near, target, weight, max_steps=500)


def _distinct(thetas: Array, digits: int = 6) -> Array:
    """Rows that differ in the first `digits` digits: many starts end in one minimum."""
    scale = np.maximum(np.abs(thetas).max(axis=0), 1e-12)
    _, first = np.unique(np.round(thetas / scale, digits), axis=0, return_index=True)
    return thetas[np.sort(first)]


def _rivals(law: Law, rows: Array, values: Array, done: npt.NDArray[np.bool_], best: int) -> list[int]:
    """Rows of other minima, each apart from the best and from each other, the lowest first."""
    telling = [k for k, name in enumerate(law.params) if name not in ("E", "A", "B", "R")]
    seen = np.minimum(rows[:, telling], NO_BOUND)
    kept = [best]
    for k in np.argsort(values).tolist():
        if not done[k] or values[k] > NEAR * values[best]:
            continue
        ratios = np.abs(seen[k] / seen[kept] - 1)
        if (ratios > APART).any(axis=1).all():
            kept.append(k)
    return kept[1:]


def _named(law: Law, row: Array) -> dict[str, float]:
    return dict(zip(law.params, row.tolist(), strict=True))
