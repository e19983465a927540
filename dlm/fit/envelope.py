"""Fit lines through the runs that no cheaper run beats.

This is approach 1 of Hoffmann et al. (2203.15556) on finished runs: the frontier of loss against FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dlm.core.errors import UserError
from dlm.fit import optimum
from dlm.fit.engine.newton import Norm
from dlm.fit.fitted import Allocation, Minimum
from dlm.fit.isoflop.fit import line_through
from dlm.fit.points import Points, as_points, cost_of
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
    """Fit log-log lines through the frontier of loss against FLOPs.

    Args:
        params: N of each run, (n,).
        tokens: D of each run, (n,).
        loss: L of each run, (n,), nats/token.
        flops: C of each run, (n,); 6 N D by default.
        run_id: Labels, (n,); points with equal labels are checkpoints of one run.
        schedule: Name of the learning-rate schedule of each point.
        convention: Name of the convention by which `flops` are counted.
        at: The values of C at which to report the optimum, FLOPs.
        label: Name of the group of runs, shown in reports.

    Returns:
        The lines N* = N0 C^a, D* = D0 C^b and L* = L0 C^c. The status is 'refused' if the frontier has fewer than 4
        points or 3 sizes, or spans less than a decade of FLOPs.

    Raises:
        UserError: For a column that is not allowed, and for several points of one run with a decaying schedule, because
            the loss in the middle of such a run is higher than that of a finished run.
    """
    points = as_points(params, tokens, loss, flops=flops, cluster=run_id, convention=convention)
    if schedule is not None:
        _check_finished(points, schedule)
    chosen = frontier(points)
    minima, reason = _minima(chosen), _refusal(chosen)
    line = {} if reason else line_through(minima)
    warnings = [reason] if reason else []
    if schedule is None and points.num_clusters < len(points):
        warnings.append("several points of one run, and no column schedule says that they are not from its middle")
    result = FitResult(
        law="envelope",
        how=Norm(norm="mse"),
        n=len(points),
        params=line,
        allocation=Allocation(a=line["a"], b=line["b"], how=HOW) if line else Allocation(how="refused: no line"),
        status="refused" if reason else "warned" if warnings else "ok",
        warnings=tuple(warnings),
        minima=tuple(sorted(minima, key=lambda m: (m.budget, m.N))),
        label=label,
        points=points,
        cost=cost_of(points),
    )
    return optimum.with_optima(result, at) if line else result


def frontier(points: Points) -> Points:
    """The runs with a lower loss than every run that costs no more."""
    order = np.lexsort((points.loss, points.flops))
    lowest = np.minimum.accumulate(points.loss[order])
    first = np.concatenate([[True], points.loss[order][1:] < lowest[:-1]])
    keep = np.zeros(len(points), dtype=bool)
    keep[order[first]] = True
    return points.take(keep)


def _minima(chosen: Points) -> list[Minimum]:
    """One `Minimum` for each run of the frontier, at the C of the run."""
    columns = (chosen.flops.tolist(), chosen.params.tolist(), chosen.tokens.tolist(), chosen.loss.tolist())
    return [Minimum(budget=c, num_points=1, N=n, D=d, L=loss) for c, n, d, loss in zip(*columns, strict=True)]


def _refusal(chosen: Points) -> str:
    """The reason why the frontier does not support a line; empty if it does."""
    sizes, decades = len(np.unique(chosen.params)), float(np.log10(chosen.top_flops / chosen.flops.min()))
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
