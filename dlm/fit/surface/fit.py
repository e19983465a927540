"""Fit a loss surface L(N, D) to runs, at the global minimum of its objective.

The laws are in `dlm.fit.laws`. The default is Chinchilla's: Hoffmann et al., 2203.15556, approach 3, as corrected by
Besiroglu et al., 2404.10102.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np
import numpy.typing as npt

from dlm.core import text
from dlm.core.errors import UserError, unknown
from dlm.fit import optimum
from dlm.fit.curves import weighed
from dlm.fit.engine import newton
from dlm.fit.engine.newton import Norm
from dlm.fit.engine.search import Solution, solve
from dlm.fit.laws import LAWS
from dlm.fit.laws.chinchilla import Chinchilla
from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.laws.epochs import Epochs
from dlm.fit.laws.law import Law
from dlm.fit.points import Array, Points, SurfaceColumns, as_points, cost_of
from dlm.fit.result import FitResult
from dlm.fit.surface import diagnose, noise
from dlm.fit.surface.holdout import leave_future_out

ONE_BUDGET = 1.25  # runs whose C differ by a smaller factor show L(N, D) along one curve only
MOST_ROUNDS, SETTLED = 200, 1e-9  # maximum iterations and tolerance of the fixed point of the data-constrained law
DEPTH, LONGEST = 4, 2.0  # fits from which the next base is extrapolated, and the longest such step in the logs
NEAR = 1e-4  # a base this close to its fit in the logs is no longer extrapolated
ONE_EPOCH = 1.05  # ratio of tokens to unique tokens up to which no token counts as repeated


@np.errstate(all="ignore")  # numbers that overflow are found and named in the warnings
def fit_surface(
    params: npt.ArrayLike,
    tokens: npt.ArrayLike,
    loss: npt.ArrayLike,
    *,
    law: str = "chinchilla",
    norm: str = "huber",
    delta: float = 1e-3,
    space: str = "log",
    under_tuned: float = 1.0,
    fixed: Mapping[str, float] | None = None,
    at: Sequence[float] = (),
    label: str = "",
    holdout: bool = True,
    unique: float | None = None,
    **columns: Unpack[SurfaceColumns],
) -> FitResult:
    """Fit a loss surface L(N, D), and find the optimum at each C of `at`. Intervals come from `bootstrap`.

    Args:
        params: N of each run, (n,).
        tokens: D of each run, (n,).
        loss: L of each run, (n,), nats/token.
        law: Name of the surface, one of `dlm.fit.laws.LAWS`.
        norm: 'huber', 'mse' (sum of squares) or 'l1' (sum of absolute values) of the residuals.
        delta: The corner of Huber's norm, in the unit of the residual.
        space: Whether residuals are of log loss ('log') or of loss ('raw').
        under_tuned: Factor in (0, 1] on the term of a point above the law, for badly tuned runs, which can only lie
            above the law.
        fixed: Parameters that are held fixed, such as {'E': 1.7} for a known asymptote.
        at: The values of C at which to report the optimum, FLOPs.
        label: Name of the group of runs, shown in reports.
        holdout: Whether to refit without the top budgets, to check the extrapolation.
        unique: The unique tokens that predictions assume; by default the most of any run.
        **columns: Optional columns of the runs, by name:

            * flops: C, (n,), counted by the convention `convention`; 6 N D by default.
            * budget: the FLOPs that the run aimed at, (n,).
            * weights: factor on the term of the run, (n,), or 'compute' for C over the mean C.
            * cluster: labels, (n,); points with equal labels share noise.
            * unique_tokens: unique tokens, (n,), for the laws that need them (`laws.UNIQUE`).
            * loss_se: standard error of the loss, (n,), nats/token, where the loss is a Monte Carlo estimate on text
              and noise that all runs share.
            * loss_se_own: the part of `loss_se` that the runs do not share, (n,), nats/token.
            * cell: labels, (n,); points with equal labels, N, D and unique tokens differ in their seed alone.
            * convention: name of the convention by which `flops` are counted.

    Raises:
        UserError: For an argument that is not allowed, and for points that do not support the law.
    """
    if law not in LAWS:
        raise unknown("law", law, tuple(LAWS))
    how = checked_norm(norm=norm, delta=delta, space=space, under_tuned=under_tuned)
    points = with_two_budgets(as_points(params, tokens, loss, **columns))
    if issubclass(LAWS[law], Epochs) and points.unique is not None:
        points = weighed(points)
    pinned = dict(fixed or {})
    result = fit_points(points, law_of(law, points, how, pinned, unique=unique), how, pinned, holdout=holdout)
    return optimum.with_optima(replace(result, label=label), at)


def with_two_budgets(points: Points) -> Points:
    """Return the points, after a check that they have two budgets or more."""
    if points.top_flops < ONE_BUDGET * points.flops.min():
        raise UserError("all runs cost nearly the same C: a surface needs runs at two budgets or more")
    return points


def fit_points(
    points: Points, surface: Law, how: Norm, fixed: Mapping[str, float], *, holdout: bool = True
) -> FitResult:
    """Fit a surface to points that have been checked; the result has no optima."""
    found = solve(points, surface, how, fixed)
    if isinstance(surface, DataConstrained) and not set(Chinchilla.params) <= set(fixed):
        surface, found = _consistent(points, surface, found, how, fixed)
    seen, notes, outliers = diagnose.surface(points, found)
    scatter, cost = noise.parts(points, found.problem, found.theta), cost_of(points)
    warnings = (*seen, *scatter.warnings())
    return FitResult(
        law=surface.name,
        how=how,
        n=len(points),
        params=found.params,
        value=found.value,
        allocation=optimum.allocation(surface, found.params, points, cost),
        holdout=leave_future_out(points, surface, how, fixed) if holdout else {},
        status="warned" if warnings else "ok",
        warnings=warnings,
        notes=tuple(notes),
        points=points,
        cost=cost,
        surface=surface,
        fixed=fixed,
        at_bound=diagnose.at_bound(points, found),
        rivals=found.rivals,
        outliers=outliers,
        noise=scatter,
    )


def law_of(name: str, points: Points, how: Norm, fixed: Mapping[str, float], *, unique: float | None = None) -> Law:
    """Create the law called `name`, after a check of the values in `fixed`.

    A law of unique tokens predicts for `unique` of them, by default the most of any run.
    """
    law = LAWS[name]
    odd = [key for key in fixed if key not in law.pins]
    if odd:
        raise unknown(f"parameter to pin in {name}:", odd[0], sorted(law.pins))
    bad = [key for key, v in fixed.items() if not (np.isfinite(v) and (v > 0 or (key == "E" and v == 0)))]
    if bad:
        raise UserError(f"fixed {bad[0]} is {fixed[bad[0]]}: give a finite number above 0")
    lowest = points.loss.min()
    if fixed.get("E", 0.0) >= lowest:
        raise UserError(f"fixed E is {fixed['E']}: it must lie below every loss, and the lowest is {lowest:g}")
    if not issubclass(law, DataConstrained | Epochs):
        return law()
    if points.unique is None:
        raise UserError(f"{name} needs the unique tokens of every run: add a column unique_tokens")
    most = float(points.unique.max()) if unique is None else unique
    if issubclass(law, Epochs):
        check_repeats(points, fixed)
        return law(most)
    return DataConstrained(_base(points, points.unique, how, fixed), most)


def _check_repeated(points: Points, unique: npt.NDArray[np.float64], name: str) -> None:
    """Raise UserError if no run repeats its text; `name` is the parameter that only such runs determine."""
    most = float((points.tokens / unique).max())
    if most <= ONE_EPOCH:
        raise UserError(
            f"no run reads its unique tokens more than {most:.3g} times, so {name}, what repetition is worth, cannot "
            "be determined: fit chinchilla, or add runs that repeat their text"
        )


def check_repeats(points: Points, fixed: Mapping[str, float]) -> None:
    """Raise UserError for points that do not show what an epoch does, or what the size does."""
    assert points.unique is not None, "the callers check that they are given"
    if "kappa" not in fixed:
        _check_repeated(points, points.unique, "kappa")
    if np.ptp(points.params) == 0 and "alpha" not in fixed:
        raise UserError(
            f"all runs have one size, {text.count(float(points.params[0]))}, so nothing shows alpha: add runs of "
            "another size, or hold it fixed, as in --pin alpha=0.34"
        )


def _base(points: Points, unique: npt.NDArray[np.float64], how: Norm, fixed: Mapping[str, float]) -> dict[str, float]:
    """The parameters of the Chinchilla law that determines U_N, the best size for the unique tokens."""
    if "R_D" not in fixed:
        _check_repeated(points, unique, "R_D")
    if set(Chinchilla.params) <= set(fixed):
        return {name: fixed[name] for name in Chinchilla.params}
    once = points.take(points.tokens <= ONE_EPOCH * unique)
    try:
        return solve(once, Chinchilla(), how).params
    except UserError as error:
        raise UserError(
            f"data-constrained needs a law of runs that repeat nothing, and the {len(once)} such runs give none "
            f"({error}): add some, or pin E, A, B, alpha and beta"
        ) from error


def _consistent(
    points: Points, law: DataConstrained, found: Solution, how: Norm, fixed: Mapping[str, float]
) -> tuple[DataConstrained, Solution]:
    """Repeat the fit until U_N follows from the fitted A, B, alpha and beta (a fixed point).

    Each base is extrapolated from the last ones by Anderson's method (J. ACM 12, 547, 1965), which needs far fewer fits
    than to take each fit as the next base.
    """
    names = [name for name in Chinchilla.params if name != "E"]  # U_N does not depend on E
    tried: list[Array] = []
    gave: list[Array] = []
    for _ in range(MOST_ROUNDS):
        tried.append(np.log([law.base[name] for name in names]))
        gave.append(np.log([found.params[name] for name in names]))
        moved = float(np.abs(gave[-1] - tried[-1]).max())
        if moved < SETTLED:
            return law, found
        # The solver does not follow a change far below the errors of the parameters, so the last steps are plain.
        is_near = moved < NEAR
        base = np.exp(gave[-1] if is_near else _extrapolated(np.array(tried[-DEPTH:]), np.array(gave[-DEPTH:])))
        law = DataConstrained(dict(zip(names, base.tolist(), strict=True)), law.unique)
        rows = np.array([list(found.params.values()), *([r[k] for k in found.params] for r in found.rivals)])
        found = solve(points, law, how, fixed, begin=rows)
    return law, replace(found, converged=False)


def _extrapolated(tried: Array, gave: Array) -> Array:
    """The mean of the last results, with the weights for which the mean of their residuals is smallest."""
    residuals = gave - tried
    if len(residuals) < 2:
        return np.asarray(gave[-1])
    share = np.linalg.lstsq(np.diff(residuals, axis=0).T, residuals[-1], rcond=1e-8)[0]
    found = gave[-1] - share @ np.diff(gave, axis=0)
    return np.asarray(found if np.abs(found - gave[-1]).max() < LONGEST else gave[-1])


def checked_norm(*, norm: str, delta: float, space: str, under_tuned: float) -> Norm:
    """How residuals count, after a check of each value."""
    for what, value, choices in (("loss norm", norm, newton.NORMS), ("space", space, newton.SPACES)):
        if value not in choices:
            raise unknown(what, value, choices)
    if not (np.isfinite(delta) and delta > 0):
        raise UserError(f"delta is {delta}: Huber's corner must be a finite number above 0 (1e-3 is usual)")
    if not 0 < under_tuned <= 1:
        raise UserError(f"under_tuned is {under_tuned}: give a factor in (0, 1] for points above the law")
    return Norm(norm=norm, delta=delta, space=space, under_tuned=under_tuned)
