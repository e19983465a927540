"""Check plain arrays and freeze them as Points, and find the FLOPs per token at each model size.

Legend of all fitting code: N parameters, D training tokens, C training FLOPs, L loss in nats/token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from dlm.core.errors import UserError

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Interval = tuple[float, float]

NAN = float("nan")
UNBOUNDED: Interval = (NAN, NAN)  # the interval of a number for which the data give no interval

REACH_NATS = 60.0  # log N is searched within this distance of log(FLOPs per token), wide enough for any unit of N
POWERS = np.array([0.0, 1 / 3, 1 / 2, 2 / 3])  # of 1/N in the cost; the first is for costs that are a multiple of 6 N
CLEARLY = 0.5  # an inverse cost is taken only if it leaves at most this share of the error
STEEP_POWERS = np.append(POWERS, 1.0)  # the same, where the sum divides 6 N
SIX_ND_TOLERANCE = 0.01  # rows whose FLOPs are 6 N D to within this share count as 6 N D


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """The runs that a law is fitted to. Every array has shape (n,), with one entry per finished run."""

    params: Array  # N, parameters
    tokens: Array  # D, training tokens
    loss: Array  # L, nats/token
    flops: Array  # C, training FLOPs actually spent, counted by `convention`
    budget: Array | None  # the FLOPs that the run aimed at; points of equal budget form one isoFLOP curve
    weight: Array  # multiplies the point's term in the objective
    cluster: npt.NDArray[np.int64]  # points of one cluster share noise and are resampled together
    convention: str  # name of the convention by which `flops` are counted
    unique: Array | None = None  # unique tokens among `tokens`; None if they are not known
    cell: npt.NDArray[np.int64] | None = None  # points of one cell differ in chance alone; None: not known
    loss_se: Array | None = None  # Monte Carlo standard error of an estimated loss, nats/token
    loss_se_own: Array | None = None  # the part of `loss_se` that the runs do not share, nats/token

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def num_clusters(self) -> int:
        """The number of independent runs or trunks that the points come from."""
        return len(np.unique(self.cluster))

    @property
    def top_flops(self) -> float:
        """The highest C that was spent, FLOPs."""
        return float(self.flops.max())

    def take(self, keep: Mask) -> Points:
        """The points where `keep` (n,) is true."""
        kept: dict[str, Any] = {name: v[keep] for name, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **kept)

    def at_budget(self, level: float) -> Points:
        """The points of one budget (FLOPs)."""
        assert self.budget is not None, "these points are not grouped"
        return self.take(self.budget == level)

    def budgets(self) -> Array:
        """The distinct budgets, rising, in FLOPs; without budgets, the distinct FLOPs spent."""
        return np.unique(self.flops if self.budget is None else self.budget)


class RunColumns(TypedDict, total=False):
    """Optional columns for surfaces and isoFLOP curves, besides N, D and L; `as_points` describes them."""

    flops: npt.ArrayLike | None
    weights: npt.ArrayLike | str | None
    loss_se: npt.ArrayLike | None
    loss_se_own: npt.ArrayLike | None
    convention: str | None


class SurfaceColumns(RunColumns, total=False):
    """Further optional columns for surfaces; `as_points` describes them."""

    budget: npt.ArrayLike | None
    cluster: npt.ArrayLike | None
    unique_tokens: npt.ArrayLike | None
    cell: npt.ArrayLike | None


def as_points(
    params: npt.ArrayLike,
    tokens: npt.ArrayLike,
    loss: npt.ArrayLike,
    *,
    flops: npt.ArrayLike | None = None,
    budget: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | str | None = None,
    cluster: npt.ArrayLike | None = None,
    unique_tokens: npt.ArrayLike | None = None,
    cell: npt.ArrayLike | None = None,
    loss_se: npt.ArrayLike | None = None,
    loss_se_own: npt.ArrayLike | None = None,
    convention: str | None = None,
) -> Points:
    """Check the columns of a table of runs and freeze them. Rows of weight 0 are left out.

    Args:
        params: N of each run, (n,).
        tokens: D of each run, (n,).
        loss: L of each run, (n,), nats/token.
        flops: C of each run, (n,); 6 N D by default.
        budget: The FLOPs that each run aimed at, (n,).
        weights: Factor of each run in the objective, (n,), or 'compute' for C over the mean C; 1 by default.
        cluster: Labels, (n,); runs with equal labels share noise. By default every run is a cluster of its own.
        unique_tokens: Unique tokens of each run, (n,).
        cell: Labels, (n,); runs with equal labels, N, D and unique tokens are replicates, which differ in their seed
            alone. By default, equal N, D and unique tokens make replicates.
        loss_se: Monte Carlo standard error of each loss, (n,), nats/token.
        loss_se_own: The part of `loss_se` that the runs do not share, (n,), nats/token.
        convention: Name of the convention by which `flops` are counted; '6n' by default if `flops` is absent.

    Raises:
        UserError: If a column is not an array of usable numbers, or not as long as `loss`, or if all losses are equal.
    """
    losses = _column(loss, "loss")
    size = len(losses)
    if not size:
        raise UserError("there are no runs: give at least one row of params, tokens and loss")
    if size > 1 and np.ptp(losses) == 0.0:
        raise UserError(f"every loss is {losses[0]:g}: nothing to fit")
    n, d = _column(params, "params", size), _column(tokens, "tokens", size)
    spent = 6.0 * n * d if flops is None else _column(flops, "flops", size)
    labels = np.arange(size) if cluster is None else _labels(cluster, "cluster", size)
    points = Points(
        params=n,
        tokens=d,
        loss=losses,
        flops=spent,
        budget=None if budget is None else _column(budget, "budget", size),
        weight=np.ones(size) if weights is None else _weights(weights, spent),
        cluster=labels.astype(np.int64),
        cell=None if cell is None else _labels(cell, "cell", size),
        convention=convention or ("6n" if flops is None else "as given"),
        unique=None if unique_tokens is None else _column(unique_tokens, "unique_tokens", size),
        loss_se=None if loss_se is None else _column(loss_se, "loss_se", size, may_be_0=True),
        loss_se_own=None if loss_se_own is None else _column(loss_se_own, "loss_se_own", size, may_be_0=True),
    )
    return points if (points.weight > 0).all() else points.take(points.weight > 0)


def _column(values: npt.ArrayLike, name: str, size: int | None = None, *, may_be_0: bool = False) -> Array:
    """Check that one column of the table has a finite number above 0 (with `may_be_0`, also 0) for every run."""
    try:
        column = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} is not an array of numbers: {error}") from error
    if column.ndim != 1:
        raise UserError(f"{name} has {column.ndim} dimensions: pass one value per run")
    _check_length(column, name, size)
    bad = np.flatnonzero(~(np.isfinite(column) & ((column > 0) | (may_be_0 & (column == 0)))))
    if len(bad):
        allowed = "not below 0" if may_be_0 else "above 0"
        raise UserError(f"{name}[{bad[0]}] is {column[bad[0]]}: every value must be a finite number {allowed}")
    return column


def _labels(values: npt.ArrayLike, name: str, size: int) -> npt.NDArray[np.int64]:
    """Number the distinct labels of one column, which has a label for every run."""
    labels = np.unique(np.asarray(values), return_inverse=True)[1]
    _check_length(labels, name, size)
    return labels.astype(np.int64)


def _weights(values: npt.ArrayLike | str, flops: Array) -> Array:
    if not isinstance(values, str):
        column = _column(values, "weights", len(flops), may_be_0=True)
        if not column.any():
            raise UserError("weights are all 0: give at least one run a weight above 0")
        return column
    if values != "compute":
        raise UserError(f"weights is {values!r}: give numbers, or 'compute' for C over its mean")
    return np.asarray(flops / flops.mean())


def _check_length(column: npt.NDArray[np.generic], name: str, size: int | None) -> None:
    if size is not None and len(column) != size:
        raise UserError(f"{name} has {len(column)} values but loss has {size}: they must be equally long")


@dataclass(frozen=True, kw_only=True, eq=False)
class Cost:
    """FLOPs per token as a function of the model size: 6 N (base + the sum of w N^-p over the `POWERS` p), each w >= 0.

    If N counts parameters that cost nothing, such as an input embedding, C / 6 N D rises with N. Then 6 N is divided by
    this sum instead (`is_inverse`).

    6 N leaves out the head, whose cost grows with the width, and attention, whose cost grows with width times depth.
    Relative to 6 N, both fall as N^-1/2 if models differ in width alone. If depth grows with the width, the head falls
    as N^-2/3 and attention as N^-1/3.

    The cost is a smooth fit to the sizes that were run. A curve through them would have wiggles where their proportions
    change, at which N* sticks to a size and D* falls as C rises. Where alpha A N^-alpha = beta B D^-beta e, the
    condition of the optimum, N* and D* both rise with C if the elasticity e = d log cost / d log N never falls as N
    grows. Here it rises and stays between 1/3 and 1, because the cost is a sum of such powers of N. The elasticity of
    an inverse cost falls, but by so little (d log e / d log N > -0.18) that this holds for every alpha above 0.18.
    """

    weights: Array = field(default_factory=lambda: np.zeros(0))  # w, one for each of `powers`; empty where C = 6 N D
    base: float = 1.0
    is_inverse: bool = False
    over_6n: float = 1.0  # the ratio of the FLOPs per token to 6 N, in the middle of the sizes that were run

    @property
    def is_6nd(self) -> bool:
        """Whether C = 6 N D, so that the optimum of most laws has a closed form."""
        return not len(self.weights)

    @property
    def powers(self) -> Array:
        """The powers p, one for each of the weights."""
        return STEEP_POWERS if self.is_inverse else POWERS

    def log_per_token(self, log_params: Array) -> Array:
        """The log of the FLOPs per token at each log N, in the shape of `log_params`."""
        log_6n = np.log(6.0) + log_params
        if self.is_6nd:
            return np.asarray(log_6n, dtype=np.float64)
        log_sum = np.log(self.base + np.exp(-np.multiply.outer(log_params, self.powers)) @ self.weights)
        return np.asarray(log_6n - log_sum if self.is_inverse else log_6n + log_sum, dtype=np.float64)

    def log_size(self, log_per_token: Array) -> Array:
        """Invert the function `log_per_token` by bisection: log N for each log of the FLOPs per token."""
        if self.is_6nd:
            return np.asarray(log_per_token - np.log(6.0), dtype=np.float64)
        low, high = log_per_token - REACH_NATS, log_per_token + REACH_NATS
        for _ in range(60):
            middle = (low + high) / 2
            above = self.log_per_token(middle) > log_per_token
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return np.asarray((low + high) / 2, dtype=np.float64)


def cost_of(points: Points) -> Cost:
    """Estimate the cost of a token from the runs, by least squares of the relative errors of the median C / D per size.

    If every size costs 6 N or more, as under all conventions of dlm, the cost is at least 6 N beyond these sizes too.
    """
    ratio = points.flops / (6.0 * points.params * points.tokens)
    if np.abs(ratio - 1.0).max() <= SIX_ND_TOLERANCE:
        return Cost()
    sizes, place = np.unique(points.params, return_inverse=True)
    medians = np.array([float(np.median(ratio[place == k])) for k in range(len(sizes))])
    direct, error = _sum_of_powers(sizes, medians, POWERS)
    inverse, other = _sum_of_powers(sizes, 1.0 / medians, STEEP_POWERS)
    is_inverse = other < CLEARLY * error
    weights, base = inverse if is_inverse else direct
    return Cost(weights=weights, base=base, is_inverse=is_inverse, over_6n=float(np.median(medians)))


def _sum_of_powers(sizes: Array, ratio: Array, powers: Array) -> tuple[tuple[Array, float], float]:
    """Fit base + the sum of w N^-p to the ratio at each size, (k,): w and the base, and the relative error left."""
    from scipy.optimize import nnls  # takes a while to load

    base = 1.0 if ratio.min() >= 1.0 else 0.0
    middle = np.log(sizes).mean()  # as the unit of N, it keeps the columns alike
    columns = np.exp(-np.multiply.outer(np.log(sizes) - middle, powers))
    found, error = nnls(columns / ratio[:, None], 1.0 - base / ratio)
    return (found * np.exp(middle * powers), base), float(error)
