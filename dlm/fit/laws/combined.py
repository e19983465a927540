"""The combined law: the weighted geometric mean of several fits of other laws."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dlm.fit.laws.law import Law, Surface
from dlm.fit.points import Array, Mask


class Combined(Surface):
    """log L is the weighted mean of the log L of its parts. Its rows are the rows of the parts, side by side.

    A part that found no law in a replicate is left out of the mean there.
    """

    name = "combined"

    def __init__(self, parts: Mapping[str, Law], weights: Mapping[str, float]) -> None:
        """Combine `parts`, by name, with `weights` that sum to 1. A parameter is called 'PART.NAME'."""
        self.parts, self.weights = dict(parts), {name: weights[name] for name in parts}
        shares = ", ".join(f"{w:.0%} {name}" for name, w in sorted(self.weights.items(), key=lambda part: -part[1]))
        self.formula = f"log L = mean of the log L of its parts, by weight: {shares}"
        self.params, self.scales, self.exponents = (
            tuple(f"{part}.{name}" for part, law in self.parts.items() for name in getattr(law, kind))
            for kind in ("params", "scales", "exponents")
        )

    def split(self, rows: Array) -> list[Array]:
        """The rows of each part, (R, p)."""
        return np.split(rows, np.cumsum([len(law.params) for law in self.parts.values()])[:-1], axis=1)

    def found(self, rows: Array) -> Mask:
        return self._weights_found(rows) > 0

    def predict(self, rows: Array, log_n: Array, log_d: Array) -> Array:
        pairs = zip(self.parts.values(), self.split(rows), strict=True)
        return np.exp(self._mean(rows, [np.log(law.predict(own, log_n, log_d)) for law, own in pairs]))

    def near_optimum(self, rows: Array, flops: float) -> Array | None:
        pairs = zip(self.parts.values(), self.split(rows), strict=True)
        guesses = [law.near_optimum(own, flops) for law, own in pairs]
        known = [guess for guess in guesses if guess is not None]
        return self._mean(rows, known) if len(known) == len(guesses) else None

    def _weights_found(self, rows: Array) -> Array:
        """The total weight of the parts that found a law in each row, (R,)."""
        pairs = zip(self.weights.values(), self.parts.values(), self.split(rows), strict=True)
        return np.asarray(sum(w * law.found(own) for w, law, own in pairs), dtype=np.float64)

    def _mean(self, rows: Array, values: list[Array]) -> Array:
        """The weighted mean of values of the parts, each (R,) or (R, m), over those that found a law in each row."""
        total = np.where(self.found(rows), self._weights_found(rows), np.nan)
        mean = np.zeros(1)
        for (name, law), own, value in zip(self.parts.items(), self.split(rows), values, strict=True):
            mean = mean + self.weights[name] * np.where(law.found(own), value.T, 0.0)
        return np.asarray((mean / total).T)
