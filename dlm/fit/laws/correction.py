"""What the form of a law of repeated data misses smoothly: an estimate from the residuals of nearby curves.

Every form with few parameters misses published curves by 1 to 3 %, in ways that neighbouring curves share: one size
learns more slowly at every number of unique tokens, or the loss turns earlier than the form can say. So the residuals
of the log loss are interpolated over log N, log U and log e by Gaussian-process regression (kriging). Away from
the runs the estimate goes to zero, and the law alone is left.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dlm.fit.laws.law import Law, Surface
from dlm.fit.points import Array

S = TypeVar("S", bound=Surface)

LENGTHS = np.array([0.6, 1.5, 1.0])  # how far in log N, log U and log e a residual tells about others
NOISE = 0.15  # noise of a point relative to the residuals' own size: 0.3 % where a form misses 2 %


@dataclass(frozen=True, kw_only=True, eq=False)
class Correction:
    """A smooth function of log N, log U and log e that is added to the log loss of a law."""

    places: Array  # log N, log U and log e of the points it is made of, in units of LENGTHS, (m, 3)
    pull: Array  # the share of each of them, (m,)

    @classmethod
    def of(cls, places: Array, residual: Array) -> Correction:
        """The correction for residuals of the log loss (m,) at log N, log U and log e (m, 3)."""
        scaled = places / LENGTHS
        near = _near(scaled, scaled)
        near[np.diag_indices_from(near)] += NOISE**2
        return cls(places=scaled, pull=np.asarray(np.linalg.solve(near, residual), dtype=np.float64))

    def at(self, log_n: Array, log_u: Array, log_e: Array) -> Array:
        """The correction at places that are all of one shape, in that shape."""
        places = np.stack([log_n, log_u, log_e], axis=-1) / LENGTHS
        return np.asarray(_near(places, self.places) @ self.pull)


def form_of(law: S) -> S:
    """The law without a correction: the law itself if it has none."""
    if not isinstance(law, Correctable) or law.correction is None:
        return law
    plain = copy(law)
    plain.correction = None
    return plain


class Correctable(Law):
    """A law of unique tokens whose predictions may be corrected; its parameters and its fit are those of the form."""

    unique: float  # U for predictions, tokens
    correction: Correction | None = None

    def predict(self, rows: Array, log_n: Array, log_d: Array) -> Array:
        plain = super().predict(rows, log_n, log_d)
        if self.correction is None:
            return plain
        same = np.ndim(log_n) == 2 and bool((log_n == log_n[:1]).all() and (log_d == log_d[:1]).all())
        at_n, at_d = (log_n[:1], log_d[:1]) if same else (log_n, log_d)
        log_u = np.minimum(np.log(self.unique), at_d)  # a run of fewer tokens repeats nothing
        return np.asarray(plain * np.exp(self.correction.at(at_n, log_u, at_d - log_u)))


def _near(places: Array, others: Array) -> Array:
    """How much two places tell about each other: 1 at the same place, (..., m) for (..., 3) and (m, 3)."""
    squares = (places**2).sum(-1)[..., None] + (others**2).sum(-1) - 2.0 * (places @ others.T)
    return np.asarray(np.exp(-0.5 * np.maximum(squares, 0.0)))
