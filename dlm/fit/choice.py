"""Hold out unique-token budgets and sizes from laws of repeated data, and choose among the laws by their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dlm.core import text
from dlm.fit.curves import Curve, bands, curves, labels
from dlm.fit.engine import newton
from dlm.fit.fitted import Fitted
from dlm.fit.points import NAN, Array, Mask, Points
from dlm.fit.turn import Repeated, log_best, of_unique

LEAST_BANDS = 3  # with fewer budgets or sizes, holding one out leaves a line through one or two
LEAST_STEPS = 3  # a curve with fewer numbers of epochs shows no best one


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """The errors of one law on curves that its fit did not see; every array is (curves,)."""

    excess: Array  # relative excess of the measured loss at the predicted best epochs over the lowest measured loss
    log_error: Array  # log of predicted over measured best epochs; NaN for a curve that does not turn
    absolute: Array  # mean absolute error of log L over the log of the epochs, up to twice the best epochs
    rms: Array  # root-mean-square error of log L there

    @property
    def total(self) -> Array:
        """What is compared: the excess loss of the decision plus the error of the loss."""
        return self.excess + self.absolute

    @property
    def log_epochs_error(self) -> float:
        """Root mean square of `log_error`; NaN if no curve turns."""
        known = self.log_error[np.isfinite(self.log_error)]
        return float(np.sqrt((known**2).mean())) if len(known) else NAN

    def shown(self) -> dict[str, float]:
        """The numbers, for JSON."""
        return {
            "score": float(self.total.mean()),
            "excess_median": float(np.median(self.excess)),
            "excess_worst": float(self.excess.max()),
            "log_epochs_rms": self.log_epochs_error,
            "rms_median": float(np.median(self.rms)),
            "rms": float(np.sqrt((self.rms**2).mean())),
            "curves": float(len(self.excess)),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """The scores of the laws that were compared, by name, and the reasons why others could not be."""

    law: str
    scores: Mapping[str, Score]
    refused: Mapping[str, str]

    @property
    def own(self) -> Score:
        """The score of the law that was chosen."""
        return self.scores[self.law]

    def sentence(self) -> str:
        """The scores in words."""
        parts = [
            f"{name} {score.total.mean():.2%} (excess loss {np.median(score.excess):.2%} in the median and "
            f"{score.excess.max():.2%} at worst, {np.median(score.rms):.2%} root mean square)"
            for name, score in self.scores.items()
        ]
        why = [f"{name} cannot be fitted: {reason}" for name, reason in self.refused.items()]
        return "; ".join([f"on left-out unique budgets and sizes, {self.law} is taken: {text.listed(parts)}", *why])

    def shown(self) -> dict[str, object]:
        """The scores, for JSON."""
        scores = {name: score.shown() for name, score in self.scores.items()}
        return {"law": self.law, "scores": scores, "refused": dict(self.refused)}


def chosen(scores: Mapping[str, Score]) -> str:
    """The first law whose score is no more than one standard error of the difference above the lowest score.

    The laws are in the order of `scores`, the simplest first. The standard error is that of the mean over the curves.
    """
    best = min(scores, key=lambda name: float(scores[name].total.mean()))
    for name, score in scores.items():
        worse = score.total - scores[best].total
        if worse.mean() <= worse.std(ddof=1) / np.sqrt(len(worse)):
            return name
    return best


def groups(points: Points, *, by: Sequence[str] = ("unique", "params")) -> list[Mask]:
    """The points to hold out together: those of one number of unique tokens, and those of one size.

    If there are many budgets or sizes, neighbours share a group. There are none with fewer than three.
    """
    assert points.unique is not None, "fit_surface checks that they are given"
    values, curve_of = {"unique": points.unique, "params": points.params}, labels(points)
    found = [bands(values[name], curve_of) for name in by]
    return [mask for each in found if len(each) >= LEAST_BANDS for mask in each]


def score(result: Fitted, held: Sequence[Mask]) -> Score:
    """Refit a law without each group of points, and compare it with the curves of that group."""
    points, law = result.points, result.fitted_law
    assert points is not None
    problem = newton.problem_of(points, law, result.how, result.fixed)
    known = np.array([[row[name] for name in law.params] for row in (result.params, *result.rivals)])
    weight = np.array([points.weight * ~mask for mask in held])
    target = newton.target_of(problem, points.loss)[None]
    theta, lowest = (
        np.repeat(problem.law.theta(known[:1], problem.centre), len(held), axis=0),
        np.full(len(held), np.inf),
    )
    for start in problem.law.theta(known, problem.centre):
        found, values, _ = newton.minimise(problem, np.tile(start, (len(held), 1)), target, weight)
        better = values < lowest
        theta[better], lowest[better] = found[better], values[better]
    rows = law.rows(theta, problem.centre)
    errors = [_errors(result, curve, rows[[k]]) for k, mask in enumerate(held) for curve in curves(points.take(mask))]
    return Score(**{name: np.array([e[j] for e in errors]) for j, name in enumerate(Score.__dataclass_fields__)})


def _errors(result: Fitted, curve: Curve, row: Array) -> tuple[float, float, float, float]:
    """The fields of `Score` for one curve."""
    law = result.surface
    assert isinstance(law, Repeated)
    log_n = np.full((1, len(curve.log_epochs)), np.log(curve.params))
    log_d = curve.log_epochs[None] + np.log(curve.unique)
    off = (np.log(of_unique(law, curve.unique).predict(row, log_n, log_d))[0] - curve.log_loss)[curve.below]
    excess, error = 0.0, NAN
    if len(curve.log_epochs) >= LEAST_STEPS:
        predicted = float(log_best(law, row, np.log(curve.params), np.log(curve.unique))[0])
        excess = curve.excess(predicted)
        if curve.turns:
            error = min(predicted, float(curve.log_epochs[-1])) - curve.best
    share = curve.shares[curve.below]
    absolute, square = (float(np.average(size, weights=share)) for size in (np.abs(off), off**2))
    return excess, error, absolute, float(np.sqrt(square))
