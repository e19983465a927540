"""result: what a fit found -> a frozen FitResult with JSON, text and HTML faces.
Made by the fits; read by cli, report.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dlm.core import text
from dlm.fit.engine.search import Norm
from dlm.fit.fitted import Allocation, Minimum, Noise, Optimum, Verdict, plain
from dlm.fit.laws.law import Law
from dlm.fit.points import NAN, Array, Cost, Interval, Points

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, eq=False)
class FitResult:
    """A fitted law. `status`: 'ok', 'warned' (read `warnings`) or 'refused' (the data do not support it)."""

    law: str
    loss: str  # the norm: huber, mse or l1
    space: str  # residuals of log loss ('log') or of loss ('raw')
    delta: float  # Huber's corner, in units of the residual; NaN where it plays no part
    n: int  # points used
    params: Mapping[str, float] = field(default_factory=dict)
    ci: Mapping[str, Interval] = field(default_factory=dict)
    objective: float = NAN  # sum over points
    allocation: Allocation = field(default_factory=Allocation)
    at: Mapping[float, Optimum] = field(default_factory=dict)
    holdout: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    status: str = "ok"
    warnings: tuple[str, ...] = ()
    minima: tuple[Minimum, ...] = ()  # per budget, for isoflop and envelope
    curve: str = ""  # of isoflop: parabola, cubic or akima
    axis: str = ""  # of isoflop: the curve runs over log of 'params' or 'tokens'
    label: str = ""  # which objective or group of runs, for the reader
    points: Points | None = field(default=None, repr=False)
    cost: Cost = field(default_factory=Cost, repr=False)
    draws: Array | None = field(default=None, repr=False)  # (replicates, params), NaN rows failed
    interval_method: str = ""
    surface: Law | None = field(default=None, repr=False)  # the law itself; None for lines
    how: Norm | None = field(default=None, repr=False)  # the whole norm of a surface
    fixed: Mapping[str, float] = field(default_factory=dict)  # parameters that were pinned
    rivals: tuple[Mapping[str, float], ...] = ()  # other minima within 1 %: params and objective
    noise: Noise = field(default_factory=Noise)
    outliers: tuple[int, ...] = ()  # indices of points far from the law; they count all the same
    verdict: Verdict | None = field(default=None, repr=False)  # how far it may be believed: after `judge`
    failed: int = 0  # replicates that found no law
    dof: int = 0  # of the intervals that resampled residuals give

    @property
    def usable(self) -> list[Minimum]:
        """The minima that a line may use."""
        return [m for m in self.minima if m.usable]

    def to_dict(self) -> dict[str, Any]:
        """The object `dlm fit --json` prints; a number that is not known is null, never filled in."""
        head: dict[str, Any] = {k: getattr(self, k) for k in ("law", "loss", "space", "delta", "n", "curve", "axis")}
        body = {
            "params": self.params,
            "ci": self.ci,
            "objective": self.objective,
            "allocation": vars(self.allocation),
            "at": {f"{flops:.12g}": _optimum(best) for flops, best in self.at.items()},
            "holdout": self.holdout,
            "status": self.status,
            "warnings": list(self.warnings),
            "minima": [_minimum(m) for m in self.minima],
            "label": self.label,
            "fixed": self.fixed,
            "under_tuned": 1.0 if self.how is None else self.how.under_tuned,
            "rivals": self.rivals,
            "noise": vars(self.noise),
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
            "outliers": self.outliers,
            "intervals": {"method": self.interval_method, "replicates": self._drawn(), "failed": self.failed},
        }
        return {key: plain(value) for key, value in (head | body).items()}

    def _drawn(self) -> int:
        return 0 if self.draws is None else len(self.draws)

    def report(self) -> str:
        """The result as a page of text."""
        rows = [f"{_head(self)}: {self.status}"]
        rows += [f"  {name:<7}{value:<14}{ends}" for name, value, ends in _table(self)]
        rows += [f"  best at {text.flops(c)} FLOPs: {sentence(best)}" for c, best in self.at.items()]
        rows += [f"  {name}: {_errors(errors)}" for name, errors in self.holdout.items()]
        rows += [f"  noise: {said}"] if (said := self.noise.sentence()) else []
        rows += [] if self.verdict is None else [f"  verdict: {self.verdict.sentence()}"]
        rows += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(rows)

    def plot(self) -> Figure:
        """A matplotlib figure: L of the runs with L*(C), and N*(C), with their intervals. UserError without a law."""
        from dlm.fit.plot import draw

        return draw(self)

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><td>{n}</td><td>{v}</td><td>{html.escape(e)}</td></tr>" for n, v, e in _table(self))
        best = "".join(f"<li>{text.flops(c)} FLOPs: {sentence(o)}</li>" for c, o in self.at.items())
        warned = "".join(f"<li>{html.escape(w)}</li>" for w in self.warnings)
        table = f"<table><tr><th></th><th>value</th><th>95 % interval</th></tr>{cells}</table>"
        said = "" if self.verdict is None else f"<p>{html.escape(self.verdict.sentence())}</p>"
        return f"<b>{html.escape(_head(self))}</b>: {self.status}{table}<ul>{best}</ul>{said}<ul>{warned}</ul>"


def sentence(best: Optimum) -> str:
    """'N = 1.2M (1M to 1.4M), D = ..., L = ...'."""
    sizes = (f"{k} = {text.count(getattr(best, k))} ({text.interval(best.ci.get(k), 'count')})" for k in "ND")
    loss = f"L = {text.number(best.L)} ({text.interval(best.ci.get('L'))})"
    if best.withheld:
        loss = f"L withheld: {best.withheld}" if math.isnan(best.L) else f"{loss}: {best.withheld}"
    ratio = text.number(best.tokens_per_param, digits=3)
    return f"{', '.join(sizes)}, D/N = {ratio} ({text.interval(best.ci.get('tokens_per_param'))}), {loss}"


def _head(result: FitResult) -> str:
    label = f" of {result.label}" if result.label else ""
    norm = f"{result.loss} on {result.space} loss" if result.loss else "line"
    curve = f", {result.curve} over log {'N' if result.axis == 'params' else 'D'}" if result.curve else ""
    return f"{result.law}{label}, {result.n} points, {norm}{curve}"


def _table(result: FitResult) -> list[tuple[str, str, str]]:
    values = {**result.params, "a": result.allocation.a, "b": result.allocation.b}
    return [(name, text.number(v, digits=6), text.interval(result.ci.get(name))) for name, v in values.items()]


def _errors(errors: Mapping[str, float]) -> str:
    shown = (f"{k} {v:+.2%}" if k.endswith("error") else f"{k} {text.number(v)}" for k, v in errors.items())
    return ", ".join(shown)


def _optimum(best: Optimum) -> dict[str, Any]:
    return dict(vars(best))


def _minimum(minimum: Minimum) -> dict[str, Any]:
    return dict(vars(minimum))
