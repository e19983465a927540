"""Fit the combined law: Chinchilla's and the Skaling form, each to all runs and to mostly the large ones.

No single fit predicts best on published runs whose top budgets are hidden. A form that fits small runs well can be
wrong beyond the large ones, so each form is also fitted with weights that grow with C. The parts are weighted by how
well they predict the top budgets of these runs when those are held out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np
import numpy.typing as npt

from dlm.core.errors import UserError
from dlm.fit import optimum
from dlm.fit.budgets import are_groups
from dlm.fit.combined.error import FAR
from dlm.fit.combined.floor import LEAST_MINIMA, FloorLaw
from dlm.fit.combined.origin import Origin
from dlm.fit.combined.origins import error_of, origins
from dlm.fit.engine.newton import Norm
from dlm.fit.engine.search import solve
from dlm.fit.fitted import Allocation, Combination, Fitted
from dlm.fit.isoflop.fit import fit_groups
from dlm.fit.laws import LAWS
from dlm.fit.laws.combined import Combined
from dlm.fit.points import Cost, Points, SurfaceColumns, as_points
from dlm.fit.result import FitResult
from dlm.fit.surface.fit import checked_norm, fit_points, law_of, with_two_budgets

FORMS = ("chinchilla", "skaling")
EMPHASES = (0.0, 0.5, 1.0)  # the weight of a run is proportional to C to this power
TOLD = 2  # origins whose errors decide the weights: those that hold out the fewest runs
SMALL = 0.003  # a smaller error per decade tells nothing about a part
NEAR_TOP = 4.0  # a line is used if the highest budget with a minimum is within this factor of the highest C
SHARP = 2.0  # the weight of a part falls with its mean squared error to this power


@np.errstate(all="ignore")  # numbers that overflow are found and named in the warnings
def fit_combined(
    params: npt.ArrayLike,
    tokens: npt.ArrayLike,
    loss: npt.ArrayLike,
    *,
    norm: str = "huber",
    delta: float = 1e-3,
    space: str = "log",
    under_tuned: float = 1.0,
    fixed: Mapping[str, float] | None = None,
    at: Sequence[float] = (),
    label: str = "",
    holdout: bool = True,
    **columns: Unpack[SurfaceColumns],
) -> FitResult:
    """Fit the combined law. The arguments are those of `fit_surface`; of the parameters, only E may be held fixed.

    Without `holdout`, all parts have the same weight.
    """
    pinned = dict(fixed or {})
    if odd := sorted({*pinned} - {"E"}):
        raise UserError(f"the combined law cannot hold {odd[0]} fixed, only E: name one law, such as chinchilla")
    how = checked_norm(norm=norm, delta=delta, space=space, under_tuned=under_tuned)
    points = with_two_budgets(as_points(params, tokens, loss, **columns))
    law_of(FORMS[0], points, how, pinned)  # checks the value of E
    return optimum.with_optima(replace(combine(points, how, pinned, holdout=holdout), label=label), at)


def combine(points: Points, how: Norm, fixed: Mapping[str, float], *, holdout: bool = True) -> FitResult:
    """Fit the combined law to checked points; the result has no optima. Only E may be held fixed.

    Raises:
        UserError: If not even Chinchilla's law can be fitted.
    """
    forms, notes = _forms(points, how, fixed)
    parts = {
        f"{name}_{emphasis:g}": part
        for name, form in forms.items()
        for emphasis in EMPHASES
        if (part := _emphasised(form, emphasis)) is not None
    }
    held = origins(points, parts) if holdout else []
    weights = weights_of(parts, held)
    surface = Combined({name: part.fitted_law for name, part in parts.items()}, weights)
    best = forms[max(forms, key=lambda name: sum(w for part, w in weights.items() if part.startswith(name)))]
    params = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.params.items()}
    line = _line(points)
    shared = [w for w in best.warnings if all(w in form.warnings for form in forms.values())]
    return FitResult(
        law=surface.name,
        how=how,
        n=len(points),
        params=params,
        allocation=_allocation(surface, params, points, best.cost, line),
        holdout={f"without_top_{k}": _missed(origin, weights) for k, origin in enumerate(held, 1)},
        status="warned" if shared else "ok",
        warnings=tuple(shared),
        notes=(*best.notes, *notes),
        points=points,
        cost=best.cost,
        surface=surface,
        fixed=fixed,
        outliers=best.outliers,
        noise=best.noise,
        combination=Combination(
            parts=parts, line=line, floor=_floor(line), error=error_of(points, held, weights), held=tuple(held)
        ),
    )


def weights_of(parts: Mapping[str, Fitted], held: Sequence[Origin]) -> dict[str, float]:
    """The weight of each part, from its errors at the first origins at which all parts have errors.

    Without such an origin, all weights are equal.
    """
    told = [origin for origin in held if origin.errors.keys() == parts.keys()][:TOLD]
    if not told:
        return dict.fromkeys(parts, 1 / len(parts))
    squares = {
        name: np.mean([np.mean((o.errors[name] / np.maximum(o.distance, FAR)) ** 2) for o in told]) for name in parts
    }
    worth = {name: float((square + SMALL**2) ** -SHARP) for name, square in squares.items()}
    return {name: value / sum(worth.values()) for name, value in worth.items()}


def _forms(points: Points, how: Norm, fixed: Mapping[str, float]) -> tuple[dict[str, FitResult], list[str]]:
    """The fits of the forms to all runs, and a note on a form that cannot be fitted."""
    found, notes = {FORMS[0]: fit_points(points, LAWS[FORMS[0]](), how, fixed, holdout=False)}, []
    for name in FORMS[1:]:
        try:
            found[name] = fit_points(points, LAWS[name](), how, fixed, holdout=False)
        except UserError as error:
            notes.append(f"{name} is no part of the combined law: {error}")
    return found, notes


def _emphasised(form: FitResult, emphasis: float) -> Fitted | None:
    """The form fitted with weights that grow with C; None if this finds no law. Its noise is that of the form."""
    points, law = form.points, form.fitted_law
    assert points is not None
    if not emphasis:
        return form
    more = (points.flops / points.top_flops) ** emphasis
    heavy = replace(points, weight=points.weight * more / more.mean())
    known = np.array([[row[key] for key in law.params] for row in (form.params, *form.rivals)])
    try:
        found = solve(heavy, law, form.how, form.fixed, begin=known)
    except UserError:
        return None
    if not found.converged:
        return None
    return replace(form, points=heavy, params=found.params, rivals=found.rivals, value=found.value)


def with_minima(result: FitResult, line: Fitted | None, floor: FloorLaw | None) -> FitResult:
    """The combined law with another isoFLOP line and floor law, or with none, and with the exponents that follow."""
    assert isinstance(result.surface, Combined) and result.points is not None and result.combination is not None
    share = _allocation(result.surface, result.params, result.points, result.cost, line)
    return replace(result, allocation=share, combination=replace(result.combination, line=line, floor=floor))


def _allocation(
    surface: Combined, params: Mapping[str, float], points: Points, cost: Cost, line: Fitted | None
) -> Allocation:
    """The exponents of N* and D*, each the mean of that of the surface and that of the line, if there is one."""
    found = optimum.allocation(surface, params, points, cost)
    if line is None:
        return found
    a, b = ((one + two) / 2 for one, two in ((found.a, line.allocation.a), (found.b, line.allocation.b)))
    return Allocation(a=a, b=b, how=f"mean of the isoFLOP line and of the surface ({found.how})")


def _line(points: Points) -> FitResult | None:
    """The isoFLOP line through the minima; None if fewer than two budgets have one, or none near the highest C."""
    if points.budget is None or not are_groups(points.budget):
        return None
    line = fit_groups(points)
    return line if line.params and optimum.top_of(line) >= points.top_flops / NEAR_TOP else None


def _floor(line: Fitted | None) -> FloorLaw | None:
    """The floor law through the minima of the line; None if there are too few."""
    if line is None or len(line.usable) < LEAST_MINIMA:
        return None
    budgets, losses = np.array([(m.budget, m.L) for m in line.usable]).T
    return FloorLaw(budgets=budgets, losses=losses)


def _missed(origin: Origin, weights: Mapping[str, float]) -> dict[str, float]:
    """The errors at one origin, as `surface.holdout.leave_future_out` gives them."""
    error = np.expm1(origin.of(weights))
    return {
        "from_flops": origin.start,
        "num_held_out": float(len(error)),
        "L_error": float(error.mean()),
        "L_rms_error": float(np.sqrt((error**2).mean())),
    }
