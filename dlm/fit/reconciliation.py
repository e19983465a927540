"""Refit sets of runs under each count of N and C and with each form, and split the spread of their exponents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError, unknown
from dlm.fit.budgets import TOLERANCE
from dlm.fit.conventions import ISOFLOP, refit_of
from dlm.fit.counts import GIVEN, SIZE_COLUMNS, Counts, counts_of
from dlm.fit.engine.newton import Norm
from dlm.fit.hparams.excess import at_best
from dlm.fit.known import hash_of
from dlm.fit.points import Array
from dlm.fit.reconciled import Reconciliation, SetFacts
from dlm.fit.recount import Refit
from dlm.fit.rows import Runs, checkpoints, load_table, read_runs, run_table, with_budgets
from dlm.fit.spread import Cell, Exponent, split

if TYPE_CHECKING:
    import pandas as pd

FORMS = (ISOFLOP, "chinchilla", "skaling", "tied")
USUAL = FORMS[:3]  # the tied form sets a = b = 1/2 where C = 6 N D, whatever the runs say
LEAST_REPLICATES = 50
MOST_LOST = 0.25  # largest share of the refits that may find no exponents


@dataclass(frozen=True, kw_only=True, eq=False)
class RunSet:
    """The runs of one objective of one table, and the counts of N and C that they allow."""

    label: str
    frame: pd.DataFrame
    counts: Counts
    without: Mapping[str, str]  # forms that they do not support, and why
    warnings: tuple[str, ...]  # about the runs


@dataclass(frozen=True, kw_only=True, eq=False)
class _Refitted:
    """The exponents of one set in every cell that it allows: a and b, (2,), and their errors in refits, (R, 2)."""

    cells: Mapping[Cell, tuple[Array, Array]]
    noise: float
    missing: Mapping[str, str]

    def exponent(self, place: int) -> dict[Cell, Exponent]:
        """a (place 0) or b (place 1) in every cell."""
        return {cell: (float(found[place]), errors[:, place]) for cell, (found, errors) in self.cells.items()}


def reconcile(
    sources: Sequence[Runs],
    *,
    objectives: Sequence[str] = (),
    columns: Sequence[str] = (),
    forms: Sequence[str] = USUAL,
    replicates: int = 200,
    seed: int = 0,
) -> Reconciliation:
    """Refit sets of runs under each count of N and C and with each form, and split the spread of a and b.

    Args:
        sources: CSV files, folders with a runs.csv, or DataFrames. Each objective of a table is a set of its own.
        objectives: The objectives to use; by default all.
        columns: Foreign names of columns, as in `read_sets`.
        forms: The forms to fit, of FORMS.
        replicates: How often the losses of each set are redrawn, to find the noise of its exponents.
        seed: Seed of these draws.

    Raises:
        UserError: If there are fewer than two sets, the same runs come twice, or no count or form suits all sets.
    """
    odd = [form for form in forms if form not in FORMS]
    if odd or not forms:
        raise unknown("form", odd[0] if odd else "", FORMS)
    if replicates < LEAST_REPLICATES or seed < 0:
        raise UserError(
            f"replicates is {replicates}, seed {seed}: give {LEAST_REPLICATES} or more, and a seed of 0 or more"
        )
    sets = read_sets(sources, objectives=objectives, columns=columns)
    _check_sizes(sets)
    found = [_refitted(one, forms, replicates, np.random.default_rng([seed, k])) for k, one in enumerate(sets)]
    common = _common(sets, found)
    exponents = [[one.exponent(place) for one in found] for place in range(2)]
    return Reconciliation(
        sets=[_facts(one, own) for one, own in zip(sets, found, strict=True)],
        exponents={
            name: [{cell: (value, float(np.std(errors))) for cell, (value, errors) in one.items()} for one in own]
            for name, own in zip("ab", exponents, strict=True)
        },
        common=common,
        parts={name: split(own, common) for name, own in zip("ab", exponents, strict=True)},
    )


def read_sets(sources: Sequence[Runs], *, objectives: Sequence[str], columns: Sequence[str]) -> list[RunSet]:
    """Read tables of runs, and make a set of each objective.

    Args:
        sources: As in `reconcile`.
        objectives: As in `reconcile`.
        columns: 'NAME=COLUMN' reads the column COLUMN as NAME in every table that has no NAME. 'FILE:NAME=COLUMN' does
            so in the table with this file name only, even if it has NAME.
    """
    labels = _labels(sources)
    frames = [load_table(source)[0] for source in sources]
    frames = _renamed(frames, labels, columns)
    sets = [one for label, frame in zip(labels, frames, strict=True) for one in _sets_of(frame, label, objectives)]
    found = {str(name) for frame in frames if "objective" in frame for name in frame["objective"].dropna().unique()}
    for name in objectives:
        if name not in found:
            raise unknown("objective", name, sorted(found))
    if len(sets) < 2:
        has = f"there is one, {sets[0].label}" if sets else "there is none"
        raise UserError(f"reconcile compares two sets of runs or more, and {has}: give another file or objective")
    seen: dict[str, str] = {}
    for one in sets:
        key = hash_of(run_table(one.frame))
        if key in seen:
            raise UserError(f"{seen[key]} and {one.label} hold the same runs: give each set once")
        seen[key] = one.label
    return sets


def _labels(sources: Sequence[Runs]) -> list[str]:
    """A short name of each table, by which --column and the report name it."""
    paths = [Path(source) if isinstance(source, str | Path) else None for source in sources]
    places = [None if path is None else path.resolve() for path in paths]
    for k, place in enumerate(places):
        if place is not None and place in places[:k]:
            raise UserError(f"{paths[k]} is given twice: give each set once")
    names = [
        f"table {k}" if path is None else path.resolve().parent.name if path.name == "runs.csv" else path.stem
        for k, path in enumerate(paths, start=1)
    ]
    return [str(path) if path and names.count(name) > 1 else name for name, path in zip(names, paths, strict=True)]


def _renamed(frames: Sequence[pd.DataFrame], labels: Sequence[str], columns: Sequence[str]) -> list[pd.DataFrame]:
    """The tables with columns under the names of dlm."""
    tables = list(frames)
    for word in columns:
        left, equals, foreign = word.partition("=")
        where, _, name = left.rpartition(":")
        if not (equals and name and foreign):
            raise UserError(f"--column {word}: write NAME=COLUMN or FILE:NAME=COLUMN, as in objective=source")
        asked = [k for k, label in enumerate(labels) if where in ("", label, f"{label}.csv")]
        if not asked:
            raise unknown(f"--column {word}: file", where, labels)
        chosen = [k for k in asked if foreign in tables[k] and (where or name not in tables[k])]
        if not chosen:
            raise UserError(f"--column {word}: no table has the column {foreign} and lacks {name}")
        for k in chosen:
            tables[k] = tables[k].assign(**{name: tables[k][foreign]})
    return tables


def _sets_of(frame: pd.DataFrame, label: str, objectives: Sequence[str]) -> list[RunSet]:
    """A set for each objective of a table; without a column objective, the table is one set."""
    if "objective" not in frame or frame["objective"].isna().all():
        return [] if objectives else [_set_of(frame, label)]
    names = [name for name in frame["objective"].dropna().unique() if not objectives or str(name) in objectives]
    return [_set_of(frame[frame["objective"] == name], f"{label}/{name}") for name in names]


def _set_of(frame: pd.DataFrame, label: str) -> RunSet:
    """Check the runs of a set. N may be in any column that counts it, as in a table with params_total alone."""
    sizes = [column for names in SIZE_COLUMNS.values() for column in names if column in frame]
    if "params" not in frame and sizes:
        frame = frame.assign(params=frame[sizes[0]])
    try:
        runs = read_runs(frame)
        if runs.empty:
            raise UserError("there are no runs: give at least one row of params, tokens and loss")
        runs = at_best(runs)
        runs = runs[runs["weight"] > 0].reset_index(drop=True) if "weight" in runs else runs
        counts, warnings = counts_of(runs), (*runs.attrs["warnings"], *checkpoints(runs))
    except UserError as error:
        raise UserError(f"{label}: {error}") from error
    try:
        runs, without = with_budgets(runs, ISOFLOP, TOLERANCE), {}
    except UserError as error:
        without = {ISOFLOP: str(error)}
    return RunSet(label=label, frame=runs, counts=counts, without=without, warnings=warnings)


def _check_sizes(sets: Sequence[RunSet]) -> None:
    """Raise a UserError if no count of N is common to all sets; it names the column that would give one."""
    if set.intersection(*({*one.counts.size} for one in sets)):
        return
    known = {name: [one.label for one in sets if name in one.counts.size] for name in SIZE_COLUMNS}
    best = max(known, key=lambda name: len(known[name]))
    lacking = [one.label for one in sets if best not in one.counts.size]
    has = "; ".join(f"{one.label} has N {text.listed([*one.counts.size])}" for one in sets)
    raise UserError(
        f"the sets have no common count of N ({has}): add the column {SIZE_COLUMNS[best][0]} to {text.listed(lacking)}"
    )


def _refitted(one: RunSet, forms: Sequence[str], replicates: int, rng: np.random.Generator) -> _Refitted:
    """Fit every form under every count, then again to losses that are redrawn from each fit with the same noise.

    The noise is that about the form that fits best, because the misfit of the other forms is no noise.
    """
    refits, missing = _refits(one, forms)
    noise = min((refit.noise for refit in refits.values() if np.isfinite(refit.noise)), default=float("nan"))
    errors = noise * rng.standard_normal((replicates, len(one.frame)))
    cells = {}
    for (size, form), refit in refits.items() if np.isfinite(noise) else ():
        drawn = refit.redrawn(errors)
        for compute, found in refit.exponents().items():
            if np.isfinite(drawn[compute]).all(axis=1).mean() < 1 - MOST_LOST:
                missing[form] = f"N {size}: refits to redrawn losses do not bound its exponents"
            else:
                cells[Cell(N=size, C=compute, by=form)] = (found, drawn[compute] - found)
    if not cells:
        reasons = "; ".join(f"{form}: {why}" for form, why in missing.items()) or "too few runs to see their noise"
        raise UserError(f"{one.label} supports none of the forms ({reasons})")
    kept = np.all([np.isfinite(off).all(axis=1) for _, off in cells.values()], axis=0)
    return _Refitted(
        cells={cell: (found, off[kept]) for cell, (found, off) in cells.items()}, noise=noise, missing=missing
    )


def _refits(one: RunSet, forms: Sequence[str]) -> tuple[dict[tuple[str, str], Refit], dict[str, str]]:
    """Fit every form under every count of N, by (N, form), and say why the other forms are missing."""
    refits, missing = {}, {form: why for form, why in one.without.items() if form in forms}
    for form in forms:
        for size in one.counts.size if form not in missing else ():
            try:
                refits[size, form] = refit_of(one.frame, one.counts, size, form, how=Norm())
            except UserError as error:
                missing[form] = f"N {size}: {error}"
    return refits, missing


def _common(sets: Sequence[RunSet], found: Sequence[_Refitted]) -> list[Cell]:
    """The cells that all sets allow. `as given` is a common count of C only if all tables call it by the same name."""
    given = [one.counts.compute[GIVEN].source if GIVEN in one.counts.compute else "" for one in sets]
    is_same = len(set(given)) == 1 and "(" in given[0]
    cells = [cell for cell in found[0].cells if all(cell in one.cells for one in found)]
    common = [cell for cell in cells if cell.C != GIVEN or is_same]
    if not common:
        own = "; ".join(f"{one.label} has its budgets in {one.counts.own}" for one in sets)
        reasons = [
            f"{one.label}, {form}: {why}"
            for one, got in zip(sets, found, strict=True)
            for form, why in got.missing.items()
        ]
        why = "; ".join([own, *reasons])
        raise UserError(f"no form fits all sets under a common count of C ({why}): add a form, as in --form chinchilla")
    return common


def _facts(one: RunSet, found: _Refitted) -> SetFacts:
    return SetFacts(
        label=one.label,
        num_runs=len(one.frame),
        size={name: count.source for name, count in one.counts.size.items()},
        compute={name: count.source for name, count in one.counts.compute.items()},
        own=one.counts.own,
        noise=found.noise,
        missing=tuple(f"no {form}: {why}" for form, why in found.missing.items()),
        warnings=one.warnings,
    )
