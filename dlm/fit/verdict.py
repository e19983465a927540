"""Determine how far a fitted law may be extrapolated, and widen its intervals so that they hold if its form is wrong.

An interval that assumes the form of the law ignores the error of that form: where the Skaling law was true, the
interval of L* under Chinchilla's law at a hundred times the budget covered the truth in 0 of 60 simulated worlds. So
every number is computed under both forms, and N* also from the isoFLOP minima. The interval is the hull of their
intervals. The interval of L* is further widened by half of the difference between the forms, and by the error of the
better form on held-out top budgets. `benchmarks/coverage.py` measures the coverage of these intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dlm.core.errors import UserError
from dlm.fit.combined.fit import FORMS
from dlm.fit.combined.verdict import judge_combined
from dlm.fit.draws import hull
from dlm.fit.engine.newton import Norm
from dlm.fit.engine.search import solve
from dlm.fit.fitted import Fitted, Verdict
from dlm.fit.isoflop.fit import fit_groups
from dlm.fit.laws import LAWS
from dlm.fit.layout import two_digits
from dlm.fit.optimum import LEVEL, MOST_REACH, SHARE, log_spread, loss_interval, main_form, optima, own_optimum, regret
from dlm.fit.points import NAN, Points
from dlm.fit.resample import bootstrap
from dlm.fit.result import FitResult
from dlm.fit.surface.fit import fit_points

WIDEST = 0.10  # relative width of the interval of L* beyond which L* is withheld
TINY = 1e-9  # a relative change of C that is only a rounding error
GRID = 41  # values of C tried between the highest C and MOST_REACH times it


@np.errstate(all="ignore")
def judge(
    result: FitResult, *, replicates: int = 1000, seed: int = 0, level: float = LEVEL, holdout: bool = True
) -> FitResult:
    """Add a verdict, and intervals at each C that hold under both forms. L* is withheld beyond `verdict.reach`.

    Args:
        result: A fit. A law without a second form (data-constrained, tied, a pinned exponent, an envelope) is returned
            unchanged; the interval of its L* is given within the runs only.
        replicates: Number of bootstrap replicates of each form.
        seed: Seed of the bootstraps.
        level: Nominal coverage of the intervals.
        holdout: Whether the other form is refitted without the top budgets. Where nothing was held out, L* is withheld
            beyond the runs.
    """
    if result.combination is not None:
        if result.draws is None:
            result = bootstrap(result, replicates=replicates, seed=seed, level=level)
        return judge_combined(result, level=level) if result.draws is not None else result
    points = result.points
    has_forms = result.law in (*FORMS, "isoflop") and not set(result.fixed) - {"E"}
    if points is None or not result.params or not has_forms:
        return result
    if result.draws is None:
        result = bootstrap(result, replicates=replicates, seed=seed, level=level)
    forms, why = _forms(result, points, replicates, seed, holdout=holdout)
    if not forms:
        return replace(result, notes=(*result.notes, why))
    top, missed = points.top_flops, _missed(forms)
    if why or not np.isfinite(missed):
        unchecked = "no budget can be held out to check it" if holdout else "no budget was held out to check it"
        reach, limit = top, why or unchecked
    else:
        reach, limit = _reach(result, forms, missed, top, level)
    methods, target = _methods(result, points, forms, replicates, seed), min(max((*result.at, top)), MOST_REACH * top)
    said = [own_optimum(f, target, level) for f in methods]
    n, main = hull([o.ci["N"] for o in said]), main_form(result, forms)
    verdict = Verdict(
        top=top,
        reach=reach,
        limit=limit,
        missed=missed,
        aicc=_aicc(points, forms),
        target=target,
        differ_n=float(np.exp(log_spread([o.N for o in said]))),
        differ_l=float(np.expm1(log_spread([own_optimum(f, target, level).L for f in forms.values()]))),
        regret=regret(main, target, own_optimum(main, target, level).N, n),
        n=n,
        forms=forms,
        methods=tuple(methods),
    )
    judged = replace(result, verdict=verdict)
    return replace(judged, at=optima(judged, judged.at, level=level))


def _forms(
    result: FitResult, points: Points, replicates: int, seed: int, *, holdout: bool
) -> tuple[dict[str, FitResult], str]:
    """Both forms with draws, by name, and the reason if one of them is missing."""
    how = Norm() if result.surface is None else result.how
    found, why = {}, ""
    for name in FORMS:
        if name == result.law:
            found[name] = result
            continue
        try:
            fit = fit_points(points, LAWS[name](), how, dict(result.fixed), holdout=holdout)
        except UserError as error:
            why = f"{name} cannot be fitted to check the form ({error})"
            continue
        drawn = bootstrap(fit, replicates=replicates, seed=seed)
        ci = own_optimum(drawn, points.top_flops, LEVEL).ci
        if np.isfinite([*ci["N"], *ci["L"]]).all():
            found[name] = drawn
        else:
            why = f"{name} cannot check the form, because resampled runs do not bound it"
    return found, why


def _methods(
    result: FitResult, points: Points, forms: Mapping[str, FitResult], replicates: int, seed: int
) -> list[FitResult]:
    """All fits that give an N*: the forms, and an isoFLOP fit if there are budgets and their points bound its N*."""
    surfaces = list(forms.values())
    if result.law == "isoflop":
        return [*surfaces, result]
    if points.budget is None or len(points.budgets()) > len(points) / 3:
        return surfaces
    own = replace(points, cluster=np.arange(len(points)))
    line = bootstrap(fit_groups(own), replicates=replicates, seed=seed)
    bounded = line.params and np.isfinite(own_optimum(line, points.top_flops, LEVEL).ci["N"]).all()
    return [*surfaces, line] if bounded else surfaces


def _missed(forms: Mapping[str, Fitted]) -> float:
    """The larger of the errors on the top one and two budgets, each of the better form; NaN if none was held out."""
    names = {name for form in forms.values() for name in form.holdout}
    better = [min(abs(f.holdout[name]["L_error"]) for f in forms.values() if name in f.holdout) for name in names]
    return max(better, default=NAN)


def _reach(result: Fitted, forms: Mapping[str, Fitted], missed: float, top: float, level: float) -> tuple[float, str]:
    """The highest C, rounded down to two digits, up to which the interval of L* is narrower than WIDEST, and its limit.

    The limit states in words why L* is not given beyond this C.
    """
    reach, limit = top, f"{MOST_REACH:g} times the highest is as far as simulated worlds have tried it"
    for flops in (top * np.geomspace(1.0, MOST_REACH, GRID)).tolist():
        low, high = loss_interval(result, forms, missed, flops, level)
        if not high / low - 1 <= WIDEST:
            limit = _limit(forms, missed, flops, level)
            break
        reach = flops
    return max(two_digits(reach * (1 + TINY), np.floor), top), limit


def _limit(forms: Mapping[str, Fitted], missed: float, flops: float, level: float) -> str:
    """The main cause, in words, of an interval that is too wide."""
    said = [own_optimum(f, flops, level) for f in forms.values()]
    widths = [o.ci["L"][1] / o.ci["L"][0] - 1 for o in said]
    if not np.isfinite(widths).all():
        return "beyond, resampled runs do not bound it"
    shares = {
        "the forms differ": (1.0 + 2 * SHARE) * log_spread([o.L for o in said]),
        "the noise of the runs spreads": float(np.median(widths)),
        "the error on held-out budgets spreads": 2.0 * missed,
    }
    cause = max(shares, key=shares.__getitem__)
    return f"beyond, its interval would be wider than {WIDEST:.0%}, mostly because {cause}"


def _aicc(points: Points, forms: Mapping[str, Fitted]) -> dict[str, float]:
    """Akaike's criterion of each form with the small-sample term, for normal residuals of log loss.

    The small-sample term is that of Hurvich and Tsai, Biometrika 76, 297, 1989.
    """
    found = {}
    for name, form in forms.items():
        squares = solve(points, form.fitted_law, Norm(norm="mse"), form.fixed).value
        n, k = len(points), len(form.fitted_law.params) - len(form.fixed) + 1
        if n > k + 1 and squares > 0:
            found[name] = float(n * np.log(squares / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1))
    return found
