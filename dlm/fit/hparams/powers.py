"""Fit power laws in N and D through the best settings of the cells, with the scatter of the cells about the law."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from dlm.fit.points import Array, Interval

TERMS = ("log", "params", "tokens")
LEAST_SPREAD = float(np.log(1.5))  # sizes or tokens that span a smaller factor do not show an exponent
ROUNDS = 60  # of the bisection for the scatter between cells


@dataclass(frozen=True, kw_only=True, eq=False)
class Power:
    """exp(log) N^params D^tokens, with the intervals and the draws of these three numbers."""

    log: float
    params: float
    tokens: float
    scatter: float  # standard deviation of the cells about the law beyond their noise, in logs
    free: int  # number of exponents that the cells determine: 0, 1 or 2
    ci: Mapping[str, Interval] = field(default_factory=dict)
    draws: Array = field(default_factory=lambda: np.empty((0, 3)), repr=False)  # (R, 3)

    def logs(self, log_n: Array, log_d: Array) -> Array:
        """The log of the best setting at each N and D, (n,)."""
        return self.log + self.params * log_n + self.tokens * log_d

    def drawn(self, log_n: Array, log_d: Array) -> Array:
        """The same of every draw, (R, n)."""
        c, x, y = self.draws.T[:, :, None]
        drawn: Array = c + x * log_n + y * log_d
        return drawn


@dataclass(frozen=True, kw_only=True, eq=False)
class Path:
    """The directions in (log N, log D) along which the cells lie, so that exponents can be found."""

    middle: Array  # mean log N and log D of the cells, (2,)
    directions: Array  # (free, 2)

    @property
    def free(self) -> int:
        """The number of exponents that the cells determine."""
        return len(self.directions)

    def design(self, log_n: Array, log_d: Array) -> Array:
        """One column of ones, and the place of each cell along each direction, (G, 1 + free)."""
        off = np.stack([log_n, log_d], axis=1) - self.middle
        return np.concatenate([np.ones((len(off), 1)), off @ self.directions.T], axis=1)

    def terms(self, found: Array) -> Array:
        """The log, and the exponents of N and D, (R, 3), of coefficients of the design, (R, 1 + free).

        Where the cells lie on a line, these are the shortest exponents with the rates along the line: the setting is
        taken not to change across it.
        """
        exponents = found[:, 1:] @ self.directions
        return np.concatenate([found[:, :1] - (exponents @ self.middle)[:, None], exponents], axis=1)


def path_of(log_n: Array, log_d: Array, *, sizes: bool) -> Path:
    """Find the directions along which cells at these N and D are spread. `sizes` is False for a law in D alone."""
    places = np.stack([log_n, log_d], axis=1)
    middle = places.mean(axis=0)
    off = places - middle
    off[:, np.ptp(off, axis=0) < LEAST_SPREAD] = 0.0
    if not sizes:
        off[:, 0] = 0.0
    directions = np.linalg.svd(off, full_matrices=False)[2]
    kept = [line for line in directions if np.ptp(off @ line) >= LEAST_SPREAD]
    return Path(middle=middle, directions=np.array(kept).reshape(len(kept), 2))


def coefficients(design: Array, best: Array, noise: Array, scatter: float) -> Array:
    """Weighted least squares of the best settings of the cells on the design.

    Args:
        design: (G, p).
        best: Logs of the best settings, (R, G); NaN where a draw has none.
        noise: Standard errors of the best settings by the noise of their runs, (G,).
        scatter: Standard deviation of the cells about the law beyond this noise.

    Returns:
        The coefficients, (R, p); NaN for draws without best settings.
    """
    weight = 1.0 / np.sqrt(noise**2 + scatter**2)
    solver = np.linalg.pinv(design * weight[:, None]) * weight
    return np.asarray(best @ solver.T)


def scatter_of(design: Array, best: Array, noise: Array) -> float:
    """The scatter between cells by the rule of Paule and Mandel.

    With it, the squared residuals, as multiples of their variance, sum up to their degrees of freedom.

    Args:
        design: As in `coefficients`.
        best: Logs of the best settings, (G,).
        noise: As in `coefficients`.
    """
    dof = len(best) - design.shape[1]

    def excess(scatter: float) -> float:
        residual = best - design @ coefficients(design, best[None], noise, scatter)[0]
        return float(np.sum(residual**2 / (noise**2 + scatter**2))) - float(dof)

    if dof <= 0 or excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, float(np.ptp(best))
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (low + high) / 2
