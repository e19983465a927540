"""Find the number of epochs at which a law of repeated data is lowest, and whether the runs agree that it turns."""

from __future__ import annotations

from copy import copy

import numpy as np

from dlm.core import text
from dlm.fit.curves import Curve, curves, sampled
from dlm.fit.laws.correction import Correction, form_of
from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.laws.epochs import Epochs
from dlm.fit.points import Array, Points

Repeated = DataConstrained | Epochs  # the laws of unique tokens

MOST_EPOCHS = 1e5  # a law that still falls here has no best number of epochs
STEPS = 231  # of the grid over log epochs, 5 % apart
FLAT = 1e-7  # a relative rise that is only rounding
GREAT_RISE = 0.05  # a rise that a law must not overlook: to train on costs 5 % of the loss
CLEAR_RISE = 0.01  # a rise of the log loss at the end of a curve that is more than the noise of its points


def of_unique(law: Repeated, unique: float) -> Repeated:
    """The same law for predictions on another number of unique tokens."""
    other = copy(law)
    other.unique = unique
    return other


def corrected(law: Epochs, row: Array, points: Points) -> Epochs:
    """The same law, given as one row, with its predictions corrected by its residuals on these points."""
    places, log_loss = sampled(points)
    log_n, log_u, log_e = places.T
    other = form_of(copy(law))
    x = (log_n[None], (log_u + log_e)[None], np.maximum(log_e, 0.0)[None])
    plain = other.loss(other.theta(row, np.zeros(len(x))), x)[0]
    other.correction = Correction.of(places, log_loss - np.log(plain))
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


def turns_within(law: Repeated, row: Array, curve: Curve) -> bool:
    """Whether a law, given as one row of parameters, is lowest before the last epochs of a curve of the runs."""
    return bool(log_best(law, row, np.log(curve.params), np.log(curve.unique))[0] < curve.log_epochs[-1])


def missed_turns(law: Repeated, row: Array, points: Points, *, rise: float = CLEAR_RISE) -> list[Curve]:
    """The curves whose log loss rises by more than `rise` where the law, given as one row, still falls."""
    return [curve for curve in curves(points) if curve.rise > rise and not turns_within(law, row, curve)]


def overlooked(law: Repeated, row: Array, points: Points) -> list[str]:
    """Return a warning if curves of the runs clearly turn upward where the law, given as one row, still falls."""
    missed = missed_turns(law, row, points)
    if not missed:
        return []
    worst = max(missed, key=lambda curve: curve.rise)
    model = f"{text.count(worst.params)} parameters on {text.count(worst.unique)} unique tokens"
    low, last = (text.number(float(np.exp(log_e)), digits=2) for log_e in (worst.best, worst.log_epochs[-1]))
    others = f"; {text.counted(len(missed) - 1, 'more curve')} too" if len(missed) > 1 else ""
    return [
        f"the runs turn upward where {law.name} still falls: the loss of {model} is lowest after about "
        f"{low} epochs, and {np.expm1(worst.rise):.0%} higher after {last}{others}"
    ]
