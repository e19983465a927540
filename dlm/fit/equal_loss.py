"""Find the compute that two laws need for the same loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlm.fit import optimum
from dlm.fit.isoflop import resample
from dlm.fit.points import NAN, Array, Interval
from dlm.fit.result import FitResult

# Tables of L*(C) reach this far beyond a law's own budgets: a resampled law needs a little more C, a question about
# missing budgets may need much more.
NEAR_NATS, FAR_NATS = 2.5, 25.0


DRAW_NODES, FIT_NODES, FAR_NODES = 13, 401, 1001


TOUCH = 1e-9  # relative: losses that overlap by less do not overlap


def budget_range(result: FitResult) -> tuple[float, float]:
    """The lowest and highest C that the law rests on, FLOPs."""
    assert result.points is not None
    spent = [m.budget for m in result.usable] or result.points.flops.tolist()
    return min(spent), max(spent)


def reached_losses(result: FitResult) -> Interval:
    """L* at the highest and at the lowest C of the law's own runs: (low, high), nats/token."""
    low_c, high_c = budget_range(result)
    return best_loss_at(result, high_c), best_loss_at(result, low_c)


def best_loss_at(result: FitResult, flops: float) -> float:
    return float(_curve(result, fit_row(result), np.log([flops]))[0, 0])


def needed_compute(result: FitResult, loss: float) -> float:
    """C, in FLOPs, at which the law itself reaches `loss`, extrapolated; NaN where it never does."""
    return float(np.exp(log_compute_at(result, fit_row(result), np.array([loss]), FAR_NATS, FAR_NODES)[0, 0]))


def fit_row(result: FitResult) -> Array:
    """The law itself as one row (1, k) of what `_curve` reads."""
    if result.surface is not None:
        return optimum.as_rows(result.surface, result.params)
    return _bent(result, np.log([[m.L for m in result.usable]]))


def _draw_rows(result: FitResult, rng: np.random.Generator) -> Array:
    """The resampled laws as rows, in an order that is independent of any other result's.

    Two bootstraps of one seed pick the same places in both tables: shuffled, their pairs are independent. A line keeps
    no minima of its draws, so these are drawn again.
    """
    assert result.draws is not None and result.points is not None
    if result.surface is not None:
        return rng.permutation(result.draws)
    drawn = resample.draw(result, result.points, len(result.draws), result.interval_method, rng)
    assert drawn.vertices is not None, "isoflop draws have them"
    return _bent(result, drawn.vertices[:, :, 2])


def _bent(result: FitResult, log_loss: Array) -> Array:
    """log L of the minima, (R, budgets) -> its parabola in log C - their mean, (R, 3); of two minima, their line."""
    z = np.log([m.budget for m in result.usable])
    powers = np.vander(z - z.mean(), min(3, len(z)), increasing=True)
    rows = log_loss @ np.linalg.pinv(powers).T
    return np.pad(rows, ((0, 0), (0, 3 - rows.shape[1])))


def _curve(result: FitResult, rows: Array, log_c: Array) -> Array:
    """L*(C) of every row, (R, m); a parabola goes on with its slope at the outermost budget."""
    if result.surface is not None:
        at = [optimum.best(result.surface, rows, float(c), result.cost)[:, 2] for c in np.exp(log_c)]
        return np.stack(at, axis=1)
    low, high = np.log(budget_range(result))
    middle = np.log([m.budget for m in result.usable]).mean()
    z = np.clip(log_c, low, high) - middle
    along = rows[:, :1] + rows[:, 1:2] * z + rows[:, 2:] * z * z
    slope = rows[:, 1:2] + 2.0 * rows[:, 2:] * z
    return np.asarray(np.exp(along + slope * (log_c - middle - z)), dtype=np.float64)


def log_compute_at(result: FitResult, rows: Array, losses: Array, beyond_nats: float, nodes: int) -> Array:
    """log C at which L*(C) of each row is each loss, (R, n); NaN where that is not within the table.

    L* - E is a power of C where C = 6 N D, exactly, and nearly so under other costs: so log(L* - E) against log C is
    close to a straight line, and is interpolated.
    """
    low, high = np.log(budget_range(result))
    log_c = np.linspace(low - beyond_nats, high + beyond_nats, nodes)
    curve = _curve(result, rows, log_c)
    floor = _floor(result, rows)[:, None]
    heights, wanted = np.log(curve - floor), np.log(losses - floor)
    heights = np.minimum.accumulate(heights, axis=1)  # the least C of a loss, should L* ever rise
    found = np.full((len(rows), len(losses)), NAN)
    for k in np.flatnonzero(np.isfinite(heights).all(axis=1)):
        found[k] = np.interp(-wanted[k], -heights[k], log_c, left=NAN, right=NAN)
    return found


def _floor(result: FitResult, rows: Array) -> Array:
    names = () if result.surface is None else result.surface.params
    return rows[:, names.index("E")] if "E" in names else np.zeros(len(rows))


def spread_of_fits(first: FitResult, second: FitResult, losses: Array, logs: Array) -> tuple[Array | None, int]:
    """log multiplier of every pair of draws, (R, n), and the degrees of freedom of its Student-t ends (0: none)."""
    if first.draws is None or second.draws is None:
        return None, 0
    num, rng, sides = min(len(first.draws), len(second.draws)), np.random.default_rng(0), []
    for result, exact in zip((first, second), logs, strict=True):
        nodes = FIT_NODES if result.surface is None else DRAW_NODES
        rows = np.concatenate([fit_row(result), _draw_rows(result, rng)[:num]])
        coarse = log_compute_at(result, rows, losses, NEAR_NATS, nodes)
        sides.append(coarse[1:] + (exact - coarse[0]))  # so that the coarse table's error cancels
    return sides[1] - sides[0], _joint_dof(sides, (first.dof, second.dof))


def _joint_dof(sides: Sequence[Array], dofs: tuple[int, int]) -> int:
    """Welch and Satterthwaite's degrees of freedom of the difference; a side of dof 0 has percentiles as they are."""
    spread = np.array([np.nanmedian(np.nanvar(side, axis=0)) for side in sides])
    shares = [v**2 / dof for v, dof in zip(spread, dofs, strict=True) if dof]
    if not shares or not np.isfinite(spread).all() or not sum(shares):
        return max(dofs)
    return max(1, round(float(spread.sum() ** 2 / sum(shares))))
