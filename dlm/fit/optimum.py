"""optimum: a fitted law and C FLOPs -> N*, D*, L*, and the exponents a, b. Called by the fits, intervals and report.

Every function takes rows of parameters, one row per bootstrap replicate (R, k): in the order of `Law.params` for a
surface, of `LINE` for the log-log lines of isoflop and envelope (`law` is then None).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit import optimum
from dlm.fit.draws import ends
from dlm.fit.fitted import Allocation, Optimum
from dlm.fit.laws import LAWS
from dlm.fit.laws.law import Law
from dlm.fit.points import NAN, Array, Cost, Interval, Points
from dlm.fit.result import FitResult

WITHHELD_LINE = "a straight line has no floor"


WITHHELD_FORM = "one form alone does not say how far it holds"


TOP = 1.05  # times the highest C still counts as inside


def best_at(
    law: Law | None, params: Mapping[str, float], cost: Cost, at: Sequence[float], top: float
) -> dict[float, Optimum]:
    """N*, D*, L* of the fit at each C, without intervals; `top` is the highest C that the fit rests on."""
    rows = optimum.as_rows(law, params)
    wrong = [c for c in at if not 0 < c < np.inf]
    if wrong:
        raise UserError(f"at is {wrong[0]}: give compute in FLOPs, above 0")
    found = {float(c): optimum.best(law, rows, float(c), cost)[0].tolist() for c in at}
    why = WITHHELD_LINE if law is None else WITHHELD_FORM
    return {
        c: Optimum(N=n, D=d, L=loss, reach=c / top, withheld=why if c > TOP * top else "")
        for c, (n, d, loss) in found.items()
    }


def reach_warnings(law: str, at: Sequence[float], top: float) -> list[str]:
    """What is asked beyond `top`, and where the interval of L is withheld."""
    beyond = sorted(c for c in at if c > TOP * top)
    if not beyond:
        return []
    what = "the highest C used"
    warned = [f"C = {text.flops(beyond[-1])} is beyond {what} ({text.flops(top)}): true only if the law keeps its form"]
    if law not in LAWS:
        warned.append(f"no interval for L at C = {text.flops(beyond[0])} and above: a straight line has no floor")
    return warned


SHARE = 0.5  # of the forms' difference that is added to the hull


LEVEL = 0.95


def gated_optimum(
    result: FitResult,
    forms: Mapping[str, FitResult],
    methods: Sequence[FitResult],
    missed: float,
    reach: float,
    flops: float,
    level: float,
) -> Optimum:
    own = at_compute(result, flops, level)
    said = [at_compute(f, flops, level) for f in methods]
    ci = {k: hull_of([o.ci[k] for o in said]) for k in ("N", "D", "tokens_per_param")}
    withheld = ""
    if flops > TOP * reach or (result.law == "isoflop" and flops > TOP * top_of(result)):
        withheld = WITHHELD_FAR if result.law != "isoflop" else WITHHELD_LINE
        ci["L"] = (NAN, NAN)
    else:
        ci["L"] = too_wide(result, forms, missed, flops, level)
    main = forms.get(result.law, next(iter(forms.values())))
    return replace(
        own,
        L=NAN if withheld else own.L,
        ci=ci,
        regret=regret(main, flops, at_compute(main, flops, level).N, ci["N"]),
        withheld=withheld,
    )


def hull_of(pairs: Sequence[Interval]) -> Interval:
    """The least interval that holds all; NaN where one of them is not known."""
    return (float(np.min([p[0] for p in pairs])), float(np.max([p[1] for p in pairs])))


def too_wide(result: FitResult, forms: Mapping[str, FitResult], missed: float, flops: float, level: float) -> Interval:
    """The interval of L*: the hull of the forms (and of the result), widened."""
    said = [at_compute(f, flops, level, far=True) for f in forms.values()]
    if result.law == "isoflop":
        said.append(at_compute(result, flops, level, far=True))
    low, high = hull_of([o.ci["L"] for o in said])
    more = np.exp(SHARE * methods_differ([o.L for o in said])) * (1.0 + np.nan_to_num(missed))
    return float(low / more), float(high * more)


def methods_differ(values: Sequence[float]) -> float:
    return float(np.log(max(values) / min(values)))


def optima(result: FitResult, at: Iterable[float], *, level: float = LEVEL) -> dict[float, Optimum]:
    """N*, D*, L* at each C (FLOPs) of any fit that has a law: gated after `judge`, else with its own intervals."""
    if result.points is None or not result.params:
        return {}
    with np.errstate(all="ignore"):
        if result.verdict is None:
            return {float(c): at_compute(result, float(c), level) for c in at}
        seen = result.verdict
        return {
            float(c): gated_optimum(result, seen.forms, seen.methods, seen.missed, seen.reach, float(c), level)
            for c in at
        }


WITHHELD_FAR = "beyond the reach of these runs"


def at_compute(result: FitResult, flops: float, level: float, *, far: bool = False) -> Optimum:
    """The optimum at C with the intervals that take the law's form for granted.

    So that of L is withheld beyond the runs unless `far`; `gate.judge` gives one that holds further.
    """
    assert result.points is not None
    point = optimum.best(result.surface, optimum.as_rows(result.surface, result.params), flops, result.cost)[0].tolist()
    best = Optimum(N=point[0], D=point[1], L=point[2], reach=flops / top_of(result))
    if result.draws is None:
        return best
    spread = optimum.best(result.surface, result.draws, flops, result.cost)
    ci = {k: ends(point[j], spread[:, j], result.dof, level, log=True) for j, k in enumerate("NDL")}
    if best.reach > TOP and not far:
        ci["L"] = (NAN, NAN)
        best = replace(best, withheld=WITHHELD_LINE if result.surface is None else WITHHELD_FORM)
    ratio = spread[:, 1] / spread[:, 0]
    ci["tokens_per_param"] = ends(best.tokens_per_param, ratio, result.dof, level, log=True)
    return replace(best, ci=ci, regret=regret(result, flops, best.N, ci["N"]))


def top_of(result: FitResult) -> float:
    """The highest C that the result rests on, FLOPs."""
    assert result.points is not None
    return max((m.budget for m in result.usable), default=float(result.points.flops.max()))


def regret(result: FitResult, flops: float, best: float, ends_n: Interval) -> float:
    """The loss given away, at most, by training any size inside the interval of N* at C FLOPs."""
    log_n = np.log([best, *ends_n])
    if result.surface is not None:
        log_d = np.log(flops) - result.cost.log_per_token(log_n)
        row = optimum.as_rows(result.surface, result.params)
        loss = result.surface.predict(row, log_n[None], log_d[None])[0]
        return float((loss[1:] - loss[0]).max())
    curvature = float(np.median([m.coefficients[2] for m in result.minima if m.usable]))
    return float(curvature * ((log_n[1:] - log_n[0]) ** 2).max())


LINE = ("N0", "a", "D0", "b", "L0", "c")


REACH_NATS, STEP_NATS = 7.0, 0.05  # the grid of log N searched around the 6 N D optimum


WIDEST_NATS = 40.0  # the same where no 6 N D optimum is known: from 1 to e^40 parameters


GOLDEN = (np.sqrt(5.0) - 1.0) / 2.0


def names(law: Law | None) -> tuple[str, ...]:
    """The parameters of a row."""
    return LINE if law is None else law.params


def as_rows(law: Law | None, params: Mapping[str, float]) -> Array:
    """One row (1, k) from named parameters."""
    return np.array([[params[name] for name in names(law)]], dtype=np.float64)


def best(law: Law | None, rows: Array, flops: float, cost: Cost) -> Array:
    """(N*, D*, L*) at C FLOPs, shape (R, 3); NaN rows stay NaN."""
    with np.errstate(all="ignore"):
        if law is None:
            logs = np.log(rows[:, 0::2]) + np.log(flops) * rows[:, 1::2]
            return np.asarray(np.exp(logs), dtype=np.float64)
        log_n = law.optimum_at_6nd(rows, flops / cost.over_6n)
        if log_n is None or not cost.is_6nd:
            log_n = _search(law, rows, flops, cost, log_n)
        log_d = np.log(flops) - cost.log_per_token(log_n)
        return np.stack([np.exp(log_n), np.exp(log_d), law.predict(rows, log_n, log_d)], axis=1)


def _search(law: Law, rows: Array, flops: float, cost: Cost, around: Array | None) -> Array:
    """log N* under cost(N) D = C: the best point of a grid, then golden section between its neighbours."""

    def loss(log_n: Array) -> Array:
        return law.predict(rows, log_n, np.log(flops) - cost.log_per_token(log_n))

    if around is None:
        offsets, around = np.arange(0.0, WIDEST_NATS, STEP_NATS), np.zeros(len(rows))
    else:
        offsets = np.arange(-REACH_NATS, REACH_NATS + STEP_NATS, STEP_NATS)
    middle = around + offsets[loss(around[:, None] + offsets).argmin(axis=1)]
    low, high = middle - STEP_NATS, middle + STEP_NATS
    for _ in range(30):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        down = loss(left) < loss(right)
        low, high = np.where(down, low, left), np.where(down, right, high)
    found = np.asarray((low + high) / 2.0, dtype=np.float64)
    return np.where(np.isfinite(rows).all(axis=1), found, np.nan)


def span_of(points: Points) -> tuple[float, float]:
    """The range of C over which exponents are measured: that of the points, at least a factor of 4."""
    low, high = float(points.flops.min()), float(points.flops.max())
    return (low, high) if high >= 4.0 * low else (low / 2.0, high * 2.0)


def exponents(law: Law | None, rows: Array, span: tuple[float, float], cost: Cost) -> Array:
    """(a, b) of N* ~ C^a and D* ~ C^b, shape (R, 2)."""
    if law is None:
        return rows[:, [1, 3]]
    a = law.exponents_at_6nd(rows) if cost.is_6nd else None
    if a is not None:
        return np.stack([a, 1.0 - a], axis=1)
    low, high = (np.log(best(law, rows, flops, cost)[:, :2]) for flops in span)
    return np.asarray((high - low) / np.log(span[1] / span[0]), dtype=np.float64)


def allocation(law: Law, params: Mapping[str, float], span: tuple[float, float], cost: Cost) -> Allocation:
    """The exponents of a surface, and how they were found."""
    rows = as_rows(law, params)
    a, b = (float(v) for v in exponents(law, rows, span, cost)[0])
    if cost.is_6nd and law.exponents_at_6nd(rows) is not None:
        same = "a = b = 1/2, as one exponent for N and D has it"
        how = same if law.name == "tied" else "a = beta/(alpha+beta), b = alpha/(alpha+beta)"
        return Allocation(a=a, b=b, how=f"closed form: {how}, since C = 6 N D")
    slope = f"mean slope between C = {text.flops(span[0])} and {text.flops(span[1])}"
    under = "6 N D = C" if cost.is_6nd else "cost(N) D = C, cost from the rows' flops/tokens"
    return Allocation(a=a, b=b, how=f"numerical: N* minimises L under {under}; {slope}")
