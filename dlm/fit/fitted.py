"""Define the result of a fit as plain data, which laws, intervals and reports read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from dlm.core import text
from dlm.fit.engine.newton import Norm
from dlm.fit.laws.law import Law
from dlm.fit.points import NAN, Array, Cost, Interval, Points

NOT_FITTED = Norm(norm="", space="")  # of a result without residuals, such as that of runs that cannot be fitted


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviations of the loss, as shares of the loss; NaN where the runs do not show a part."""

    residual: float = NAN  # about the law: all parts but the Monte Carlo error that all runs share
    seed: float = NAN  # between runs of one N and D
    trunk: float = NAN  # shared by the points of one trunk or run
    monte_carlo: float = NAN  # median of loss_se over loss
    monte_carlo_own: float = NAN  # median of loss_se_own over loss: the part that runs do not share
    replicates: int = 0  # degrees of freedom behind `seed`
    lack_of_fit: float = NAN  # F ratio of the law's misfit to the noise between seeds
    lack_of_fit_p: float = NAN  # probability of so large an F under a law that fits

    def sentence(self) -> str:
        """The known parts in words; empty if none is known."""
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
        """A warning where runs of the same N and D show that the law does not fit."""
        if not self.lack_of_fit_p < 0.05:
            return []
        test = f"F = {self.lack_of_fit:.2g}, p = {self.lack_of_fit_p:.2g}"
        return [f"the law misses the points by more than runs of one cell differ ({test})"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """How far a law may be extrapolated, and what limits it."""

    top: float  # the highest C of the runs, FLOPs
    reach: float  # the highest C at which L* is given, FLOPs
    limit: str  # why L* is not given beyond `reach`
    missed: float  # relative error of the better form where the top budgets were held out; NaN if none could be
    aicc: Mapping[str, float]  # Akaike's criterion of each form, from squares of log residuals; lower is better
    target: float  # the C of the four numbers below, FLOPs
    differ_n: float  # largest over smallest N* of the methods
    differ_l: float  # relative difference between the L* of the forms
    regret: float  # nats/token lost at most by any size inside the interval of N*
    n: Interval  # of N* over all methods
    forms: Mapping[str, Fitted] = field(default_factory=dict, repr=False)  # both forms, by name
    methods: Sequence[Fitted] = field(default_factory=tuple, repr=False)  # all fits that give an N*

    def sentence(self) -> str:
        """The verdict in words, with its numbers."""
        far = f"up to {text.flops(self.reach)} FLOPs ({self.reach / self.top:.3g} times the highest)"
        inside = f"within the runs, up to {text.flops(self.top)} FLOPs, and not beyond"
        said = [f"L* may be read {far if self.reach > self.top else inside}: {self.limit}"]
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
        """The numbers and the sentence, without the fits themselves."""
        return {**shown(self), "sentence": self.sentence()}


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How the best size and the best number of tokens grow: N* ~ C^a, D* ~ C^b."""

    a: float = NAN
    b: float = NAN
    how: str = "not fitted"  # how a and b were found, in words


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best use of C FLOPs: N parameters on D tokens, for an expected loss L in nats/token."""

    N: float
    D: float
    L: float
    ci: Mapping[str, Interval] = field(default_factory=dict)  # of N, D, L and tokens_per_param
    regret: float = NAN  # nats/token lost at most by any size inside the interval of N
    reach: float = NAN  # C over the highest C that the fit rests on; above 1 it is an extrapolation
    withheld: str = ""  # why L or its interval is not given; empty where it is

    @property
    def tokens_per_param(self) -> float:
        """D* / N*."""
        return self.D / self.N if self.N > 0 else NAN


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """One isoFLOP curve and its minimum, or why it has none.

    The curve is L = c0 + c1 z + c2 z^2 (+ c3 z^3) with z = log N - centre, or log D - centre with axis 'tokens'. For an
    Akima curve, the coefficients are those of the parabola through its points.
    """

    budget: float  # FLOPs
    num_points: int
    reason: str = ""  # too_few_points, not_convex, outside_grid or edge; empty where there is a minimum
    why: str = field(default="", repr=False)  # the reason in words, with its numbers
    detail: str = ""  # the budget and the reason in words
    N: float = NAN
    D: float = NAN
    L: float = NAN
    centre: float = NAN
    coefficients: tuple[float, ...] = (NAN, NAN, NAN)
    ci: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Whether the curve has an interior minimum, so that lines may use it."""
        return not self.reason


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A fitted law. `status` is 'ok', 'warned' (read `warnings`) or 'refused' (the data do not support the law)."""

    law: str
    how: Norm = NOT_FITTED  # how residuals counted
    n: int  # points used
    params: Mapping[str, float] = field(default_factory=dict)
    ci: Mapping[str, Interval] = field(default_factory=dict)  # of the parameters and of a and b
    value: float = NAN  # the objective at the fit: a sum over the points
    allocation: Allocation = field(default_factory=Allocation)
    at: Mapping[float, Optimum] = field(default_factory=dict)  # by C in FLOPs
    holdout: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # errors on held-out top budgets
    status: str = "ok"
    warnings: tuple[str, ...] = ()
    minima: tuple[Minimum, ...] = ()  # one per budget, of isoflop and envelope
    curve: str = ""  # of isoflop: parabola, cubic or akima
    axis: str = ""  # of isoflop: whether curves run over log of 'params' or of 'tokens'
    label: str = ""  # name of the objective or group of runs, for readers
    points: Points | None = field(default=None, repr=False)
    cost: Cost = field(default_factory=Cost, repr=False)
    draws: Array | None = field(default=None, repr=False)  # (replicates, params); rows that failed are NaN
    interval_method: str = ""
    surface: Law | None = field(default=None, repr=False)  # the law itself; None for lines
    fixed: Mapping[str, float] = field(default_factory=dict)  # parameters that were pinned
    rivals: tuple[Mapping[str, float], ...] = ()  # other minima within 1 %: their params and 'objective'
    noise: Noise = field(default_factory=Noise)
    outliers: tuple[int, ...] = ()  # indices of points far from the law; they count all the same
    verdict: Verdict | None = field(default=None, repr=False)  # how far the law may be believed, after `judge`
    failed: int = 0  # replicates that found no law
    dof: int = 0  # degrees of freedom of intervals from resampled residuals

    @property
    def usable(self) -> list[Minimum]:
        """The minima that a line may use."""
        return [m for m in self.minima if m.usable]

    @property
    def norm(self) -> str:
        """The norm of the residuals: 'huber', 'mse' or 'l1'; empty where nothing was fitted."""
        return self.how.norm

    @property
    def delta(self) -> float:
        """Huber's corner, in the unit of the residual; NaN under another norm."""
        return self.how.delta if self.how.norm == "huber" else NAN


def shown(record: Verdict | Minimum) -> dict[str, Any]:
    """The fields of a record that its JSON and its repr have."""
    return {f.name: getattr(record, f.name) for f in fields(record) if f.repr}


def plain(value: Any) -> Any:
    """The value as JSON has it: a number that is not known becomes None, and a tuple a list."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
