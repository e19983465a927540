"""Lay out the tables of the report: each function takes fits, runs or a proof run and returns a ``Table``."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dlm.core import text
from dlm.fit.fitted import Minimum, Optimum
from dlm.fit.laws import LAW_NAMES
from dlm.fit.proof import Proof
from dlm.fit.result import WITHOUT, FitResult
from dlm.report import words
from dlm.report.table import Table

if TYPE_CHECKING:
    import pandas as pd

BEST_HEADS = ("parameters N*", "tokens D*", "D*/N*", "loss L*")


def parameters_of(fit: FitResult) -> dict[str, float]:
    """Return the fitted parameters and the exponents a and b of the allocation."""
    return {**fit.params, "a": fit.allocation.a, "b": fit.allocation.b}


def best(fits: Sequence[FitResult]) -> Table:
    """Tabulate the best use of each C, with one row per method."""
    rows = [
        (words.place(flops, fit.at[flops]), LAW_NAMES[fit.law], *_optimum(fit.at[flops]))
        for flops in sorted({flops for fit in fits for flops in fit.at})
        for fit in fits
        if flops in fit.at
    ]
    return Table(heads=("compute C", "by", *BEST_HEADS), rows=rows, words=("compute C", "by"))


def side_by_side(fits: Iterable[FitResult]) -> Table:
    """Tabulate the best use of the highest reported C that the runs of all usable fits reach."""
    usable = [fit for fit in fits if fit.at and fit.points is not None]
    run = [{flops for flops in fit.at if words.is_run(fit, flops)} for fit in usable]
    top = max(set.intersection(*run), default=0.0) if run else 0.0
    rows = [(words.objective(fit.label), LAW_NAMES[fit.law], *_optimum(fit.at[top])) for fit in usable if top in fit.at]
    caption = f"The best use of {text.flops(top)} FLOPs."
    return Table(heads=("objective", "by", *BEST_HEADS), rows=rows, words=("objective", "by"), caption=caption)


def _optimum(best: Optimum) -> tuple[str, ...]:
    loss = f"withheld: {best.withheld}" if best.withheld else _with_interval(best, "L", "number")
    return _with_interval(best, "N"), _with_interval(best, "D"), text.count(best.tokens_per_param, digits=2), loss


def _with_interval(best: Optimum | Minimum, key: str, style: str = "count") -> str:
    """Format N, D or L of an optimum, with the interval if there is one; ``style`` as in ``text.interval``."""
    value = getattr(best, key)
    shown = text.count(value) if style == "count" else text.number(value)
    return f"{shown} ({text.interval(best.ci[key], style)})" if key in best.ci else shown


def minima(fits: Iterable[FitResult]) -> Table:
    heads = ("budget", "runs", "parameters N*", "tokens D*", "loss L*", "verdict")
    rows = [_minimum(minimum) for fit in fits if fit.law == "isoflop" for minimum in fit.minima]
    return Table(heads=heads, rows=rows, words=("budget", "verdict"))


def _minimum(minimum: Minimum) -> tuple[str, ...]:
    head = (text.flops(minimum.budget), str(minimum.num_points))
    if not minimum.usable:
        return (*head, *[words.MISSING] * 3, f"refused: {minimum.why}")
    best = (_with_interval(minimum, "N"), _with_interval(minimum, "D"), _with_interval(minimum, "L", "number"))
    return (*head, *best, "interior minimum")


def parameter_table(fits: Iterable[FitResult]) -> Table:
    """Tabulate the parameters of each fit; of a combined law, those of the parts that are fitted to all runs alike."""
    rows = []
    for fit in fits:
        for key, value in parameters_of(fit).items() if fit.params else ():
            part, _, name = key.rpartition(".")
            form, _, emphasis = part.partition("_")
            if not part or emphasis == "0":
                law = f"{LAW_NAMES[fit.law]}, {form} part" if part else LAW_NAMES[fit.law]
                rows.append((law, name, text.number(value), text.interval(fit.ci.get(key)), words.PARAMETERS[name]))
    heads = ("fit", "parameter", "value", "95 % interval", "meaning")
    return Table(heads=heads, rows=rows, words=("fit", "parameter", "meaning"))


def conventions(fits: Sequence[FitResult]) -> Table:
    """Tabulate a and b under every count of N and C, from the fit with the most of them."""
    known = [fit.conventions for fit in fits if fit.conventions is not None]
    most = max(known, key=lambda found: len(found.rows), default=None)
    heads = ("N counts", "C counts", "by", "a", "b", "a + b")
    if most is None:
        return Table(heads=heads, rows=(), words=heads[:3])
    rows = [
        (words.SIZES[row.N], row.C, LAW_NAMES[row.by], *(f"{value:.3f}" for value in (row.a, row.b, row.a + row.b)))
        for row in most.rows
    ]
    return Table(heads=heads, rows=rows, words=heads[:3], caption=words.CONVENTIONS_CAPTION)


def checks(fits: Iterable[FitResult]) -> Table:
    """Tabulate the errors of N*, D* and L* at the top budgets, as predicted by fits to the lower budgets alone."""
    rows = [
        (LAW_NAMES[fit.law], WITHOUT.get(name, name), *words.relative_errors(errors))
        for fit in fits
        for name, errors in fit.holdout.items()
    ]
    heads = ("fit", "refitted without", "N*", "D*", "loss")
    return Table(heads=heads, rows=rows, words=("fit", "refitted without"))


def proof(proof: Proof) -> Table:
    """Tabulate the forecast of the proof run and its result, next to the predictions without a law."""
    heads = ("prediction", "parameters N", "predicted loss", "measured", "prediction off by", "z of the measured loss")
    rows = []
    if proof.forecast is not None:
        for run in proof.forecast["proof"]["runs"]:
            rows.append(("the law, frozen before the run", *_proof_run(run, proof.rows)))
        for name, value, error in proof.comparisons():
            loss = words.MISSING if value is None else f"{value:.3f}"
            off = words.MISSING if error is None else f"{error:+.1%}"
            rows.append((name, words.MISSING, loss, words.MISSING, off, words.MISSING))
    return Table(heads=heads, rows=rows, words=("prediction",))


def _proof_run(run: Mapping[str, float], graded: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    said = f"{run['predicted']:.3f} ({run['low']:.3f} to {run['high']:.3f})"
    size, place = text.count(run["params"]), (run["params"], run["tokens"])
    for row in graded:
        if (row["params"], row["tokens"]) == place:
            return size, said, f"{row['loss']:.3f}", f"{row['error']:+.1%}", f"{row['z']:+.1f}"
    return size, said, *[words.MISSING] * 3


def runs(runs: pd.DataFrame) -> Table:
    """Tabulate all runs, sorted by objective, budget and size.

    A column of CAPTION_COLUMNS with the same value for all runs goes into the caption. Empty columns are left out.
    """
    order = [name for name in ("objective", "budget", "params") if name in runs]
    rows = _records(runs.sort_values(order) if order else runs)
    columns = {name: [words.cell(name, row) for row in rows] for name in words.COLUMNS}
    columns = {name: cells for name, cells in columns.items() if set(cells) != {words.MISSING}}
    same = [name for name in columns if name in words.CAPTION_COLUMNS and len(set(columns[name])) == 1]
    caption = ", ".join(f"{words.COLUMNS[name][0]} {columns.pop(name)[0]}" for name in same)
    return Table(
        heads=[words.COLUMNS[name][0] for name in columns],
        rows=list(zip(*columns.values(), strict=True)),
        words=[words.COLUMNS[name][0] for name in words.WORD_COLUMNS],
        caption=f"All of them: {caption}." if caption else "",
        is_wide=True,
    )


def excluded(excluded: pd.DataFrame) -> Table:
    heads = {"run_id": "run", "status": "state", "reason": "reason"}
    rows = [[str(row.get(name) or words.MISSING) for name in heads] for row in _records(excluded)]
    return Table(heads=list(heads.values()), rows=rows, words=heads.values())


def _records(frame: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """Return the rows of a data frame, with None for missing values."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def plan(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate the cells of a plan of which no run has finished."""
    columns = [name for name in words.COLUMNS if any(row.get(name) is not None for row in rows)]
    return Table(
        heads=[words.COLUMNS[name][0] for name in columns],
        rows=[[words.cell(name, row) for name in columns] for row in rows],
        words=[words.COLUMNS[name][0] for name in words.WORD_COLUMNS],
        is_wide=True,
    )
