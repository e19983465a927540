"""Define the result of a fit as plain data, which laws, intervals and reports read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm.core import text
from dlm.fit.choice import Choice
from dlm.fit.combined.error import FormError
from dlm.fit.combined.floor import FloorLaw
from dlm.fit.engine.newton import Norm
from dlm.fit.exponents import Conventions
from dlm.fit.laws.law import Law, Surface
from dlm.fit.points import NAN, Array, Cost, Interval, Points

if TYPE_CHECKING:
    from dlm.fit.combined.origin import Origin

LACK_OF_FIT_P = 0.01  # p-value of the lack-of-fit test below which a law is said to miss the points
NOT_FITTED = Norm(norm="", space="")  # of a result without residuals, for example of runs that cannot be fitted


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviations of the loss, as shares of the loss; NaN for a part that the runs do not show."""

    residual: float = NAN  # about the law: all parts except the Monte Carlo error that all runs share
    seed: float = NAN  # between replicates: runs that differ in their seed alone
    trunk: float = NAN  # shared by the points of one trunk or run
    monte_carlo: float = NAN  # median of loss_se / loss
    monte_carlo_own: float = NAN  # median of loss_se_own / loss: the part that the runs do not share
    replicates: int = 0  # degrees of freedom behind `seed`
    lack_of_fit: float = NAN  # F ratio of the law's misfit to the noise between seeds
    lack_of_fit_p: float = NAN  # p-value: the probability of an F at least this large if the law fits

    def sentence(self) -> str:
        """The known parts of the noise in words; empty if no part is known."""
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
        """A warning if replicates show that the law does not fit."""
        if not self.lack_of_fit_p < LACK_OF_FIT_P:
            return []
        test = f"F = {self.lack_of_fit:.2g}, p = {self.lack_of_fit_p:.2g}"
        return [f"the law misses the points by more than runs of one cell differ ({test})"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """How far a law may be extrapolated, and what limits it."""

    top: float  # the highest C of the runs, FLOPs
    reach: float  # the highest C at which L* is given, FLOPs
    limit: str  # why L* is not given beyond `reach`
    missed: float  # relative error of the better form on held-out top budgets; NaN if none could be held out
    aicc: Mapping[str, float]  # Akaike's criterion of each form, from squares of log residuals; lower is better
    target: float  # the C at which the next four fields are computed, FLOPs
    differ_n: float  # ratio of the largest to the smallest N* of the methods
    differ_l: float  # relative difference between the L* of the forms
    regret: float  # largest excess loss of a size inside the interval of N*, nats/token
    n: Interval  # the interval of N* over all methods
    words: tuple[str, ...] = ()  # the verdict of a combined law, in sentences
    forms: Mapping[str, Fitted] = field(default_factory=dict, repr=False)  # both forms, by name
    methods: Sequence[Fitted] = field(default_factory=tuple, repr=False)  # all fits that give an N*

    def first_words(self) -> str:
        """Up to which C the law may be read, and its error on held-out budgets if one is known."""
        if self.words:
            return " ".join(self.words[:2])
        far = f"up to {text.flops(self.reach)} FLOPs ({self.reach / self.top:.3g} times the highest)"
        inside = f"within the runs, up to {text.flops(self.top)} FLOPs, and not beyond"
        said = [f"L* may be read {far if self.reach > self.top else inside}: {self.limit}"]
        if np.isfinite(self.missed):
            said.append(f"with the top budgets held out, the better form missed their loss by {self.missed:.2%}")
        return "; ".join(said)

    def sentence(self) -> str:
        """The verdict in words, with its numbers."""
        if self.words:
            return " ".join(self.words)
        said = [self.first_words()]
        if len(self.aicc) > 1:
            low, high = sorted(self.aicc, key=self.aicc.__getitem__)
            said.append(f"AICc prefers {low} to {high} by {self.aicc[high] - self.aicc[low]:.1f}")
        if not np.isfinite(self.differ_n):
            return "; ".join(said) + "."
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
    """How the best size and the best number of tokens grow with C: N* ~ C^a, D* ~ C^b."""

    a: float = NAN
    b: float = NAN
    how: str = "not fitted"  # how a and b were found, in words


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best use of C FLOPs: N parameters on D tokens, for an expected loss L in nats/token."""

    N: float
    D: float
    L: float
    ci: Mapping[str, Interval] = field(default_factory=dict)  # intervals of N, D, L and tokens_per_param
    regret: float = NAN  # largest excess loss of a size inside the interval of N, nats/token
    reach: float = NAN  # ratio of C to the highest C that the fit rests on; above 1, the optimum is an extrapolation
    withheld: str = ""  # why L or its interval is withheld; empty if neither is

    @property
    def tokens_per_param(self) -> float:
        """D* / N*."""
        return self.D / self.N if self.N > 0 else NAN


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """One isoFLOP curve and its minimum, or the reason why it has no minimum.

    The curve is L = c0 + c1 z + c2 z^2 (+ c3 z^3) with z = log N - centre, or log D - centre with axis 'tokens'. For an
    Akima curve, the coefficients are those of the parabola through its points.
    """

    budget: float  # FLOPs
    num_points: int
    reason: str = ""  # too_few_points, not_convex, outside_grid or edge; empty if there is a minimum
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
        """Whether the curve has an interior minimum, through which lines may be fitted."""
        return not self.reason


@dataclass(frozen=True, kw_only=True, eq=False)
class Doubt:
    """Top budgets whose losses are clearly higher than the runs below them predict."""

    lower: Fitted  # the combined law of the runs below, with draws
    num_budgets: int  # how many budgets lie above these runs
    start: float  # the lowest C of the runs above, FLOPs
    excess: float  # mean log of measured over predicted loss of the runs above
    error: float  # standard error of `excess`, from the noise of both groups of runs

    def shown(self) -> dict[str, float]:
        """The numbers, for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "lower"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Combination:
    """What a combined law consists of, besides the weights of its parts, which are those of its surface."""

    parts: Mapping[str, Fitted]  # fits of all runs, by name; their points carry the weights of the fit
    line: Fitted | None  # the isoFLOP line that gives half of N*; None if its minima do not bound it
    floor: FloorLaw | None  # the law that L* beyond the runs follows in part; None with fewer than three minima
    error: FormError  # the error of the law's form beyond the runs
    held: tuple[Origin, ...] = ()  # what the law of the lower budgets missed when the top ones were held out
    doubts: tuple[Doubt, ...] = ()  # the intervals of losses also cover those of the lower laws; found by `bootstrap`

    def shown(self, weights: Mapping[str, float]) -> dict[str, Any]:
        """The weights of the parts, the laws through the minima, the error of the form and the doubts, for JSON."""
        line, floor = (None if law is None else law.params for law in (self.line, self.floor))
        doubts = [doubt.shown() for doubt in self.doubts]
        return {"weights": weights, "line": line, "floor": floor, "error": vars(self.error), "doubts": doubts}


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A fitted law. `status` is 'ok', 'warned' (read `warnings`) or 'refused' (the data do not support the law)."""

    law: str
    how: Norm = NOT_FITTED  # how the residuals count in the objective
    n: int  # number of points used
    params: Mapping[str, float] = field(default_factory=dict)
    ci: Mapping[str, Interval] = field(default_factory=dict)  # intervals of the parameters and of a and b
    value: float = NAN  # the objective at the fit: a sum over the points
    allocation: Allocation = field(default_factory=Allocation)
    at: Mapping[float, Optimum] = field(default_factory=dict)  # optima, by C in FLOPs
    holdout: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # errors on held-out top budgets
    status: str = "ok"
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # remarks on the runs that give no reason for doubt
    minima: tuple[Minimum, ...] = ()  # isoflop: one per budget; envelope: one per run of the frontier
    curve: str = ""  # isoflop only: 'parabola', 'cubic' or 'akima'
    axis: str = ""  # isoflop only: 'params' if the curves run over log N, 'tokens' if over log D
    label: str = ""  # name of the objective or group of runs, shown in reports
    runs: Mapping[str, Sequence[Any]] = field(
        default_factory=dict, repr=False
    )  # what tells the runs apart: `fit.known`
    tuning: Mapping[str, Any] | None = None  # how well rate and batch were tuned: `fit.hparams`; None if not known
    points: Points | None = field(default=None, repr=False)
    cost: Cost = field(default_factory=Cost, repr=False)
    draws: Array | None = field(default=None, repr=False)  # refitted params, (replicates, params); failed rows are NaN
    interval_method: str = ""
    surface: Surface | None = field(default=None, repr=False)  # None for the lines of isoflop and envelope
    combination: Combination | None = field(default=None, repr=False)  # of a combined law only
    fixed: Mapping[str, float] = field(default_factory=dict)  # parameters that were held fixed, and their values
    choice: Choice | None = field(
        default=None, repr=False
    )  # of a law of repeated data: its errors on what was held out
    at_bound: tuple[str, ...] = ()  # parameters that the points push to a bound; they have no interval
    rivals: tuple[Mapping[str, float], ...] = ()  # other minima within 1 % of the lowest: params and 'objective'
    noise: Noise = field(default_factory=Noise)
    outliers: tuple[int, ...] = ()  # indices of points far from the law; they still count in the fit
    verdict: Verdict | None = field(default=None, repr=False)  # how far the law may be extrapolated; set by `judge`
    conventions: Conventions | None = field(default=None, repr=False)  # a and b if N and C are counted otherwise
    failed: int = 0  # number of replicates that found no law
    dof: int = 0  # degrees of freedom of Student's t for the intervals; 0 if they are plain percentiles

    @property
    def usable(self) -> list[Minimum]:
        """The minima through which lines may be fitted."""
        return [m for m in self.minima if m.usable]

    @property
    def fitted_law(self) -> Law:
        """The surface of a result that was fitted directly: not of lines, and not of a combined law."""
        assert isinstance(self.surface, Law), f"{self.law} was not fitted directly"
        return self.surface

    @property
    def norm(self) -> str:
        """The norm of the residuals: 'huber', 'mse' or 'l1'; empty if nothing was fitted."""
        return self.how.norm

    @property
    def delta(self) -> float:
        """Huber's corner, in the unit of the residual; NaN under another norm."""
        return self.how.delta if self.how.norm == "huber" else NAN


def shown(record: Verdict | Minimum) -> dict[str, Any]:
    """The fields of a record that appear in its JSON and in its repr."""
    return {f.name: getattr(record, f.name) for f in fields(record) if f.repr}


def plain(value: Any) -> Any:
    """Convert the value for JSON: a number that is not finite becomes None, and a tuple becomes a list."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
