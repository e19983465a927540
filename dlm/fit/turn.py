"""Find the number of epochs at which a law of repeated data is lowest."""

from __future__ import annotations

from copy import copy

import numpy as np

from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.laws.epochs import Epochs
from dlm.fit.points import Array

Repeated = DataConstrained | Epochs  # the laws of unique tokens

MOST_EPOCHS = 1e5  # a law that still falls here has no best number of epochs
STEPS = 231  # of the grid over log epochs, 5 % apart
FLAT = 1e-7  # a relative rise that is only rounding


def of_unique(law: Repeated, unique: float) -> Repeated:
    """The same law for predictions on another number of unique tokens."""
    other = copy(law)
    other.unique = unique
    return other


def log_best(law: Repeated, rows: Array, log_n: float, log_u: float) -> Array:
    """The log of the best number of epochs, 1 or more, of each row at N parameters and U unique tokens, (R,).

    It is infinite for a law that falls up to MOST_EPOCHS, and NaN for a row without a law.
    """
    grid = np.linspace(0.0, np.log(MOST_EPOCHS), STEPS)
    log_d = np.broadcast_to(grid + log_u, (len(rows), STEPS))
    loss = of_unique(law, float(np.exp(log_u))).predict(rows, np.full((len(rows), STEPS), log_n), log_d)
    low = np.nanargmin(np.where(np.isfinite(loss), loss, np.inf), axis=1)
    each = np.arange(len(rows))
    middle = np.clip(low, 1, STEPS - 2)
    left, here, right = (loss[each, middle + k] for k in (-1, 0, 1))
    with np.errstate(all="ignore"):
        shift = 0.5 * (left - right) / (left - 2.0 * here + right)
    found = grid[low] + np.where(low == middle, np.clip(np.nan_to_num(shift), -1.0, 1.0), 0.0) * (grid[1] - grid[0])
    falls = loss[:, -1] <= loss[each, low] * (1.0 + FLAT)
    return np.where(law.found(rows), np.where(falls, np.inf, found), np.nan)
