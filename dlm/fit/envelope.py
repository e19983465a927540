"""envelope: runs of many costs -> the line through those that no cheaper run beats.
Called by table, cli and notebooks.

Approach 1 of Hoffmann et al. (2203.15556), on finished runs: the frontier of loss against FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dlm.core.errors import UserError
from dlm.fit import optimum
from dlm.fit.fitted import Allocation, Minimum
from dlm.fit.isoflop.fit import lines
from dlm.fit.optimum import best_at, reach_warnings
from dlm.fit.points import NAN, Points, as_points, cost_of
from dlm.fit.result import FitResult

HOW = "slopes of the log-log lines through the envelope's points"


LEAST_POINTS, LEAST_SIZES, LEAST_DECADES = 4, 3, 1.0


def fit_envelope(
    params: npt.ArrayLike,
    tokens: npt.ArrayLike,
    loss: npt.ArrayLike,
    *,
    flops: npt.ArrayLike | None = None,
    run_id: npt.ArrayLike | None = None,
    schedule: Sequence[str] | None = None,
    convention: str | None = None,
    at: Sequence[float] = (),
    label: str = "",
) -> FitResult:
    """Log-log lines through the frontier; refused where it has fewer than 4 points, 3 sizes or one decade of
    FLOPs.

    Points of one `run_id` from the middle of a decaying `schedule` are not losses of finished runs: UserError.
    """
    points = as_points(params, tokens, loss, flops=flops, cluster=run_id, convention=convention)
    if schedule is not None:
        _check_finished(points, schedule)
    chosen, cost = frontier(points), cost_of(points)
    top = float(points.flops.max())
    reason = _refusal(chosen)
    warnings = [reason] if reason else reach_warnings("envelope", at, top)
    if schedule is None and len(np.unique(points.cluster)) < len(points):
        warnings.append("several points of one run, and no column schedule says that they are not from its middle")
    fitted = {} if reason else _line(chosen)
    refused = Allocation(how="refused: no line")
    return FitResult(
        law="envelope",
        loss="mse",
        space="log",
        delta=NAN,
        n=len(points),
        params=fitted,
        allocation=refused if reason else Allocation(a=fitted["a"], b=fitted["b"], how=HOW),
        at={} if reason else best_at(None, fitted, cost, at, top),
        status="refused" if reason else "warned" if warnings else "ok",
        warnings=tuple(warnings),
        minima=tuple(_minima(chosen)),
        label=label,
        points=points,
        cost=cost,
    )


def frontier(points: Points) -> Points:
    """The runs with a lower loss than every run that costs no more."""
    order = np.lexsort((points.loss, points.flops))
    lowest = np.minimum.accumulate(points.loss[order])
    first = np.concatenate([[True], points.loss[order][1:] < lowest[:-1]])
    keep = np.zeros(len(points), dtype=bool)
    keep[order[first]] = True
    return points.take(keep)


def _line(chosen: Points) -> dict[str, float]:
    logs = np.log(np.stack([chosen.params, chosen.tokens, chosen.loss], axis=1))
    fitted = lines(chosen.flops, logs[None])[0].tolist()
    return dict(zip(optimum.LINE, fitted, strict=True))


def _minima(chosen: Points) -> list[Minimum]:
    columns = (chosen.flops, chosen.params, chosen.tokens, chosen.loss)
    rows = sorted(zip(*(c.tolist() for c in columns), strict=True))
    return [Minimum(budget=c, num_points=1, N=n, D=d, L=loss) for c, n, d, loss in rows]


def _refusal(chosen: Points) -> str:
    sizes, decades = len(np.unique(chosen.params)), float(np.log10(chosen.flops.max() / chosen.flops.min()))
    if len(chosen) >= LEAST_POINTS and sizes >= LEAST_SIZES and decades >= LEAST_DECADES:
        return ""
    has = f"{len(chosen)} runs of {sizes} sizes over {decades:.1f} decades of FLOPs"
    needs = f"{LEAST_POINTS} runs, {LEAST_SIZES} sizes and {LEAST_DECADES:g} decade"
    return f"no envelope: the runs that no cheaper run beats are {has}; a line needs {needs}"


def _check_finished(points: Points, schedule: Sequence[str]) -> None:
    repeated = np.bincount(points.cluster)[points.cluster] > 1
    decaying = sorted({str(name) for many, name in zip(repeated, schedule, strict=True) if many and name != "constant"})
    if decaying:
        raise UserError(
            f"an envelope cannot use points from the middle of a {decaying[0]} schedule: their learning rate is "
            "not yet annealed, so their loss is too high; keep one row per run_id, its last"
        )
