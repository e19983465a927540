"""Compute what shared trunks save, and how much wider intervals are because branches share the noise of their trunk.

A branch ends with the losses that it would have from nothing, so shared trunks change no loss and cost nothing against
the same cells without them. But cells of one model and one seed have noise in common, so intervals are wider than those
of cells with a seed of their own each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlm.plan.cells import Cell

# The share of the noise variance of a branch that is also that of its trunk: the correlation of their losses over nine
# seeds was 0.93 and 0.89 for branches of two thirds and one third of the trunk's length (BENCHMARKS.md).
SHARED_NOISE = 0.9
# The law that the widths are computed for: exponents as published for Chinchilla (Hoffmann et al. 2203.15556), a floor
# of 1.7 nats and one nat above it, with the optimum in the middle of the plan. Other exponents change it little.
FLOOR, ABOVE, ALPHA, BETA = 1.7, 1.0, 0.34, 0.28


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What a plan gains and loses by shared trunks."""

    branches: int  # number of cells that start from a checkpoint of another cell
    trunks: int
    flops: float  # training FLOPs, as a share of those without shared trunks
    width: float | None  # interval of N* at the top budget, relative to that of independent cells; None: too few cells

    @property
    def flops_at_equal_width(self) -> float | None:
        """The training FLOPs for an interval as wide as that of independent cells, as a share of the FLOPs of these.

        The width of an interval falls with the root of the number of cells, hence with the root of the FLOPs.
        """
        return None if self.width is None else self.flops * self.width**2


def own_flops(cells: Sequence[Cell]) -> float:
    """Return the target FLOPs of the steps that the cells train themselves, without those of their trunks."""
    return sum(cell.budget_flops * cell.own_share for cell in cells)


def sharing(cells: Sequence[Cell]) -> Sharing:
    """Compute what the cells of a plan gain and lose by shared trunks."""
    parents = [cell.parent for cell in cells if cell.parent is not None]
    return Sharing(
        branches=len(parents),
        trunks=len(set(parents)),
        flops=own_flops(cells) / sum(cell.budget_flops for cell in cells),
        width=_relative_width([cell for cell in cells if cell.objective == cells[0].objective and cell.role is None]),
    )


def _relative_width(cells: Sequence[Cell]) -> float | None:
    """Return the width of the interval of N* at the top budget, relative to that of independent cells.

    A least-squares fit of L = E + A/N^alpha + B/D^beta to log L is linearised around the law that is described above.
    """
    import numpy as np

    n, d = (np.array([getattr(cell, name) for cell in cells], dtype=float) for name in ("num_params", "tokens"))
    n, d = n / np.exp(np.log(n).mean()), d / np.exp(np.log(d).mean())  # the optimum is at N = D = 1
    unit = ABOVE / (1 / ALPHA + 1 / BETA)
    by_n, by_d = unit / ALPHA * n**-ALPHA, unit / BETA * d**-BETA
    loss = FLOOR + by_n + by_d
    # Derivatives of log L by E, log A, log B, alpha and beta.
    slopes = np.stack([np.ones_like(n), by_n, by_d, -by_n * np.log(n), -by_d * np.log(d)], axis=1) / loss[:, None]
    if np.linalg.matrix_rank(slopes) < slopes.shape[1]:
        return None
    at_top = np.array([cell.budget_flops for cell in cells]) == max(cell.budget_flops for cell in cells)
    log_nd = np.log(n * d)[at_top].mean()
    log_best = BETA * log_nd / (ALPHA + BETA)
    # log N* = (log(alpha A / (beta B)) + beta log(N D)) / (alpha + beta), and its derivatives.
    of_best = np.array([0, 1, -1, 1 / ALPHA - log_best, -1 / BETA + log_nd - log_best]) / (ALPHA + BETA)
    weights = of_best @ np.linalg.pinv(slopes)
    trunks = np.array([cell.parent or cell.cell_id for cell in cells])
    together = (trunks[:, None] == trunks[None, :]).astype(float)
    noise = (1 - SHARED_NOISE) * np.eye(len(cells)) + SHARED_NOISE * together
    return math.sqrt(float(weights @ noise @ weights) / float(weights @ weights))
