"""Answer a newcomer's questions: how sure the answer is, what limits it, which runs failed, and what all of it cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dlm.core import text
from dlm.fit.laws import LAW_NAMES
from dlm.report import words
from dlm.report.charts.excluded import excluded_summary
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
    found.append(Point(question="What it cost", answer=_cost(runs, estimate)))
    return found


def _failed(excluded: pd.DataFrame) -> Point:
    if excluded.empty:
        return Point(question="Which runs failed", answer=["None: every run was used."])
    causes = [f"{number} {cause} ({advice})" for cause, number, advice in excluded_summary(excluded)]
    said = f"{text.counted(len(excluded), 'run')} left out: {text.listed(causes)}."
    return Point(question="Which runs failed", answer=[said], link="#left-out", more="each of them, with the reason")


def _cost(runs: pd.DataFrame, estimate: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """State the FLOPs and the hours of the runs, and what the plan expected of the same runs."""
    said = []
    if "flops" in runs and runs["flops"].notna().any():
        said.append(f"The runs spent {text.flops(float(runs['flops'].sum()))} training FLOPs.")
    gpu = runs["gpu_hours"].fillna(0.0) if "gpu_hours" in runs else runs.iloc[:, :0].sum(axis=1)
    is_gpu = bool((gpu > 0).any())
    if is_gpu:
        hours = gpu
    elif {"tokens", "tokens_per_sec"} <= set(runs):
        hours = (runs["tokens"] / runs["tokens_per_sec"] / 3600).where(lambda value: value.map(math.isfinite))
    else:
        return said or ["The table of runs does not say."]
    if not hours.notna().any():
        return said or ["The table of runs does not say."]
    total = float(hours.sum())
    line = "They took " + (f"{total:,.3g} GPU-hours" if is_gpu else f"{text.duration(3600 * total)} of one process")
    ids = runs["run_id"].astype(str) if "run_id" in runs else hours.index.astype(str)
    key = "gpu_hours" if is_gpu else "hours"
    planned = {str(name): row[key] for name, row in estimate.items() if row.get(key)}
    both = [(value, planned[name]) for name, value in zip(ids, hours, strict=True) if name in planned]
    if both and sum(plan for _, plan in both):
        ratio = sum(value for value, _ in both) / sum(plan for _, plan in both)
        which = "the plan" if len(both) == len(runs) else f"the plan for the {text.counted(len(both), 'run')} it covers"
        line += f", {ratio:.2g} times the estimate of {which}"
    return [*said, f"{line}."]
