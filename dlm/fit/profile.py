"""Profile a parameter: how much the objective rises as the parameter is changed and all others are re-optimised.

A flat profile shows that the points do not determine the parameter, however narrow its interval is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dlm.core.errors import UserError, unknown
from dlm.fit.engine import newton
from dlm.fit.fitted import Fitted
from dlm.fit.laws.law import Law
from dlm.fit.optimum import as_rows
from dlm.fit.points import Array

__all__ = ["Profile", "profile"]

STIFF = 1e4  # stiffness of the spring, as a multiple of the objective over the squared coordinate at the fit
STEP = 1e-6  # step of the central differences


@dataclass(frozen=True, kw_only=True, eq=False)
class Profile:
    """The objective at each value of one parameter, minimised over the other parameters."""

    name: str
    values: Array  # values of the parameter, rising, (m,)
    objective: Array  # lowest objective at each value, (m,)
    lowest: float  # the objective of the fit itself

    @property
    def rise(self) -> Array:
        """The relative increase of the objective over that of the fit, (m,)."""
        return self.objective / self.lowest - 1.0


def profile(result: Fitted, name: str, *, low: float, high: float, places: int = 41) -> Profile:
    """Profile one parameter of a surface.

    A stiff spring (a quadratic penalty) pulls each fit towards a target value of the parameter. At the minimum, all
    other parameters minimise the objective given the value reached. So the pair of value and objective lies exactly on
    the profile, although the value differs a little from the target.

    Args:
        result: A fitted surface.
        name: The parameter; it must not be pinned.
        low: The lowest target value.
        high: The highest target value.
        places: The number of target values, evenly spaced (in logs for a multiplicative parameter).

    Raises:
        UserError: For a result that is not a surface, an unknown or pinned parameter, or a range that is not allowed.
    """
    points, how = result.points, result.how
    if not isinstance(result.surface, Law) or points is None:
        raise UserError(f"{result.law} has no profile: only a surface that is fitted directly has one")
    law = result.surface
    scaled = name in law.scales
    _check(name, [p for p in law.params if p not in result.fixed], scaled or name == "E", low, high, places)
    column = law.params.index(name)
    problem = newton.problem_of(points, law, how, result.fixed)
    theta = law.theta(as_rows(law, result.params), problem.centre)
    target, weight = newton.target_of(problem, points.loss)[None], points.weight[None]

    def coordinate(theta: Array) -> Array:
        value = law.rows(theta, problem.centre)[:, column]
        return np.log(value) if scaled else value

    middle = coordinate(theta)[0]
    stiff = STIFF * float(newton.value(problem, theta, target, weight)[0] / max(middle**2, 1e-12))
    aims = np.log(np.geomspace(low, high, places)) if scaled else np.linspace(low, high, places)
    found: dict[int, Array] = {}
    for k in np.argsort(np.abs(aims - middle)).tolist():  # from the fit outwards, each from its neighbour's solution
        near = min(found, key=lambda j: abs(j - k), default=None)
        begin = theta if near is None else found[near]
        pulled = replace(problem, extra=_spring(coordinate, float(aims[k]), stiff))
        found[k] = newton.minimise(pulled, begin, target, weight)[0]
    rows = np.concatenate(list(found.values()))
    values, objective = law.rows(rows, problem.centre)[:, column], newton.value(problem, rows, target, weight)
    order = np.argsort(values)
    return Profile(name=name, values=values[order], objective=objective[order], lowest=result.value)


def _check(name: str, free: list[str], positive: bool, low: float, high: float, places: int) -> None:
    if name not in free:
        raise unknown("parameter", name, free)
    if places < 2:
        raise UserError(f"places is {places}: a profile needs 2 or more")
    if positive and not low > 0:
        raise UserError(f"low is {low:g}: {name} is above 0")
    if not low < high:
        raise UserError(f"low is {low:g} and high {high:g}: low must be below high")


def _spring(coordinate: Callable[[Array], Array], aim: float, stiff: float) -> newton.Extra:
    """stiff/2 (c(theta) - aim)^2 with its gradient and the leading part of its Hessian."""

    def extra(theta: Array) -> tuple[Array, Array, Array]:
        off = coordinate(theta) - aim
        bumps = STEP * np.eye(theta.shape[1])
        slope = np.stack([(coordinate(theta + b) - coordinate(theta - b)) / (2 * STEP) for b in bumps], axis=1)
        return 0.5 * stiff * off**2, stiff * off[:, None] * slope, stiff * slope[:, :, None] * slope[:, None, :]

    return extra
