"""law: what a loss surface must say of itself to be fitted: its function, its derivatives, its names.

Coordinates: `theta` (R, p) is what the solver moves, R fits at once, on features `x` that are centred (means
subtracted), so that it is well scaled; `rows` (R, p) are the same laws in the letters of their papers (`params`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, cast

import numpy as np

from dlm.fit.points import Array, Points

STEP = 1e-20  # of the complex step: no difference is taken, so nothing cancels


Features = tuple[Array, ...]


class Law(ABC):
    """L as a function of features; subclass it, one file a law, and name it in `laws.LAWS`."""

    name: ClassVar[str]
    params: ClassVar[tuple[str, ...]]  # the columns of `rows`
    scales: ClassVar[tuple[str, ...]] = ("A", "B")  # params that multiply: their intervals are taken in logs
    exponents: ClassVar[tuple[str, ...]] = ("alpha", "beta")  # params that are powers of N and D
    pins: ClassVar[dict[str, int]] = {}  # params that may be fixed -> their column of theta
    floor: ClassVar[int] = 4  # the column of theta that is E, which must not fall below 0
    formula: ClassVar[str]

    @abstractmethod
    def loss(self, theta: Array, x: Features) -> Array:
        """L in nats/token, (R, n); x: each (n,) or (R, n)."""

    @abstractmethod
    def jet(self, theta: Array, x: Features) -> tuple[Array, Array]:
        """L (R, n) and its derivatives by theta (R, p, n), fastest as a transposed (p, R, n); x: each (n,)."""

    def bend(self, theta: Array, x: Features, slopes: Array, pull: Array) -> Array:
        """Second derivatives of L summed over the points with weights `pull` (R, n): (R, p, p).

        By the complex step on `jet`, exact where jet is analytic; a law overrides it to be faster.
        """
        columns = []
        for k in range(theta.shape[1]):
            moved = theta.astype(np.complex128)
            moved[:, k] += 1j * STEP
            turned: Array = self.jet(cast(Array, moved), x)[1].imag / STEP
            columns.append(np.matmul(turned, pull[:, :, None])[:, :, 0])
        return np.stack(columns, axis=2)

    @abstractmethod
    def rows(self, theta: Array, centre: Array) -> Array:
        """theta on features centred by `centre` -> params, (R, p)."""

    @abstractmethod
    def theta(self, rows: Array, centre: Array) -> Array:
        """params -> theta on features centred by `centre`, (R, p)."""

    @abstractmethod
    def starts(self, chinchilla: Array) -> Array:
        """Where to begin, given Chinchilla laws (S, 5) in its theta on the same centre: (S', p)."""

    def features(self, points: Points) -> Features:
        """What L depends on, in logs, each (n,): the first two are log N and log D."""
        return np.log(points.params), np.log(points.tokens)

    def along(self, log_n: Array, log_d: Array) -> Features:
        """The features at any N and D, for predictions."""
        return log_n, log_d

    def predict(self, rows: Array, log_n: Array, log_d: Array) -> Array:
        """L of every row at log N, log D: (R,) for (R,), (R, m) for (R, m)."""
        flat = np.ndim(log_n) == 1
        x = tuple(v[:, None] if flat else v for v in self.along(log_n, log_d))
        found = self.loss(self.theta(rows, np.zeros(len(x))), x)
        return found[:, 0] if flat else found

    def exponents_at_6nd(self, rows: Array) -> Array | None:
        """a of N* ~ C^a where C = 6 N D, (R,), or None where it is no constant."""
        return None

    def optimum_at_6nd(self, rows: Array, flops: float) -> Array | None:
        """log N* where C = 6 N D, (R,), or None where there is no closed form."""
        return None


def two_term_optimum(log_ratio: Array, alpha: Array, beta: Array, flops: float) -> Array:
    """log N* of N^-alpha + e^ratio D^-beta under 6 N D = C: 2203.15556 eq. 4; monotone functions of it share it."""
    return np.asarray(
        (np.log(alpha) - np.log(beta) - log_ratio + beta * np.log(flops / 6.0)) / (alpha + beta), dtype=np.float64
    )
