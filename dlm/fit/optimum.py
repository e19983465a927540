"""Find the best use of C FLOPs under a fitted law: N*, D* and L*, their intervals, and the exponents a and b.

`names` and all functions below it take rows of parameters, (R, k), one row per bootstrap replicate. The parameters are
in the order of `Surface.params` for a surface, and in the order of `LINE` for the log-log lines of isoflop and
envelope, for which `law` is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit.combined.error import half_of_size
from dlm.fit.combined.floor import FloorLaw, share_at
from dlm.fit.draws import ends, hull
from dlm.fit.fitted import Allocation, Combination, Fitted, Optimum, Verdict
from dlm.fit.laws.combined import Combined
from dlm.fit.laws.correction import form_of
from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.laws.epochs import Epochs
from dlm.fit.laws.law import Surface
from dlm.fit.points import NAN, UNBOUNDED, Array, Cost, Interval, Points

LEVEL = 0.95
TOP = 1.05  # a C up to this multiple of the highest C counts as within the runs
SHARE = 0.5  # share of the difference between the forms by which the interval of L* is widened

WITHHELD_LINE = "a straight line has no floor"
WITHHELD_FORM = "one form alone does not say how far it holds"
WITHHELD_NOISE = "without resampled runs, nothing shows its noise"
WITHHELD_FAR = "beyond the reach of these runs"

MOST_REACH = 100.0  # multiple of the highest C up to which intervals were tested; nothing is given beyond
LEAST_WEIGHT = 0.05  # parts of a combined law that weigh less have no say in the regret
MOST_SPREAD = 10.0  # ratio of the ends of the interval of N* above which N* is not given beyond the runs
UNTESTED = f"C is over {MOST_REACH:g} times the highest of the runs, further than any interval was tested"
UNTESTED_BELOW = (
    f"C is below the lowest of the runs by a factor above {MOST_REACH:g}, further than any interval was tested"
)
NOT_BOUNDED = "resampled runs do not bound it"
TOO_WIDE = f"the interval of N* spans a factor above {MOST_SPREAD:g}"

NEAR_SIZES = 2.0
FAR_SIZE = (
    f"to spend all of C on these unique tokens takes a size {NEAR_SIZES:g} times or more beyond those of the runs"
)
LINE = ("N0", "a", "D0", "b", "L0", "c")  # N* = N0 C^a, D* = D0 C^b, L* = L0 C^c
REACH_NATS = 7.0  # N* is searched within this distance of the optimum under 6 N D = C
WIDEST_NATS = 40.0  # or, if that optimum is not known, from 1 to e^40 parameters
SIZES = np.linspace(0.0, WIDEST_NATS, 321)  # where the search begins for a law whose loss may have several minima
GOLDEN, GOLDEN_STEPS = (np.sqrt(5.0) - 1.0) / 2.0, 42  # from 40 nats to 7e-8, where rounding hides what is left

F = TypeVar("F", bound=Fitted)


def optima(result: Fitted, at: Iterable[float], *, level: float = LEVEL) -> dict[float, Optimum]:
    """Find the optimum at each C, with intervals.

    After `judge`, the intervals hold under both forms of the law, or include the error of the form of a combined law,
    and L* is withheld beyond the reach of the verdict. Before `judge`, the intervals of other laws assume that their
    form is right, and the interval of L* is withheld beyond the runs.

    Args:
        result: Any fit; a fit without a law has no optima.
        at: The values of C, FLOPs.
        level: Nominal coverage of the intervals.

    Raises:
        UserError: If a C is not a finite number above 0.
    """
    if result.points is None or not result.params:
        return {}
    places = [float(c) for c in at]
    wrong = [c for c in places if not 0 < c < np.inf]
    if wrong:
        raise UserError(f"at is {wrong[0]}: give compute in FLOPs, above 0")
    with np.errstate(all="ignore"):
        return {c: _optimum(result, c, level) for c in places}


def _optimum(result: Fitted, flops: float, level: float) -> Optimum:
    best = own_optimum(result, flops, level)
    if result.draws is not None and best.reach > TOP * MOST_REACH:
        return _without(best, UNTESTED)
    if result.draws is not None and bottom_of(result) > TOP * MOST_REACH * flops:
        return _without(best, UNTESTED_BELOW)
    if isinstance(result.surface, Epochs) and not _is_near_sizes(result, best.N):
        return _without(best, FAR_SIZE)
    if result.verdict is not None:
        best = _judged(result, best, result.verdict, flops, level)
        low, high = best.ci["N"]
        if result.combination is not None and not np.isfinite(low + high):
            return _without(best, NOT_BOUNDED)
        if best.reach <= TOP or high <= MOST_SPREAD * low:
            return best
        return _without(best, TOO_WIDE if np.isfinite(high) else NOT_BOUNDED)
    if best.reach <= TOP:
        return replace(best, ci={**best.ci})  # the one that is kept must not change
    ci = {**best.ci, "L": UNBOUNDED} if best.ci else {}
    why = WITHHELD_LINE if result.surface is None else WITHHELD_FORM if result.combination is None else WITHHELD_NOISE
    return replace(best, ci=ci, withheld=why)


def _is_near_sizes(result: Fitted, size: float) -> bool:
    assert result.points is not None
    low, high = result.points.params.min(), result.points.params.max()
    return bool(low / NEAR_SIZES <= size <= high * NEAR_SIZES)


def _without(best: Optimum, why: str) -> Optimum:
    """The optimum without any of its numbers, for the reason `why`."""
    return replace(best, N=NAN, D=NAN, L=NAN, regret=NAN, ci=dict.fromkeys(best.ci, UNBOUNDED), withheld=why)


@lru_cache(maxsize=256)  # a verdict and its figures ask for the same optima many times
def own_optimum(result: Fitted, flops: float, level: float) -> Optimum:
    """The optimum at C, even far beyond the runs, with intervals that assume that the form of the law is right."""
    if result.combination is not None:
        return _combined(result, result.combination, flops, level)
    point = best(result.surface, as_rows(result.surface, result.params), flops, result.cost)[0].tolist()
    found = Optimum(N=point[0], D=point[1], L=point[2], reach=flops / top_of(result))
    if result.draws is None:
        return found
    form = result.surface if result.surface is None else form_of(result.surface)
    spread = best(form, result.draws, flops, result.cost)
    if (
        form is not result.surface
    ):  # the draws are of the form alone, so its distance from the corrected optimum is added
        spread = spread * (point / best(form, as_rows(form, result.params), flops, result.cost))
    ci = {k: ends(point[j], spread[:, j], result.dof, level, log=True) for j, k in enumerate("NDL")}
    ratio = spread[:, 1] / spread[:, 0]
    ci["tokens_per_param"] = ends(found.tokens_per_param, ratio, result.dof, level, log=True)
    return replace(found, ci=ci, regret=regret(result, flops, found.N, ci["N"]))


def _combined(result: Fitted, combination: Combination, flops: float, level: float) -> Optimum:
    """The optimum of a combined law, with intervals that include the error of its form.

    N* is the geometric mean of that of the surface and, if there is one, that of the line through the isoFLOP minima.
    L* is the loss of the surface at this size; beyond the runs, it is the weighted geometric mean of this loss and that
    of the floor law. The interval of N* includes half of the difference between surface and line. The interval of L*
    covers those of the runs below top budgets that are in doubt.
    """
    surface, cost, line = result.surface, result.cost, combination.line
    assert surface is not None
    rows = [as_rows(surface, result.params)] + ([] if result.draws is None else [result.draws])
    log_n = [np.log(best(surface, row, flops, cost)[:, 0]) for row in rows]
    apart = 0.0
    if line is not None:
        lines = [as_rows(None, line.params)] + ([] if line.draws is None else [line.draws])
        other = [np.log(best(None, row, flops, cost)[:, 0]) for row in lines]
        apart = SHARE * abs(float(other[0][0] - log_n[0][0]))
        log_n = [(one + two) / 2 for one, two in zip(log_n, other, strict=True)]
    log_d = [np.log(flops) - cost.log_per_token(log) for log in log_n]
    loss = [surface.predict(row, n, d) for row, n, d in zip(rows, log_n, log_d, strict=True)]
    reach = flops / top_of(result)
    if combination.floor is not None:
        loss = _with_floor(loss, combination.floor, flops, reach)
    n, d = (float(np.exp(v[0][0])) for v in (log_n, log_d))
    found = Optimum(N=n, D=d, L=float(loss[0][0]), reach=reach)
    if result.draws is None:
        return found
    far = max(float(np.log10(reach)), float(np.log10(bottom_of(result) / flops)), 0.0)
    more = float(np.hypot(half_of_size(far, level), apart))
    size = _widened(n, ends(n, np.exp(log_n[1]), result.dof, level, log=True), more)
    tokens = np.exp(np.log(flops) - cost.log_per_token(np.log(size[::-1])))
    half = float(combination.error.half(far, level))
    own = _widened(found.L, ends(found.L, loss[1], result.dof, level, log=True), half)
    ci = {
        "N": size,
        "D": (float(tokens[0]), float(tokens[1])),
        "L": hull([own, *(own_optimum(doubt.lower, flops, level).ci["L"] for doubt in combination.doubts)]),
        "tokens_per_param": (float(tokens[0] / size[1]), float(tokens[1] / size[0])),
    }
    return replace(found, ci=ci)


def _with_floor(losses: list[Array], floor: FloorLaw, flops: float, reach: float) -> list[Array]:
    """The losses of the surface at C and of its draws, if there are any, each moved towards those of the floor law."""
    share = share_at(float(np.log10(reach)))
    if not share:
        return losses
    lowest = [floor.losses[None]] + ([] if floor.draws is None or len(losses) == 1 else [floor.draws])
    laws = [floor.at(flops, rows) for rows in lowest]
    return [own ** (1 - share) * law**share for own, law in zip(losses, laws, strict=True)]


def _widened(point: float, interval: Interval, half: float) -> Interval:
    """The interval with an independent error of half-width `half` in the log added on both sides."""
    below, above = (float(np.hypot(np.log(end / point), half)) for end in interval)
    return point * float(np.exp(-below)), point * float(np.exp(above))


def _regret_of_draws(result: Fitted, combination: Combination, flops: float, sizes: Interval, level: float) -> float:
    """The excess loss, nats/token, of the worse end of the interval of N*: an upper bound over the draws and the parts.

    It is the larger of the quantile `level` over the draws and the worst of the parts.
    """
    assert result.surface is not None and result.draws is not None
    cost, surfaces = result.cost, [(result.surface, result.draws)]
    assert isinstance(result.surface, Combined)
    weights = result.surface.weights
    surfaces += [
        (part.fitted_law, as_rows(part.surface, part.params))
        for name, part in combination.parts.items()
        if weights[name] >= LEAST_WEIGHT
    ]
    lost = []
    for surface, rows in surfaces:
        lowest = best(surface, rows, flops, cost)[:, 2]
        log_n = np.tile(np.log(sizes), (len(rows), 1))
        loss = surface.predict(rows, log_n, np.log(flops) - cost.log_per_token(log_n)).max(axis=1) - lowest
        lost.append(ends(0.0, loss, 0, 2 * level - 1)[1])
    return float(np.max(lost))


def _judged(result: Fitted, own: Optimum, verdict: Verdict, flops: float, level: float) -> Optimum:
    """The optimum without L* beyond the reach of the verdict. Intervals of a single law become hulls of all methods."""
    if result.combination is not None:
        own = replace(own, regret=_regret_of_draws(result, result.combination, flops, own.ci["N"], level))
        if flops <= TOP * verdict.reach:
            return own
        return replace(own, L=NAN, ci={**own.ci, "L": UNBOUNDED}, withheld=WITHHELD_FAR)
    methods = [own_optimum(f, flops, level) for f in verdict.methods]
    ci = {k: hull([o.ci[k] for o in methods]) for k in ("N", "D", "tokens_per_param")}
    main = main_form(result, verdict.forms)
    lost = regret(main, flops, own_optimum(main, flops, level).N, ci["N"])
    is_line = result.law == "isoflop"
    if flops > TOP * verdict.reach or (is_line and own.reach > TOP):
        why = WITHHELD_LINE if is_line else WITHHELD_FAR
        return replace(own, L=NAN, ci={**ci, "L": UNBOUNDED}, regret=lost, withheld=why)
    ci["L"] = loss_interval(result, verdict.forms, verdict.missed, flops, level)
    return replace(own, ci=ci, regret=lost, withheld="")


def loss_interval(result: Fitted, forms: Mapping[str, Fitted], missed: float, flops: float, level: float) -> Interval:
    """The interval of L* at C that holds if either form of the law is right.

    It is the hull of the intervals of both forms (and of the line of an isoFLOP fit), widened by half of the difference
    between their L* and by `missed`, the relative error on held-out budgets (NaN if it is not known).
    """
    asked = [*forms.values(), result] if result.law == "isoflop" else list(forms.values())
    found = [own_optimum(f, flops, level) for f in asked]
    low, high = hull([o.ci["L"] for o in found])
    more = np.exp(SHARE * log_spread([o.L for o in found])) * (1.0 + np.nan_to_num(missed))
    return float(low / more), float(high * more)


def main_form(result: Fitted, forms: Mapping[str, Fitted]) -> Fitted:
    """The form that has the law of `result`; the first form if there is none."""
    return forms.get(result.law, next(iter(forms.values())))


def log_spread(values: Sequence[float]) -> float:
    """The log of the ratio of the largest to the smallest value."""
    with np.errstate(all="ignore"):
        return float(np.log(np.max(values) / np.min(values)))


def top_of(result: Fitted) -> float:
    """The highest C that the law rests on, FLOPs; for isoFLOP lines, the highest budget with a minimum."""
    assert result.points is not None
    return max(m.budget for m in result.usable) if result.law == "isoflop" else result.points.top_flops


def bottom_of(result: Fitted) -> float:
    """The lowest C of the runs, FLOPs."""
    assert result.points is not None
    return float(result.points.flops.min())


def regret(result: Fitted, flops: float, best_n: float, ends_n: Interval) -> float:
    """The largest excess loss, nats/token, of a size inside the interval of N*, at C = `flops`."""
    log_n = np.log([best_n, *ends_n])
    if result.surface is not None:
        log_d = np.log(flops) - result.cost.log_per_token(log_n)
        row = as_rows(result.surface, result.params)
        loss = result.surface.predict(row, log_n[None], log_d[None])[0]
        return float((loss[1:] - loss[0]).max())
    curvature = float(np.median([m.coefficients[2] for m in result.usable]))
    return float(curvature * ((log_n[1:] - log_n[0]) ** 2).max())


def with_optima(result: F, at: Iterable[float]) -> F:
    """The result with its optima at each C of `at` (FLOPs), and with notes on those beyond the runs."""
    best = optima(result, at)
    return replace(result, at=best, notes=(*result.notes, *_reach_notes(result, best)))


def with_warnings(result: F, more: Iterable[str]) -> F:
    """The result with further warnings, without duplicates. A refused result stays refused."""
    warnings = tuple(dict.fromkeys((*result.warnings, *more)))
    return replace(result, warnings=warnings, status="warned" if warnings and result.status == "ok" else result.status)


def _reach_notes(result: Fitted, at: Iterable[float]) -> list[str]:
    top = top_of(result)
    beyond = sorted(c for c in at if c > TOP * top)
    if not beyond:
        return []
    used = f"the highest C used ({text.flops(top)})"
    notes = [f"C = {text.flops(beyond[-1])} is beyond {used}: true only if the law keeps its form"]
    if result.surface is None:
        notes.append(f"no interval for L at C = {text.flops(beyond[0])} and above: {WITHHELD_LINE}")
    return notes


def names(law: Surface | None) -> tuple[str, ...]:
    """The names of the parameters in a row, in order."""
    return LINE if law is None else law.params


def as_rows(law: Surface | None, params: Mapping[str, float]) -> Array:
    """Arrange named parameters as one row, (1, k)."""
    return np.array([[params[name] for name in names(law)]], dtype=np.float64)


def best(law: Surface | None, rows: Array, flops: float, cost: Cost) -> Array:
    """N*, D* and L* of every row at C FLOPs, (R, 3); NaN for rows that are NaN."""
    with np.errstate(all="ignore"):
        if law is None:
            logs = np.log(rows[:, 0::2]) + np.log(flops) * rows[:, 1::2]
            return np.asarray(np.exp(logs), dtype=np.float64)
        log_n = law.optimum_at_6nd(rows, flops) if cost.is_6nd else None
        if log_n is None:
            log_n = _search(law, rows, flops, cost, law.near_optimum(rows, flops / cost.over_6n))
        log_d = np.log(flops) - cost.log_per_token(log_n)
        return np.stack([np.exp(log_n), np.exp(log_d), law.predict(rows, log_n, log_d)], axis=1)


def _search(law: Surface, rows: Array, flops: float, cost: Cost, around: Array | None) -> Array:
    """log N* under cost(N) D = C, (R,), by golden section.

    Under a `Cost`, the loss of every law that can be fitted has one minimum over N. The mean of such laws in a combined
    law is taken to have one minimum too.
    """

    def loss(log_n: Array) -> Array:
        return law.predict(rows, log_n, np.log(flops) - cost.log_per_token(log_n))

    if form_of(law) is not law:  # the sum with a correction may have several minima: take the lowest
        place = loss(np.tile(SIZES, (len(rows), 1))).argmin(axis=1)
        low, high = SIZES[np.maximum(place - 1, 0)], SIZES[np.minimum(place + 1, len(SIZES) - 1)]
    elif around is None:
        low, high = np.zeros(len(rows)), np.full(len(rows), WIDEST_NATS)
    else:
        low, high = around - REACH_NATS, around + REACH_NATS
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(GOLDEN_STEPS):
        down = at_left <= at_right
        low, high = np.where(down, low, left), np.where(down, right, high)
        new = np.where(down, high - GOLDEN * (high - low), low + GOLDEN * (high - low))
        at_new = loss(new)
        left, right = np.where(down, new, right), np.where(down, left, new)
        at_left, at_right = np.where(down, at_new, at_right), np.where(down, at_left, at_new)
    found = np.asarray((low + high) / 2.0, dtype=np.float64)
    return np.where(law.found(rows), found, np.nan)


def span_of(points: Points) -> tuple[float, float]:
    """The range of C, in FLOPs, over which exponents are measured: that of the points, but at least a factor of 4."""
    low, high = float(points.flops.min()), points.top_flops
    return (low, high) if high >= 4.0 * low else (low / 2.0, high * 2.0)


def exponents(law: Surface | None, rows: Array, span: tuple[float, float], cost: Cost) -> Array:
    """a and b of N* ~ C^a and D* ~ C^b, (R, 2): in closed form, or as mean slopes over `span` (FLOPs)."""
    if law is None:
        return rows[:, [1, 3]]
    a = law.exponents_at_6nd(rows) if cost.is_6nd else None
    if a is not None:
        return np.stack([a, 1.0 - a], axis=1)
    low, high = (np.log(best(law, rows, flops, cost)[:, :2]) for flops in span)
    return np.asarray((high - low) / np.log(span[1] / span[0]), dtype=np.float64)


def allocation(law: Surface, params: Mapping[str, float], points: Points, cost: Cost) -> Allocation:
    """The exponents of a surface, and a text on how they were found and for how many unique tokens they hold."""
    if isinstance(law, Epochs):
        return Allocation(how="no exponents: on a fixed number of unique tokens, N* and D* are no power laws of C")
    rows, span = as_rows(law, params), span_of(points)
    a, b = (float(v) for v in exponents(law, rows, span, cost)[0])
    if cost.is_6nd and law.exponents_at_6nd(rows) is not None:
        same = "a = b = 1/2, because N and D share one exponent"
        how = same if law.name == "tied" else "a = beta/(alpha+beta), b = alpha/(alpha+beta)"
        return Allocation(a=a, b=b, how=f"closed form for C = 6 N D: {how}")
    slope = f"mean slope between C = {text.flops(span[0])} and {text.flops(span[1])}"
    under = "6 N D = C" if cost.is_6nd else "cost(N) D = C, with the cost from the rows' flops/tokens"
    until = ""
    if isinstance(law, DataConstrained) and points.unique is not None:
        most = ", the most of any run" if law.unique == points.unique.max() else ""
        until = f"; for {text.count(law.unique)} unique tokens{most}"
    return Allocation(a=a, b=b, how=f"numerical: N* minimises L under {under}; {slope}{until}")
