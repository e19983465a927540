"""A law of repeated data that can turn upward: text that the model has learned by heart adds a penalty to the loss.

L = E + A/N^alpha + B/(U^beta w^kappa) + P (N/U)^delta e^epsilon. The first three terms are those of the law `epochs`.
An additive penalty for repetition is the idea of 2605.01640. The powers of N/U and of the epochs e are our own choice.
theta = (a, alpha, b, beta, E, kappa, log e0, p, delta, epsilon).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from dlm.fit.laws.epochs import Epochs
from dlm.fit.laws.law import Features, add_power
from dlm.fit.points import Array

NUM_BASE = 7  # columns of theta that belong to `epochs`


class Penalty(Epochs):
    """The law `epochs` plus a penalty that grows with the parameters per unique token and with the epochs."""

    name = "penalty"
    formula = (
        "L = E + A/N^alpha + B/(U^beta w^kappa) + P (N/U)^delta e^epsilon, with w = (e + e0)/(1 + e0), e = D/U epochs"
    )
    params = (*Epochs.params, "P", "delta", "epsilon")
    scales = (*Epochs.scales, "P")
    pins: ClassVar[dict[str, int]] = {**Epochs.pins, "delta": 8, "epsilon": 9}
    variants: ClassVar[Sequence[Sequence[float]]] = ((-4.0, 0.4, 0.7), (-8.0, 0.4, 1.4))
    turn: ClassVar[tuple[str, ...]] = ("P", "delta", "epsilon")

    def loss(self, theta: Array, x: Features) -> Array:
        return np.asarray(self.base(theta, self.terms(theta, x)) + self._penalty(theta, x))

    def jet(self, theta: Array, x: Features) -> tuple[Array, Array]:
        terms, penalty = self.terms(theta, x), self._penalty(theta, x)
        slopes = np.empty((len(self.params), *penalty.shape))
        slopes[:NUM_BASE] = self.base_slopes(theta, x, terms).transpose(1, 0, 2)
        slopes[7], slopes[8], slopes[9] = penalty, penalty * _log_ratio(x), penalty * x[2]
        return self.base(theta, terms) + penalty, slopes.transpose(1, 0, 2)

    def bend(self, theta: Array, x: Features, slopes: Array, pull: Array) -> Array:
        second = np.zeros((len(theta), len(self.params), len(self.params)))
        second[:, :NUM_BASE, :NUM_BASE] = self.base_bend(theta, x, self.terms(theta, x), pull)
        penalty = self._penalty(theta, x)
        one = np.ones_like(penalty)
        add_power(second, [7, 8, 9], pull * penalty, [one, _log_ratio(x) * one, x[2] * one])
        return second

    def rows(self, theta: Array, centre: Array) -> Array:
        p, delta, epsilon = theta[:, NUM_BASE:].T
        scale = np.exp(p - delta * (centre[0] - centre[1]))
        return np.column_stack([super().rows(theta[:, :NUM_BASE], centre), scale, delta, epsilon])

    def theta(self, rows: Array, centre: Array) -> Array:
        scale, delta, epsilon = rows[:, NUM_BASE:].T
        p = np.log(scale) + delta * (centre[0] - centre[1])
        return np.column_stack([super().theta(rows[:, :NUM_BASE], centre), p, delta, epsilon])

    def _penalty(self, theta: Array, x: Features) -> Array:
        p, delta, epsilon = (theta[:, k : k + 1] for k in range(NUM_BASE, NUM_BASE + 3))
        return np.asarray(np.exp(p + delta * _log_ratio(x) + epsilon * x[2]))


def _log_ratio(x: Features) -> Array:
    """log N/U, each on its centre."""
    return x[0] - x[1] + x[2]
