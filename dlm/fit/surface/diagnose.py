"""Check a fitted surface for problems that make its numbers unreliable."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dlm.core import text
from dlm.fit.curves import curves
from dlm.fit.engine.search import Solution
from dlm.fit.laws.epochs import Epochs
from dlm.fit.points import Array, Points
from dlm.fit.surface import noise
from dlm.fit.turn import Repeated, overlooked, turns_within

EXPONENT_RANGE = (0.02, 3.0)  # an exponent outside this range shows that the points do not determine its term
UNSEEN = "is not believable: these points do not determine it"
NO_REPETITION = "is at its bound: these runs do not show what repetition costs"
RANGES = {  # the plausible range of each parameter, and the meaning of a value outside it
    "alpha": (EXPONENT_RANGE, UNSEEN),
    "beta": (EXPONENT_RANGE, UNSEEN),
    "k": ((0.05, 20.0), "is at its bound: these points do not determine how the two terms mix"),
    "R_D": ((0.01, 1e3), NO_REPETITION),
    "R_N": ((0.01, 1e3), NO_REPETITION),
    "e0": ((1e-3, 1e3), "is at its bound: these runs do not show from which epoch on the loss falls as a power"),
}
ZERO = 1e-3  # E below this share of the lowest loss counts as zero
COLLINEAR = 0.97  # correlation of log N and log D above which the effects of N and D cannot be separated
LOOSE = 0.5  # ratio of standard error to exponent above which the points do not determine the exponent
FAR = 4.5  # robust standard deviations from the law beyond which a point is an outlier
FEW_OUTLIERS = 0.05  # share of the points up to which outliers hardly move a law under the Huber norm
SHOWN = 3  # how many outliers or rivals a warning describes
FEW = 3  # with fewer budgets, the form of the law is not checked


def surface(points: Points, found: Solution) -> tuple[list[str], list[str], tuple[int, ...]]:
    """Find all problems that show without refitting: warnings, notes, and the indices of outliers among the points.

    A few outliers are a note under the Huber norm, because each of them pulls at the law no more than a near point.
    """
    residual = noise.relative_residual(points, found.problem, found.theta)
    outliers = _outliers(residual, points)
    told = _told(outliers, residual, points)
    is_robust = found.problem.how.norm == "huber" and len(outliers) <= FEW_OUTLIERS * len(points)
    warnings = [
        *_fit(points, found),
        *_design(points),
        *_one_unique(points, found),
        *_determined(points, found, residual),
        *([] if is_robust else told),
        *_quantised(points.loss, residual, found.problem.how.space),
        *_correlated(points),
    ]
    return warnings, told if is_robust else [], tuple(outliers.tolist())


def _fit(points: Points, found: Solution) -> list[str]:
    warned = [] if found.converged else ["the fit did not converge: take its numbers as rough"]
    warned += _values(points, found)
    if found.rivals:
        telling = [n for n in found.params if n not in ("A", "B", "R", *found.pinned)]
        others = "; ".join(", ".join(f"{n} {text.number(r[n])}" for n in telling) for r in found.rivals[:SHOWN])
        count = len(found.rivals)
        warned.append(
            f"{count} other {'minimum lies' if count == 1 else 'minima lie'} within 1 % of the best, with other "
            f"exponents ({others}): they are not well determined"
        )
    free = len(found.problem.free)
    if len(points) < 2 * free:
        warned.append(f"{len(points)} points for {free} parameters: expect wide or missing intervals")
    if points.budget is not None and len(points.budgets()) < FEW:
        warned.append(f"{len(points.budgets())} budgets: three or more are needed to check the law's form")
    return warned


def _values(points: Points, found: Solution) -> list[str]:
    """Warnings for parameters with implausible values."""
    params, warned = found.params, []
    if "E" not in found.pinned and params["E"] < ZERO * points.loss.min():
        warned.append(
            "E, the loss that no run gets below, came out at zero: the runs do not reach far enough to see it"
        )
    for name, ((low, high), why) in RANGES.items():
        if name in params and name not in found.pinned and not low < params[name] < high:
            warned.append(f"{name} = {params[name]:.3g} {why}")
    law = found.problem.law
    if isinstance(law, Epochs) and law.turn and not _turns(points, found):
        said = text.listed(law.turn)
        warned.append(
            f"no loss of these runs rises with the epochs: they do not show where it turns, and {said} of {law.name}, "
            "with all their intervals, say nothing about overfitting"
        )
    if isinstance(law, Repeated) and points.unique is not None:
        warned += overlooked(law, law.rows(found.theta, found.problem.centre), points)
    for name in ("A", "B"):
        if name in params and not 0 < params[name] < np.inf:
            warned.append(f"{name} came out as {params[name]:g}: the law has no optimum, and none is given")
    return warned


def at_bound(points: Points, found: Solution) -> tuple[str, ...]:
    """The parameters that the points push to a bound, where a resampled interval means nothing."""
    params, law = found.params, found.problem.law
    names = ["E"] if params["E"] < ZERO * points.loss.min() else []
    names += [
        n for n, (range_, why) in RANGES.items() if why is not UNSEEN and n in params and not _within(params[n], range_)
    ]
    names += law.turn if isinstance(law, Epochs) and not _turns(points, found) else ()
    return tuple(name for name in names if name not in found.pinned)


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] < value < bounds[1]


def _turns(points: Points, found: Solution) -> bool:
    """Whether the law turns upward within the epochs of a curve of the runs that does.

    A turn beyond all runs is extrapolated, and one that no curve shows is made of noise.
    """
    law = found.problem.law
    assert isinstance(law, Epochs)
    row = law.rows(found.theta, found.problem.centre)
    return any(curve.turns and turns_within(law, row, curve) for curve in curves(points))


def _one_unique(points: Points, found: Solution) -> list[str]:
    if not isinstance(found.problem.law, Epochs) or points.unique is None or np.ptp(points.unique) > 0:
        return []
    own = text.count(float(points.unique[0]))
    return [f"all runs have {own} unique tokens: the law holds for this number, and nothing shows what another does"]


def _design(points: Points) -> list[str]:
    log_n, log_d = np.log(points.params), np.log(points.tokens)
    if min(np.ptp(log_n), np.ptp(log_d)) < 1e-9:
        return ["all runs have one size or one number of tokens: the law has nothing to tell them apart by"]
    if np.corrcoef(log_n, log_d)[0, 1] > COLLINEAR:
        return ["all runs have nearly one ratio of tokens to parameters: N and D cannot be told apart"]
    return []


def _determined(points: Points, found: Solution, residual: Array) -> list[str]:
    """Warnings for exponents with a standard error over half their value, and for an undetermined R_D or R_N."""
    errors, law, loose = standard_errors(points, found, residual), found.problem.law, []
    free = {name: column for name, column in law.pins.items() if name not in found.pinned}
    for name in [name for name in law.exponents if name in free]:
        share = errors[free[name]] / abs(found.theta[0, free[name]])
        if not share < LOOSE:
            by = "without bound" if not np.isfinite(share) or share > 10 else f"{share:.0%} of it"
            loose.append(f"{name} is not identified: its standard error is {by}")
    for name in ("R_D", "R_N"):
        if name in free and not errors[free[name]] < 1.0:
            loose.append(f"{name} is not identified: these runs do not show what repetition costs")
    return loose


def standard_errors(points: Points, found: Solution, residual: Array) -> Array:
    """Standard errors of theta, (p,), by linear propagation of the variance of the residuals.

    They are 0 for pinned coordinates, and infinite for coordinates that the points do not determine.
    """
    problem, free = found.problem, found.problem.free
    loss, slopes = problem.law.jet(found.theta, problem.x)
    j = (slopes[0] / loss[0])[free] * np.sqrt(points.weight)
    dof = max(len(points) - len(free), 1)
    variance = float((points.weight * residual**2).sum()) / dof
    errors = np.zeros(len(problem.law.params))
    values, vectors = np.linalg.eigh(np.nan_to_num(j @ j.T))
    seen = values > 1e-13 * max(float(values.max()), 1e-300)
    spread = (vectors[:, seen] ** 2 / values[seen]).sum(axis=1)
    blind = (vectors[:, ~seen] ** 2).sum(axis=1) > 1e-6
    errors[free] = np.where(blind, np.inf, np.sqrt(variance * spread))
    return errors


def _outliers(residual: Array, points: Points) -> npt.NDArray[np.int64]:
    scale = 1.4826 * float(np.median(np.abs(residual - np.median(residual))))
    far = np.abs(residual) > FAR * max(scale, 1e-9)
    return np.flatnonzero(far & (points.weight > 0)) if scale > 1e-9 else np.zeros(0, dtype=np.int64)


def _told(outliers: npt.NDArray[np.int64], residual: Array, points: Points) -> list[str]:
    if not len(outliers):
        return []
    order = outliers[np.argsort(-np.abs(residual[outliers]))].tolist()
    shown = [
        f"N {text.count(points.params[k])}, D {text.count(points.tokens[k])}: loss {points.loss[k]:.4g}, "
        f"{abs(residual[k]):.1%} {'above' if residual[k] > 0 else 'below'} the law"
        for k in order[:SHOWN]
    ]
    more = f"; and {len(order) - SHOWN} more" if len(order) > SHOWN else ""
    runs = "1 run lies far from the law, and still counts"
    if len(order) > 1:
        runs = f"{len(order)} runs lie far from the law, and still count"
    return [f"{runs} ({'; '.join(shown)}{more})"]


def _quantised(loss: Array, residual: Array, space: str) -> list[str]:
    """A warning if the losses are rounded more coarsely than a third of their noise."""
    for digits in range(7):
        if np.allclose(np.round(loss, digits), loss, rtol=0, atol=1e-12):
            step = 10.0**-digits
            noise = float(np.std(residual)) * float(np.median(loss))
            if len(loss) > 5 and step / np.sqrt(12.0) > noise / 3.0:
                return [f"the losses are rounded to {step:g}, which is not small beside their noise ({noise:.2g})"]
            return []
    return []


def _correlated(points: Points) -> list[str]:
    runs = points.num_clusters
    if runs == len(points):
        return []
    return [f"{len(points)} points of {runs} runs: points of one run share its noise, and the intervals allow for it"]
