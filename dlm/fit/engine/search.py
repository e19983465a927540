"""Find the global minimum of a law on some points, and any rival minimum that is nearly as low.

The scan over exponents finds the basins, the law gives the starts in each basin, and Newton's method finds the minima
from these starts; the lowest minimum is returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from dlm.core.errors import UserError
from dlm.fit.engine import newton, scan
from dlm.fit.engine.newton import Minima, Norm
from dlm.fit.laws.chinchilla import Chinchilla
from dlm.fit.laws.law import Law
from dlm.fit.points import Array, Points

NEAR = 1.01  # a minimum below this multiple of the lowest objective is a rival
APART = 0.1  # least relative difference between rivals in an exponent, in k, in R_D or in R_N
NO_BOUND = 1e3  # values of k, R_D or R_N beyond this count as equal, because the law no longer changes
MOST_STARTS = 96
MOST_SEARCHED = 1000  # of twice as many points and more, only a part is searched for starts
SAME = 1 + 1e-6  # minima within this multiple of the lowest objective count as the same minimum
HOPEFUL = 1.02  # a start below this multiple of the lowest objective after some steps may still become the lowest


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How thoroughly minima are searched for."""

    cells: int | None  # cells of the scan whose true objective is computed; all if None
    best: int  # number of best cells that become starts
    kept: int  # number of starts of each kind that are kept, per start that the law makes from one cell
    steps: int  # Newton steps after which hopeless starts are dropped
    tolerance: float  # tolerance for the minima of smoother norms
    worth: float  # multiple of the lowest objective, after `steps`, above which a start is dropped


LITTLE = Effort(cells=64, best=6, kept=2, steps=10, tolerance=1e-3, worth=1.2)
MUCH = Effort(cells=None, best=16, kept=MOST_STARTS, steps=40, tolerance=1e-9, worth=HOPEFUL)


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """The lowest minimum, and the rivals within 1 % of it whose exponents differ by more than 10 %."""

    problem: newton.Problem
    theta: Array  # (1, p)
    params: dict[str, float]
    value: float  # the objective: the sum over the points
    converged: bool
    rivals: tuple[dict[str, float], ...]  # the params of each, and its 'objective'

    @property
    def pinned(self) -> set[str]:
        """The names of the parameters that were held fixed."""
        return {name for name, column in self.problem.law.pins.items() if column in self.problem.fixed}


def solve(
    points: Points, law: Law, how: Norm, fixed: Mapping[str, float] | None = None, *, begin: Array | None = None
) -> Solution:
    """Find the global minimum over the free parameters of a law.

    Args:
        points: The runs.
        law: The loss surface.
        how: The norm and the space of the residuals.
        fixed: Parameters that are held fixed, by name.
        begin: Rows of params (S, p) to start from instead of a search, for a law that has been fitted before.

    Raises:
        UserError: If there are too few points, or if no surface describes them.
    """
    fixed = fixed or {}
    free = len(law.params) - len(fixed)
    if len(points) <= free:
        more = "" if len(points) < 2 else f", or pin some (of {', '.join(law.pins)})"
        raise UserError(
            f"{len(points)} points cannot fit {free} parameters of {law.name}: give {free + 1} or more{more}"
        )
    problem = newton.problem_of(points, law, how, fixed)
    target, weight = newton.target_of(problem, points.loss)[None], points.weight[None]
    if begin is None and len(points) >= 2 * MOST_SEARCHED:
        # The minima of a part of the points lie in the basins of those of all points.
        part = np.zeros(len(points), dtype=bool)
        part[np.random.default_rng(0).permutation(len(points))[:MOST_SEARCHED]] = True
        found = solve(points.take(part), law, how, fixed)
        begin = np.array([[row[name] for name in law.params] for row in (found.params, *found.rivals)])
    if begin is None:
        thetas, values, done = _search(problem, points, target, weight)
    else:
        starts = problem.pinned(law.theta(begin, problem.centre))
        thetas, values, done = _finish(problem, starts, target, weight, MUCH)
    lowest = int(values.argmin())
    named = [dict(zip(law.params, row, strict=True)) for row in law.rows(thetas, problem.centre).tolist()]
    return Solution(
        problem=problem,
        theta=thetas[[lowest]],
        params=named[lowest],
        value=float(values[lowest]),
        converged=bool(done[lowest]),
        rivals=tuple(named[k] | {"objective": float(values[k])} for k in _rivals(problem, (thetas, values, done))),
    )


def chinchilla_problem(problem: newton.Problem) -> newton.Problem:
    """The same problem under Chinchilla's law with nothing pinned and `under_tuned` 1, where every law's fit starts."""
    even = replace(problem.how, under_tuned=1.0)
    return replace(problem, law=Chinchilla(), x=problem.x[:2], centre=problem.centre[:2], fixed={}, how=even)


def _search(problem: newton.Problem, points: Points, target: Array, weight: Array) -> Minima:
    """Search from a few starts. Usually all of them end in one minimum; if not, search from many starts."""
    few, one = _starts(problem, points, target, weight, LITTLE)
    found = thetas, values, done = _finish(problem, few, target, weight, LITTLE)
    if one and done.all() and values.max() <= SAME * values.min():
        return found
    many, _ = _starts(problem, points, target, weight, MUCH)
    return _finish(problem, np.concatenate([many, thetas]), target, weight, MUCH)


def _starts(
    problem: newton.Problem, points: Points, target: Array, weight: Array, effort: Effort
) -> tuple[Array, bool]:
    """The starts, (S, p), and whether the sum of squared residuals has a single minimum."""
    law = problem.law
    if problem.has_its_surface:
        begin = np.array([[problem.fixed[k] for k in range(5)]])
    else:
        plain = chinchilla_problem(problem)
        begin = scan.many_starts(plain, points.loss, points.weight, cells=effort.cells, best=effort.best)
        if not len(begin):
            raise UserError("no surface fits: the loss does not fall with params and with tokens over these points")
    starts = problem.pinned(law.starts(begin))
    starts = starts[np.argsort(newton.value(problem, starts, target, weight))[:MOST_STARTS]]
    if problem.how.norm == "mse":
        return starts, True
    # A law that makes many starts from one cell has more minima, so more starts are kept.
    kept = effort.kept * (len(starts) // len(begin) + 1)
    smooth = replace(problem, how=replace(problem.how, norm="mse"))
    squares, values = _eased(smooth, starts, target, weight, effort)
    wide = newton.huber(problem, 10.0 * problem.how.delta)
    wider, _ = _eased(wide, squares[:kept], target, weight, effort)
    one = not (values[1:] <= HOPEFUL * values[0]).any()
    return np.concatenate([starts[:kept], squares[:kept], wider[:kept]]), one


def _eased(smooth: newton.Problem, starts: Array, target: Array, weight: Array, effort: Effort) -> tuple[Array, Array]:
    """The distinct minima of a smoother norm and their objectives, the lowest first: starts for norms with corners."""
    thetas, values, _ = newton.minimise(
        smooth, starts, target, weight, max_steps=effort.steps, tolerance=effort.tolerance
    )
    order = np.argsort(values)
    values = values[order]
    other = np.diff(values, prepend=-np.inf) > effort.tolerance * values
    other[0] = True  # keep one even if no value is finite
    return thetas[order[other]], values[other]


def _finish(problem: newton.Problem, starts: Array, target: Array, weight: Array, effort: Effort) -> Minima:
    """The minima that the starts lead to; starts that are still high after the first steps are dropped."""
    rough, values, _ = newton.minimise(problem, starts, target, weight, max_steps=effort.steps)
    near = _distinct(rough[values <= effort.worth * values.min()])
    return newton.minimise(problem, near, target, weight, max_steps=500)


def _distinct(thetas: Array, digits: int = 6) -> Array:
    """The rows that differ in their first `digits` digits, because many starts end in one minimum."""
    scale = np.maximum(np.abs(thetas).max(axis=0), 1e-12)
    _, first = np.unique(np.round(thetas / scale, digits), axis=0, return_index=True)
    return thetas[np.sort(first)]


def _rivals(problem: newton.Problem, minima: Minima) -> list[int]:
    """The row numbers of rival minima, the lowest first; they differ from the best and from one another."""
    thetas, values, done = minima
    telling = [k for k, name in enumerate(problem.law.params) if name not in ("E", "A", "B", "R")]
    seen = np.minimum(problem.law.rows(thetas, problem.centre)[:, telling], NO_BOUND)
    kept = [int(values.argmin())]
    for k in np.argsort(values).tolist():
        near = done[k] and values[k] <= NEAR * values.min()
        if near and (np.abs(seen[k] / seen[kept] - 1) > APART).any(axis=1).all():
            kept.append(k)
    return kept[1:]
