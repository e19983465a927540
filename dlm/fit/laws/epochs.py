"""A law of repeated data in which an epoch counts less than new text and never harms.

L = E + A/N^alpha + B/(U^beta w^kappa) with w = (e + e0)/(1 + e0), where U is the number of unique tokens and e = D/U is
the number of epochs. At e = 1 it is Chinchilla's law. The first epochs may do little, for example because the learning
rate still rises; e0 is the number of epochs from which on the loss falls as e^-kappa. The laws that can turn upward,
`penalty` and `onset`, extend this one.
theta = (a, alpha, b, beta, E, kappa, log e0). The features are log N, log D and log e.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from dlm.fit.laws.chinchilla import Chinchilla
from dlm.fit.laws.correction import Correctable
from dlm.fit.laws.law import Features, add_power
from dlm.fit.points import Array, Points

PLAIN = Chinchilla()  # the first five coordinates are those of Chinchilla's law
KNEES = (0.3, 10.0)  # the values of e0 from which a fit starts
KNEE = ([2, 3, 5, 6], 5, 6)  # the columns of theta in the data term, that of kappa and that of log e0


class Terms(NamedTuple):
    """The parts of the law at every point, (R, n), and the derivatives of log w by log e0."""

    size: Array  # A/N^alpha
    data: Array  # B/(U^beta w^kappa)
    log_w: Array
    slope: Array  # first derivative
    bend: Array  # second derivative


class Epochs(Correctable):
    """Chinchilla's law of the unique tokens, whose data term falls more slowly with epochs than with new text."""

    name = "epochs"
    formula = "L = E + A/N^alpha + B/(U^beta w^kappa), with w = (e + e0)/(1 + e0) and e = D/U epochs"
    params: tuple[str, ...] = ("E", "A", "B", "alpha", "beta", "kappa", "e0")
    scales: tuple[str, ...] = ("A", "B", "e0")
    pins: ClassVar[dict[str, int]] = {"alpha": 1, "beta": 3, "E": 4, "kappa": 5, "e0": 6}
    turn: ClassVar[tuple[str, ...]] = ()  # params of the term that makes the loss rise
    variants: ClassVar[Sequence[Sequence[float]]] = ((),)  # what follows log e0 in theta, at each start of a fit

    def __init__(self, unique: float) -> None:
        """Set the number of unique tokens that predictions assume."""
        self.unique = unique

    def features(self, points: Points) -> Features:
        assert points.unique is not None, "fit_surface checks that they are given"
        return self._features(np.log(points.params), np.log(points.tokens), points.unique)

    def along(self, log_n: Array, log_d: Array) -> Features:
        return self._features(log_n, log_d, np.asarray(self.unique))

    def _features(self, log_n: Array, log_d: Array, unique: Array) -> Features:
        """A run of at most `unique` tokens repeats nothing: it has one epoch of its own tokens."""
        return log_n, log_d, np.maximum(log_d - np.log(unique), 0.0)

    def loss(self, theta: Array, x: Features) -> Array:
        return self.base(theta, self.terms(theta, x))

    def jet(self, theta: Array, x: Features) -> tuple[Array, Array]:
        terms = self.terms(theta, x)
        return self.base(theta, terms), self.base_slopes(theta, x, terms)

    def bend(self, theta: Array, x: Features, slopes: Array, pull: Array) -> Array:
        return self.base_bend(theta, x, self.terms(theta, x), pull)

    def rows(self, theta: Array, centre: Array) -> Array:
        return np.column_stack([PLAIN.rows(theta[:, :5], centre), theta[:, 5], np.exp(theta[:, 6])])

    def theta(self, rows: Array, centre: Array) -> Array:
        return np.column_stack([PLAIN.theta(rows[:, :5], centre), rows[:, 5], np.log(rows[:, 6])])

    def starts(self, chinchilla: Array) -> Array:
        """The Chinchilla laws with kappa = beta, each e0 of KNEES and each of `variants`."""
        tails = [[np.log(knee), *variant] for knee in KNEES for variant in self.variants]
        own = np.column_stack([chinchilla, chinchilla[:, 3]])
        return np.concatenate([np.column_stack([own, np.tile(tail, (len(own), 1))]) for tail in tails])

    def terms(self, theta: Array, x: Features) -> Terms:
        """The parts of the law."""
        a, alpha, b, beta, _, kappa, knee = (theta[:, k : k + 1] for k in range(7))
        log_w = np.logaddexp(x[2], knee) - np.logaddexp(0.0, knee)
        late, one = 1.0 / (1.0 + np.exp(x[2] - knee)), 1.0 / (1.0 + np.exp(-knee))
        data = np.exp(b - beta * (x[1] - x[2]) - kappa * log_w)
        bend = late * (1.0 - late) - one * (1.0 - one)
        return Terms(np.exp(a - alpha * x[0]), data, log_w, late - one, bend)

    def base(self, theta: Array, terms: Terms) -> Array:
        """The law without what `penalty` and `onset` add."""
        return np.asarray(terms.size + terms.data + theta[:, 4:5])

    def base_slopes(self, theta: Array, x: Features, terms: Terms) -> Array:
        """The derivatives of `base`, (R, 7, n)."""
        size, data = terms.size, terms.data
        slopes = np.empty((7, *data.shape))
        slopes[0], slopes[1] = size, -size * x[0]
        slopes[2], slopes[3] = data, -data * (x[1] - x[2])
        slopes[4], slopes[5] = 1.0, -data * terms.log_w
        slopes[6] = -data * theta[:, 5:6] * terms.slope
        return slopes.transpose(1, 0, 2)

    def base_bend(self, theta: Array, x: Features, terms: Terms, pull: Array) -> Array:
        """The second derivatives of `base`, summed with the weights `pull`, (R, 7, 7)."""
        second = np.zeros((len(theta), 7, 7))
        kappa, one = theta[:, 5:6], np.ones_like(terms.data)
        add_power(second, [0, 1], pull * terms.size, [one, -x[0] * one])
        tilts = [one, (x[2] - x[1]) * one, -terms.log_w, -kappa * terms.slope]
        add_power(second, KNEE[0], pull * terms.data, tilts)
        cross = -(pull * terms.data * terms.slope).sum(axis=1)
        second[:, KNEE[1], KNEE[2]] += cross
        second[:, KNEE[2], KNEE[1]] += cross
        second[:, KNEE[2], KNEE[2]] -= (pull * terms.data * kappa * terms.bend).sum(axis=1)
        return second
