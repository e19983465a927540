"""State how far a combined law may be extrapolated, how it did on held-out budgets, and where its numbers come from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dlm.core import text
from dlm.fit.combined.fit import FORMS
from dlm.fit.combined.floor import share_at
from dlm.fit.engine import newton
from dlm.fit.fitted import Allocation, Combination, Doubt, Fitted, Optimum, Verdict
from dlm.fit.isoflop.fit import fit_groups, line_through
from dlm.fit.layout import two_digits
from dlm.fit.optimum import (
    LEVEL,
    MOST_REACH,
    MOST_SPREAD,
    NOT_BOUNDED,
    TOO_WIDE,
    TOP,
    as_rows,
    best,
    log_spread,
    optima,
    own_optimum,
    top_of,
)
from dlm.fit.points import NAN
from dlm.fit.result import FitResult
from dlm.fit.surface.resample import refit

WIDEST = 0.20  # relative width of the interval of L* beyond which L* is withheld
HALVINGS = 7  # of the range of log C in which the reach is searched
UNDERTUNED = 0.01  # the excess loss of the largest size, for which the change of N* is stated
SMALLEST_MOVE = 0.01  # smaller changes of log N* are not stated
SAME_SIZE = 1.05  # sizes within this factor of the largest count as the largest


@np.errstate(all="ignore")
def judge_combined(result: FitResult, *, level: float = LEVEL) -> FitResult:
    """Add a verdict to a combined law with draws. L* is withheld beyond `verdict.reach`."""
    points, combination = result.points, result.combination
    assert points is not None and combination is not None
    top = points.top_flops
    reach, limit = _reach(result, top, level)
    target = max([top, *(flops for flops in result.at if flops <= TOP * reach)])
    here = own_optimum(result, target, level)
    is_bounded = bool(np.isfinite(own_optimum(result, top, level).ci["N"]).all())
    if not is_bounded:
        result = replace(result, allocation=Allocation(how="withheld, because resampled runs do not bound N*"))
    forms = {name: part for name in FORMS if (part := combination.parts.get(f"{name}_0")) is not None}
    asked = [*forms.values(), *([] if combination.line is None else [combination.line])]
    said = [own_optimum(replace(fit, draws=None), target, level) for fit in asked]
    verdict = Verdict(
        top=top,
        reach=reach,
        limit=limit,
        missed=result.holdout.get("without_top_1", {}).get("L_rms_error", NAN),
        aicc={},
        target=target,
        differ_n=float(np.exp(log_spread([o.N for o in said]))),
        differ_l=float(np.expm1(log_spread([o.L for o in said[: len(forms)]]))),
        regret=NAN,
        n=here.ci["N"],
    )
    judged = replace(result, verdict=verdict)
    lost = optima(judged, [target], level=level)[target].regret
    words = _words(result, reach, limit)
    if is_bounded:
        words.append(_source(result, combination, target))
        words += [*_regret(here, target, lost), *_sensitivity(result, combination, target)]
    judged = replace(result, verdict=replace(verdict, regret=lost, words=tuple(words)))
    return replace(judged, at=optima(judged, judged.at, level=level))


def _reach(result: Fitted, top: float, level: float) -> tuple[float, str]:
    """The highest C, rounded down to two digits, up to which the interval of L* is narrow enough, and its limit."""

    def is_narrow(flops: float) -> bool:
        ci = own_optimum(result, flops, level).ci
        is_bounded = flops <= TOP * top or ci["N"][1] <= MOST_SPREAD * ci["N"][0]
        return is_bounded and ci["L"][1] / ci["L"][0] - 1 <= WIDEST

    if is_narrow(MOST_REACH * top):
        return MOST_REACH * top, "intervals were not tested further"
    low, high = 0.0, float(np.log(MOST_REACH))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_narrow(top * float(np.exp(middle))) else (low, middle)
    ci = own_optimum(result, top * float(np.exp(high)), level).ci
    if not np.isfinite([*ci["L"], *ci["N"]]).all():
        why = NOT_BOUNDED
    elif ci["L"][1] / ci["L"][0] - 1 > WIDEST:
        why = f"its interval is wider than {WIDEST:.0%}"
    else:
        why = TOO_WIDE
    return max(float(two_digits(top * np.exp(low), np.floor)), top), f"beyond, {why}"


def _words(result: Fitted, reach: float, limit: str) -> list[str]:
    """How far L* is given, and the error at held-out budgets, in sentences."""
    assert result.points is not None
    top = result.points.top_flops
    far = f"up to {text.flops(reach)} FLOPs, {reach / top:.3g} times the highest C of the runs"
    low, high = own_optimum(result, top, LEVEL).ci["L"]
    if not high / low - 1 <= WIDEST:
        said = [
            f"These runs do not determine L*, not even at {text.flops(top)} FLOPs: {limit.removeprefix('beyond, ')}."
        ]
    else:
        said = [f"L* is given {far if reach > TOP * top else 'within the runs only'}: {limit}."]
    held = result.holdout.get("without_top_1")
    if result.combination is not None and result.combination.doubts:
        said.append(_doubted(max(result.combination.doubts, key=lambda doubt: doubt.excess / doubt.error)))
    elif held is None:
        said.append("No budget could be held out, so the error of the form is that of other published runs.")
    else:
        what = f"the runs from {text.flops(held['from_flops'])} FLOPs"
        error = f"{held['L_rms_error']:.2%} (root mean square)"
        said.append(f"Fitted without {what}, the law predicts them with an error of {error}.")
    return said


def _doubted(doubt: Doubt) -> str:
    """By how much the top budgets contradict the runs below them, and what the intervals do about it."""
    many = {1: "top budget lies", 2: "top two budgets lie"}[doubt.num_budgets]
    return (
        f"The {many} {np.expm1(doubt.excess):.1%} above what the runs below {text.flops(doubt.start)} FLOPs predict "
        f"({doubt.excess / doubt.error:.1f} standard errors): either training went wrong there, or the law bends, and "
        "the interval of L* covers both."
    )


def _regret(best: Optimum, target: float, lost: float) -> list[str]:
    low, high = best.ci["N"]
    if not (np.isfinite(lost) and high <= MOST_SPREAD * low):
        return []
    sizes = text.interval(best.ci["N"], "count")
    return [
        f"At {text.flops(target)} FLOPs, any size from {sizes} loses at most {text.number(lost, digits=2)} nats/token."
    ]


def _sensitivity(result: Fitted, combination: Combination, target: float) -> list[str]:
    """By how much N* would change if the largest size had been trained with a worse recipe than the others.

    Nothing in the runs shows this fault, so the reader has to judge it.
    """
    points, surface, line = result.points, result.surface, combination.line
    assert points is not None and surface is not None
    largest = points.params >= points.params.max() / SAME_SIZE
    better = replace(points, loss=np.where(largest, points.loss / (1 + UNDERTUNED), points.loss))
    losses = newton.in_space(better.loss, result.how)[None]
    rows = [refit(part, losses, part.points.weight[None]) for part in combination.parts.values() if part.points]
    before, after = (
        float(np.log(best(surface, row, target, result.cost)[0, 0]))
        for row in (as_rows(surface, result.params), np.concatenate(rows, axis=1))
    )
    moved = after - before
    if line is not None:
        budgets = {m.budget for m in line.usable}
        minima = [m for m in fit_groups(better).usable if m.budget in budgets]
        if len(minima) < len(budgets):
            return []
        lines = [as_rows(None, params) for params in (line.params, line_through(minima))]
        before, after = (float(np.log(best(None, row, target, result.cost)[0, 0])) for row in lines)
        moved = (moved + after - before) / 2
    if not abs(moved) >= SMALLEST_MOVE:
        return []
    size, more = text.count(float(points.params.max())), np.expm1(moved)
    change = f"{abs(more):.0%} {'larger' if more > 0 else 'smaller'}"
    return [
        f"If better tuning lowered the losses of {size}, the largest size, by {UNDERTUNED:.0%}, N* at "
        f"{text.flops(target)} would be {change}."
    ]


def _source(result: Fitted, combination: Combination, target: float) -> str:
    """Where N* and L* come from."""
    if combination.line is None:
        size = "N* is that of the surface alone, because no isoFLOP minima bound it"
    else:
        assert result.surface is not None
        alone = own_optimum(replace(result, combination=replace(combination, line=None), draws=None), target, LEVEL).N
        other = own_optimum(replace(combination.line, draws=None), target, LEVEL).N
        both = f"{text.count(alone)} and {text.count(other)} at {text.flops(target)} FLOPs"
        size = f"N* is the geometric mean of that of the surface and that of the isoFLOP minima ({both})"
    return f"{size}; {_source_of_loss(result, combination, target)}."


def _source_of_loss(result: Fitted, combination: Combination, target: float) -> str:
    floor, share = combination.floor, share_at(float(np.log10(target / top_of(result))))
    if floor is None or not share:
        return "L* is the loss of the surface at N*"
    alone = own_optimum(replace(result, combination=replace(combination, floor=None)), target, LEVEL).L
    law = float(floor.at(target, floor.losses[None])[0])
    return (
        f"L* is to {1 - share:.0%} the loss of the surface at N* ({text.number(alone, digits=4)}) and to {share:.0%} "
        f"that of a floor law through the minima ({text.number(law, digits=4)})"
    )
