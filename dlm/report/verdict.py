"""Answer a newcomer's questions: how sure the answer is, what limits it, which runs failed, and what all of it cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm.core import text
from dlm.fit.laws import LAW_NAMES
from dlm.report import words
from dlm.report.charts.cost import Planned, cost_sentence, costs_of, own_share, planned_of
from dlm.report.charts.excluded import excluded_summary
from dlm.report.charts.runs import Row, column, rows_of
from dlm.report.content import Material

if TYPE_CHECKING:
    import pandas as pd

MOST_LIMITS = 3


@dataclass(frozen=True, kw_only=True)
class Point:
    """A question and its answer; ``link`` leads to a place on the page, with the words ``more``."""

    question: str
    answer: Sequence[str]
    link: str = ""
    more: str = ""


def rest_of(reservations: Sequence[str], advice: Sequence[object]) -> Sequence[str]:
    """Return the reservations for the list below the answer: none if the answer itself states all of them."""
    return reservations if len(reservations) + len(advice) > MOST_LIMITS else ()


def reservations(material: Material) -> list[str]:
    """Return the reservations about the fits of an objective that the advice does not state already."""
    fits = [*material.fits.values()]
    advised = {
        words.sentence(f"{LAW_NAMES[fit.law]}: left out: {minimum.detail}")
        for fit in fits
        for minimum in fit.minima
        if minimum.why and any(minimum.why in sentence for sentence, _ in material.advice)
    }
    return [line for line in words.reservations(fits) if line not in advised]


def points(material: Material, slug: str) -> list[Point]:
    """Return the points of one objective: how sure, what limits it, and the proof run."""
    fits = [*material.fits.values()]
    found = []
    judged = next((fit for fit in (material.surface, *fits) if fit is not None and fit.verdict is not None), None)
    if judged is not None and judged.verdict is not None:
        found.append(Point(question="How far to trust it", answer=[words.sentence(judged.verdict.sentence())]))
    limits = [*[one for one, _ in material.advice], *reservations(material)]
    if limits:
        rest = len(limits) - MOST_LIMITS
        more = f"{text.counted(rest, 'more point')} below" if rest > 0 else "the commands that would settle it"
        link = f"#limits-{slug}" if rest > 0 or material.advice else ""
        found.append(Point(question="What limits it", answer=limits[:MOST_LIMITS], link=link, more=more))
    elif fits:
        found.append(Point(question="What limits it", answer=["No check of these fits raised a reservation."]))
    if material.proof is not None:
        said = [words.sentence(material.proof.statement()), *material.proof.meaning()]
        found.append(Point(question="Proof run", answer=said, link=f"#proof-{slug}", more="how it was predicted"))
    elif fits:
        said = ["No proof run has tested this law yet: no run beyond these budgets was predicted and then trained."]
        found.append(Point(question="Proof run", answer=said))
    return found


def of_all(
    runs: pd.DataFrame, excluded: pd.DataFrame, *, estimate: Mapping[str, Mapping[str, Any]], planned: Collection[str]
) -> list[Point]:
    """Return the points of the whole page: what is missing, which runs failed, and what the runs cost.

    ``planned`` are the ids of the cells of the plan without proof runs.
    """
    found = []
    if planned:
        done = len(set(planned) & set(runs["run_id"])) if "run_id" in runs else 0
        said = f"{done} of {text.counted(len(planned), 'planned cell')} can be used"
        found.append(Point(question="How far the sweep is", answer=[f"{said}."]))
    found.append(_failed(excluded))
    found.append(Point(question="What it cost", answer=_cost(runs, excluded, estimate)))
    return found


def _failed(excluded: pd.DataFrame) -> Point:
    if excluded.empty:
        return Point(question="Which runs failed", answer=["None: every run was used."])
    causes = [f"{number} {cause} ({advice})" for cause, number, advice in excluded_summary(excluded)]
    said = f"{text.counted(len(excluded), 'run')} left out: {text.listed(causes)}."
    return Point(question="Which runs failed", answer=[said], link="#left-out", more="each of them, with the reason")


def _cost(runs: pd.DataFrame, excluded: pd.DataFrame, estimate: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """State the FLOPs of the runs that can be used, and what all runs cost, as the figure of the cost counts it."""
    costs = costs_of(runs, excluded, planned_of(estimate))
    said = []
    if "flops" in runs and runs["flops"].notna().any():
        said.append(_flops(rows_of(runs), {cell.cell_id: cell for cell in planned_of(estimate)}))
    if np.isfinite(costs.used).any():
        said.append(cost_sentence(costs))
    return said or ["The table of runs does not say."]


def _flops(rows: Sequence[Row], planned: Mapping[str, Planned]) -> str:
    """State the FLOPs of the runs; those of a trunk count once where the plan knows its branches."""
    shares = np.array([own_share(row, planned.get(str(row.get("run_id")))) for row in rows])
    is_known = bool(np.isfinite(shares).all())
    spent = float(np.nansum(column(rows, "flops") * (shares if is_known else 1.0)))
    more = "" if is_known else ", those of a trunk counted again for each of its branches"
    return f"The runs that can be used took {text.flops(spent)} training FLOPs{more}."
