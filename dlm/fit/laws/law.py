"""The interface of a loss surface L(N, D): its function, its derivatives and the names of its parameters.

A law has two sets of coordinates, each for R fits at once. `rows` (R, p) holds the parameters of the published formula,
in the order of `params`. `theta` (R, p) holds the coordinates that the solver optimises; they refer to features from
which their mean (`centre`) has been subtracted, so that the problem is well scaled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, cast

import numpy as np

from dlm.fit.points import Array, Mask, Points

STEP = 1e-20  # length of the complex step; it can be tiny, because no difference is taken and nothing cancels

Features = tuple[Array, ...]  # the variables that L depends on, each (n,)


class Surface(ABC):
    """A function L(N, D). Its parameters are rows (R, p), in the order of `params`, one for each replicate."""

    name: str  # the name that `--law` takes
    formula: str  # as reports show it
    params: tuple[str, ...]  # the columns of `rows`
    scales: tuple[str, ...] = ("A", "B")  # multiplicative params; their intervals are taken in logs
    exponents: tuple[str, ...] = ("alpha", "beta")  # params that are powers of N and D

    @abstractmethod
    def predict(self, rows: Array, log_n: Array, log_d: Array) -> Array:
        """L of every row in nats/token, at log N and log D that are both (R,) or both (R, m)."""

    def found(self, rows: Array) -> Mask:
        """Which rows hold a law, (R,): a replicate without a fit is NaN."""
        return np.asarray(np.isfinite(rows).all(axis=1))

    def exponents_at_6nd(self, rows: Array) -> Array | None:
        """The exponent a of N* ~ C^a for C = 6 N D, (R,); None if the exponent depends on C."""
        return None

    def optimum_at_6nd(self, rows: Array, flops: float) -> Array | None:
        """log N* at `flops` for C = 6 N D, (R,); None if there is no closed form."""
        return None

    def near_optimum(self, rows: Array, flops: float) -> Array | None:
        """A guess of log N* at `flops` for C = 6 N D, (R,), from which a search starts; None if there is none."""
        return self.optimum_at_6nd(rows, flops)


class Law(Surface):
    """A surface that can be fitted. To add one, write a subclass in a file of its own and name it in `laws.LAWS`."""

    pins: ClassVar[dict[str, int]] = {}  # params that may be fixed, and their columns of theta
    floor: ClassVar[int] = 4  # the column of theta that is E, which must not fall below 0

    def loss(self, theta: Array, x: Features) -> Array:
        """L in nats/token, (R, n), for features that are each (n,) or (R, n). A law may override this to be faster."""
        return self.jet(theta, x)[0]

    @abstractmethod
    def jet(self, theta: Array, x: Features) -> tuple[Array, Array]:
        """L, (R, n), and its derivatives with respect to theta, (R, p, n), for features that are each (n,) or (R, n).

        The solver is fastest if the derivatives are a transposed array of shape (p, R, n).
        """

    def bend(self, theta: Array, x: Features, slopes: Array, pull: Array) -> Array:
        """The second derivatives of L, summed over the points with the weights `pull` (R, n): (R, p, p).

        This version takes a complex step through `jet`, which is exact if `jet` is analytic. A law may override this to
        be faster; `slopes` are the derivatives that `jet` returned.
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
        """Convert theta on features centred by `centre` to the published parameters, (R, p)."""

    @abstractmethod
    def theta(self, rows: Array, centre: Array) -> Array:
        """Convert the published parameters to theta on features centred by `centre`, (R, p)."""

    @abstractmethod
    def starts(self, chinchilla: Array) -> Array:
        """The starts of the search, given S Chinchilla laws.

        Args:
            chinchilla: theta of Chinchilla's law on the same centre, (S, 5).

        Returns:
            (V * S, p): V blocks of S rows, where row k of every block is a variant of `chinchilla[k]`.
        """

    def features(self, points: Points) -> Features:
        """The variables that L depends on, each (n,); the first two are log N and log D."""
        return np.log(points.params), np.log(points.tokens)

    def along(self, log_n: Array, log_d: Array) -> Features:
        """The features for predictions at any log N and log D."""
        return log_n, log_d

    @np.errstate(all="ignore")  # a row without a law gives NaN, which the callers know
    def predict(self, rows: Array, log_n: Array, log_d: Array) -> Array:
        """L of every row in nats/token, at log N and log D that are both (R,) or both (R, m)."""
        flat = np.ndim(log_n) == 1
        x = tuple(v[:, None] if flat else v for v in self.along(log_n, log_d))
        with np.errstate(all="ignore"):  # a resampled row may overflow, and callers leave out what is not finite
            found = self.loss(self.theta(rows, np.zeros(len(x))), x)
        return found[:, 0] if flat else found


def two_term_optimum(log_ratio: Array, alpha: Array, beta: Array, flops: float) -> Array:
    """log N* that minimises N^-alpha + e^log_ratio D^-beta under 6 N D = C, (R,).

    This is equation 4 of 2203.15556; any increasing function of the sum of the two terms has the same optimum.
    """
    return np.asarray(
        (np.log(alpha) - np.log(beta) - log_ratio + beta * np.log(flops / 6.0)) / (alpha + beta), dtype=np.float64
    )


def add_power(second: Array, columns: list[int], weighted: Array, tilts: list[Array]) -> None:
    """Add to `second` the part g g' of the second derivatives of a term exp(z), where g = dz/dtheta in `columns`.

    `weighted` is the term times the weight of each point, (R, n), and `tilts` are g, each (R, n).
    """
    g = np.stack(tilts, axis=1)
    place = np.array(columns)
    second[:, place[:, None], place] += (g * weighted[:, None]) @ g.transpose(0, 2, 1)
