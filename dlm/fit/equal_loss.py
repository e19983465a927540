"""Find the compute that two laws need for the same loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlm.fit import optimum
from dlm.fit.fitted import Fitted
from dlm.fit.isoflop import resample
from dlm.fit.points import NAN, Array, Interval

# Tables of L*(C) extend this far, in nats of C, beyond a law's own budgets: NEAR because a resampled law may need a
# little more C than the fit, and FAR because budgets that are missing for an overlap may lie much further away.
NEAR_NATS, FAR_NATS = 2.5, 25.0
DRAW_NODES, FIT_NODES, FAR_NODES = 13, 401, 1001  # values of C in these tables


@dataclass(frozen=True, kw_only=True, eq=False)
class Ratio:
    """The ratio of the compute that the second law needs to the compute of the first law, at n losses."""

    log_c: Array  # log C of the first and of the second law, (2, n)
    draws: Array | None  # log ratio of every pair of resampled laws, (R, n); None if a law has no draws
    dof: int = 0  # degrees of freedom for Student's t; with 0, percentiles are used as they are

    @property
    def log(self) -> Array:
        """The log of the ratio, (n,)."""
        return np.asarray(self.log_c[1] - self.log_c[0], dtype=np.float64)


def ratio(first: Fitted, second: Fitted, losses: Array) -> Ratio:
    """Compare the compute of two laws at each of `losses`, (n,), nats/token; draws of both are taken as independent."""
    log_c = np.array([log_compute(r, losses) for r in (first, second)])
    if first.draws is None or second.draws is None:
        return Ratio(log_c=log_c, draws=None)
    num, rng, sides = min(len(first.draws), len(second.draws)), np.random.default_rng(0), []
    for result, exact in zip((first, second), log_c, strict=True):
        nodes = FIT_NODES if result.surface is None else DRAW_NODES
        rows = np.concatenate([_fit_row(result), _draw_rows(result, rng)[:num]])
        coarse = _log_compute(result, rows, losses, NEAR_NATS, nodes)
        sides.append(coarse[1:] + (exact - coarse[0]))  # the error of the coarse table cancels
    return Ratio(log_c=log_c, draws=sides[1] - sides[0], dof=_joint_dof(sides, (first.dof, second.dof)))


def budget_range(result: Fitted) -> Interval:
    """The lowest and the highest C that the law rests on, FLOPs."""
    assert result.points is not None
    spent = [m.budget for m in result.usable] or result.points.flops.tolist()
    return min(spent), max(spent)


def reached_losses(result: Fitted) -> Interval:
    """L* at the highest and at the lowest C of the law's own runs: (low, high), nats/token."""
    low_c, high_c = budget_range(result)
    return best_loss(result, high_c), best_loss(result, low_c)


def best_loss(result: Fitted, flops: float) -> float:
    """L* of the law at C, nats/token."""
    return float(_curve(result, _fit_row(result), np.log([flops]))[0, 0])


def log_compute(result: Fitted, losses: Array) -> Array:
    """log C at which the law reaches each loss, (n,); NaN if this C is far from the law's own budgets."""
    return np.asarray(_log_compute(result, _fit_row(result), losses, NEAR_NATS, FIT_NODES)[0], dtype=np.float64)


def needed_compute(result: Fitted, loss: float) -> float:
    """C, in FLOPs, at which the law reaches `loss`, extrapolated if necessary; NaN if the law never reaches it."""
    return float(np.exp(_log_compute(result, _fit_row(result), np.array([loss]), FAR_NATS, FAR_NODES)[0, 0]))


def _fit_row(result: Fitted) -> Array:
    """The fitted law as one row, (1, k), in the form that `_curve` takes."""
    if result.surface is not None:
        return optimum.as_rows(result.surface, result.params)
    return _bent(result, np.log([[m.L for m in result.usable]]))


def _draw_rows(result: Fitted, rng: np.random.Generator) -> Array:
    """The resampled laws as rows, (R, k), in the form that `_curve` takes, in random order.

    Two bootstraps with the same seed draw the same row numbers from both tables; shuffling makes their pairs
    independent. An isoFLOP fit does not keep the minima of its draws, so these are drawn again.
    """
    assert result.draws is not None
    if result.surface is not None:
        return rng.permutation(result.draws)
    drawn = resample.draw(result, len(result.draws), result.interval_method, rng)
    assert drawn.vertices is not None, "isoFLOP draws have vertices"
    return _bent(result, drawn.vertices[:, :, 2])


def _bent(result: Fitted, log_loss: Array) -> Array:
    """Fit parabolas (lines for two budgets) to log L of the minima, (R, budgets), over centred log C.

    Returns:
        The coefficients, (R, 3), the constant first.
    """
    z = np.log([m.budget for m in result.usable])
    powers = np.vander(z - z.mean(), min(3, len(z)), increasing=True)
    rows = log_loss @ np.linalg.pinv(powers).T
    return np.pad(rows, ((0, 0), (0, 3 - rows.shape[1])))


def _curve(result: Fitted, rows: Array, log_c: Array) -> Array:
    """L*(C) of every row, (R, m). Beyond the budgets, a parabola continues with its slope at the outermost budget."""
    if result.surface is not None:
        at = [optimum.best(result.surface, rows, float(c), result.cost)[:, 2] for c in np.exp(log_c)]
        return np.stack(at, axis=1)
    low, high = np.log(budget_range(result))
    middle = np.log([m.budget for m in result.usable]).mean()
    z = np.clip(log_c, low, high) - middle
    along = rows[:, :1] + rows[:, 1:2] * z + rows[:, 2:] * z * z
    slope = rows[:, 1:2] + 2.0 * rows[:, 2:] * z
    return np.asarray(np.exp(along + slope * (log_c - middle - z)), dtype=np.float64)


def _log_compute(result: Fitted, rows: Array, losses: Array, beyond_nats: float, nodes: int) -> Array:
    """log C at which L*(C) of each row equals each loss, (R, n); NaN if this C lies outside the table.

    L* - E is a power of C if C = 6 N D, and nearly a power of C under other costs. So log(L* - E) is close to a
    straight line in log C, and is interpolated.
    """
    low, high = np.log(budget_range(result))
    log_c = np.linspace(low - beyond_nats, high + beyond_nats, nodes)
    curve = _curve(result, rows, log_c)
    names = () if result.surface is None else result.surface.params
    floor = (rows[:, names.index("E")] if "E" in names else np.zeros(len(rows)))[:, None]
    heights, wanted = np.log(curve - floor), np.log(losses - floor)
    heights = np.minimum.accumulate(heights, axis=1)  # the least C of a loss, even if L* rises somewhere
    found = np.full((len(rows), len(losses)), NAN)
    for k in np.flatnonzero(np.isfinite(heights).all(axis=1)):
        found[k] = np.interp(-wanted[k], -heights[k], log_c, left=NAN, right=NAN)
    return found


def _joint_dof(sides: Sequence[Array], dofs: tuple[int, int]) -> int:
    """The degrees of freedom of a difference, by Welch and Satterthwaite; a dof of 0 counts as infinitely many."""
    spread = np.array([np.nanmedian(np.nanvar(side, axis=0)) for side in sides])
    shares = [v**2 / dof for v, dof in zip(spread, dofs, strict=True) if dof]
    if not shares or not np.isfinite(spread).all() or not sum(shares):
        return max(dofs)
    return max(1, round(float(spread.sum() ** 2 / sum(shares))))
