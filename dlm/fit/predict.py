"""Predict the loss at any N and D from a fitted law, with an interval of the law and an interval of a new run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlm.core.errors import UserError
from dlm.fit.combined.error import FormError
from dlm.fit.draws import ends, stretch
from dlm.fit.fitted import Fitted
from dlm.fit.laws.combined import Combined
from dlm.fit.laws.law import Law
from dlm.fit.optimum import MOST_REACH, SHARE, as_rows
from dlm.fit.points import NAN, Array, Mask

__all__ = ["Prediction", "predict"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """Predicted L in nats/token at m pairs of N and D, with two intervals."""

    loss: Array  # the loss under the law, (m,)
    ci: Array  # the interval of the law, (m, 2)
    pi: Array  # the interval of a new run, which also includes the noise of the runs, (m, 2)


def predict(result: Fitted, params: npt.ArrayLike, tokens: npt.ArrayLike, *, level: float = 0.95) -> Prediction:
    """Predict the loss of runs with N = `params` and D = `tokens`, each (m,).

    After `judge`, the intervals hold under both forms of the law. A run has no interval (NaN) if its N D is over
    `MOST_REACH` times that of every fitted run, or below that of every fitted run by a factor above `MOST_REACH`.

    Raises:
        UserError: If the result is not a surface or has no draws (see `bootstrap`), if an N or D is not a finite number
            above 0, or if `params` and `tokens` differ in length.
    """
    if result.surface is None or result.draws is None:
        raise UserError(f"{result.law} gives no prediction: fit a surface and bootstrap it first")
    for name, values in (("params", params), ("tokens", tokens)):
        if not (np.isfinite(values) & (np.asarray(values) > 0)).all():
            raise UserError(f"{name} must be finite numbers above 0")
    if np.size(params) != np.size(tokens):
        raise UserError(f"params has {np.size(params)} values and tokens {np.size(tokens)}: they must be equally long")
    lower = lower_laws_of(result)
    seen = predict_from(forms_of(result), missed_by(result), params, tokens, level, error=error_of(result), lower=lower)
    assert result.points is not None
    own = result.points.params * result.points.tokens
    near = ~(too_high(params, tokens, own.max()) | too_low(params, tokens, own.min()))
    ci, pi = (np.where(near[:, None], pair, NAN) for pair in (seen.ci, seen.pi))
    return Prediction(loss=seen.loss, ci=ci, pi=pi)


def fitted_losses(result: Fitted) -> Array:
    """The loss of each run that the surface of ``result`` was fitted to, by this surface, (n,)."""
    surface, points = result.surface, result.points
    assert surface is not None and points is not None
    row = as_rows(surface, result.params)
    if not isinstance(surface, Law):
        return np.asarray(surface.predict(row, np.log(points.params)[None], np.log(points.tokens)[None])[0])
    features = surface.features(points)  # more than N and D for a law of unique tokens
    theta = surface.theta(row, np.zeros(len(features)))
    return np.asarray(surface.loss(theta, tuple(v[None] for v in features))[0])


def too_high(params: npt.ArrayLike, tokens: npt.ArrayLike, most: float) -> Mask:
    """Which runs, (m,), lie further above `most`, the highest N D of the fitted runs, than any interval was tested."""
    return np.atleast_1d(np.multiply(params, tokens, dtype=np.float64) > MOST_REACH * most)


def too_low(params: npt.ArrayLike, tokens: npt.ArrayLike, least: float) -> Mask:
    """Which runs, (m,), lie further below `least`, the lowest N D of the fitted runs, than any interval was tested."""
    return np.atleast_1d(MOST_REACH * np.multiply(params, tokens, dtype=np.float64) < least)


def forms_of(result: Fitted) -> list[Fitted]:
    """The result and, after `judge`, the other form of the law, which checks it."""
    if result.combination is not None or result.verdict is None:
        return [result]
    others = result.verdict.forms.values()
    return [result, *(f for f in others if f.law != result.law)]


def missed_by(result: Fitted) -> float:
    """The relative error on held-out budgets by which `judge` widens intervals; NaN where it does not."""
    return NAN if result.verdict is None or result.combination is not None else result.verdict.missed


def error_of(result: Fitted) -> FormError | None:
    """The error of the form of a combined law; None for another law."""
    return None if result.combination is None else result.combination.error


def lower_laws_of(result: Fitted) -> list[tuple[Fitted, FormError]]:
    """The laws of the runs below top budgets that are in doubt, each with the error of its form."""
    doubts = () if result.combination is None else result.combination.doubts
    return [(doubt.lower, error) for doubt in doubts if (error := error_of(doubt.lower)) is not None]


@np.errstate(all="ignore")
def predict_from(
    forms: Sequence[Fitted],
    missed: float,
    params: npt.ArrayLike,
    tokens: npt.ArrayLike,
    level: float,
    *,
    error: FormError | None = None,
    lower: Sequence[tuple[Fitted, FormError]] = (),
) -> Prediction:
    """Predict the loss under the first of `forms`, with intervals over all of them.

    The interval of the law is the hull of the intervals of all forms, widened as `optimum.loss_interval` describes. The
    interval of a new run adds the relative residual of the runs, times Student's t, in quadrature.

    Args:
        forms: Surfaces with draws.
        missed: Relative error on held-out budgets; NaN if it is not known.
        params: N, (m,).
        tokens: D, (m,).
        level: Nominal coverage of the intervals.
        error: The error of the form of a combined law, which adds to the interval of the law in quadrature.
        lower: Combined laws, with the errors of their forms, whose intervals of the law the interval covers as well.
    """
    from scipy.special import ndtri

    log_n, log_d = (np.log(np.atleast_1d(np.asarray(v, dtype=np.float64))) for v in (params, tokens))
    points, intervals = (np.stack(v) for v in zip(*(_of_form(f, log_n, log_d, level) for f in forms), strict=True))
    more = SHARE * np.log(points.max(axis=0) / points.min(axis=0)) + np.log1p(np.nan_to_num(missed))
    low = np.log(intervals[:, :, 0].min(axis=0)) - more
    high = np.log(intervals[:, :, 1].max(axis=0)) + more
    middle, main, tail = np.log(points[0]), forms[0], (1 - level) / 2
    if error is not None:
        half = error.half_of_run(np.exp(log_n), np.exp(log_d), level)
        low, high = middle - np.hypot(middle - low, half), middle + np.hypot(high - middle, half)
    for law, own in lower:
        ends_of_law = np.log(predict_from([law], NAN, params, tokens, level, error=own).ci)
        low, high = np.minimum(low, ends_of_law[:, 0]), np.maximum(high, ends_of_law[:, 1])
    noise = main.noise.residual * stretch(max(main.n - free_of(main), 1), tail) * float(ndtri(1 - tail))
    below, above = np.hypot(middle - low, noise), np.hypot(high - middle, noise)
    return Prediction(
        loss=points[0],
        ci=np.exp(np.stack([low, high], axis=1)),
        pi=np.exp(np.stack([middle - below, middle + above], axis=1)),
    )


def free_of(result: Fitted) -> int:
    """The number of fitted parameters, without those held fixed; of a combined law, that of its largest part."""
    many = len(result.params)
    if isinstance(result.surface, Combined):
        many = max(len(law.params) for law in result.surface.parts.values())
    return many - len(result.fixed)


def _of_form(form: Fitted, log_n: Array, log_d: Array, level: float) -> tuple[Array, Array]:
    """The loss under one form, (m,), and its interval, (m, 2)."""
    assert form.surface is not None and form.draws is not None
    point = form.surface.predict(as_rows(form.surface, form.params), log_n[None], log_d[None])[0]
    many = np.ones((len(form.draws), 1))
    spread = form.surface.predict(form.draws, many * log_n, many * log_d)
    return point, np.array([ends(float(p), spread[:, k], form.dof, level, log=True) for k, p in enumerate(point)])
