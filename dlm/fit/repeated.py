"""Answer the questions of repeated data from a fitted law: how many epochs, and which size.

All numbers hold for a stated number of unique tokens U. Their intervals come from resampled curves. That of the best
epochs also has the error on the curves that were held out, because the law's form misses more than its noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit import optimum
from dlm.fit.draws import ends
from dlm.fit.fitted import Fitted
from dlm.fit.laws.correction import form_of
from dlm.fit.points import NAN, UNBOUNDED, Array, Interval, Points
from dlm.fit.turn import MOST_EPOCHS, Repeated, log_best, of_unique

LEVEL = 0.95
FAR = 2.0  # beyond this multiple of the sizes or the unique tokens of the runs, nothing is given
NORMAL = 1.96
FEW_SIZES = 6  # sizes of the runs whose best epochs a report shows
SIZES, STEPS = 49, 41  # the grid over log N and over log C on which the lowest loss is searched
EDGES = {"smallest": "smaller", "largest": "larger"}  # the ends of the sizes considered, and where more sizes lie
NEAR, ROUNDS = np.linspace(-1.0, 1.0, 7), 3  # the finer grids around the best, in steps of the grid before


@dataclass(frozen=True, kw_only=True)
class BestEpochs:
    """The number of epochs at which N parameters reach their lowest loss on U unique tokens."""

    N: float
    U: float
    epochs: float  # NaN if the law does not turn within the runs
    L: float  # the loss there, nats/token
    ci: Interval = UNBOUNDED  # of `epochs`
    withheld: str = ""  # why there is no number

    def sentence(self) -> str:
        """The number in words."""
        who = f"N = {text.count(self.N)}"
        if self.withheld:
            return f"{who}: {self.withheld}"
        return f"{who}: {text.number(self.epochs, digits=3)} ({text.interval(self.ci)}), L = {text.number(self.L)}"


@dataclass(frozen=True, kw_only=True)
class Spending:
    """The best use of at most C FLOPs on U unique tokens: N parameters for a number of epochs."""

    C: float
    U: float
    N: float
    epochs: float
    L: float  # nats/token
    used: float  # the FLOPs that this use spends; less than C if more training would raise the loss
    ci: dict[str, Interval] = field(default_factory=dict)  # of N, epochs and L
    edge: str = ""  # which end of the sizes considered N is, if it is one: then N is no optimum
    withheld: str = ""  # why there are no numbers

    def sentence(self) -> str:
        """The use in words."""
        where = f"{text.flops(self.C)} FLOPs and {text.count(self.U)} unique tokens"
        if self.withheld:
            return f"{where}: {self.withheld}"
        ci = {
            name: text.interval(self.ci.get(name), "count" if name == "N" else "number")
            for name in ("N", "epochs", "L")
        }
        less = (
            f", which spends only {text.flops(self.used)} FLOPs: more raises the loss"
            if self.used < 0.9 * self.C
            else ""
        )
        edge = (
            f"; N is the {self.edge} size considered, and a {EDGES[self.edge]} one may be better" if self.edge else ""
        )
        return (
            f"{where}: N = {text.count(self.N)} ({ci['N']}) for {text.number(self.epochs, digits=3)} epochs "
            f"({ci['epochs']}), L = {text.number(self.L)} ({ci['L']}){less}{edge}"
        )


def best_epochs(result: Fitted, params: float, unique: float | None = None, *, level: float = LEVEL) -> BestEpochs:
    """The best number of epochs for a model of `params` parameters on `unique` tokens.

    Args:
        result: The fit of a law of unique tokens.
        params: N.
        unique: U; by default that of the law.
        level: Nominal coverage of the interval.

    Raises:
        UserError: If the law does not depend on unique tokens, or for a number that is not above 0.
    """
    law, points = law_of(result), points_of(result)
    unique = law.unique if unique is None else unique
    check(params=params, unique=unique)
    why = outside(points, "params", params) or outside(points, "unique", unique)
    nothing = BestEpochs(N=params, U=unique, epochs=NAN, L=NAN)
    if why:
        return replace(nothing, withheld=why)
    log_n, log_u, row = np.log(params), np.log(unique), optimum.as_rows(law, result.params)
    found = float(log_best(law, row, log_n, log_u)[0])
    most = _most_epochs(points)
    if not found <= np.log(most):
        return replace(nothing, withheld=f"no turn within the runs, which have up to {text.number(most)} epochs")
    loss = of_unique(law, unique).predict(row, np.array([log_n]), np.array([log_u + found]))
    ci = UNBOUNDED
    if result.draws is not None:
        form = form_of(law)  # the draws are of the form alone: its distance from the corrected best is added
        drawn = log_best(form, result.draws, log_n, log_u)
        if form is not law:
            shift = found - float(log_best(form, row, log_n, log_u)[0])
            drawn = drawn + (shift if np.isfinite(shift) else 0.0)
        ci = _widened(float(np.exp(found)), np.exp(np.minimum(drawn, 700.0)), result, level)
    return replace(nothing, epochs=float(np.exp(found)), L=float(loss[0]), ci=ci)


def allocation(result: Fitted, flops: float, unique: float | None = None, *, level: float = LEVEL) -> Spending:
    """The best size and epochs for at most `flops` FLOPs on `unique` tokens, among sizes near those of the runs.

    Args:
        result: The fit of a law of unique tokens.
        flops: C.
        unique: U; by default that of the law.
        level: Nominal coverage of the intervals.

    Raises:
        UserError: As in `best_epochs`.
    """
    law, points = law_of(result), points_of(result)
    unique = law.unique if unique is None else unique
    check(flops=flops, unique=unique)
    nothing = Spending(C=flops, U=unique, N=NAN, epochs=NAN, L=NAN, used=NAN)
    why = outside(points, "unique", unique)
    if flops > FAR * points.top_flops or flops < points.flops.min() / FAR:
        low, high = text.flops(float(points.flops.min())), text.flops(points.top_flops)
        why = why or f"withheld: the runs spend {low} to {high} FLOPs"
    if why:
        return replace(nothing, withheld=why)
    rows = optimum.as_rows(law, result.params)
    n, e, loss, used = (float(v[0]) for v in _spend(result, rows, flops, unique))
    found = replace(nothing, N=n, epochs=e, L=loss, used=used, edge=_edge(result, n))
    most = FAR * _most_epochs(points)
    if e > most:
        why = f"withheld: its best use takes {text.number(e, digits=3)} epochs, and nothing is given above"
        return replace(nothing, withheld=f"{why} {text.number(most, digits=3)}, twice the most of any run")
    if result.draws is None:
        return found
    form = replace(result, surface=form_of(law))
    drawn = _spend(form, result.draws, flops, unique)
    if form.surface is not law:  # the draws are of the form alone: its distance from the corrected use is added
        alone = _spend(form, rows, flops, unique)
        drawn = (drawn[0] * (n / alone[0]), drawn[1] * (e / alone[1]), drawn[2] * (loss / alone[2]), drawn[3])
    ci = {
        name: ends(value, draws, result.dof, level, log=True)
        for name, value, draws in zip(("N", "epochs", "L"), (n, e, loss), drawn, strict=False)
    }
    return replace(found, ci={**ci, "N": UNBOUNDED} if found.edge else ci)


def summary(result: Fitted) -> dict[str, Any]:
    """What a report of a law of unique tokens adds: the best epochs of some sizes, and the use of each C."""
    law, points = law_of(result), points_of(result)
    unique = np.asarray(points.unique)
    low, high = text.count(float(unique.min())), text.count(float(unique.max()))
    sizes = np.unique(points.params)
    shown = sizes[np.unique(np.linspace(0, len(sizes) - 1, min(FEW_SIZES, len(sizes))).round().astype(int))]
    return {
        "unique": law.unique,
        "holds": f"the optima hold for {text.count(law.unique)} unique tokens; the runs have {low} to {high}",
        "best_epochs": [best_epochs(result, float(n)) for n in shown],
        "allocation": [allocation(result, flops) for flops in result.at],
    }


def lines(result: Fitted) -> list[str]:
    """`summary` as lines of a report."""
    found = summary(result)
    spent = [f"  {spending.sentence()}" for spending in found["allocation"]]
    return [f"  {found['holds']}", *(f"  best epochs of {b.sentence()}" for b in found["best_epochs"]), *spent]


def shown(result: Fitted) -> dict[str, Any]:
    """`summary` for JSON."""
    found = summary(result)
    return {**found, **{k: [vars(each) for each in found[k]] for k in ("best_epochs", "allocation")}}


def lowest_loss(side: Fitted, rows: Array, log_c: Array, unique: float) -> Array:
    """The lowest loss of each row that at most each C reaches, (R, m)."""
    law = of_unique(law_of(side), unique)
    log_n = np.linspace(*_size_range(side), SIZES)
    shape, losses = (len(rows), SIZES), []
    for c in log_c:
        log_d = np.broadcast_to(c - side.cost.log_per_token(log_n), shape)
        losses.append(law.predict(rows, np.broadcast_to(log_n, shape), log_d).min(axis=1))
    return np.asarray(np.minimum.accumulate(np.stack(losses, axis=1), axis=1))


def _spend(side: Fitted, rows: Array, flops: float, unique: float) -> tuple[Array, Array, Array, Array]:
    """N, epochs, L and the FLOPs of the best use of at most `flops`, each (R,): from a grid, then from finer ones."""
    low, high = _size_range(side)
    least = min(np.log(points_of(side).flops.min() / FAR), np.log(flops) - 1.0)
    log_n, log_c = (
        axis.ravel() for axis in np.meshgrid(np.linspace(low, high, SIZES), np.linspace(least, np.log(flops), STEPS))
    )
    best_n, best_c, loss = _best_of(side, rows, np.tile(log_n, (len(rows), 1)), np.tile(log_c, (len(rows), 1)), unique)
    step_n, step_c = (high - low) / (SIZES - 1), (np.log(flops) - least) / (STEPS - 1)
    around = [axis.ravel() for axis in np.meshgrid(NEAR, NEAR)]
    for _ in range(ROUNDS):
        near_n = np.clip(best_n[:, None] + step_n * around[0], low, high)
        near_c = np.minimum(best_c[:, None] + step_c * around[1], np.log(flops))
        best_n, best_c, loss = _best_of(side, rows, near_n, near_c, unique)
        step_n, step_c = step_n / len(NEAR), step_c / len(NEAR)
    log_d = best_c - side.cost.log_per_token(best_n)
    return np.exp(best_n), np.exp(log_d) / unique, loss, np.exp(best_c)


def _best_of(side: Fitted, rows: Array, log_n: Array, log_c: Array, unique: float) -> tuple[Array, Array, Array]:
    """log N, log C and the loss of the best of m candidates of each row, each (R,); all NaN for a row without a law."""
    law = of_unique(law_of(side), unique)
    loss = law.predict(rows, log_n, log_c - side.cost.log_per_token(log_n))
    low, each = np.where(np.isfinite(loss), loss, np.inf).argmin(axis=1), np.arange(len(rows))
    fine = law.found(rows)
    best_n, best_c, lowest = (np.where(fine, values[each, low], NAN) for values in (log_n, log_c, loss))
    return best_n, best_c, lowest


def _size_range(side: Fitted) -> tuple[float, float]:
    """The log of the sizes that are considered: FAR times beyond those of the runs."""
    sizes = points_of(side).params
    return float(np.log(sizes.min() / FAR)), float(np.log(sizes.max() * FAR))


def _edge(side: Fitted, params: float) -> str:
    """The end of the sizes considered at which a size lies; empty between the ends."""
    at_end = np.isclose(np.log(params), _size_range(side), rtol=0.0, atol=1e-6)
    return next((name for name, is_there in zip(EDGES, at_end, strict=True) if is_there), "")


def _widened(point: float, draws: Array, result: Fitted, level: float) -> Interval:
    """The interval of the draws, with the error of ln(epochs) on held-out curves added in quadrature."""
    low, high = ends(point, draws, result.dof, level, log=True)
    missed = NAN if result.choice is None else result.choice.own.log_epochs_error
    more = NORMAL * missed if np.isfinite(missed) else 0.0
    below, above = (float(np.hypot(np.log(end / point), more)) for end in (low, high))
    high = point * float(np.exp(above))
    return point * float(np.exp(-below)), high if not high > MOST_EPOCHS else np.inf  # some draws may not turn


def law_of(result: Fitted) -> Repeated:
    law = result.surface
    if not isinstance(law, Repeated):
        raise UserError(f"{result.law} does not depend on unique tokens: fit --law repeated")
    return law


def points_of(result: Fitted) -> Points:
    assert result.points is not None and result.points.unique is not None
    return result.points


def _most_epochs(points: Points) -> float:
    assert points.unique is not None
    return float((points.tokens / points.unique).max())


def check(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 < value < np.inf:
            raise UserError(f"{name} is {value}: give a finite number above 0")


def outside(points: Points, name: str, value: float) -> str:
    """Why nothing is given at `value`; empty if it lies near the runs."""
    own = points.params if name == "params" else points.unique
    assert own is not None
    low, high = float(own.min()), float(own.max())
    if low / FAR <= value <= high * FAR:
        return ""
    noun = "parameters" if name == "params" else "unique tokens"
    return f"withheld: {text.count(value)} {noun} are far from the {text.count(low)} to {text.count(high)} of the runs"
