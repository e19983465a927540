"""Find the compute at which one law of repeated data overtakes another, each at its own best size and epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError
from dlm.core.objectives import OBJECTIVES
from dlm.fit import optimum
from dlm.fit.draws import ends
from dlm.fit.fitted import Fitted, plain
from dlm.fit.laws.correction import form_of
from dlm.fit.points import NAN, UNBOUNDED, Array, Interval
from dlm.fit.repeated import LEVEL, check, law_of, lowest_loss, outside, points_of

STEPS = 81  # of the grid over log C
MOST_COMPARED = 8  # numbers of unique tokens at which two fits are compared
BOUND = (
    "the loss of masked diffusion is an upper bound on -log p, and that of autoregressive training is exact: "
    "diffusion may overtake earlier than stated, not later"
)


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """Where the first law becomes better than the second on U unique tokens, each at its own best size and epochs."""

    U: float
    C: float  # FLOPs from which on the first has the lower loss; NaN if it does not within the runs
    ci: Interval = UNBOUNDED
    withheld: str = ""  # why there is no C
    L_first: float = NAN  # the lowest loss of each within the runs, nats/token
    L_second: float = NAN

    def sentence(self, names: tuple[str, str]) -> str:
        """The crossing in words."""
        lowest = f"lowest loss {text.number(self.L_first)} against {text.number(self.L_second)}"
        if self.withheld:
            return f"U = {text.count(self.U)}: {self.withheld} ({lowest})"
        interval = text.interval(self.ci, "flops")
        overtakes = f"{names[0]} overtakes {names[1]} at {text.flops(self.C)} FLOPs"
        return f"U = {text.count(self.U)}: {overtakes} ({interval}; {lowest})"


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """The crossings of two laws over U."""

    names: tuple[str, str]
    laws: tuple[str, str]
    at: tuple[Crossing, ...]
    notes: tuple[str, ...] = ()

    def report(self) -> str:
        """The crossings and the notes as text."""
        one, other = (f"{name} ({law})" for name, law in zip(self.names, self.laws, strict=True))
        head = f"{one} against {other}, each at its own best size and epochs"
        return "\n".join(
            [head, *(f"  {c.sentence(self.names)}" for c in self.at), *(f"  note: {n}" for n in self.notes)]
        )

    def to_dict(self) -> dict[str, Any]:
        """The object for JSON; a number that is not known is None."""
        shown = plain({**vars(self), "at": [vars(crossing) for crossing in self.at]})
        assert isinstance(shown, dict)
        return shown


def shared_budgets(one: Fitted, two: Fitted) -> list[float]:
    """The numbers of unique tokens at which to compare: some of the first fit, within the range of the second."""
    own, other = (np.unique(np.asarray(points_of(side).unique)) for side in (one, two))
    inside = own[(own >= other.min()) & (own <= other.max())]
    if not len(inside):
        raise UserError("the two groups of runs share no number of unique tokens: nothing to compare")
    spaced = np.linspace(0, len(inside) - 1, min(len(inside), MOST_COMPARED)).round().astype(int)
    return [float(u) for u in inside[np.unique(spaced)]]


def crossover(first: Fitted, second: Fitted, unique: Sequence[float], *, level: float = LEVEL) -> Crossover:
    """The compute at which the first law overtakes the second on each of `unique` tokens.

    Each law is taken at its own best size and epochs for at most C FLOPs, within the sizes and the FLOPs that both
    have runs for. A law may stop early, so its lowest loss never rises with C.

    Args:
        first: The fit that is expected to win with much compute, such as that of masked diffusion.
        second: The other fit, such as that of autoregressive training.
        unique: The values of U.
        level: Nominal coverage of the intervals.

    Raises:
        UserError: As in `best_epochs`, and if the two count FLOPs in different conventions or share no compute.
    """
    sides = (first, second)
    if first.points is not None and second.points is not None and first.points.convention != second.points.convention:
        raise UserError(
            f"the fits count FLOPs as '{first.points.convention}' and '{second.points.convention}': count both alike"
        )
    low = max(float(points_of(side).flops.min()) for side in sides)
    high = min(points_of(side).top_flops for side in sides)
    if not low < high:
        raise UserError("the two sets of runs share no range of FLOPs: nothing to compare")
    log_c = np.linspace(np.log(low), np.log(high), STEPS)
    names = (first.label or "first", second.label or "second")
    found = tuple(_crossing(sides, float(u), log_c, level) for u in unique)
    notes = (BOUND,) if any(map(is_bound, names)) else ()
    return Crossover(names=names, laws=(first.law, second.law), at=found, notes=notes)


def _crossing(sides: tuple[Fitted, Fitted], unique: float, log_c: Array, level: float) -> Crossing:
    check(unique=unique)
    why = next((said for side in sides if (said := outside(points_of(side), "unique", unique))), "")
    if why:
        return Crossing(U=unique, C=NAN, withheld=why)
    point = [lowest_loss(side, optimum.as_rows(side.fitted_law, side.params), log_c, unique)[0] for side in sides]
    place = float(_place(point[0] - point[1], log_c))
    nothing = Crossing(U=unique, C=NAN, L_first=float(point[0][-1]), L_second=float(point[1][-1]))
    if not np.isfinite(place):
        better = "is better at every compute of the runs" if place < 0 else "does not overtake within the runs"
        return replace(nothing, withheld=f"the first {better}")
    ci = UNBOUNDED
    if all(side.draws is not None for side in sides):
        many = min(len(side.draws) for side in sides if side.draws is not None)
        drawn = [_drawn(side, own, log_c, unique, many) for side, own in zip(sides, point, strict=True)]
        gaps = drawn[0] - drawn[1]
        places = np.array([_place(gap, log_c) for gap in gaps])
        ci = ends(float(np.exp(place)), np.exp(np.clip(places, -700.0, 700.0)), 0, level, log=True)
        inside = np.exp(log_c[[0, -1]])
        ci = (ci[0] if ci[0] >= inside[0] else 0.0, ci[1] if ci[1] <= inside[1] else np.inf)
    return replace(nothing, C=float(np.exp(place)), ci=ci)


def _drawn(side: Fitted, point: Array, log_c: Array, unique: float, many: int) -> Array:
    """The lowest losses of the first draws at each C, (many, m); `point` are those of the fit."""
    assert side.draws is not None
    law = law_of(side)
    form = replace(side, surface=form_of(law))
    drawn = lowest_loss(form, side.draws[:many], log_c, unique)
    if form.surface is law:
        return drawn
    alone = lowest_loss(form, optimum.as_rows(law, side.params), log_c, unique)[0]
    return np.asarray(drawn * (point / alone))  # the draws are of the form alone


def _place(gap: Array, log_c: Array) -> float:
    """log C from which on `gap` is below 0; -inf if it always is, inf if it is not at the end."""
    if not np.isfinite(gap).all():
        return NAN
    if gap[-1] >= 0:
        return np.inf
    above = np.flatnonzero(gap >= 0)
    if not len(above):
        return -np.inf
    k = int(above[-1])
    return float(log_c[k] + (log_c[k + 1] - log_c[k]) * gap[k] / (gap[k] - gap[k + 1]))


def is_bound(label: str) -> bool:
    """Whether the loss of this objective is an upper bound on -log p; False for a name that dlm does not know."""
    return label in OBJECTIVES and OBJECTIVES[label].is_bound
