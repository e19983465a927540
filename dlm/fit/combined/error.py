"""Estimate by how much a prediction beyond the runs is wrong because the form of the law is.

The log error of a prediction is taken to grow with the root of the distance, log10 of C over the highest C of the runs,
and to follow Student's t. Its scale at one decade starts from what the same rule missed on published sets of runs whose
top budgets were hidden, and moves towards what it misses when the top budgets of these runs are held out.
`benchmarks/predict.py` measures both, and how often the intervals hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dlm.fit.points import Array

# The published sets: scale and degrees of freedom of the log error of L at one decade.
PRIOR_SCALE = 0.010
PRIOR_DOF = 4.0
GROWTH = 0.5  # the power of the distance with which the error grows
WORTH = 1.0  # degrees of freedom that an origin adds
FAR = 0.3  # decades; what nearer runs miss when they are held out, which is mostly noise, counts as at this distance
NEAR = 0.03  # decades; nearer to the runs and within them, the error is that at this distance
PRIOR_N = 0.21  # standard deviation of log N* at one decade on the same sets; it grows with the root of the distance
BIAS_N = 0.03  # of log N* within the runs: a parabola over a factor of 25 to 64 in size is off by 1 to 3 %


@dataclass(frozen=True, kw_only=True)
class FormError:
    """The error of a law's form: Student's t with a scale that grows with the distance.

    The defaults are those of files that earlier versions froze.
    """

    scale: float  # of log L at one decade beyond the runs
    dof: float
    most: float  # the highest N D of the runs, from which the distance of a single run is measured
    growth: float = 1.0  # the power of the distance with which the scale grows
    near: float = 0.1  # decades; the least distance
    least: float | None = None  # the lowest N D of the runs; None in files that earlier versions froze

    def half(self, distance: Array | float, level: float) -> Array:
        """The half-width of the interval of log L that has the coverage `level`, at a distance in decades."""
        from scipy.special import stdtrit

        return np.asarray(
            stdtrit(self.dof, (1 + level) / 2) * self.scale * np.maximum(distance, self.near) ** self.growth
        )

    def half_of_run(self, params: Array, tokens: Array, level: float) -> Array:
        """The half-width for single runs with N = `params` and D = `tokens`, each (m,)."""
        product = params * tokens
        above = np.log10(product / self.most)
        return self.half(above if self.least is None else np.maximum(above, np.log10(self.least / product)), level)


def half_of_size(distance: float, level: float) -> float:
    """The half-width of the interval of log N* that the form of the law causes, at a distance in decades."""
    from scipy.special import ndtri

    return float(ndtri((1 + level) / 2) * np.sqrt(BIAS_N**2 + PRIOR_N**2 * max(distance, 0.0)))
