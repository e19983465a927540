"""gate: a fitted law -> how far it may be believed, and intervals that hold if its form is wrong. Called by table.

An interval that takes the form for granted says nothing of the form: with Skaling truths, Chinchilla's interval of L*
at a hundred times the budget covered 0 of 60 worlds. So every number is asked of both forms (and N* of the isoFLOP
minima too): the interval is their hull, and that of L* is widened by half of what the forms differ, and by what the
better of them missed when the top budgets were held out. `benchmarks/coverage.py` measures what that covers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from dlm.core.errors import UserError
from dlm.fit.engine.search import Norm, solve
from dlm.fit.fitted import Verdict
from dlm.fit.isoflop.fit import fit_isoflop
from dlm.fit.laws import LAWS
from dlm.fit.optimum import (
    LEVEL,
    SHARE,
    at_compute,
    gated_optimum,
    hull_of,
    methods_differ,
    regret,
    too_wide,
)
from dlm.fit.points import NAN, Points
from dlm.fit.resample import bootstrap
from dlm.fit.result import FitResult
from dlm.fit.surface.fit import fit_points

FORMS = ("chinchilla", "skaling")


MOST_REACH = 100.0  # times the highest C: nothing beyond has been tried in simulated worlds


WIDEST = 0.10  # relative width of the interval of L* beyond which it is withheld


GRID = 41  # places between the highest C and MOST_REACH times it


@np.errstate(all="ignore")
def judge(
    result: FitResult, *, replicates: int = 1000, seed: int = 0, level: float = LEVEL, at: Sequence[float] | None = None
) -> FitResult:
    """The result with a verdict, and with intervals at each C that hold under both forms.

    Beyond `verdict.reach` L* is withheld. Laws that have no second form (data-constrained, tied, a pinned exponent, an
    envelope) come back as they are: their L* is given within the runs only.
    """
    if result.points is None or not result.params or not _has_forms(result):
        return result
    if result.draws is None:
        result = bootstrap(result, replicates=replicates, seed=seed, level=level)
    forms, why = _forms(result, replicates, seed)
    if not forms:
        return result
    places = tuple(result.at) if at is None else tuple(at)
    methods = _methods(result, forms, replicates, seed)
    verdict = _verdict(result, forms, methods, why, places, level)
    best = {
        float(c): gated_optimum(result, forms, methods, verdict.missed, verdict.reach, float(c), level) for c in places
    }
    return replace(result, at=best, verdict=verdict)


def _has_forms(result: FitResult) -> bool:
    return result.law in (*FORMS, "isoflop") and not set(result.fixed) - {"E"}


def _forms(result: FitResult, replicates: int, seed: int) -> tuple[dict[str, FitResult], str]:
    """Both forms with draws, and why one is missing."""
    assert result.points is not None
    found, why = {}, ""
    for name in FORMS:
        if name == result.law and result.draws is not None:
            found[name] = result
            continue
        try:
            fit = fit_points(result.points, LAWS[name](), result.how or Norm(), dict(result.fixed))
        except UserError as error:
            why = f"{name} cannot be fitted to check the form ({error})"
            continue
        found[name] = bootstrap(fit, replicates=replicates, seed=seed)
    return found, why


def _methods(result: FitResult, forms: Mapping[str, FitResult], replicates: int, seed: int) -> list[FitResult]:
    """All that say N*: the forms, and the isoFLOP minima where there are budgets and their points bound them."""
    assert result.points is not None
    if result.law == "isoflop":
        return [*forms.values(), result]
    points = result.points
    if points.budget is None or len(points.budgets()) > len(points) / 3:
        return list(forms.values())
    line = fit_isoflop(
        points.params,
        points.tokens,
        points.loss,
        points.budget,
        flops=points.flops,
        weights=points.weight,
        loss_se=points.loss_se,
        loss_se_own=points.loss_se_own,
    )
    line = bootstrap(line, replicates=replicates, seed=seed)
    bounded = line.params and np.isfinite(at_compute(line, float(points.flops.max()), LEVEL).ci["N"]).all()
    return [*forms.values(), line] if bounded else list(forms.values())


def _missed(forms: Mapping[str, FitResult]) -> float:
    """The larger of the errors at the top one and two budgets, each that of the better form; NaN if none is known."""
    errors = [
        min(abs(f.holdout[k]["L_error"]) for f in forms.values() if k in f.holdout)
        for k in ("without_top_1", "without_top_2")
        if any(k in f.holdout for f in forms.values())
    ]
    return max(errors, default=NAN)


def _verdict(
    result: FitResult,
    forms: Mapping[str, FitResult],
    methods: Sequence[FitResult],
    why: str,
    places: Sequence[float],
    level: float,
) -> Verdict:
    assert result.points is not None
    top, missed = float(result.points.flops.max()), _missed(forms)
    reach, limit = _reach(result, forms, missed, top, level)
    if why or not np.isfinite(missed):
        reach, limit = top, why or "no budget can be held out to check it"
    target = max((*places, top))
    said = [at_compute(f, target, level) for f in methods]
    n, main = hull_of([o.ci["N"] for o in said]), forms.get(result.law, next(iter(forms.values())))
    best = at_compute(main, target, level)
    return Verdict(
        top=top,
        reach=reach,
        limit=limit,
        missed=missed,
        aicc=_aicc(result.points, forms),
        target=target,
        differ_n=float(np.exp(methods_differ([o.N for o in said]))),
        differ_l=float(np.expm1(methods_differ([at_compute(f, target, level).L for f in forms.values()]))),
        regret=regret(main, target, best.N, n),
        n=n,
        forms=forms,
        methods=tuple(methods),
    )


def _reach(
    result: FitResult, forms: Mapping[str, FitResult], missed: float, top: float, level: float
) -> tuple[float, str]:
    """The highest C, rounded down to two digits, at which the interval of L* is narrower than WIDEST; and why."""
    reach = top
    for flops in top * np.geomspace(1.0, MOST_REACH, GRID):
        low, high = too_wide(result, forms, missed, float(flops), level)
        if not high / low - 1 <= WIDEST:
            return max(_down(reach), top), _limit(forms, missed, float(flops), level)
        reach = float(flops)
    return _down(reach), f"{MOST_REACH:g} times the highest is as far as simulated worlds have tried it"


def _down(value: float) -> float:
    scale = 10.0 ** (np.floor(np.log10(value)) - 1)
    return float(f"{np.floor(value / scale * (1 + 1e-9)) * scale:.1e}")


def _limit(forms: Mapping[str, FitResult], missed: float, flops: float, level: float) -> str:
    """The largest part of an interval that has become too wide."""
    said = [at_compute(f, flops, level, far=True) for f in forms.values()]
    widths = [o.ci["L"][1] / o.ci["L"][0] - 1 for o in said]
    if not np.isfinite(widths).all():
        return "beyond, resampled runs do not bound it"
    shares = {
        "the forms differ": (1.0 + 2 * SHARE) * methods_differ([o.L for o in said]),
        "the noise of the runs spreads": float(np.median(widths)),
        "the error on held-out budgets spreads": 2.0 * missed,
    }
    return (
        f"beyond, its interval would be wider than {WIDEST:.0%}, mostly because {max(shares, key=shares.__getitem__)}"
    )


def _aicc(points: Points, forms: Mapping[str, FitResult]) -> dict[str, float]:
    """Akaike's criterion with the small-sample term, for normal residuals of log loss (Hurvich and Tsai 1989)."""
    found = {}
    for name, form in forms.items():
        assert form.surface is not None
        squares = solve(points, form.surface, Norm(norm="mse"), dict(form.fixed)).objective
        n, k = len(points), len(form.surface.params) - len(form.fixed) + 1
        if n > k + 1 and squares > 0:
            found[name] = float(n * np.log(squares / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1))
    return found
