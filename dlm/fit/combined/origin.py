"""What became of a prediction of held-out runs: the record of one rolling origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dlm.fit.points import Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """Runs that were held out, and the errors of their predictions."""

    start: float  # the lowest C that was held out, FLOPs
    level: Array  # the level of each run, (m,)
    distance: Array  # log10 of C over the highest C that was kept, (m,)
    errors: Mapping[str, Array]  # log of predicted over measured loss under each part, (m,); a part may be missing

    def of(self, weights: Mapping[str, float]) -> Array:
        """The log error of the weighted geometric mean of the parts, (m,)."""
        known = {name: weights[name] for name in self.errors}
        total = sum(known.values())
        return np.asarray(sum(w / total * self.errors[name] for name, w in known.items()))

    def by_level(self, errors: Array) -> tuple[Array, Array]:
        """The mean distance and the mean log error of each level that was held out."""
        _, place = np.unique(self.level, return_inverse=True)
        count = np.bincount(place)
        return np.bincount(place, weights=self.distance) / count, np.bincount(place, weights=errors) / count
