"""Choose among laws of repeated data by their errors on curves that were left out (`left_out.py` finds these)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dlm.core import text
from dlm.fit.points import NAN, Array

CORRECTED = "corrected by the residuals of nearby curves: "
BLIND = "passed over, because the loss of some runs rises by 5 % and more where they still fall: "


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
    corrected: tuple[str, ...] = ()  # the laws whose predictions are corrected by the smooth part of their residuals
    blind: tuple[str, ...] = ()  # the laws that were passed over because they fall where the runs clearly rise

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
            if np.isfinite(score.total).all()
        ]
        lost = [name for name, score in self.scores.items() if not np.isfinite(score.total).all()]
        parts += [f"none of {name}, which some of the remaining runs do not determine" for name in lost]
        why = [f"{name} cannot be fitted: {reason}" for name, reason in self.refused.items()]
        why += [
            f"{said}{', '.join(names)}" for said, names in ((BLIND, self.blind), (CORRECTED, self.corrected)) if names
        ]
        return "; ".join([f"on left-out unique budgets and sizes, {self.law} is taken: {text.listed(parts)}", *why])

    def shown(self) -> dict[str, object]:
        """The scores, for JSON."""
        scores = {name: score.shown() for name, score in self.scores.items()}
        said = {"law": self.law, "scores": scores, "refused": dict(self.refused)}
        return {**said, "corrected": list(self.corrected), "passed_over": list(self.blind)}


def chosen(scores: Mapping[str, Score]) -> str:
    """The first law whose score is no more than one standard error of the difference above the lowest score.

    The laws are in the order of `scores`, the simplest first. The standard error is that of the mean over the curves.
    """
    mean = {name: float(score.total.mean()) for name, score in scores.items()}
    best = min(scores, key=lambda name: mean[name] if np.isfinite(mean[name]) else np.inf)
    for name, score in scores.items():
        worse = score.total - scores[best].total
        if worse.mean() <= worse.std(ddof=1) / np.sqrt(len(worse)):
            return name
    return best
