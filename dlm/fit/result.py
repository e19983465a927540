"""Show a fitted law as JSON, as text, as HTML and as a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlm.core import text
from dlm.fit.brief import WIDTH, brief
from dlm.fit.fitted import Fitted, Optimum, plain, shown
from dlm.fit.laws.combined import Combined
from dlm.fit.laws.data_constrained import DataConstrained
from dlm.fit.laws.epochs import Epochs
from dlm.fit.layout import escaped, html_block, html_list, html_table, within

if TYPE_CHECKING:
    from matplotlib.figure import Figure


HELD_OUT = {"N_error": "N*", "D_error": "D*", "L_error": "L"}
WITHOUT = {
    "without_top_1": "the top budget",
    "without_top_2": "the top two budgets",
    "without_top_3": "the top three budgets",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class FitResult(Fitted):
    """A fitted law that can be printed, saved and drawn. Its fields are those of `Fitted`."""

    def to_dict(self) -> dict[str, Any]:
        """The object that `dlm fit --json` prints. A number that is not known is None; no default replaces it."""
        replicates = 0 if self.draws is None else len(self.draws)
        values = {
            "law": self.law,
            "loss": self.norm,
            "space": self.how.space,
            "delta": self.delta,
            "n": self.n,
            "curve": self.curve,
            "axis": self.axis,
            "params": self.params,
            "ci": self.ci,
            "objective": self.value,
            "allocation": vars(self.allocation),
            "at": {f"{flops:.12g}": vars(best) for flops, best in self.at.items()},
            "holdout": self.holdout,
            "status": self.status,
            "warnings": self.warnings,
            "notes": self.notes,
            "minima": [shown(m) for m in self.minima],
            "label": self.label,
            "fixed": self.fixed,
            "under_tuned": self.how.under_tuned,
            "rivals": self.rivals,
            "noise": vars(self.noise),
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
            "outliers": self.outliers,
            "tuning": self.tuning,
            "combination": self._combination(),
            "conventions": None if self.conventions is None else self.conventions.to_dict(),
            "at_bound": self.at_bound,
            "repeated": self._repeated(),
            "intervals": {"method": self.interval_method, "replicates": replicates, "failed": self.failed},
        }
        return {key: plain(value) for key, value in values.items()}

    def _combination(self) -> dict[str, Any] | None:
        if self.combination is None or not isinstance(self.surface, Combined):
            return None
        return self.combination.shown(self.surface.weights)

    def report(self, *, width: int | None = None) -> str:
        """The result as a page of text, whose tables fit a terminal of ``width`` columns."""
        rows = [f"{_head(self)}: {self.status}"]
        rows += [f"  {self.surface.formula}"] if self.surface is not None else []
        rows += [f"  {name:<8}{value:<13}{ends}" for name, value, ends in _numbers(self)]
        if not isinstance(self.surface, Epochs):  # whose best use of C may be to spend less
            rows += [f"  best at {text.flops(c)} FLOPs: {sentence(best)}" for c, best in self.at.items()]
        rows += self._of_unique_tokens()
        rows += [f"  {_held_out(name, errors)}" for name, errors in self.holdout.items()]
        rows += [] if self.conventions is None else [f"  {line}" for line in self.conventions.lines(within(width))]
        rows += [f"  noise: {said}"] if (said := self.noise.sentence()) else []
        rows += [] if self.verdict is None else [f"  verdict: {self.verdict.sentence()}"]
        rows += [] if self.tuning is None else [f"  tuning: {self.tuning['sentence']}"]
        rows += [f"  warning: {warning}" for warning in self.warnings]
        rows += [f"  note: {note}" for note in self.notes]
        return "\n".join(rows)

    def summary(self, *, at: Sequence[float] = (), width: int = WIDTH, rest: str = "report() has them") -> str:
        """The answer in at most ten lines: N*, D*, L*, the exponents, how far to trust them, and what limits them.

        Args:
            at: The C in FLOPs to show, of those in `self.at`. Empty: the two highest.
            width: The width of the terminal; the ten lines are of 80 characters.
            rest: Where the rest can be read, in words.
        """
        return brief(self, _head(self), at=at, width=width, rest=rest)

    def _of_unique_tokens(self) -> list[str]:
        """The best epochs, the best use of each C, and the errors of the law, if it depends on unique tokens."""
        if not isinstance(self.surface, DataConstrained | Epochs):
            return []
        from dlm.fit import repeated  # which needs `Fitted` and its optima

        return [*repeated.lines(self), *([] if self.choice is None else [f"  {self.choice.sentence()}"])]

    def _repeated(self) -> dict[str, Any] | None:
        if not isinstance(self.surface, DataConstrained | Epochs):
            return None
        from dlm.fit import repeated

        return {**repeated.shown(self), "choice": None if self.choice is None else self.choice.shown()}

    def plot(self) -> Figure:
        """Draw L*(C) with the runs, and N*(C), both with intervals, as a matplotlib figure.

        Raises:
            UserError: If there is no law to draw.
        """
        from dlm.fit.plot import draw

        return draw(self)

    def _repr_html_(self) -> str:
        table = html_table([("", "value", "95 % interval"), *_numbers(self)])
        best = html_list(f"{text.flops(c)} FLOPs: {sentence(o)}" for c, o in self.at.items())
        verdict = "" if self.verdict is None else f"<p>{escaped(self.verdict.sentence())}</p>"
        tuning = () if self.tuning is None else (str(self.tuning["sentence"]),)
        remarks = html_list((*tuning, *self.warnings, *self.notes))
        return html_block(f"<b>{escaped(_head(self))}</b>: {escaped(self.status)}", table, best, verdict, remarks)


def sentence(best: Optimum) -> str:
    """An optimum in words: 'N = 1.2M (1M to 1.4M), D = ..., L = ...'."""
    if math.isnan(best.N):
        return f"withheld: {best.withheld}"
    sizes = (f"{k} = {text.count(getattr(best, k))} ({text.interval(best.ci.get(k), 'count')})" for k in "ND")
    loss = f"L = {text.number(best.L)} ({text.interval(best.ci.get('L'))})"
    if best.withheld:
        loss = f"L withheld: {best.withheld}" if math.isnan(best.L) else f"{loss}: {best.withheld}"
    ratio = text.number(best.tokens_per_param, digits=3)
    return f"{', '.join(sizes)}, D/N = {ratio} ({text.interval(best.ci.get('tokens_per_param'))}), {loss}"


def _head(result: Fitted) -> str:
    label = f" of {result.label}" if result.label else ""
    norm = f"{result.norm} on {result.how.space} loss" if result.norm else "line"
    curve = f", {result.curve} over log {'N' if result.axis == 'params' else 'D'}" if result.curve else ""
    return f"{result.law}{label}, {result.n} points, {norm}{curve}"


def _numbers(result: Fitted) -> list[tuple[str, str, str]]:
    """The name, value and interval of every parameter and of a and b, as text."""
    shown = {} if result.combination is not None else result.params  # a combined law has 30 and more
    values = {**shown, "a": result.allocation.a, "b": result.allocation.b}
    if isinstance(result.surface, Epochs):
        values = dict(shown)  # no power law gives N*
    said = {name: "at its bound" if name in result.at_bound else text.interval(result.ci.get(name)) for name in values}
    return [(name, text.number(value, digits=6), said[name]) for name, value in values.items()]


def _held_out(name: str, errors: Mapping[str, float]) -> str:
    """'fitted without the top budget, at 3e11 FLOPs and above: L off by +0.44% (0.65% root mean square)'."""
    left_out = WITHOUT.get(name, name)
    said = ", ".join(f"{what} off by {errors[key]:+.2%}" for key, what in HELD_OUT.items() if key in errors)
    rms = f" ({errors['L_rms_error']:.2%} root mean square)" if "L_rms_error" in errors else ""
    return f"fitted without {left_out}, at {text.flops(errors['from_flops'])} FLOPs and above: {said}{rms}"
