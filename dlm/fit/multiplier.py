"""multiplier: two FitResults -> how much more compute the second law needs than the first, at equal loss.
Called by table and notebooks.

C(loss) is the least C whose best loss L*(C) is that loss, so the multiplier is C_second(loss) / C_first(loss). It is
given where both laws reach the loss within the budgets of their own runs, and nowhere else: outside, one of the two
would be an extrapolation, and the multiplier a statement about its form. Of isoFLOP minima, L* is a parabola of log L
in log C through them: their straight line has no floor, which put a multiplier of 16 off by 20 % at either end.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit.draws import ends
from dlm.fit.equal_loss import (
    FIT_NODES,
    NEAR_NATS,
    TOUCH,
    best_loss_at,
    budget_range,
    fit_row,
    log_compute_at,
    needed_compute,
    reached_losses,
    spread_of_fits,
)
from dlm.fit.points import NAN, Array, Interval
from dlm.fit.result import FitResult

NUM_LOSSES = 9


LEVEL_NATS = 1e-3  # a multiplier that changes by less over the losses does not change


SAME_COST = 0.05  # FLOPs per token that differ by more, at the same N, are told


HEADS = ("loss", "C of {0}", "C of {1}", "multiplier", "{2:.0%} interval")


@dataclass(frozen=True, kw_only=True)
class Multiplier:
    """C_second / C_first at each of `losses` (nats/token, falling, so that scale rises); above 1 the second needs more.

    `ci` holds one interval a loss, each on its own (not all at once), NaN where there is none; `trend` is the
    multiplier at the lowest loss over that at the highest.
    """

    names: tuple[str, str]
    laws: tuple[str, str]
    convention: str  # how both count FLOPs
    losses: tuple[float, ...]
    C_first: tuple[float, ...]  # FLOPs of the compute-optimal run of that loss
    C_second: tuple[float, ...]
    multiplier: tuple[float, ...]
    ci: tuple[Interval, ...]
    trend: float
    trend_ci: Interval
    level: float
    overlap: Interval  # the losses that both laws reach within their own budgets, nats/token
    warnings: tuple[str, ...] = ()

    def report(self) -> str:
        """The table and its sentences as text."""
        cells = [self._heads(), *self._cells()]
        widths = [max(len(line[k]) for line in cells) for k in range(len(HEADS))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([*lines, self.verdict(), *(f"warning: {warning}" for warning in self.warnings)])

    def verdict(self) -> str:
        """What the table says, in words."""
        first, second = self.names
        where = f"over losses {text.number(min(self.losses))} to {text.number(max(self.losses))}"
        needs = f"at equal loss, {second} needs {_between(self.multiplier)} times the compute of {first} ({where})"
        return "; ".join(part for part in (needs, self._certainty(), self._with_scale()) if part)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not known is None."""
        values = {key: _plain(value) for key, value in vars(self).items()}
        return values | {"verdict": self.verdict()}

    def _repr_html_(self) -> str:
        head, *rows = (
            "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
            for tag, line in (("th", self._heads()), *(("td", cells) for cells in self._cells()))
        )
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        remarks = "".join(f"<li>{html.escape(warning)}</li>" for warning in self.warnings)
        return f"<table><tr>{head}</tr>{body}</table><p>{html.escape(self.verdict())}</p><ul>{remarks}</ul>"

    def _heads(self) -> tuple[str, ...]:
        return tuple(head.format(*self.names, self.level) for head in HEADS)

    def _cells(self) -> list[tuple[str, ...]]:
        columns = zip(self.losses, self.C_first, self.C_second, self.multiplier, self.ci, strict=True)
        return [
            (text.number(loss), text.flops(c1), text.flops(c2), _short(m), text.interval(_rounded(ci)))
            for loss, c1, c2, m, ci in columns
        ]

    def _certainty(self) -> str:
        known = np.isfinite(np.array(self.ci)).all(axis=1)
        if not known.any():
            return "there is no interval"
        low, high = np.array(self.ci)[known].T
        held = (low <= 1.0) & (high >= 1.0)
        span = f"its {self.level:.0%} intervals lie within {_short(low.min())} to {_short(high.max())}"
        if held.all():
            return f"no difference is shown: {span}, and each holds 1"
        losses = np.array(self.losses)[known][held]
        ends_ = f"{text.number(losses.min())} to {text.number(losses.max())}" if len(losses) else ""
        return f"{span}; no difference is shown at losses {ends_}, where they hold 1" if ends_ else span

    def _with_scale(self) -> str:
        """Whether the multiplier depends on scale: only an interval can say so."""
        if len(self.losses) < 2 or not np.isfinite(self.trend):
            return ""
        if abs(np.log(self.trend)) < LEVEL_NATS:
            return "the multiplier does not change with scale"
        way = "rises" if self.trend > 1.0 else "falls"
        path = f"from {_short(self.multiplier[0])} to {_short(self.multiplier[-1])}"
        low, high = self.trend_ci
        if low <= 1.0 <= high:
            return f"no change with scale is shown ({path}; the ratio's interval is {_short(low)} to {_short(high)})"
        how = "" if np.isfinite(low) else ", which no interval confirms"
        return f"the multiplier {way} with scale, {path}{how}"


@np.errstate(all="ignore")  # rows of resampled laws that overflow are counted as failed
def compare(
    first: FitResult, second: FitResult, *, losses: npt.ArrayLike | None = None, level: float = 0.95
) -> Multiplier:
    """How many times the compute of `first` does `second` need, at equal loss?

    losses: nats/token, (n,), by default 9 within the overlap, evenly spaced in log C of `first`. Intervals come from
    the draws of both (see `bootstrap`), taken as independent, and after `judge` over both forms of the law; without
    draws there are point values only. Raises UserError where a law is missing or rises with C, the conventions of FLOPs
    differ, or the losses do not overlap: then it says which budgets would make them.
    """
    if not 0 < level < 1:
        raise UserError(f"level is {level}: give a number between 0 and 1, such as 0.95")
    names = _names(first, second)
    for name, result in zip(names, (first, second), strict=True):
        _check(name, result)
    convention = _common_convention(names, first, second)
    overlap = _overlap(names, first, second)
    wanted = _losses(first, second, names, overlap, losses)
    logs = np.array([log_compute_at(r, fit_row(r), wanted, NEAR_NATS, FIT_NODES)[0] for r in (first, second)])
    log_m = logs[1] - logs[0]
    spread, dof = spread_of_fits(first, second, wanted, logs)
    ci, trend_ci = _intervals(log_m, spread, dof, level)
    ci, trend_ci = _over_forms(first, second, wanted, level, ci, trend_ci)
    return Multiplier(
        names=names,
        laws=(first.law, second.law),
        convention=convention,
        losses=tuple(wanted.tolist()),
        C_first=tuple(np.exp(logs[0]).tolist()),
        C_second=tuple(np.exp(logs[1]).tolist()),
        multiplier=tuple(np.exp(log_m).tolist()),
        ci=ci,
        trend=float(np.exp(log_m[-1] - log_m[0])),
        trend_ci=trend_ci,
        level=level,
        overlap=overlap,
        warnings=tuple(_warnings(names, first, second, wanted, spread, ci)),
    )


def _names(first: FitResult, second: FitResult) -> tuple[str, str]:
    one, other = first.label or "first", second.label or "second"
    return (one, other) if one != other else (f"{one} (first)", f"{other} (second)")


def _check(name: str, result: FitResult) -> None:
    if result.points is None or not result.params:
        why = f" ({result.warnings[0]})" if result.warnings else ""
        raise UserError(f"{name} has no law{why}: nothing to compare")
    low, high = reached_losses(result)
    if not low < high * (1.0 - TOUCH):
        raise UserError(f"the law of {name} does not fall with C within its budgets: no compute answers to a loss")


def _common_convention(names: tuple[str, str], first: FitResult, second: FitResult) -> str:
    one, other = _convention(first), _convention(second)
    if one != other:
        raise UserError(
            f"{names[0]} counts FLOPs as '{one}' and {names[1]} as '{other}': a multiplier needs one convention for "
            "both; count one of them again (or name it in the column convention)"
        )
    return one


def _convention(result: FitResult) -> str:
    """The name of the convention; FLOPs that were given without one, and are 6 N D, are '6n'."""
    assert result.points is not None
    named = result.points.convention
    return "6n" if named == "as given" and result.cost.is_6nd else named


def _overlap(names: tuple[str, str], first: FitResult, second: FitResult) -> Interval:
    """The losses that both reach, (low, high); refused where there are none, with the budgets that are missing."""
    one, other = reached_losses(first), reached_losses(second)
    low, high = max(one[0], other[0]), min(one[1], other[1])
    if low < high * (1.0 - TOUCH):
        return low, high
    both = [(names[0], first, one), (names[1], second, other)]
    upper, lower = both if one[0] > other[0] else both[::-1]
    told = "; ".join(
        f"{name} reaches {text.number(ends_[1])} to {text.number(ends_[0])} on {_written(result)}"
        for name, result, ends_ in (upper, lower)
    )
    raise UserError(f"no loss is reached by both: {told}. They would overlap with {_missing(upper, lower)}")


def _missing(upper: tuple[str, FitResult, Interval], lower: tuple[str, FitResult, Interval]) -> str:
    """More compute for the law that stands too high, or less for the other, each extrapolated."""
    name, result, own = upper
    other_name, other, other_own = lower
    up, down = needed_compute(result, other_own[1]), needed_compute(other, own[0])
    more = f"runs of {name} up to {text.flops(_rounded_to_two(up, np.ceil))} FLOPs"
    less = f"runs of {other_name} down to {text.flops(_rounded_to_two(down, np.floor))} FLOPs"
    if not np.isfinite(up):
        floor = result.params.get("E", NAN)
        never = f"the law of {name} never gets down to {text.number(other_own[1])} (its E is {text.number(floor)})"
        return f"{less} (extrapolated by its law); {never}"
    return f"{more}, or with {less} (both extrapolated by their laws)"


def _rounded_to_two(value: float, towards: np.ufunc) -> float:
    """Two significant digits."""
    if not np.isfinite(value):
        return NAN
    unit = 10.0 ** (np.floor(np.log10(value)) - 1)
    return float(towards(value / unit) * unit)


def _written(result: FitResult) -> str:
    low, high = budget_range(result)
    return f"{text.flops(low)} to {text.flops(high)} FLOPs"


def _losses(
    first: FitResult, second: FitResult, names: tuple[str, str], overlap: Interval, asked: npt.ArrayLike | None
) -> Array:
    """The losses of the table, falling."""
    low, high = overlap
    if asked is None:
        log_c = log_compute_at(first, fit_row(first), np.array([high, low]), NEAR_NATS, FIT_NODES)[0]
        inside = np.exp(np.linspace(log_c[0], log_c[1], NUM_LOSSES)[1:-1])
        return np.array([high, *(best_loss_at(first, float(c)) for c in inside), low])
    wanted = np.sort(np.atleast_1d(np.asarray(asked, dtype=np.float64)).ravel())[::-1]
    if not len(wanted) or not (np.isfinite(wanted) & (wanted > 0)).all():
        raise UserError(f"losses is {asked}: give finite numbers above 0, in nats/token")
    outside = wanted[(wanted < low * (1 - TOUCH)) | (wanted > high * (1 + TOUCH))]
    if len(outside):
        loss = float(outside[0])
        needs = text.listed(
            [f"{n} {text.flops(needed_compute(r, loss))}" for n, r in zip(names, (first, second), strict=True)]
        )
        raise UserError(
            f"losses holds {loss:g}, and both laws reach {text.number(low)} to {text.number(high)} within their own "
            f"budgets; that loss would need, extrapolated, {needs} FLOPs"
        )
    return wanted


def _intervals(log_m: Array, spread: Array | None, dof: int, level: float) -> tuple[tuple[Interval, ...], Interval]:
    """An interval at each loss, and that of the trend."""
    if spread is None:
        return ((NAN, NAN),) * len(log_m), (NAN, NAN)
    ci = tuple(ends(float(np.exp(m)), np.exp(v), dof, level, log=True) for m, v in zip(log_m, spread.T, strict=True))
    rise = spread[:, -1] - spread[:, 0]
    return ci, ends(float(np.exp(log_m[-1] - log_m[0])), np.exp(rise), dof, level, log=True)


def _over_forms(
    first: FitResult, second: FitResult, losses: Array, level: float, ci: tuple[Interval, ...], trend_ci: Interval
) -> tuple[tuple[Interval, ...], Interval]:
    """The hull with the intervals of the form that checks both laws, where `judge` has fitted one."""
    checks = [set() if r.verdict is None else set(r.verdict.forms) - {r.law} for r in (first, second)]
    if first.law != second.law or first.surface is None:
        return ci, trend_ci
    for name in sorted(checks[0] & checks[1]):
        one, other = (r.verdict.forms[name] for r in (first, second) if r.verdict is not None)
        logs = np.array([log_compute_at(r, fit_row(r), losses, NEAR_NATS, FIT_NODES)[0] for r in (one, other)])
        spread, dof = spread_of_fits(one, other, losses, logs)
        more, more_trend = _intervals(logs[1] - logs[0], spread, dof, level)
        ci = tuple(_hull(a, b) for a, b in zip(ci, more, strict=True))
        trend_ci = _hull(trend_ci, more_trend)
    return ci, trend_ci


def _hull(one: Interval, other: Interval) -> Interval:
    """The least interval that holds both; a form that says nothing there (NaN) is left out."""
    return float(np.fmin(one[0], other[0])), float(np.fmax(one[1], other[1]))


def _warnings(
    names: tuple[str, str],
    first: FitResult,
    second: FitResult,
    losses: Array,
    spread: Array | None,
    ci: tuple[Interval, ...],
) -> list[str]:
    warned = [*_without_draws(names, first, second), *_failures(losses, spread, ci), *_costs(names, first, second)]
    if first.law != second.law:
        warned.append(f"{first.law} against {second.law}: a part of the multiplier may be the form of the law")
    for name, result in zip(names, (first, second), strict=True):
        warned += [f"{name}: {warning}" for warning in result.warnings]
    return warned


def _without_draws(names: tuple[str, str], first: FitResult, second: FitResult) -> list[str]:
    bare = [name for name, result in zip(names, (first, second), strict=True) if result.draws is None]
    have = "has" if len(bare) == 1 else "have"
    return [f"no interval: {text.listed(bare)} {have} no resampled laws, which bootstrap makes"] if bare else []


def _failures(losses: Array, spread: Array | None, ci: tuple[Interval, ...]) -> list[str]:
    if spread is None:
        return []
    lost = ~np.isfinite(np.array(ci)).all(axis=1)
    if not lost.any():
        return []
    failed = 1.0 - np.isfinite(spread).mean(axis=0)[lost].min()
    where = f"at {'any loss' if lost.all() else f'losses up to {text.number(losses[lost].max())}'}"
    return [
        f"no interval {where}: {failed:.1%} or more of the pairs of resampled laws give no multiplier there, for one "
        f"of the two was not found, or does not reach the loss with {np.exp(NEAR_NATS):.0f} times its highest budget"
    ]


def _costs(names: tuple[str, str], first: FitResult, second: FitResult) -> list[str]:
    """FLOPs per token that differ between models of one size: another architecture, or another way of counting."""
    assert first.points is not None and second.points is not None
    low = max(r.points.params.min() for r in (first, second) if r.points is not None)
    high = min(r.points.params.max() for r in (first, second) if r.points is not None)
    log_n = np.log(np.array([low, high if high > low else low]))
    one, other = (np.exp(r.cost.log_per_token(log_n) - log_n) for r in (first, second))
    worst = int(np.abs(np.log(other / one)).argmax())
    if abs(other[worst] / one[worst] - 1.0) <= SAME_COST:
        return []
    return [
        f"at N = {text.count(float(np.exp(log_n[worst])))} a token costs {one[worst]:.3g} N FLOPs in {names[0]} and "
        f"{other[worst]:.3g} N in {names[1]}: the multiplier holds that too; see that both count alike"
    ]


def _between(values: Sequence[float]) -> str:
    low, high = _short(min(values)), _short(max(values))
    return low if low == high else f"{low} to {high}"


def _short(value: float) -> str:
    return text.number(value, digits=3)


def _rounded(pair: Interval) -> Interval:
    return (float(f"{pair[0]:.3g}"), float(f"{pair[1]:.3g}"))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return (value if np.isfinite(value) else None) if isinstance(value, float) else value
