"""predict: a fitted law and (N, D) -> the loss to expect there, with its interval and that of a run. Called by frozen
and notebooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dlm.core.errors import UserError
from dlm.fit.draws import ends, stretch
from dlm.fit.laws.law import Law
from dlm.fit.optimum import SHARE
from dlm.fit.points import Array
from dlm.fit.result import FitResult


@dataclass(frozen=True, kw_only=True, eq=False)
class Form:
    """A law with one row of parameters, its bootstrap rows, and the degrees of freedom of their intervals."""

    law: Law
    row: Array  # (1, p)
    draws: Array  # (R, p)
    dof: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """L in nats/token at m places: the law's value, the interval of the law, and that of a new run (with its noise)."""

    loss: Array  # (m,)
    ci: Array  # (m, 2)
    pi: Array  # (m, 2)


def predict(result: FitResult, params: npt.ArrayLike, tokens: npt.ArrayLike, *, level: float = 0.95) -> Prediction:
    """The loss at (N, D), of a surface after `bootstrap`; after `judge` the intervals hold under both forms.

    Raises UserError for a result that is no surface or has no draws.
    """
    if result.surface is None or result.draws is None:
        raise UserError(f"{result.law} gives no prediction: fit a surface and bootstrap it first")
    for name, values in (("params", params), ("tokens", tokens)):
        if not (np.isfinite(values) & (np.asarray(values) > 0)).all():
            raise UserError(f"{name} must be finite numbers above 0")
    if np.size(params) != np.size(tokens):
        raise UserError(f"params has {np.size(params)} values and tokens {np.size(tokens)}: they must be equally long")
    forms = forms_of(result)
    missed = np.nan if result.verdict is None else result.verdict.missed
    return at_places(forms, missed, result.noise.residual, result.n, params, tokens, level)


def forms_of(result: FitResult) -> list[Form]:
    """The result's own form first, then the one that checks it."""
    others = [] if result.verdict is None else [f for f in result.verdict.forms.values() if f.law != result.law]
    found = []
    for fit in (result, *others):
        assert fit.surface is not None and fit.draws is not None
        row = np.array([[fit.params[name] for name in fit.surface.params]])
        found.append(Form(law=fit.surface, row=row, draws=fit.draws, dof=fit.dof))
    return found


@np.errstate(all="ignore")
def at_places(
    forms: Sequence[Form],
    missed: float,
    residual: float,
    n: int,
    params: npt.ArrayLike,
    tokens: npt.ArrayLike,
    level: float,
) -> Prediction:
    """The same from its parts: `missed` on held-out budgets (NaN: not known), relative `residual` of n runs."""
    log_n, log_d = (np.log(np.atleast_1d(np.asarray(v, dtype=np.float64))) for v in (params, tokens))
    points = np.stack([f.law.predict(f.row, log_n[None], log_d[None])[0] for f in forms])
    lows, highs = (np.stack(v) for v in zip(*(_ends(f, log_n, log_d, level) for f in forms), strict=True))
    more = SHARE * np.log(points.max(axis=0) / points.min(axis=0)) + np.log1p(np.nan_to_num(missed))
    low, high = np.log(lows.min(axis=0)) - more, np.log(highs.max(axis=0)) + more
    middle = np.log(points[0])
    noise = residual * stretch(max(n - forms[0].row.shape[1], 1), (1 - level) / 2) * _z(level)
    below, above = np.hypot(middle - low, noise), np.hypot(high - middle, noise)
    return Prediction(
        loss=points[0],
        ci=np.exp(np.stack([low, high], axis=1)),
        pi=np.exp(np.stack([middle - below, middle + above], axis=1)),
    )


def _ends(form: Form, log_n: Array, log_d: Array, level: float) -> tuple[Array, Array]:
    point = form.law.predict(form.row, log_n[None], log_d[None])[0]
    many = np.ones((len(form.draws), 1))
    spread = form.law.predict(form.draws, many * log_n, many * log_d)
    pairs = [ends(float(p), spread[:, k], form.dof, level, log=True) for k, p in enumerate(point)]
    low, high = np.array(pairs).T
    return low, high


def _z(level: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(1 - (1 - level) / 2))
