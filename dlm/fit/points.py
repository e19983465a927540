"""points: plain arrays -> checked Points, and what a token costs at each size. Called by every fit.

Legend: N parameters, D tokens, C training FLOPs, L loss in nats/token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dlm.core.errors import UserError

Array = npt.NDArray[np.float64]


NAN = float("nan")


Interval = tuple[float, float]


SIX_ND_TOLERANCE = 0.01  # rows whose flops are 6 N D to within this are counted as 6 N D


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """The rows a law is fitted to, one entry per finished run."""

    params: Array  # N, parameters
    tokens: Array  # D, training tokens
    loss: Array  # L, nats/token
    flops: Array  # C, training FLOPs actually spent, in `convention`
    budget: Array | None  # the FLOPs aimed at; equal values are one isoFLOP curve
    weight: Array  # multiplies the point's term in the objective
    cluster: npt.NDArray[np.int64]  # points with one number share noise and are resampled together
    convention: str  # how `flops` are counted, for the reader
    unique: Array | None = None  # unique tokens, of which `tokens` are epochs; None: nothing is known of them
    loss_se: Array | None = None  # Monte Carlo standard error of a loss that is an estimated bound, nats/token
    loss_se_own: Array | None = None  # the part of it that runs do not share

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, keep: npt.NDArray[np.bool_]) -> Points:
        """The rows where `keep` is true."""
        budget = None if self.budget is None else self.budget[keep]
        return Points(
            params=self.params[keep],
            tokens=self.tokens[keep],
            loss=self.loss[keep],
            flops=self.flops[keep],
            budget=budget,
            weight=self.weight[keep],
            cluster=self.cluster[keep],
            convention=self.convention,
            unique=None if self.unique is None else self.unique[keep],
            loss_se=None if self.loss_se is None else self.loss_se[keep],
            loss_se_own=None if self.loss_se_own is None else self.loss_se_own[keep],
        )

    def at_budget(self, level: float) -> Points:
        """The rows of one budget."""
        assert self.budget is not None, "these points are not grouped"
        return self.take(self.budget == level)

    def budgets(self) -> Array:
        """The distinct budgets, rising; when none were named, the distinct FLOPs."""
        return np.unique(self.flops if self.budget is None else self.budget)


def as_points(
    params: npt.ArrayLike,
    tokens: npt.ArrayLike,
    loss: npt.ArrayLike,
    *,
    flops: npt.ArrayLike | None = None,
    budget: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | str | None = None,
    cluster: npt.ArrayLike | None = None,
    unique: npt.ArrayLike | None = None,
    loss_se: npt.ArrayLike | None = None,
    loss_se_own: npt.ArrayLike | None = None,
    convention: str | None = None,
) -> Points:
    """Check and freeze the arrays; without `flops`, C = 6 N D; weights 'compute' are C over its mean; rows of weight 0
    are left out.

    Raises UserError for anything unusable.
    """
    n_, d_, l_ = (_positive(v, name) for v, name in ((params, "params"), (tokens, "tokens"), (loss, "loss")))
    size = len(l_)
    for name, first in (("params", n_), ("tokens", d_)):
        if len(first) != size:
            raise UserError(f"{name} has {len(first)} values but loss has {size}: they must be equally long")
    if size > 1 and np.ptp(l_) == 0.0:
        raise UserError(f"every loss is {l_[0]:g}: nothing to fit")
    if not size:
        raise UserError("there are no runs: give at least one row of params, tokens and loss")
    spent = 6.0 * n_ * d_ if flops is None else _positive(flops, "flops")
    aimed = None if budget is None else _positive(budget, "budget")
    weight = np.ones(size) if weights is None else _weights(weights, spent)
    once = None if unique is None else _positive(unique, "unique_tokens")
    errors, own = (
        None if v is None else _errors(v, f"loss_se{end}") for v, end in ((loss_se, ""), (loss_se_own, "_own"))
    )
    labels = np.arange(size) if cluster is None else np.unique(np.asarray(cluster), return_inverse=True)[1]
    columns = {
        "params": n_,
        "tokens": d_,
        "flops": spent,
        "budget": aimed,
        "weights": weight,
        "cluster": labels,
        "unique_tokens": once,
        "loss_se": errors,
        "loss_se_own": own,
    }
    for name, column in columns.items():
        if column is not None and len(column) != size:
            raise UserError(f"{name} has {len(column)} values but loss has {size}: they must be equally long")
    named = convention or ("6n" if flops is None else "as given")
    points = Points(
        params=n_,
        tokens=d_,
        loss=l_,
        flops=spent,
        budget=aimed,
        weight=weight,
        cluster=labels.astype(np.int64),
        convention=named,
        unique=once,
        loss_se=errors,
        loss_se_own=own,
    )
    return points if (weight > 0).all() else points.take(weight > 0)  # a row without weight is no row


def _positive(values: npt.ArrayLike, name: str) -> Array:
    column = _column(values, name)
    bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
    if len(bad):
        raise UserError(f"{name}[{bad[0]}] is {column[bad[0]]}: every value must be a finite number above 0")
    return column


def _errors(values: npt.ArrayLike, name: str) -> Array:
    column = _column(values, name)
    if not np.isfinite(column).all() or (column < 0).any():
        raise UserError(f"{name} must be finite numbers, none below 0")
    return column


def _weights(values: npt.ArrayLike | str, flops: Array) -> Array:
    if isinstance(values, str):
        if values != "compute":
            raise UserError(f"weights is {values!r}: give numbers, or 'compute' for C over its mean")
        return np.asarray(flops / flops.mean())
    column = _column(values, "weights")
    if not np.isfinite(column).all() or (column < 0).any() or not column.any():
        raise UserError("weights must be finite numbers, none below 0 and not all 0")
    return column


def _column(values: npt.ArrayLike, name: str) -> Array:
    try:
        column = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} is not an array of numbers: {error}") from error
    if column.ndim != 1:
        raise UserError(f"{name} has {column.ndim} dimensions: pass one value per run")
    return column


@dataclass(frozen=True, kw_only=True, eq=False)
class Cost:
    """FLOPs per token at N: 6 N (base + extra(N)). What 6 N leaves out (head, attention) is near a power of N, so it is
    interpolated in log-log, and goes on outside the sizes with its mean slope.
    """

    log_params: Array = field(default_factory=lambda: np.zeros(0))
    log_extra: Array = field(default_factory=lambda: np.zeros(0))
    base: float = 1.0
    slope: float = 0.0

    @property
    def is_6nd(self) -> bool:
        """True where C = 6 N D, so that the optimum has a closed form."""
        return not len(self.log_extra)

    @property
    def over_6n(self) -> float:
        """FLOPs per token over 6 N, in the middle of the sizes."""
        return 1.0 if self.is_6nd else float(self.base + np.exp(np.median(self.log_extra)))

    def log_per_token(self, log_params: Array) -> Array:
        """log FLOPs per token at log N."""
        if self.is_6nd:
            return np.asarray(np.log(6.0) + log_params, dtype=np.float64)
        outside = log_params - np.clip(log_params, self.log_params[0], self.log_params[-1])
        extra = np.interp(log_params, self.log_params, self.log_extra) + self.slope * outside
        return np.asarray(np.log(6.0) + log_params + np.log(self.base + np.exp(extra)), dtype=np.float64)


def cost_of(points: Points) -> Cost:
    """The cost curve the rows show: the median of flops/tokens at each size (see `Cost`)."""
    ratio = points.flops / (6.0 * points.params * points.tokens)
    if np.abs(ratio - 1.0).max() <= SIX_ND_TOLERANCE:
        return Cost()
    sizes, place = np.unique(points.params, return_inverse=True)
    medians = np.array([float(np.median(ratio[place == k])) for k in range(len(sizes))])
    base = min(1.0, 0.99 * float(medians.min()))
    log_params, log_extra = np.log(sizes), np.log(np.maximum(medians - base, 1e-6))
    slope = float(np.polyfit(log_params, log_extra, 1)[0]) if len(sizes) > 1 else 0.0
    return Cost(log_params=log_params, log_extra=log_extra, base=base, slope=min(0.0, slope))
