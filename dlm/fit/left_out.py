"""Leave unique-token budgets and sizes out of the fit of a law of repeated data, and find its errors there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlm.fit.choice import Score
from dlm.fit.curves import Curve, bands, curves, labels
from dlm.fit.engine import newton
from dlm.fit.fitted import Fitted
from dlm.fit.laws.epochs import Epochs
from dlm.fit.points import NAN, Array, Mask, Points
from dlm.fit.turn import Repeated, corrected, log_best, of_unique

LEAST_BANDS = 3  # with fewer budgets or sizes, holding one out leaves a line through one or two
LEAST_STEPS = 3  # a curve with fewer numbers of epochs shows no best one


def groups(points: Points, *, by: Sequence[str] = ("unique", "params")) -> list[Mask]:
    """The points to hold out together: those of one number of unique tokens, and those of one size.

    If there are many budgets or sizes, neighbours share a group. There are none with fewer than three.
    """
    assert points.unique is not None, "fit_surface checks that they are given"
    values, curve_of = {"unique": points.unique, "params": points.params}, labels(points)
    found = [bands(values[name], curve_of) for name in by]
    return [mask for each in found if len(each) >= LEAST_BANDS for mask in each]


def score(result: Fitted, held: Sequence[Mask], *, correct: bool = False) -> Score:
    """Refit a law without each group of points, and compare it with the curves of that group.

    With `correct`, the refitted law is corrected by its residuals on the points that it was fitted to.
    """
    points, law = result.points, result.fitted_law
    assert points is not None
    problem = newton.problem_of(points, law, result.how, result.fixed)
    known = np.array([[row[name] for name in law.params] for row in (result.params, *result.rivals)])
    weight = np.array([points.weight * ~mask for mask in held])
    target = newton.target_of(problem, points.loss)[None]
    theta, lowest = (
        np.repeat(problem.law.theta(known[:1], problem.centre), len(held), axis=0),
        np.full(len(held), np.inf),
    )
    for start in problem.law.theta(known, problem.centre):
        found, values, _ = newton.minimise(problem, np.tile(start, (len(held), 1)), target, weight)
        better = values < lowest
        theta[better], lowest[better] = found[better], values[better]
    rows = law.rows(theta, problem.centre)
    errors = []
    for k, mask in enumerate(held):
        own = result.surface
        assert isinstance(own, Repeated)
        if correct and isinstance(own, Epochs) and np.isfinite(rows[k]).all():
            own = corrected(own, rows[[k]], points.take(~mask))
        errors += [_errors(own, curve, rows[[k]]) for curve in curves(points.take(mask))]
    return Score(**{name: np.array([e[j] for e in errors]) for j, name in enumerate(Score.__dataclass_fields__)})


def _errors(law: Repeated, curve: Curve, row: Array) -> tuple[float, float, float, float]:
    """The fields of `Score` for one curve."""
    log_n = np.full((1, len(curve.log_epochs)), np.log(curve.params))
    log_d = curve.log_epochs[None] + np.log(curve.unique)
    off = (np.log(of_unique(law, curve.unique).predict(row, log_n, log_d))[0] - curve.log_loss)[curve.below]
    excess, error = 0.0, NAN
    if len(curve.log_epochs) >= LEAST_STEPS:
        predicted = float(log_best(law, row, np.log(curve.params), np.log(curve.unique))[0])
        excess = curve.excess(predicted)
        if curve.turns:
            error = min(predicted, float(curve.log_epochs[-1])) - curve.best
    share = curve.shares[curve.below]
    absolute, square = (float(np.average(size, weights=share)) for size in (np.abs(off), off**2))
    return excess, error, absolute, float(np.sqrt(square))
