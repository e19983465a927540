"""The tied law, L = E + A/N^alpha + B/D^alpha, with one exponent for both terms (Gadre et al., 2403.08540, eq. 4).

The paper writes the law as E + (a M^eta + b M^-eta) C^-eta with M = D/N and C = 6 N D, so alpha = 2 eta. The law needs
few runs, because it assumes that the best size grows as C^(1/2). theta = (a, b, alpha, E), where a and b are the logs
of A and B on centred features.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from dlm.fit.laws.law import Features, Law, two_term_optimum
from dlm.fit.points import Array


class Tied(Law):
    """Chinchilla's law with alpha = beta."""

    name = "tied"
    formula = "L = E + A/N^alpha + B/D^alpha"
    params = ("E", "A", "B", "alpha")
    exponents = ("alpha",)
    pins: ClassVar[dict[str, int]] = {"alpha": 2, "E": 3}
    floor = 3

    def jet(self, theta: Array, x: Features) -> tuple[Array, Array]:
        a, b, alpha, e = (theta[:, k : k + 1] for k in range(4))
        size, tokens = np.exp(a - alpha * x[0]), np.exp(b - alpha * x[1])
        slopes = [size, tokens, -size * x[0] - tokens * x[1], np.ones_like(size)]
        return size + tokens + e, np.stack(slopes, axis=1)

    def rows(self, theta: Array, centre: Array) -> Array:
        a, b, alpha, e = theta.T
        with np.errstate(over="ignore"):
            return np.stack([e, np.exp(a + alpha * centre[0]), np.exp(b + alpha * centre[1]), alpha], axis=1)

    def theta(self, rows: Array, centre: Array) -> Array:
        e, a, b, alpha = rows.T
        return np.stack([np.log(a) - alpha * centre[0], np.log(b) - alpha * centre[1], alpha, e], axis=1)

    def starts(self, chinchilla: Array) -> Array:
        a, alpha, b, beta, e = chinchilla.T
        return np.stack([a, b, (alpha + beta) / 2, e], axis=1)

    def exponents_at_6nd(self, rows: Array) -> Array:
        return np.full(len(rows), 0.5)

    def optimum_at_6nd(self, rows: Array, flops: float) -> Array:
        _, a, b, alpha = rows.T
        return two_term_optimum(np.log(b) - np.log(a), alpha, alpha, flops)
