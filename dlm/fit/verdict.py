"""verdict: how far a law may be believed, in numbers and in words. Made by gate, carried by FitResult."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm.fit import text
from dlm.fit.points import Interval

if TYPE_CHECKING:
    from dlm.fit.result import FitResult


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """How far a law may be extrapolated, and what limits it."""

    top: float  # the highest C of the runs
    reach: float  # the highest C at which L* is given
    limit: str  # what stops it there, in words
    missed: float  # relative error of the better form where the top budgets were held out; NaN if none could be
    aicc: Mapping[str, float]  # of each form, on squares of log residuals; the lower is preferred
    target: float  # the C of the four numbers below
    differ_n: float  # largest over smallest N* of the methods
    differ_l: float  # relative difference of the forms' L*
    regret: float  # nats/token lost at most by a size inside the interval of N*
    n: Interval  # of N* over all methods
    forms: Mapping[str, FitResult] = field(default_factory=dict, repr=False)
    methods: Sequence[FitResult] = field(default_factory=tuple, repr=False)  # all that say N*

    def sentence(self) -> str:
        """The verdict in words, with its numbers."""
        far = f"up to {text.flops(self.reach)} FLOPs ({self.reach / self.top:.3g} times the highest)"
        if self.reach <= self.top:
            far = f"within the runs, up to {text.flops(self.top)} FLOPs, and not beyond"
        said = [f"L* may be read {far}: {self.limit}"]
        if np.isfinite(self.missed):
            said.append(f"with the top budgets held out, the better form missed their loss by {self.missed:.2%}")
        if len(self.aicc) > 1:
            low, high = sorted(self.aicc, key=self.aicc.__getitem__)
            said.append(f"AICc prefers {low} to {high} by {self.aicc[high] - self.aicc[low]:.1f}")
        at = f"at {text.flops(self.target)} FLOPs the methods' N* differ by a factor of {self.differ_n:.2f}"
        if np.isfinite(self.differ_l):
            at += f", the forms' L* by {self.differ_l:.1%}"
        if np.isfinite(self.regret):
            at += f", and any size within {text.interval(self.n, 'count')} loses at most {self.regret:.2g} nats/token"
        return "; ".join([*said, at]) + "."

    def to_dict(self) -> dict[str, Any]:
        """All but the fits themselves, and the sentence."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        return {**shown, "sentence": self.sentence()}
