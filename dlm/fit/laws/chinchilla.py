"""Chinchilla's law, L = E + A/N^alpha + B/D^beta (Hoffmann et al., 2203.15556, approach 3).

theta = (a, alpha, b, beta, E) with L = exp(a - alpha x) + exp(b - beta y) + E, where x and y are log N and log D, each
minus its mean.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from dlm.fit.laws.law import Features, Law, two_term_optimum
from dlm.fit.points import Array


class Chinchilla(Law):
    """The sum of a power law of N, a power law of D, and a floor E."""

    name = "chinchilla"
    formula = "L = E + A/N^alpha + B/D^beta"
    params = ("E", "A", "B", "alpha", "beta")
    pins: ClassVar[dict[str, int]] = {"alpha": 1, "beta": 3, "E": 4}

    def loss(self, theta: Array, x: Features) -> Array:
        a, alpha, b, beta, e = (theta[:, k : k + 1] for k in range(5))
        return np.asarray(np.exp(a - alpha * x[0]) + np.exp(b - beta * x[1]) + e)

    def jet(self, theta: Array, x: Features) -> tuple[Array, Array]:
        slopes = np.empty((5, len(theta), len(x[0])), dtype=theta.dtype)
        for k, v in ((0, x[0]), (2, x[1])):
            term = np.matmul(theta[:, k : k + 2], np.stack([np.ones_like(v), -v]), out=slopes[k])
            np.multiply(np.exp(term, out=term), -v, out=slopes[k + 1])
        slopes[4] = 1.0
        return slopes[0] + slopes[2] + theta[:, 4:5], slopes.transpose(1, 0, 2)

    def bend(self, theta: Array, x: Features, slopes: Array, pull: Array) -> Array:
        second = np.zeros((len(theta), 5, 5))
        for k, v in ((0, x[0]), (2, x[1])):
            moments = (pull * slopes[:, k]) @ np.stack([np.ones_like(v), -v, v * v], axis=1)
            second[:, k, k] = moments[:, 0]
            second[:, k, k + 1] = second[:, k + 1, k] = moments[:, 1]
            second[:, k + 1, k + 1] = moments[:, 2]
        return second

    def rows(self, theta: Array, centre: Array) -> Array:
        a, alpha, b, beta, e = theta.T
        with np.errstate(over="ignore"):
            return np.stack([e, np.exp(a + alpha * centre[0]), np.exp(b + beta * centre[1]), alpha, beta], 1)

    def theta(self, rows: Array, centre: Array) -> Array:
        e, a, b, alpha, beta = rows.T
        return np.stack([np.log(a) - alpha * centre[0], alpha, np.log(b) - beta * centre[1], beta, e], axis=1)

    def starts(self, chinchilla: Array) -> Array:
        return chinchilla

    def exponents_at_6nd(self, rows: Array) -> Array:
        return np.asarray(rows[:, 4] / (rows[:, 3] + rows[:, 4]))

    def optimum_at_6nd(self, rows: Array, flops: float) -> Array:
        _, a, b, alpha, beta = rows.T
        return two_term_optimum(np.log(b) - np.log(a), alpha, beta, flops)
