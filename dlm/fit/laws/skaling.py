"""The Skaling law, L = E + A (N^-alpha + R D^-beta)^k (2608.07222); k = 1 is Chinchilla's law with B = A R.

theta = (a, alpha', b, beta', E, log k) with u = a - alpha' x, v = b - beta' y and L = E + (exp(u/k) + exp(v/k))^k.
The points determine the slopes alpha' = k alpha and beta' = k beta, so the rest of theta hardly changes when k changes.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from dlm.fit.laws.law import Features, Law, two_term_optimum
from dlm.fit.points import Array

K_STARTS = (0.15, 0.35, 0.7, 1.0, 1.6)


class Skaling(Law):
    """The k-th power of a sum of two power laws, plus a floor E."""

    name = "skaling"
    formula = "L = E + A (N^-alpha + R D^-beta)^k"
    params = ("E", "A", "R", "alpha", "beta", "k")
    scales = ("A", "R", "k")
    pins: ClassVar[dict[str, int]] = {"E": 4, "k": 5}

    def loss(self, theta: Array, x: Features) -> Array:
        return np.asarray(np.exp(self._mixed(theta, x)[0]) + theta[:, 4:5])

    def jet(self, theta: Array, x: Features) -> tuple[Array, Array]:
        h, share, entropy, _, k = self._mixed(theta, x)
        mixed = np.exp(h)
        slopes = np.empty((6, len(theta), len(x[0])), dtype=theta.dtype)
        slopes[0] = mixed * share
        slopes[1] = -slopes[0] * x[0]
        slopes[2] = mixed * (1.0 - share)
        slopes[3] = -slopes[2] * x[1]
        slopes[4] = 1.0
        slopes[5] = mixed * k * entropy
        return mixed + theta[:, 4:5], slopes.transpose(1, 0, 2)

    def bend(self, theta: Array, x: Features, slopes: Array, pull: Array) -> Array:
        """Use d2 e^h = e^h (h' h'^T + h'') with h = k log(e^(u/k) + e^(v/k)) and h'' from the softmax of (u, v)/k."""
        h, share, entropy, gap, k = self._mixed(theta, x)
        mixed = pull * np.exp(h)
        one, other = np.ones_like(x[0]), 1.0 - share
        inner = [share, -share * x[0], other, -other * x[1], k * entropy]
        first = np.stack([np.broadcast_to(v, share.shape) for v in inner], axis=1)
        second = np.zeros((len(theta), 6, 6))
        second[:, :5, :5] = (first * mixed[:, None]) @ first.transpose(0, 2, 1)
        tilt = mixed * share * other / k  # h_uu = h_vv = -h_uv
        along = np.stack([one, -x[0], -one, x[1]])  # derivatives of u - v by (a, alpha', b, beta')
        second[:, :4, :4] += (tilt[:, None] * along) @ along.T
        cross = -(mixed * share * other * gap) @ along.T  # h_(log k, u) = -h_(log k, v)
        second[:, :4, 4] += cross
        second[:, 4, :4] += cross
        second[:, 4, 4] += (mixed * k * (entropy + share * other * gap**2)).sum(axis=1)
        order = [0, 1, 2, 3, 5, 4]  # in theta, E stands before log k; h does not depend on E
        return second[:, order][:, :, order]

    def rows(self, theta: Array, centre: Array) -> Array:
        a, alpha, b, beta, e, log_k = theta.T
        k = np.exp(log_k)
        log_a, log_b = a + alpha * centre[0], b + beta * centre[1]
        with np.errstate(over="ignore"):
            return np.stack([e, np.exp(log_a), np.exp((log_b - log_a) / k), alpha / k, beta / k, k], axis=1)

    def theta(self, rows: Array, centre: Array) -> Array:
        e, a, r, alpha, beta, k = rows.T
        log_a = np.log(a)
        log_b = log_a + k * np.log(r)
        own = [log_a - k * alpha * centre[0], k * alpha, log_b - k * beta * centre[1], k * beta]
        return np.stack([*own, e, np.log(k)], axis=1)

    def starts(self, chinchilla: Array) -> Array:
        """The Chinchilla laws at each k of K_STARTS, shifted so that the loss in the middle of the points is kept."""
        k = np.repeat(K_STARTS, len(chinchilla))
        lifted = np.column_stack([np.tile(chinchilla, (len(K_STARTS), 1)), np.log(k)])
        lifted[:, [0, 2]] += (1.0 - k[:, None]) * np.log(2.0)
        return lifted

    def exponents_at_6nd(self, rows: Array) -> Array:
        return np.asarray(rows[:, 4] / (rows[:, 3] + rows[:, 4]))

    def optimum_at_6nd(self, rows: Array, flops: float) -> Array:
        return two_term_optimum(np.log(rows[:, 2]), rows[:, 3], rows[:, 4], flops)

    def _mixed(self, theta: Array, x: Features) -> tuple[Array, Array, Array, Array, Array]:
        """h, the share of u in the softmax of (u, v)/k, the entropy of that softmax, (u - v)/k, and k."""
        a, alpha, b, beta, _, log_k = (theta[:, j : j + 1] for j in range(6))
        k = np.exp(log_k)
        first, second = (a - alpha * x[0]) / k, (b - beta * x[1]) / k
        gap = first - second
        top = np.where(gap.real > 0, first, second)
        rest = np.exp(-np.where(gap.real > 0, gap, -gap))  # of the smaller term
        total = top + np.log1p(rest)
        share = np.where(gap.real > 0, 1.0, rest) / (1.0 + rest)
        entropy = total - share * first - (1.0 - share) * second
        return k * total, share, entropy, gap, k
