"""The result of a fit as plain data: what laws, intervals and reports read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm.core import text
from dlm.fit.points import NAN, Interval

if TYPE_CHECKING:
    from dlm.fit.result import FitResult


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Relative standard deviations of a loss; NaN where the runs do not show a part."""

    residual: float = NAN  # about the law, all parts but the shared one
    seed: float = NAN  # between runs of one cell
    trunk: float = NAN  # shared by the points of one trunk
    monte_carlo: float = NAN  # median loss_se over loss
    monte_carlo_own: float = NAN  # the part of it that runs do not share
    replicates: int = 0  # degrees of freedom behind `seed`
    lack_of_fit: float = NAN  # F of the law's misfit over the seeds' noise
    lack_of_fit_p: float = NAN  # how often chance gives such an F

    def sentence(self) -> str:
        """The parts that are known, in words; '' if none is."""
        parts = {
            "about the law": self.residual,
            f"between seeds ({self.replicates} degrees of freedom)": self.seed,
            "shared by a trunk or run": self.trunk,
            "Monte Carlo": self.monte_carlo,
            "of it the runs' own": self.monte_carlo_own,
        }
        said = [f"{value:.2%} {name}" for name, value in parts.items() if np.isfinite(value)]
        if np.isfinite(self.lack_of_fit):
            said.append(f"lack of fit F = {self.lack_of_fit:.2f}, p = {self.lack_of_fit_p:.2g}")
        return ", ".join(said)

    def warnings(self) -> list[str]:
        """Where replicates say that the law does not fit."""
        if not self.lack_of_fit_p < 0.05:
            return []
        odds = f"p = {self.lack_of_fit_p:.2g}"
        return [f"the law misses the points by more than runs of one cell differ (F = {self.lack_of_fit:.2g}, {odds})"]


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


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How the best size and the best number of tokens grow: N* ~ C^a, D* ~ C^b."""

    a: float = NAN
    b: float = NAN
    how: str = "not fitted"


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best use of C FLOPs: N parameters, D tokens, expected loss L (nats/token), 95 % intervals."""

    N: float
    D: float
    L: float
    ci: Mapping[str, Interval] = field(default_factory=dict)
    regret: float = NAN  # nats/token lost, at most, by any size inside the interval of N
    reach: float = NAN  # C over the highest C the fit rests on; above 1 it is extrapolation
    withheld: str = ""  # why L or its interval is not given

    @property
    def tokens_per_param(self) -> float:
        """D* / N*."""
        return self.D / self.N if self.N > 0 else NAN


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """One isoFLOP curve: its polynomial L = c0 + c1 z + c2 z^2 (+ c3 z^3), z = log N - centre (log D with axis
    'tokens'), and its minimum, or why there is none. An Akima curve keeps the parabola through its points here.
    """

    budget: float
    num_points: int
    reason: str = ""  # '' or one of minima.REASONS
    detail: str = ""  # the reason with its numbers, in words
    N: float = NAN
    D: float = NAN
    L: float = NAN
    centre: float = NAN
    coefficients: tuple[float, ...] = (NAN, NAN, NAN)
    ci: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Whether the vertex is an interior minimum that a line may use."""
        return not self.reason


def plain(value: Any) -> Any:
    """The value as JSON has it: a number that is not known is None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
