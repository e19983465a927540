"""Find how much more compute one law needs than another, at equal loss.

C(loss) is the least C whose best loss L*(C) is that loss, so the multiplier is C_second(loss) / C_first(loss). It is
given only for losses that both laws reach within the budgets of their own runs: for other losses, one of the two laws
would be extrapolated, and the multiplier would depend on the form of that law. For isoFLOP fits, L* is a parabola of
log L in log C through the minima: a straight line has no floor, which gave a multiplier of 16 an error of 20 % at
either end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit import equal_loss
from dlm.fit.draws import ends, hull
from dlm.fit.equal_loss import Ratio
from dlm.fit.fitted import Fitted, plain
from dlm.fit.layout import escaped, html_block, html_list, html_table, text_table, two_digits
from dlm.fit.points import NAN, UNBOUNDED, Array, Interval

NUM_LOSSES = 9
TOUCH = 1e-9  # ranges of loss whose overlap is a smaller share count as disjoint
LEVEL_NATS = 1e-3  # a multiplier whose log changes by less than this over the losses counts as constant
SAME_COST = 0.05  # relative difference in FLOPs per token at the same N above which a warning is given
HEADS = ("loss", "C of {0}", "C of {1}", "multiplier", "{2:.0%} interval")

Sides = tuple[Fitted, Fitted]


@dataclass(frozen=True, kw_only=True)
class Multiplier:
    """The multiplier C_second / C_first at each of n losses; above 1, the second law needs more compute."""

    names: tuple[str, str]
    laws: tuple[str, str]
    convention: str  # the FLOP convention of both laws
    losses: tuple[float, ...]  # nats/token, in falling order, so with rising compute
    C_first: tuple[float, ...]  # FLOPs of the compute-optimal run at each loss, under the first law
    C_second: tuple[float, ...]  # the same under the second law
    multiplier: tuple[float, ...]
    ci: tuple[Interval, ...]  # one pointwise (not simultaneous) interval per loss; NaN for a loss without an interval
    trend: float  # ratio of the multiplier at the lowest loss to the multiplier at the highest loss
    trend_ci: Interval
    level: float
    overlap: Interval  # the losses that both laws reach within their own budgets, nats/token
    warnings: tuple[str, ...] = ()

    def report(self, *, width: int | None = None) -> str:
        """The table, the verdict and the warnings as text; the table fits a terminal of ``width`` columns."""
        table = text_table(self._table(), width)
        return "\n".join([*table, self.verdict(), *(f"warning: {w}" for w in self.warnings)])

    def verdict(self) -> str:
        """A summary of the table in words."""
        first, second = self.names
        where = f"over losses {text.number(min(self.losses))} to {text.number(max(self.losses))}"
        low, high = _short(min(self.multiplier)), _short(max(self.multiplier))
        times = low if low == high else f"{low} to {high}"
        needs = f"at equal loss, {second} needs {times} times the compute of {first} ({where})"
        return "; ".join(part for part in (needs, self._certainty(), self._with_scale()) if part)

    def to_dict(self) -> dict[str, Any]:
        """The object that `dlm compare --json` prints; a number that is not known is None."""
        return {**plain(vars(self)), "verdict": self.verdict()}

    def _repr_html_(self) -> str:
        verdict = f"<p>{escaped(self.verdict())}</p>"
        return html_block(html_table(self._table()), verdict, html_list(self.warnings))

    def _table(self) -> list[tuple[str, ...]]:
        intervals = [text.interval([float(f"{end:.3g}") for end in ci]) for ci in self.ci]
        columns = (
            map(text.number, self.losses),
            map(text.flops, self.C_first),
            map(text.flops, self.C_second),
            map(_short, self.multiplier),
            intervals,
        )
        return [tuple(head.format(*self.names, self.level) for head in HEADS), *zip(*columns, strict=True)]

    def _certainty(self) -> str:
        """State in words whether the intervals show a difference."""
        known = np.isfinite(np.array(self.ci)).all(axis=1)
        if not known.any():
            return "there is no interval"
        low, high = np.array(self.ci)[known].T
        holds_one = (low <= 1.0) & (high >= 1.0)
        span = f"its {self.level:.0%} intervals lie within {_short(low.min())} to {_short(high.max())}"
        if holds_one.all():
            return f"no difference is shown: {span}, and each holds 1"
        if not holds_one.any():
            return span
        losses = np.array(self.losses)[known][holds_one]
        where = f"{text.number(losses.min())} to {text.number(losses.max())}"
        return f"{span}; no difference is shown at losses {where}, where they hold 1"

    def _with_scale(self) -> str:
        """State in words whether the multiplier depends on scale, which only an interval can show."""
        if len(self.losses) < 2 or not np.isfinite(self.trend):
            return ""
        if abs(np.log(self.trend)) < LEVEL_NATS:
            return "the multiplier does not change with scale"
        path = f"from {_short(self.multiplier[0])} to {_short(self.multiplier[-1])}"
        low, high = self.trend_ci
        if low <= 1.0 <= high:
            return f"no change with scale is shown ({path}; the ratio's interval is {_short(low)} to {_short(high)})"
        way = "rises" if self.trend > 1.0 else "falls"
        how = "" if np.isfinite(low) else ", which no interval confirms"
        return f"the multiplier {way} with scale, {path}{how}"


@np.errstate(all="ignore")  # rows of resampled laws that overflow are counted as failed
def compare(first: Fitted, second: Fitted, *, losses: npt.ArrayLike | None = None, level: float = 0.95) -> Multiplier:
    """Find the factor by which `second` needs more compute than `first` at equal loss.

    Args:
        first: A fitted law.
        second: Another fitted law. Its draws are taken as independent of those of `first`. Intervals need draws of both
            laws (see `bootstrap`); after `judge` of both, the intervals are hulls over both forms of the law.
        losses: The losses to compare at, nats/token, (n,); by default 9 losses within the overlap, evenly spaced in
            log C of `first`.
        level: Nominal coverage of the intervals.

    Raises:
        UserError: If a law is missing or rises with C, if the conventions of FLOPs differ, or if the losses do not
            overlap; in the last case, the message names the budgets that would make them overlap.
    """
    if not 0 < level < 1:
        raise UserError(f"level is {level}: give a number between 0 and 1, such as 0.95")
    sides = _labelled(first, second)
    for side in sides:
        _check(side)
    convention, overlap = _common_convention(sides), _overlap(sides)
    wanted = _within(sides, overlap, losses) if losses is not None else _evenly(sides[0], overlap)
    found, *others = [equal_loss.ratio(*pair, wanted) for pair in (sides, *_checking_forms(sides))]
    intervals = [_intervals(each, level) for each in (found, *others)]
    ci = tuple(hull(list(each)) for each in zip(*(by_loss for by_loss, _ in intervals), strict=True))
    return Multiplier(
        names=(sides[0].label, sides[1].label),
        laws=(first.law, second.law),
        convention=convention,
        losses=tuple(wanted.tolist()),
        C_first=tuple(np.exp(found.log_c[0]).tolist()),
        C_second=tuple(np.exp(found.log_c[1]).tolist()),
        multiplier=tuple(np.exp(found.log).tolist()),
        ci=ci,
        trend=float(np.exp(found.log[-1] - found.log[0])),
        trend_ci=hull([trend for _, trend in intervals]),
        level=level,
        overlap=overlap,
        warnings=tuple(_warnings(sides, wanted, found, ci)),
    )


def _labelled(first: Fitted, second: Fitted) -> Sides:
    """Both results, with distinct labels."""
    one, other = first.label or "first", second.label or "second"
    if one == other:
        one, other = f"{one} (first)", f"{other} (second)"
    return replace(first, label=one), replace(second, label=other)


def _check(side: Fitted) -> None:
    if side.points is None or not side.params:
        why = f" ({side.warnings[0]})" if side.warnings else ""
        raise UserError(f"{side.label} has no law{why}: nothing to compare")
    low, high = equal_loss.reached_losses(side)
    if not low < high * (1.0 - TOUCH):
        raise UserError(
            f"the law of {side.label} does not fall with C within its budgets: no compute answers to a loss"
        )


def _common_convention(sides: Sides) -> str:
    one, other = (_convention(side) for side in sides)
    if one != other:
        raise UserError(
            f"{sides[0].label} counts FLOPs as '{one}' and {sides[1].label} as '{other}': a multiplier needs one "
            "convention for both; count one of them again (or name it in the column convention)"
        )
    return one


def _convention(side: Fitted) -> str:
    """The name of the FLOP convention; '6n' for FLOPs that were given without a convention but equal 6 N D."""
    assert side.points is not None
    named = side.points.convention
    return "6n" if named == "as given" and side.cost.is_6nd else named


def _overlap(sides: Sides) -> Interval:
    """The losses that both laws reach, (low, high). If there are none, a UserError names the missing budgets."""
    one, other = (equal_loss.reached_losses(side) for side in sides)
    low, high = max(one[0], other[0]), min(one[1], other[1])
    if low < high * (1.0 - TOUCH):
        return low, high
    upper, lower = sides if one[0] > other[0] else sides[::-1]
    told = "; ".join(_reached(side) for side in (upper, lower))
    raise UserError(f"no loss is reached by both: {told}. They would overlap with {_missing(upper, lower)}")


def _reached(side: Fitted) -> str:
    (low, high), (low_c, high_c) = equal_loss.reached_losses(side), equal_loss.budget_range(side)
    budgets = f"{text.flops(low_c)} to {text.flops(high_c)} FLOPs"
    return f"{side.label} reaches {text.number(high)} to {text.number(low)} on {budgets}"


def _missing(upper: Fitted, lower: Fitted) -> str:
    """The extrapolated budgets that would give an overlap, in words: higher ones for `upper`, or lower for `lower`."""
    aim, start = equal_loss.reached_losses(lower)[1], equal_loss.reached_losses(upper)[0]
    up, down = equal_loss.needed_compute(upper, aim), equal_loss.needed_compute(lower, start)
    more = f"runs of {upper.label} up to {text.flops(two_digits(up, np.ceil))} FLOPs"
    less = f"runs of {lower.label} down to {text.flops(two_digits(down, np.floor))} FLOPs"
    if not np.isfinite(up):
        floor = text.number(upper.params.get("E", NAN))
        never = f"the law of {upper.label} never gets down to {text.number(aim)} (its E is {floor})"
        return f"{less} (extrapolated by its law); {never}"
    return f"{more}, or with {less} (both extrapolated by their laws)"


def _evenly(first: Fitted, overlap: Interval) -> Array:
    """Losses across the overlap, falling, evenly spaced in log C of the first law."""
    low, high = overlap
    log_c = equal_loss.log_compute(first, np.array([high, low]))
    inside = np.exp(np.linspace(log_c[0], log_c[1], NUM_LOSSES)[1:-1])
    return np.array([high, *(equal_loss.best_loss(first, float(c)) for c in inside), low])


def _within(sides: Sides, overlap: Interval, asked: npt.ArrayLike) -> Array:
    """The requested losses in falling order; each must lie within the overlap."""
    low, high = overlap
    wanted = np.sort(np.atleast_1d(np.asarray(asked, dtype=np.float64)).ravel())[::-1]
    if not len(wanted) or not (np.isfinite(wanted) & (wanted > 0)).all():
        raise UserError(f"losses is {asked!r}: give finite numbers above 0, in nats/token")
    outside = wanted[(wanted < low * (1 - TOUCH)) | (wanted > high * (1 + TOUCH))]
    if len(outside):
        loss = float(outside[0])
        needs = text.listed([f"{side.label} {text.flops(equal_loss.needed_compute(side, loss))}" for side in sides])
        raise UserError(
            f"losses holds {loss:g}, and both laws reach {text.number(low)} to {text.number(high)} within their own "
            f"budgets; that loss would need, extrapolated, {needs} FLOPs"
        )
    return wanted


def _checking_forms(sides: Sides) -> list[Sides]:
    """The other form of both laws, as pairs of fits, if `judge` has fitted this form to both sides; else empty."""
    one, other = sides
    if one.law != other.law or one.surface is None or one.verdict is None or other.verdict is None:
        return []
    names = sorted(one.verdict.forms.keys() & other.verdict.forms.keys() - {one.law})
    return [(one.verdict.forms[name], other.verdict.forms[name]) for name in names]


def _intervals(found: Ratio, level: float) -> tuple[list[Interval], Interval]:
    """The interval of the multiplier at each loss, and the interval of its trend."""
    if found.draws is None:
        return [UNBOUNDED] * len(found.log), UNBOUNDED
    draws, trend = found.draws, found.log[-1] - found.log[0]
    columns = zip(found.log, draws.T, strict=True)
    by_loss = [ends(float(np.exp(m)), np.exp(v), found.dof, level, log=True) for m, v in columns]
    rise = np.exp(draws[:, -1] - draws[:, 0])
    return by_loss, ends(float(np.exp(trend)), rise, found.dof, level, log=True)


def _warnings(sides: Sides, losses: Array, found: Ratio, ci: Sequence[Interval]) -> list[str]:
    warned = []
    bare = [side.label for side in sides if side.draws is None]
    if bare:
        have = "has" if len(bare) == 1 else "have"
        warned.append(f"no interval: {text.listed(bare)} {have} no resampled laws, which bootstrap makes")
    warned += [*_failures(losses, found, ci), *_costs(sides)]
    if sides[0].law != sides[1].law:
        warned.append(f"{sides[0].law} against {sides[1].law}: a part of the multiplier may be the form of the law")
    return [*warned, *(f"{side.label}: {warning}" for side in sides for warning in side.warnings)]


def _failures(losses: Array, found: Ratio, ci: Sequence[Interval]) -> list[str]:
    """A warning if too few pairs of resampled laws give a multiplier."""
    lost = ~np.isfinite(np.array(ci)).all(axis=1)
    if found.draws is None or not lost.any():
        return []
    failed = 1.0 - np.isfinite(found.draws).mean(axis=0)[lost].min()
    where = f"at {'any loss' if lost.all() else f'losses up to {text.number(losses[lost].max())}'}"
    times = f"{np.exp(equal_loss.NEAR_NATS):.0f} times its highest budget"
    return [
        f"no interval {where}: {failed:.1%} or more of the pairs of resampled laws give no multiplier there, because "
        f"one of the two was not found, or does not reach the loss with {times}"
    ]


def _costs(sides: Sides) -> list[str]:
    """A warning if models of equal size cost different FLOPs per token, by architecture or by the way of counting."""
    sizes = [side.points.params for side in sides if side.points is not None]
    low, high = max(n.min() for n in sizes), min(n.max() for n in sizes)
    log_n = np.log([low, max(low, high)])
    one, other = (np.exp(side.cost.log_per_token(log_n) - log_n) for side in sides)
    worst = int(np.abs(np.log(other / one)).argmax())
    if abs(other[worst] / one[worst] - 1.0) <= SAME_COST:
        return []
    return [
        f"at N = {text.count(float(np.exp(log_n[worst])))} a token costs {one[worst]:.3g} N FLOPs in {sides[0].label} "
        f"and {other[worst]:.3g} N in {sides[1].label}: the multiplier holds that too; see that both count alike"
    ]


def _short(value: float) -> str:
    return text.number(value, digits=3)
