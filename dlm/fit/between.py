"""Fit what a report of several groups of runs compares: laws of repeated data, multipliers, and where one overtakes.

A comparison that the runs do not allow is the sentence that says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from dlm.core.errors import UserError
from dlm.fit.crossing import MOST_COMPARED, Crossover, crossover, is_bound, shared_budgets
from dlm.fit.fitted import Fitted
from dlm.fit.multiplier import Multiplier, compare
from dlm.fit.one_law import COMBINED
from dlm.fit.result import FitResult
from dlm.fit.rows import ONE_EPOCH, Runs, objectives_of, read_runs, unique_tokens
from dlm.fit.surface.repeated import REPEATED
from dlm.fit.table import fit_runs

PART = "chinchilla_0"  # of a combined law
LEAST_UNIQUE = 2  # numbers of unique tokens that runs repeat; with one, nothing shows what another does


def fit_repeats(source: Runs, *, bootstrap: int = 4000, seed: int = 0) -> dict[str, FitResult]:
    """Fit the best law of repeated data to every objective whose runs repeat texts of several lengths.

    Returns:
        The fits, keyed by 'objective/repeated', or by 'repeated' if the table names no objective; without the
        objectives whose runs repeat no text, or one text only. A law that cannot be fitted has the status 'refused'.
    """
    frame = read_runs(source)
    found = {}
    for name in objectives_of(frame) or [""]:
        rows = frame[frame["objective"] == name] if name else frame
        if repeats(rows):
            found[f"{name}/{REPEATED}" if name else REPEATED] = _fit_or_refuse(frame, name, bootstrap, seed)
    return found


def repeats(frame: pd.DataFrame) -> bool:
    """Whether runs read texts of several lengths more than once."""
    if "unique_tokens" not in frame or frame["unique_tokens"].isna().any():
        return False
    unique = unique_tokens(frame)
    return bool(unique[frame["tokens"] > ONE_EPOCH * unique].nunique() >= LEAST_UNIQUE)


def _reread(fit: FitResult) -> set[float]:
    """Return the numbers of unique tokens that some run of a fit read more than once."""
    points = fit.points
    assert points is not None and points.unique is not None
    return set(points.unique[points.tokens > ONE_EPOCH * points.unique].tolist())


def _fit_or_refuse(frame: pd.DataFrame, name: str, bootstrap: int, seed: int) -> FitResult:
    rows = len(frame[frame["objective"] == name]) if name else len(frame)
    try:
        return fit_runs(frame, law=REPEATED, objective=name or None, bootstrap=bootstrap, seed=seed, conventions=False)
    except UserError as error:
        return FitResult(law=REPEATED, n=rows, status="refused", warnings=(str(error),), label=name)


def multiplier_of(
    first: Mapping[str, FitResult], second: Mapping[str, FitResult], *, names: tuple[str, str]
) -> Multiplier | str:
    """Find how much more compute the second runs need at equal loss, from fits by the name of their law.

    The isoFLOP minima answer if both have them, because they assume no form of the loss; otherwise the surfaces of
    Chinchilla's form, which are parts of the combined laws.
    """
    pair: list[Fitted | None] = [fits.get("isoflop") for fits in (first, second)]
    if not all(fit is not None and fit.params for fit in pair):
        pair = [_chinchilla_of(fits.get(COMBINED)) for fits in (first, second)]
    one, other = pair
    if one is None or other is None:
        return "no law is fitted to both"
    try:
        return compare(replace(one, label=names[0]), replace(other, label=names[1]))
    except UserError as error:
        return str(error)


def _chinchilla_of(fit: FitResult | None) -> Fitted | None:
    """Return the part of a combined law that has Chinchilla's form and weighs all runs alike, with its draws."""
    if fit is None or fit.combination is None or PART not in fit.combination.parts:
        return None
    parts = fit.combination.parts
    before = sum(len(part.params) for name, part in parts.items() if [*parts].index(name) < [*parts].index(PART))
    part = parts[PART]
    draws = None if fit.draws is None else fit.draws[:, before : before + len(part.params)]
    return replace(part, label=fit.label, draws=draws, dof=fit.dof, interval_method=fit.interval_method)


def overtaking(repeated: Mapping[str, FitResult]) -> Crossover | str:
    """Find where the objective whose loss is a bound overtakes the other, from the fits of `fit_repeats`.

    The sentence is empty if there are not two objectives.
    """
    if len(repeated) != 2:  # a crossing is of two
        return ""
    one, two = repeated.values()
    late, early = (two, one) if is_bound(two.label) else (one, two)
    for fit in (late, early):
        if fit.surface is None:
            return f"{fit.label} has no law of repeated data: {fit.warnings[0]}"
    both = _reread(late) & _reread(early)
    try:
        return crossover(late, early, sorted(both)[:MOST_COMPARED] or shared_budgets(late, early))
    except UserError as error:
        return str(error)
