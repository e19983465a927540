"""Fit L*(C) = E + k C^-g with a fixed exponent g to the losses of the isoFLOP minima.

A surface describes all runs, most of which are far from the best size. This law describes the lowest losses alone, and
beyond the runs L* follows it in part. Three or four minima do not determine g: with a free exponent, the law predicts
some published sets far worse than the surface does. `benchmarks/predict.py` measures how far off L* is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlm.fit.points import Array

EXPONENT = 0.12  # g of laws fitted to published runs is 0.06 (masked diffusion, Skaling) to 0.15 (Hoffmann et al.)
SHARE = 0.3  # weight of this law in log L* a decade beyond the runs and further
LEAST_MINIMA = 3  # a law with two parameters passes through two minima exactly, and nothing checks it


@dataclass(frozen=True, kw_only=True, eq=False)
class FloorLaw:
    """The floor law through the lowest losses of m budgets."""

    budgets: Array  # FLOPs, (m,)
    losses: Array  # nats/token, (m,)
    draws: Array | None = None  # the lowest losses of resampled runs, (R, m)

    @property
    def params(self) -> dict[str, float]:
        """E, k and g, with C in FLOPs."""
        floor, factor = self.rows(self.losses[None])[0].tolist()
        return {"E": floor, "k": factor, "g": EXPONENT}

    def rows(self, losses: Array) -> Array:
        """E and k, (R, 2), by least squares of the relative residuals, from lowest losses (R, m); E is 0 or above."""
        basis = np.stack([np.ones_like(self.budgets), self.budgets**-EXPONENT], axis=1) / self.losses[:, None]
        both, alone = (losses / self.losses @ np.linalg.pinv(columns).T for columns in (basis, basis[:, 1:]))
        return np.asarray(np.where(both[:, :1] < 0, np.pad(alone, ((0, 0), (1, 0))), both), dtype=np.float64)

    def at(self, flops: float, losses: Array) -> Array:
        """L* at C under the laws through lowest losses (R, m), (R,)."""
        return np.asarray(self.rows(losses) @ [1.0, flops**-EXPONENT], dtype=np.float64)


def share_at(distance: float) -> float:
    """The weight of the floor law in log L* at `distance`, log10 of C over the highest C of the runs."""
    return SHARE * min(max(distance, 0.0), 1.0)
