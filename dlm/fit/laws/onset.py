"""A law of repeated data that can turn upward: from a number of epochs on, the loss rises by a power of the epochs.

L = (E + A/N^alpha + B/(U^beta w^kappa)) (1 + (e/e_o)^k)^(s/k) with e_o = K U^u / N^n. The bracket is the law `epochs`.
That the epochs at which overfitting starts are a power law of U and N is the finding of Quokka (2510.03280), which
gives u = .39 and n = .55.
theta = (a, alpha, b, beta, E, kappa, log e0, log K, u, n, log s, log k).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from dlm.fit.laws.epochs import Epochs
from dlm.fit.laws.law import Features
from dlm.fit.points import Array

NUM_BASE = 7  # columns of theta that belong to `epochs`


class Rise(NamedTuple):
    """The log of the second factor, and what its derivatives are made of, all (R, n) except s and k, (R, 1)."""

    log: Array  # s/k log(1 + e^y)
    late: Array  # v = log e - log e_o
    share: Array  # 1 / (1 + e^-y) with y = k v
    s: Array
    k: Array


class Onset(Epochs):
    """The law `epochs`, which rises as e^s beyond the onset of overfitting; k sets how sharply it turns."""

    name = "onset"
    formula = (
        "L = (E + A/N^alpha + B/(U^beta w^kappa)) (1 + (e N^n / (K U^u))^k)^(s/k), with w = (e + e0)/(1 + e0), e = D/U"
    )
    params = (*Epochs.params, "K", "u", "n", "s", "k")
    scales = (*Epochs.scales, "K", "s", "k")
    pins: ClassVar[dict[str, int]] = {**Epochs.pins, "u": 8, "n": 9}
    variants: ClassVar[Sequence[Sequence[float]]] = (
        (4.5, 0.2, 0.4, np.log(0.3), np.log(2.0)),
        (5.5, 0.2, 0.4, np.log(0.6), 0.0),
    )
    turn: ClassVar[tuple[str, ...]] = ("K", "u", "n", "s", "k")

    def loss(self, theta: Array, x: Features) -> Array:
        return np.asarray(self.base(theta, self.terms(theta, x)) * np.exp(self._rise(theta, x).log))

    def jet(self, theta: Array, x: Features) -> tuple[Array, Array]:
        terms, rise = self.terms(theta, x), self._rise(theta, x)
        factor = np.exp(rise.log)
        loss = self.base(theta, terms) * factor
        slopes = np.empty((len(self.params), *loss.shape))
        slopes[:NUM_BASE] = self.base_slopes(theta, x, terms).transpose(1, 0, 2) * factor
        slopes[NUM_BASE:] = _slopes(rise, x).transpose(1, 0, 2) * loss
        return loss, slopes.transpose(1, 0, 2)

    def bend(self, theta: Array, x: Features, slopes: Array, pull: Array) -> Array:
        terms, rise = self.terms(theta, x), self._rise(theta, x)
        factor = pull * np.exp(rise.log)
        own, tilts = self.base_slopes(theta, x, terms), _slopes(rise, x)
        second = np.zeros((len(theta), len(self.params), len(self.params)))
        second[:, :NUM_BASE, :NUM_BASE] = self.base_bend(theta, x, terms, factor)
        mixed = (own * factor[:, None]) @ tilts.transpose(0, 2, 1)
        second[:, :NUM_BASE, NUM_BASE:] = mixed
        second[:, NUM_BASE:, :NUM_BASE] = mixed.transpose(0, 2, 1)
        weighted = factor * self.base(theta, terms)
        second[:, NUM_BASE:, NUM_BASE:] = (tilts * weighted[:, None]) @ tilts.transpose(0, 2, 1)
        second[:, NUM_BASE:, NUM_BASE:] += _bend(rise, x, weighted)
        return second

    def rows(self, theta: Array, centre: Array) -> Array:
        place, u, n, log_s, log_k = theta[:, NUM_BASE:].T
        scale = np.exp(place + n * centre[0] - u * centre[1])
        own = super().rows(theta[:, :NUM_BASE], centre)
        return np.column_stack([own, scale, u, n, np.exp(log_s), np.exp(log_k)])

    def theta(self, rows: Array, centre: Array) -> Array:
        scale, u, n, s, k = rows[:, NUM_BASE:].T
        place = np.log(scale) - n * centre[0] + u * centre[1]
        return np.column_stack([super().theta(rows[:, :NUM_BASE], centre), place, u, n, np.log(s), np.log(k)])

    def _rise(self, theta: Array, x: Features) -> Rise:
        place, u, n, log_s, log_k = (theta[:, j : j + 1] for j in range(NUM_BASE, NUM_BASE + 5))
        s, k = np.exp(log_s), np.exp(log_k)
        late = x[2] - place - u * (x[1] - x[2]) + n * x[0]
        return Rise(s * np.logaddexp(0.0, k * late) / k, late, np.exp(-np.logaddexp(0.0, -k * late)), s, k)


def _along(x: Features, like: Array) -> Array:
    """The derivatives of log e - log e_o by (log K, u, n), (R, 3, n)."""
    one = np.ones_like(like)
    return np.stack([-one, (x[2] - x[1]) * one, x[0] * one], axis=1)


def _slopes(rise: Rise, x: Features) -> Array:
    """The derivatives of the log of the rise by its own five columns of theta, (R, 5, n)."""
    steep = rise.s * rise.share
    by_k = steep * rise.late - rise.log
    return np.concatenate([_along(x, steep) * steep[:, None], rise.log[:, None], by_k[:, None]], axis=1)


def _bend(rise: Rise, x: Features, weighted: Array) -> Array:
    """The second derivatives of the log of the rise, summed with the weights `weighted`, (R, 5, 5)."""
    along, steep = _along(x, rise.share), rise.s * rise.share
    flat = steep * (1.0 - rise.share)
    by_k = steep * rise.late - rise.log
    second = np.zeros((len(weighted), 5, 5))
    second[:, :3, :3] = (along * (weighted * flat * rise.k)[:, None]) @ along.transpose(0, 2, 1)
    for column, tilt in ((3, steep), (4, flat * rise.k * rise.late)):
        cross = (along * (weighted * tilt)[:, None]).sum(axis=2)
        second[:, :3, column] = cross
        second[:, column, :3] = cross
    second[:, 3, 3] = (weighted * rise.log).sum(axis=1)
    second[:, 3, 4] = second[:, 4, 3] = (weighted * by_k).sum(axis=1)
    second[:, 4, 4] = (weighted * (flat * rise.k * rise.late**2 - by_k)).sum(axis=1)
    return second
