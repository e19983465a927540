"""The data-constrained law: Chinchilla's law in which repeated data are worth less than unique data.

This is Muennighoff et al., 2305.16264, equations 5 and 6:
L = E + A/N'^alpha + B/D'^beta. U of the D tokens are unique, and D' = U + U R_D (1 - exp(-(D/U - 1)/R_D)) if D > U.
Likewise N' = U_N + U_N R_N (1 - exp(-(N/U_N - 1)/R_N)) if N > U_N, where U_N is the best size for U tokens.
theta = (a, alpha, b, beta, E, log R_D, log R_N). The features are log N (at most log U_N), log D (at most log U), and
the repetitions N/U_N - 1 and D/U - 1 (at least 0).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from dlm.fit.laws.chinchilla import Chinchilla
from dlm.fit.laws.law import Features, Law, add_power
from dlm.fit.points import Array, Points

R_STARTS = (0.5, 1.5, 5.0, 15.0, 50.0, 150.0)
PLAIN = Chinchilla()  # the first five coordinates are those of Chinchilla's law


class DataConstrained(Law):
    """The law of N, D and unique tokens; predictions assume `unique` unique tokens."""

    name = "data-constrained"
    formula = "L = E + A/N'^alpha + B/D'^beta, with N' and D' reduced by repetition"
    params = ("E", "A", "B", "alpha", "beta", "R_D", "R_N")
    scales = ("A", "B", "R_D", "R_N")
    pins: ClassVar[dict[str, int]] = {"alpha": 1, "beta": 3, "E": 4, "R_D": 5, "R_N": 6, "A": 0, "B": 2}

    def __init__(self, base: dict[str, float], unique: float) -> None:
        """Set the constants that the law needs besides its parameters.

        Args:
            base: The parameters of Chinchilla's law for runs that repeat nothing; they determine U_N.
            unique: U for predictions, tokens.
        """
        self.base, self.unique = base, unique

    def best_size(self, unique: Array) -> Array:
        """U_N in parameters: the size of the compute-optimal run on U tokens, under `base` and C = 6 N D."""
        a, b, alpha, beta = (self.base[k] for k in ("A", "B", "alpha", "beta"))
        log_g = (np.log(alpha * a) - np.log(beta * b)) / (alpha + beta)
        return np.asarray(np.exp(log_g + (np.log(unique) + log_g) * beta / alpha))

    def features(self, points: Points) -> Features:
        assert points.unique is not None, "fit_surface checks that they are given"
        return self._features(np.log(points.params), np.log(points.tokens), points.unique)

    def along(self, log_n: Array, log_d: Array) -> Features:
        return self._features(log_n, log_d, np.asarray(self.unique))

    def _features(self, log_n: Array, log_d: Array, unique: Array) -> Features:
        log_u, log_size = np.log(unique), np.log(self.best_size(unique))
        repeated = (np.expm1(np.maximum(v, 0.0)) for v in (log_n - log_size, log_d - log_u))
        return np.minimum(log_n, log_size), np.minimum(log_d, log_u), *repeated

    def jet(self, theta: Array, x: Features) -> tuple[Array, Array]:
        a, alpha, b, beta, e, log_rd, log_rn = (theta[:, k : k + 1] for k in range(7))
        log_n, by_rn, _ = _worth(x[0], x[2], log_rn)
        log_d, by_rd, _ = _worth(x[1], x[3], log_rd)
        size, tokens = np.exp(a - alpha * log_n), np.exp(b - beta * log_d)
        own = [size, -size * log_n, tokens, -tokens * log_d, np.ones_like(size)]
        both = [*own, -tokens * beta * by_rd, -size * alpha * by_rn]
        return size + tokens + e, np.stack(np.broadcast_arrays(*both), axis=1)

    def bend(self, theta: Array, x: Features, slopes: Array, pull: Array) -> Array:
        second = np.zeros((len(theta), 7, 7))
        for amount, power, limit, own in ((0, 1, 6, 0), (2, 3, 5, 1)):
            exponent = theta[:, power : power + 1]
            log_worth, by_r, bent = _worth(x[own], x[own + 2], theta[:, limit : limit + 1])
            weighted = pull * slopes[:, amount]
            tilts = [np.ones_like(weighted), -log_worth * np.ones_like(weighted), -exponent * by_r]
            add_power(second, [amount, power, limit], weighted, tilts)
            cross = -(weighted * by_r).sum(axis=1)
            second[:, power, limit] += cross
            second[:, limit, power] += cross
            second[:, limit, limit] -= (weighted * exponent * bent).sum(axis=1)
        return second

    def rows(self, theta: Array, centre: Array) -> Array:
        return np.column_stack([PLAIN.rows(theta[:, :5], centre), np.exp(theta[:, 5:])])

    def theta(self, rows: Array, centre: Array) -> Array:
        return np.column_stack([PLAIN.theta(rows[:, :5], centre), np.log(rows[:, 5:])])

    def starts(self, chinchilla: Array) -> Array:
        """The Chinchilla laws with every pair of R_D and R_N from R_STARTS."""
        pairs = np.log(np.stack(np.meshgrid(R_STARTS, R_STARTS), axis=-1).reshape(-1, 2))
        return np.column_stack([np.tile(chinchilla, (len(pairs), 1)), np.repeat(pairs, len(chinchilla), axis=0)])


def _worth(log_unique: Array, repeated: Array, log_r: Array) -> tuple[Array, Array, Array]:
    """log D' (or log N') from the features, and its two derivatives with respect to log R_D (or log R_N)."""
    r = np.exp(log_r)
    left = np.exp(-repeated / r)
    gain = r * (1.0 - left)
    first = (gain - repeated * left) / (1.0 + gain)
    second = (gain - repeated * left * (1.0 + repeated / r)) / (1.0 + gain)
    return log_unique + np.log1p(gain), first, second - first**2
