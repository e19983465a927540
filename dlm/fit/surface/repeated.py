"""Fit laws of repeated data, and choose among them by the unique-token budgets and sizes that they did not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np
import numpy.typing as npt

from dlm.core.errors import UserError, unknown
from dlm.fit import optimum
from dlm.fit.choice import Choice, chosen
from dlm.fit.curves import weighed
from dlm.fit.engine.newton import Norm
from dlm.fit.laws import UNIQUE
from dlm.fit.laws.epochs import Epochs
from dlm.fit.left_out import groups, score
from dlm.fit.points import Points, SurfaceColumns, as_points
from dlm.fit.result import FitResult
from dlm.fit.surface.fit import check_repeats, checked_norm, fit_points, law_of, with_two_budgets
from dlm.fit.turn import GREAT_RISE, Repeated, corrected, missed_turns, overlooked

REPEATED = "repeated"
NAMES = (REPEATED, "epochs", "penalty", "onset")
DELTA = 1e-2  # Huber's corner: these laws miss a curve by about 1 %


@np.errstate(all="ignore")  # numbers that overflow are found and named in the warnings
def fit_repeated(
    params: npt.ArrayLike,
    tokens: npt.ArrayLike,
    loss: npt.ArrayLike,
    *,
    law: str = REPEATED,
    unique: float | None = None,
    norm: str = "huber",
    delta: float = DELTA,
    space: str = "log",
    under_tuned: float = 1.0,
    fixed: Mapping[str, float] | None = None,
    at: Sequence[float] = (),
    label: str = "",
    holdout: bool = True,
    **columns: Unpack[SurfaceColumns],
) -> FitResult:
    """Fit a law of repeated data, and find the optimum for `unique` tokens at each C of `at`.

    Args:
        params: N of each run, (n,).
        tokens: D of each run, (n,).
        loss: L of each run, (n,), nats/token.
        law: 'epochs', 'penalty' or 'onset', or 'repeated' for the law of `UNIQUE` that predicts best what it has not
            seen.
        unique: U for predictions; by default the most unique tokens of any run.
        norm: As in `fit_surface`.
        delta: As in `fit_surface`.
        space: As in `fit_surface`.
        under_tuned: As in `fit_surface`.
        fixed: As in `fit_surface`.
        at: As in `fit_surface`.
        label: As in `fit_surface`.
        holdout: Whether to hold out budgets of unique tokens and sizes. 'repeated' needs it.
        **columns: As in `fit_surface`; `unique_tokens` is required.

    Raises:
        UserError: For an argument that is not allowed, and for points that do not support the law.
    """
    if law not in NAMES:
        raise unknown("law", law, NAMES)
    if unique is not None and not 0 < unique < np.inf:
        raise UserError(f"unique is {unique}: give a number of unique tokens above 0")
    how = checked_norm(norm=norm, delta=delta, space=space, under_tuned=under_tuned)
    points = with_two_budgets(as_points(params, tokens, loss, **columns))
    if points.unique is None:
        raise UserError(f"{law} needs the unique tokens of every run: add a column unique_tokens")
    check_repeats(points, fixed or {})
    found = _choose(weighed(points), law, how, dict(fixed or {}), unique=unique, holdout=holdout)
    return optimum.with_optima(replace(found, label=label), at)


def _choose(
    points: Points, law: str, how: Norm, fixed: Mapping[str, float], *, unique: float | None, holdout: bool
) -> FitResult:
    """The fit of the law that is asked for, or of the one that is chosen, with its errors on what was held out."""
    held = groups(points) if holdout else []
    if law == REPEATED and not held:
        raise UserError(
            "repeated chooses a law by leaving out unique-token budgets and sizes, and "
            + ("these runs have fewer than three of both" if holdout else "--no-holdout forbids it")
            + ": name one law, such as --law penalty"
        )
    fits: dict[str, FitResult] = {}
    refused: dict[str, str] = {}
    for name in UNIQUE if law == REPEATED else (law,):
        try:
            surface = law_of(name, points, how, fixed, unique=unique)
            fits[name] = fit_points(points, surface, how, fixed, holdout=False)
        except UserError as error:
            refused[name] = str(error)
    if not fits:
        raise UserError("; ".join(f"{name}: {why}" for name, why in refused.items()))
    if not held:
        return fits[law]
    scores = {name: score(fit, held) for name, fit in fits.items()}
    better = {name: score(fit, held, correct=True) for name, fit in fits.items() if isinstance(fit.surface, Epochs)}
    corrects = [name for name in better if chosen({"plain": scores[name], "corrected": better[name]}) == "corrected"]
    scores |= {name: better[name] for name in corrects}
    blind = tuple(name for name, fit in fits.items() if _is_blind(fit, points))
    if len(blind) == len(fits):
        blind = ()
    law = chosen({name: own for name, own in scores.items() if name not in blind})
    choice = Choice(law=law, scores=scores, refused=refused, corrected=tuple(corrects), blind=blind)
    found = replace(fits[choice.law], choice=choice)
    return _corrected(found, points) if choice.law in corrects else found


def _is_blind(fit: FitResult, points: Points) -> bool:
    """Whether the loss of some of the runs rises greatly where the law that was fitted to them still falls."""
    law = fit.surface
    assert isinstance(law, Repeated)
    return bool(missed_turns(law, optimum.as_rows(law, fit.params), points, rise=GREAT_RISE))


def _corrected(found: FitResult, points: Points) -> FitResult:
    """The same fit with its predictions corrected, and with the corrected law's warnings of turns that it overlooks."""
    law = found.surface
    assert isinstance(law, Epochs)
    row = optimum.as_rows(law, found.params)
    own = corrected(law, row, points)
    others = [warning for warning in found.warnings if warning not in overlooked(law, row, points)]
    warnings = (*others, *overlooked(own, row, points))
    return replace(found, surface=own, warnings=warnings, status="warned" if warnings else "ok")
