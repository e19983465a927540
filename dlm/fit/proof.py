"""Fits of a sweep go in; the forecast of its proof run comes out, and later how that run ended, in words and numbers.

A proof run trains the model that the law calls best at a budget above the runs. The forecast is frozen before the run
starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlm.core import text
from dlm.fit.fitted import Optimum
from dlm.fit.frozen import extended, forecast, predicted
from dlm.fit.laws import LAW_NAMES
from dlm.fit.optimum import LEVEL, TOP, optima, own_optimum
from dlm.fit.points import NAN
from dlm.fit.resample import WIDE
from dlm.fit.result import WITHOUT, FitResult

NOT_YET = "the proof run has not ended yet"
LINE_NAME = "straight log-log line through the isoFLOP minima"


def headline(fits: Iterable[FitResult]) -> FitResult | None:
    """The fit that a proof run tests: the combined law.

    Its N* at the budget of the proof run is the size that is trained, and its interval of a run is the forecast. None
    if there is no such fit.
    """
    return next((fit for fit in fits if fit.law == "combined"), None)


def best_size(fits: Sequence[FitResult], flops: float) -> tuple[Optimum | None, str]:
    """The optimum of the headline fit at C = `flops`, or the reason why the fits of one objective determine none."""
    main = headline(fits)
    if main is None or not main.params:
        said = main.warnings[0] if main is not None and main.warnings else "no surface was fitted"
        return None, f"there is no law to predict from: {said}"
    if main.draws is None or main.verdict is None:
        said = main.warnings[0] if main.warnings else "its form could not be checked"
        return None, f"the law has no intervals: {said}"
    best = optima(main, [flops])[flops]
    low, high = best.ci["N"]
    if not math.isfinite(low + high):
        why = best.withheld if math.isnan(best.N) else "resampled runs do not bound it"
        return None, f"the best size at {text.flops(flops)} FLOPs is not known: {why}"
    if high > WIDE * low:
        span = text.interval((low, high), "count")
        return (
            None,
            f"the interval of the best size at {text.flops(flops)} FLOPs ({span}) spans a factor above {WIDE:g}",
        )
    if not math.isfinite(sum(own_optimum(main, flops, LEVEL).ci["L"])):
        return None, f"resampled runs do not bound the loss at {text.flops(flops)} FLOPs"
    return best, ""


def open_budgets(fits: Iterable[FitResult]) -> list[str]:
    """The reasons why budgets have no usable minimum, in words."""
    return [minimum.detail for fit in fits for minimum in fit.minima if not minimum.usable]


def freeze_proof(
    fits: Sequence[FitResult], flops: float, cells: Sequence[Mapping[str, Any]], **more: Any
) -> dict[str, Any]:
    """Return the forecast of the proof runs of one objective, as it is written to proof.json.

    Args:
        fits: The fits of the objective, whose `best_size` at `flops` is known.
        flops: The budget of the proof run, FLOPs.
        cells: The proof runs, with num_params and tokens.
        **more: Further facts about the proof runs.

    Returns:
        What `freeze` writes, and under 'proof' the cells, the prediction of each, the prediction of the straight line
        through the isoFLOP minima, and the errors of the earlier hold-outs.
    """
    main = headline(fits)
    assert main is not None
    content = forecast(main, [flops])
    runs = predicted(content, *([cell[key] for cell in cells] for key in ("num_params", "tokens")))
    proof = {"budget": flops, **more, "cells": list(cells), "runs": runs, "line": _line(fits, flops)}
    proof["lowest"] = _lowest(main)
    return extended(content, proof={**proof, "holdouts": _holdouts(fits)})


def _lowest(main: FitResult) -> dict[str, float]:
    """The lowest loss of the runs with the highest C, and this C."""
    assert main.points is not None
    top = main.points.top_flops
    return {"flops": top, "loss": float(main.points.loss[main.points.flops >= top / TOP].min())}


def _line(fits: Iterable[FitResult], flops: float) -> dict[str, float] | None:
    """N* and L* at C = `flops` on the straight lines through the isoFLOP minima; None without such lines."""
    line = next((fit for fit in fits if fit.law == "isoflop" and fit.params), None)
    if line is None:
        return None
    best = own_optimum(line, flops, LEVEL)
    return {"N": best.N, "L": best.L}


def _holdouts(fits: Iterable[FitResult]) -> list[dict[str, Any]]:
    """The relative error of the loss at the budgets that each law predicted from the lower budgets alone."""
    return [
        {"law": fit.law, "name": name, "L_error": errors["L_error"]}
        for fit in fits
        for name, errors in fit.holdout.items()
        if "L_error" in errors
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Proof:
    """The proof run of one objective: its forecast, and how it ended."""

    label: str  # the objective
    forecast: Mapping[str, Any] | None = None  # the frozen forecast; None if there is none
    why: str = ""  # why there is no forecast, or no result yet; empty once the run is scored
    rows: Sequence[Mapping[str, Any]] = ()  # the graded proof runs, as in `Score.rows`
    sizes: Sequence[Mapping[str, Any]] = ()  # the test of N* by proof runs of several sizes, as in `Score.sizes`
    notes: Sequence[str] = ()  # what a reader has to know besides

    @property
    def planned(self) -> Mapping[str, float]:
        """The prediction of the run at N*, as `predicted` returns it."""
        assert self.forecast is not None
        runs = self.forecast["proof"]["runs"]
        return {key: NAN if value is None else value for key, value in runs[len(runs) // 2].items()}

    @property
    def measured(self) -> Mapping[str, Any] | None:
        """The graded run at N*; None before it has ended."""
        same = [row for row in self.rows if (row["params"], row["tokens"]) == self._place]
        return same[0] if same else None

    @property
    def _place(self) -> tuple[float, float]:
        return self.planned["params"], self.planned["tokens"]

    def sentence(self) -> str:
        """'predicted 2.031 (2.012 to 2.051), measured 2.038, z = 0.4', or why the run has no result yet."""
        one, run = self.planned, self.measured
        has_ends = math.isfinite(one["low"] + one["high"])
        ends = f"{one['low']:.3f} to {one['high']:.3f}" if has_ends else "no interval"
        said = f"predicted {one['predicted']:.3f} ({ends})"
        if run is None:
            return f"{said}; {self.why}"
        return f"{said}, measured {run['loss']:.3f}" + (f", z = {round(run['z'], 1) + 0.0:.1f}" if has_ends else "")

    def statement(self) -> str:
        """'Proof run at 9e12 FLOPs with 57.1k parameters: predicted ...', or why there is no proof run."""
        if self.forecast is None:
            return f"No proof run: {self.why}"
        flops, n = text.flops(self.forecast["proof"]["budget"]), text.count(self.planned["params"])
        return f"Proof run at {flops} FLOPs with {n} parameters: {self.sentence()}"

    def meaning(self) -> list[str]:
        """Whether the forecast held, and whether it could have failed, as sentences; empty without a result."""
        if self.forecast is None or self.measured is None:
            return []
        run, low, high = self.measured, self.planned["low"], self.planned["high"]
        held, off = low <= run["loss"] <= high, self.planned["predicted"] / run["loss"] - 1
        where = "inside" if held else "above" if run["loss"] > high else "below"
        missed_by = f"{abs(off):.1%} too {'high' if off > 0 else 'low'}"
        if not math.isfinite(low + high):
            return [f"The forecast was {missed_by}. It has no interval, so it neither held nor missed."]
        outcome = "held" if held else "missed"
        said = [f"The forecast {outcome}: it was {missed_by}, and the run lies {where} its interval."]
        lowest = self.forecast["proof"].get("lowest")  # earlier versions did not keep it
        if lowest is not None:
            as_good = f"a loss as high as the lowest one at {text.flops(lowest['flops'])} FLOPs ({lowest['loss']:.3f})"
            if not low <= lowest["loss"] <= high:
                said.append(f"It could have failed: {as_good} would have been outside.")
            else:
                said.append(f"This is a weak test, because {as_good} would have been inside too.")
        line = self.forecast["proof"]["line"]
        if line is not None and low <= line["L"] <= high:
            said.append(
                "The loss that the straight line predicts lies inside too, so the run does not choose between them."
            )
        return said

    def comparisons(self) -> list[tuple[str, float | None, float | None]]:
        """The straight line and the earlier hold-outs: (name, predicted loss, its relative error); None if unknown.

        These predictions have no interval of a run, so they have no z.
        """
        if self.forecast is None:
            return []
        proof, run = self.forecast["proof"], self.measured
        line = proof["line"]
        value = None if line is None else line["L"]
        found: list[tuple[str, float | None, float | None]] = [
            (LINE_NAME, value, None if value is None or run is None else value / run["loss"] - 1)
        ]
        for held in proof["holdouts"]:
            name = f"hold-out: {LAW_NAMES[held['law']]} without {WITHOUT.get(held['name'], held['name'])}"
            found.append((name, None, held["L_error"]))
        return found

    def tests_of_size(self) -> list[str]:
        """What proof runs of several sizes say of N*, a sentence for each budget."""
        found = []
        for size in self.sizes:
            between, said = (text.interval(ends, "count") for ends in (size["between"], (size["low"], size["high"])))
            vertex = "has no minimum between these sizes"
            if size["vertex"] is not None:
                vertex = f"has its minimum at {text.count(size['vertex'])} parameters"
            found.append(
                f"a parabola through the {size['runs']} proof runs {vertex}; the best run shows that N* lies within "
                f"{between}; predicted was {said}"
            )
        return found

    def report(self) -> str:
        """The outcome as lines for the terminal."""
        lines = [f"{self.label}: {self.statement()}" if self.label else self.statement()]
        for what, value, error in self.comparisons():
            loss = "" if value is None else f" {value:.3f}"
            off = "" if error is None else f"{',' if loss else ''} off by {error:+.1%}"
            lines.append(f"  {what}:{loss}{off}" if loss or off else f"  {what}: none, too few budgets have a minimum")
        more = (*self.meaning(), *self.tests_of_size(), *self.notes)
        return "\n".join([*lines, *(f"  {line}" for line in more)])
