"""Fit laws to the runs of any CSV file or DataFrame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from dlm.core import text
from dlm.core.errors import UserError, unknown
from dlm.core.flops import MOST_FLOPS
from dlm.fit import frozen, laws
from dlm.fit.budgets import TOLERANCE
from dlm.fit.conventions import conventions_of
from dlm.fit.crossing import Crossover, crossover, is_bound, shared_budgets
from dlm.fit.engine.newton import Norm
from dlm.fit.frozen import Score
from dlm.fit.hparams import untuned
from dlm.fit.hparams.excess import TUNE, term_of
from dlm.fit.multiplier import Multiplier, compare
from dlm.fit.one_law import COMBINED, columns_of, envelope_of, isoflop_of, surface_of, without_outliers
from dlm.fit.optimum import with_warnings
from dlm.fit.points import as_points
from dlm.fit.resample import bootstrap as add_intervals
from dlm.fit.result import FitResult
from dlm.fit.rows import (
    REPEATS,
    Runs,
    check_convention,
    checkpoints,
    objectives_of,
    one_objective,
    read_runs,
    run_table,
    spent_flops,
    with_budgets,
)
from dlm.fit.surface import repeated
from dlm.fit.verdict import judge

__all__ = ["compare_runs", "fit_runs", "fit_sweep", "predict_runs", "read_runs", "score_forecast", "score_runs"]

LAWS = (COMBINED, repeated.REPEATED, *laws.LAWS, "isoflop", "envelope")
FEW_BUDGETS = 8  # with at most this many budgets, the optimum is reported at each; with more, at the highest only
MOST_TO_JUDGE = 1000  # replicates of each part of the combined law, and of each form that checks a law, at most
MOST_RESAMPLED = 1_000_000  # rows that are resampled for a combined law: more rows are resampled less often
LEAST_RESAMPLES = 200
FURTHER = 10.0  # multiple of the highest budget at which the optimum is reported by default
MIXED = ("data", "data_hash", "schedule", "estimator")  # columns that should be the same for all runs of a fit
# The same, unless every size and number of tokens has runs of each value, as in a sweep that varies them on purpose.
MIXED_UNLESS_CROSSED = ("weight_decay", "dropout")
RECIPE = ("learning_rate", "global_batch_size")  # columns that may follow size and tokens, but not differ at one place


def fit_runs(
    source: Runs,
    *,
    law: str = COMBINED,
    loss: str = "huber",
    delta: float | None = None,
    space: str = "log",
    bootstrap: int = 4000,
    seed: int = 0,
    at: Sequence[float] = (),
    objective: str | None = None,
    fixed: Mapping[str, float] | None = None,
    under_tuned: float = 1.0,
    weights: str | None = None,
    curve: str = "parabola",
    axis: str = "params",
    budget_tolerance: float = TOLERANCE,
    holdout: bool = True,
    drop_outliers: bool = False,
    conventions: bool = True,
    unique: float | None = None,
) -> FitResult:
    """Fit one law to the finished runs of one objective, with intervals and the verdict of `judge`.

    Args:
        source: A CSV file or DataFrame with the columns that `dlm.fit.rows` lists.
        law: 'combined', a surface of `dlm.fit.laws.LAWS`, 'repeated' for the best law of repeated data, or 'isoflop' or
            'envelope', which are plain least squares.
        loss: The norm of the residuals of a surface, as `norm` in `fit_surface`.
        delta: As in `fit_surface`; by default 1e-2 for laws of repeated data, else 1e-3.
        space: As in `fit_surface`.
        bootstrap: Number of replicates; 0 gives neither intervals nor a verdict.
        seed: Seed of the bootstrap.
        at: The values of C, in FLOPs, at which to report the optimum besides the budgets (besides the highest budget,
            if there are more than 8); by default ten times the highest budget.
        objective: The objective whose runs are fitted; required if the table holds several objectives.
        fixed: Parameters that are held fixed, as in `fit_surface`.
        under_tuned: As in `fit_surface`.
        weights: 'compute' as in `fit_surface`, or None to use the column `weight` if the table has it.
        curve: As in `fit_isoflop`.
        axis: As in `fit_isoflop`.
        budget_tolerance: Budgets that differ by at most this share count as one; 0 keeps all apart that are not equal.
            For isoFLOP curves of a table without budgets, FLOPs are grouped in this manner.
        holdout: Whether the top budgets are held out to check a surface and to weight the parts of the combined law.
        drop_outliers: Whether a surface is fitted again without the runs that lie far from it. A warning names them.
        conventions: Whether a and b are also found under every count of N and C that the table allows.
        unique: The unique tokens for which a law of unique tokens gives optima; by default the most of any run.

    Raises:
        UserError: For runs that cannot be fitted, and for an option that the law does not have.
    """
    if law not in LAWS:
        raise unknown("law", law, LAWS)
    usual = repeated.DELTA if law in repeated.NAMES else Norm().delta
    how = Norm(norm=loss, delta=usual if delta is None else delta, space=space, under_tuned=under_tuned)
    if unique is not None and law not in (repeated.REPEATED, *laws.UNIQUE):
        raise UserError(f"{law} does not depend on unique tokens: leave out --unique, or fit --law {repeated.REPEATED}")
    if law == repeated.REPEATED and drop_outliers:
        raise UserError("repeated compares laws on the same runs, so it drops no outliers: name one of them")
    frame = one_objective(read_runs(source), objective)
    if frame.empty:
        raise UserError("there are no runs: give at least one row of params, tokens and loss")
    frame, term = term_of(frame)
    if term is not None:
        again = partial(
            fit_runs,
            law=law,
            loss=loss,
            delta=delta,
            space=space,
            seed=seed,
            at=at,
            fixed=fixed,
            under_tuned=under_tuned,
            weights=weights,
            curve=curve,
            axis=axis,
            budget_tolerance=budget_tolerance,
            holdout=holdout,
            drop_outliers=drop_outliers,
            conventions=conventions,
            unique=unique,
        )
        return term.fit(again, bootstrap)
    if law in (repeated.REPEATED, *laws.UNIQUE):
        frame.attrs["warnings"] = [said for said in frame.attrs["warnings"] if not said.startswith(REPEATS)]
    frame.attrs["warnings"] += _mixtures(frame)
    if law not in repeated.NAMES:  # they take the points of a curve for one run where no run_id tells
        frame.attrs["warnings"] += checkpoints(frame)
    frame = with_budgets(frame, law, budget_tolerance)
    places = _places(frame, at)
    _check_options(law, how, fixed, weights, curve, axis, drop_outliers=drop_outliers, holdout=holdout)
    if law == "isoflop":
        result = isoflop_of(frame, at=places, curve=curve, axis=axis)
    elif law == "envelope":
        result = envelope_of(frame, places)
    else:
        weight = frame.get("weight") if weights is None else weights
        options: dict[str, Any] = {"fixed": fixed, "weights": weight, "unique": unique, **vars(how)}
        if drop_outliers:
            frame = without_outliers(frame, surface_of(frame, law, holdout=False, **options), weights)
            options["weights"] = frame.get("weight") if weights is None else weights
        result = surface_of(frame, law, at=places, holdout=holdout, **options)
    result = replace(with_warnings(result, frame.attrs["warnings"]), notes=(*result.notes, *frame.attrs["notes"]))
    result = replace(result, runs=run_table(frame), tuning=untuned.told(frame, result))
    if conventions:
        found = conventions_of(frame, law, how=how, fixed=fixed, weights=weights, curve=curve)
        result = replace(result, conventions=found)
    if not bootstrap:
        return result
    few = min(bootstrap, MOST_TO_JUDGE)
    is_slow = law in (COMBINED, *repeated.NAMES)
    many = min(few, max(LEAST_RESAMPLES, MOST_RESAMPLED // len(frame))) if is_slow else bootstrap
    return judge(add_intervals(result, replicates=many, seed=seed), replicates=few, seed=seed, holdout=holdout)


def fit_sweep(
    source: Runs, *, laws: Sequence[str] = ("isoflop", COMBINED), bootstrap: int = 4000, seed: int = 0
) -> dict[str, FitResult]:
    """Fit every law to every objective.

    Returns:
        The fits, keyed by 'objective/law', or by 'law' if the table names no objective. If a law cannot be fitted, its
        result has the status 'refused'.
    """
    frame = read_runs(source)
    return {
        f"{name}/{law}" if name else law: _fit_or_refuse(frame, law, name, bootstrap, seed)
        for name in objectives_of(frame) or [""]
        for law in laws
    }


def _fit_or_refuse(frame: pd.DataFrame, law: str, name: str, bootstrap: int, seed: int) -> FitResult:
    try:
        return fit_runs(frame, law=law, objective=name or None, bootstrap=bootstrap, seed=seed)
    except UserError as error:
        rows = frame[frame["objective"] == name] if name else frame
        return FitResult(law=law, n=len(rows), status="refused", warnings=(str(error),), label=name)


def _mixtures(frame: pd.DataFrame) -> list[str]:
    """Warn if the runs differ in a property that no law models. Mixed conventions of FLOPs raise a UserError."""
    check_convention(frame)
    mixed = [name for name in MIXED if name in frame and frame[name].nunique() > 1]
    mixed += [name for name in MIXED_UNLESS_CROSSED if name in frame and not _is_crossed(frame, name)]
    found = (
        [f"the runs differ in {text.listed(mixed)}: one law for all of them mixes those effects in"] if mixed else []
    )
    several = [name for name in RECIPE if name in frame and _is_varied(frame, name)]
    if several:
        found.append(
            f"runs of one size and number of tokens differ in {text.listed(several)}: the law describes their average, "
            "not the best of them; `dlm hparams` finds the best, and rows with the role 'tune' stay out of a law"
        )
    return found


def _is_varied(frame: pd.DataFrame, name: str) -> bool:
    """Whether some runs of equal size and number of tokens have different values in a column."""
    return bool((frame.groupby(["params", "tokens"])[name].nunique() > 1).any())


def _is_crossed(frame: pd.DataFrame, name: str) -> bool:
    """Whether the runs of every size and number of tokens take all values of a column."""
    values = frame.groupby(["params", "tokens"])[name].nunique()
    return bool((values == frame[name].nunique()).all())


def _places(frame: pd.DataFrame, at: Sequence[float]) -> list[float]:
    """The values of C at which the optimum is reported, FLOPs."""
    for value in at:
        if not 0 < value <= MOST_FLOPS:
            raise UserError(f"at is {value}: give compute in FLOPs, above 0 and at most {MOST_FLOPS:g}")
    spent = spent_flops(frame)
    budgets = frame["budget"].dropna() if "budget" in frame else spent
    levels = sorted(budgets.unique().tolist()) or [float(spent.max())]
    own = levels if len(levels) <= FEW_BUDGETS else levels[-1:]
    return sorted({*own, *(map(float, at) if at else [FURTHER * levels[-1]])})


def _check_options(
    law: str,
    how: Norm,
    fixed: Mapping[str, float] | None,
    weights: str | None,
    curve: str,
    axis: str,
    *,
    drop_outliers: bool,
    holdout: bool,
) -> None:
    """Refuse an option that the law does not have, rather than ignore it."""
    if law != "isoflop" and (curve, axis) != ("parabola", "params"):
        raise UserError(f"{law} has no curve or axis: only isoflop has them")
    if law in (COMBINED, repeated.REPEATED, *laws.LAWS):
        return
    odd = ["loss" if name == "norm" else name for name, usual in vars(Norm()).items() if getattr(how, name) != usual]
    odd += ["fixed parameters"] if fixed else []
    odd += ["weights from compute"] if weights is not None else []
    odd += ["outliers to drop"] if drop_outliers else []
    odd += ["hold-outs to leave out"] if not holdout else []
    if odd:
        raise UserError(f"{law} has no {odd[0]}: only surfaces do ({', '.join(laws.LAWS)})")


def predict_runs(
    source: Runs, *, at: Sequence[float], freeze: Path | None = None, **how: Any
) -> tuple[FitResult, dict[str, Any] | None]:
    """Fit as `fit_runs` does, with predictions at C = `at` (FLOPs).

    Returns:
        The fit, and the content that was written to the new file `freeze` (see `frozen.freeze`), or None without
        `freeze`.
    """
    if freeze is not None:
        frozen.check_free(freeze)
    result = fit_runs(source, at=at, **how)
    return result, None if freeze is None else frozen.freeze(result, at, freeze)


def score_runs(path: Path, source: Runs) -> Score:
    """Grade the frozen predictions in `path` on the finished runs of `source` that have the same objective."""
    return score_forecast(frozen.load(path), source)


def score_forecast(forecast: Mapping[str, Any], source: Runs) -> Score:
    """Grade frozen predictions (the content of a file) on the finished runs of their objective, proof runs included."""
    frame = read_runs(source, proofs=True)
    label = forecast["label"]
    if label and "objective" in frame:
        frame = one_objective(frame, label)
    check_convention(frame)
    frame = _without_tuning(frame, forecast)
    columns = columns_of(frame)
    del columns["label"]
    found = frozen.grade(forecast, as_points(**columns), run_table(frame))
    return replace(found, notes=(*found.notes, *frame.attrs["warnings"]))


def _without_tuning(frame: pd.DataFrame, forecast: Mapping[str, Any]) -> pd.DataFrame:
    """The runs without tuning runs that the law did not use, and a note: their recipes differ from the best one."""
    if "role" not in frame:
        return frame
    left_out = frozen.matched(forecast, run_table(frame)).new & (frame["role"] == TUNE).to_numpy()
    if not left_out.any():
        return frame
    kept = frame[~left_out].reset_index(drop=True)
    kept.attrs = {name: list(lines) for name, lines in frame.attrs.items()}
    kept.attrs["warnings"].append(f"{text.counted(int(left_out.sum()), 'tuning run')} not graded: they vary the recipe")
    return kept


def compare_runs(
    source: Runs,
    other: Runs | None = None,
    *,
    first: str | None = None,
    second: str | None = None,
    law: str = "chinchilla",
    bootstrap: int = 4000,
    seed: int = 0,
) -> Multiplier | Crossover:
    """Compare the compute that two groups of runs need for equal loss (see `compare`).

    With a law of repeated data, find instead where one overtakes the other on each number of unique tokens
    (see `repeated.crossover`).

    Args:
        source: The first group of runs, or both groups.
        other: The second group. Without it, two objectives of `source` are compared.
        first: Objective of the first group; may be None if the table leaves no choice.
        second: Objective of the second group; may be None if the table leaves no choice.
        law: As in `fit_runs`.
        bootstrap: Number of replicates; 0 gives no intervals.
        seed: Seed of the first bootstrap; the second bootstrap uses seed + 1.

    Raises:
        UserError: For runs that cannot be compared.
    """
    names = (first, second) if other is not None else _two_objectives(read_runs(source), first, second)
    tables = (source, source if other is None else other)
    fits = []
    for k, (table, name) in enumerate(zip(tables, names, strict=True)):
        top = float(spent_flops(read_runs(table)).max())  # no optimum is needed beyond the runs
        fits.append(
            fit_runs(table, law=law, objective=name, bootstrap=bootstrap, seed=seed + k, at=[top], conventions=False)
        )
    labels = _labels(tables, fits)
    one, two = (replace(fit, label=label) for fit, label in zip(fits, labels, strict=True))
    if law not in (repeated.REPEATED, *laws.UNIQUE):
        return compare(one, two)
    late, early = (two, one) if is_bound(two.label) else (one, two)
    return crossover(late, early, shared_budgets(one, two))


def _two_objectives(frame: pd.DataFrame, first: str | None, second: str | None) -> tuple[str, str]:
    """Both objectives to compare. A name that is None is taken from the table, which must leave no choice."""
    if first is not None and second is not None:
        return first, second
    names = objectives_of(frame)
    rest = [name for name in names if name not in (first, second)]
    if len(rest) == (first, second).count(None):
        return first or rest[0], second or rest[-1]
    has = f"its objectives are {text.listed(names)}" if names else "it has no column objective"
    raise UserError(
        f"one table of runs holds a comparison where it has two objectives, and {has}: name two, or a second CSV"
    )


def _labels(tables: Sequence[Runs], fits: Sequence[FitResult]) -> list[str]:
    """The labels of the fits: the objectives, file names or folder names, whichever is the first that differs."""
    choices = [[fit.label for fit in fits]]
    if all(not isinstance(table, pd.DataFrame) for table in tables):
        paths = [Path(str(table)).resolve() for table in tables]
        choices += [[path.stem for path in paths], [path.parent.name for path in paths]]
    return next((names for names in choices if len(set(names)) == len(names)), choices[0])
