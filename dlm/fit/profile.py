"""profile: how much worse a fit gets as one of its parameters is moved away and all others follow. For notebooks.

A flat profile is a parameter that the points do not determine, whatever its interval says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dlm.core.errors import UserError, unknown
from dlm.fit.engine import newton
from dlm.fit.points import Array
from dlm.fit.result import FitResult

STIFF = 1e4  # of the pull towards a value, in units of the objective's own curvature there


STEP = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """The lowest objective at each value of one parameter."""

    name: str
    values: Array  # (m,), rising
    objective: Array  # (m,)
    lowest: float  # of the fit itself

    @property
    def rise(self) -> Array:
        """The objective over the lowest, less one, (m,)."""
        return self.objective / self.lowest - 1.0


def profile(result: FitResult, name: str, *, low: float, high: float, places: int = 41) -> Profile:
    """The profile of parameter `name` from `low` to `high`, near `places` values.

    Each fit is pulled towards its value by a stiff spring; where it comes to rest, everything else is at its minimum
    given that value, so (value, objective) there is exactly on the profile. Raises UserError for a result that is no
    surface, an unknown or pinned name, or a range that is not rising.
    """
    law, points, how = result.surface, result.points, result.how
    if law is None or points is None or how is None:
        raise UserError(f"{result.law} has no profile: only surfaces do")
    free = [p for p in law.params if p not in result.fixed]
    if name not in free:
        raise unknown("parameter", name, free)
    if places < 2:
        raise UserError(f"places is {places}: a profile needs 2 or more")
    if (name in law.scales or name == "E") and not low > 0:
        raise UserError(f"low is {low:g}: {name} is above 0")
    if not low < high:
        raise UserError(f"low is {low:g} and high {high:g}: low must be below high")
    column = law.params.index(name)
    problem = newton.problem_of(
        points, law, space=how.space, norm=how.norm, delta=how.delta, under_tuned=how.under_tuned,
        fixed=dict(result.fixed),
    )  # fmt: skip
    scaled = name in law.scales
    wanted = np.geomspace(low, high, places) if scaled else np.linspace(low, high, places)
    begin = law.theta(np.array([[result.params[p] for p in law.params]]), problem.centre)
    target, weight = newton.target_of(problem, points.loss)[None], points.weight[None]

    def coordinate(theta: Array) -> Array:
        value = law.rows(theta, problem.centre)[:, column]
        return np.log(value) if scaled else value

    stiff = STIFF * _curvature(problem, begin, target, weight, coordinate(begin)[0])
    aims = np.log(wanted) if scaled else wanted
    found, order = [], np.argsort(np.abs(aims - coordinate(begin)[0]))
    starts: dict[int, Array] = {}
    for k in order.tolist():  # outwards from the fit, each from its neighbour
        near = min(starts, key=lambda j: abs(j - k), default=None)
        theta = begin if near is None else starts[near]
        spring = replace(problem, extra=_spring(coordinate, float(aims[k]), stiff))
        theta, _, _ = newton.minimise(spring, theta, target, weight, max_steps=200)
        starts[k] = theta
        found.append(
            (float(law.rows(theta, problem.centre)[0, column]), float(newton.value(problem, theta, target, weight)[0]))
        )
    values, objective = np.array(sorted(found)).T
    return Profile(name=name, values=values, objective=objective, lowest=result.objective)


def _spring(coordinate: Callable[[Array], Array], aim: float, stiff: float) -> newton.Extra:
    """stiff/2 (c(theta) - aim)^2 with its gradient and the leading part of its Hessian."""

    def extra(theta: Array) -> tuple[Array, Array, Array]:
        off = coordinate(theta) - aim
        bumps = STEP * np.eye(theta.shape[1])
        slope = np.stack([(coordinate(theta + b) - coordinate(theta - b)) / (2 * STEP) for b in bumps], axis=1)
        return 0.5 * stiff * off**2, stiff * off[:, None] * slope, stiff * slope[:, :, None] * slope[:, None, :]

    return extra


def _curvature(problem: newton.Problem, theta: Array, target: Array, weight: Array, value: float) -> float:
    """The objective over the square of the value: the scale of a spring that is stiff for these points."""
    return float(newton.value(problem, theta, target, weight)[0] / max(value**2, 1e-12))
