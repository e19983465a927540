"""What stands in the section of one objective: which figures, from which data, and the tables below each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dlm.fit.proof import Proof
from dlm.fit.result import FitResult
from dlm.report import page_tables
from dlm.report.chart import Chart
from dlm.report.charts.allocation import allocation_chart
from dlm.report.charts.cost import cost_chart, planned_of
from dlm.report.charts.curves import curves_chart
from dlm.report.charts.holdout import holdout_chart
from dlm.report.charts.isoflop import isoflop_chart
from dlm.report.charts.residuals import residuals_chart
from dlm.report.charts.surface import surface_chart
from dlm.report.charts.tuning import tuning_chart
from dlm.report.published import beside
from dlm.report.table import Table

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, eq=False)
class Material:
    """The data of one objective, from which its charts, tables and sentences are made.

    Attributes:
        label: The name of the objective; '' for runs without one.
        fits: Its fits, by law.
        runs: Its rows of runs.csv that are fitted: without proof runs and tuning runs.
        all_runs: Its rows of runs.csv.
        excluded: Its rows of excluded.csv.
        history: The rows of history.parquet; None where there are none.
        estimate: What the plan expects each cell to cost, as estimate.json has it; empty without a plan.
        proof: How its proof run ended.
        advice: Pairs of a sentence and a command, which may be ''.
        budgets: All budgets of the page, so that each looks the same in every chart.
    """

    label: str
    fits: Mapping[str, FitResult]
    runs: pd.DataFrame
    all_runs: pd.DataFrame
    excluded: pd.DataFrame
    history: pd.DataFrame | None = None
    estimate: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    proof: Proof | None = None
    advice: Sequence[tuple[str, str]] = ()
    budgets: Sequence[float] = ()

    @property
    def surface(self) -> FitResult | None:
        """The fitted surface whose charts are shown: the combined law, or the first other surface."""
        found = [fit for fit in self.fits.values() if fit.surface is not None and fit.params]
        return next((fit for fit in found if fit.law == "combined"), found[0] if found else None)


Tables = Callable[[Material], Sequence[Table]]


@dataclass(frozen=True, kw_only=True)
class Item:
    """A figure of the section, and the tables below it."""

    chart: Callable[[Material], Chart | None]
    tables: Tables = field(default=lambda material: ())


def _isoflop(material: Material) -> Chart | None:
    isoflop, runs = material.fits.get("isoflop"), material.runs
    if isoflop is None:
        return None
    is_aligned = len(runs) == isoflop.n
    loss_se = runs["loss_se"].astype(float).tolist() if "loss_se" in runs and is_aligned else None
    names = runs["run_id"].astype(str).tolist() if "run_id" in runs and is_aligned else None
    return isoflop_chart(isoflop, material.fits.get("combined"), loss_se=loss_se, names=names, budgets=material.budgets)


def _allocation(material: Material) -> Chart | None:
    if not any(math.isfinite(best.N) for fit in material.fits.values() for best in fit.at.values()):
        return None
    published, notes = beside(material.runs)
    return allocation_chart(material.fits.values(), published=published, notes=notes)


def _surface(material: Material) -> Chart | None:
    if material.surface is None:
        return None
    return surface_chart(material.surface, material.runs, budgets=material.budgets)


def _residuals(material: Material) -> Chart | None:
    if material.surface is None:
        return None
    return residuals_chart(material.surface, material.fits.get("isoflop"), material.runs, budgets=material.budgets)


def _holdout(material: Material) -> Chart | None:
    return holdout_chart(material.fits.get("combined"), material.fits.get("isoflop"), material.runs)


def _curves(material: Material) -> Chart | None:
    return curves_chart(material.history, material.all_runs, material.excluded, budgets=material.budgets)


def _tuning(material: Material) -> Chart | None:
    return tuning_chart(material.all_runs, budgets=material.budgets)


def _cost(material: Material) -> Chart | None:
    planned = planned_of(material.estimate)
    return cost_chart(material.all_runs, material.excluded, planned, budgets=material.budgets)


# The figures of a section in the order of the page. A chart that returns None leaves no trace, and neither do its
# tables.
CONTENT: Sequence[Item] = (
    Item(chart=_isoflop, tables=lambda material: [page_tables.minima(material.fits.values())]),
    Item(chart=_allocation, tables=lambda material: [page_tables.best([*material.fits.values()])]),
    Item(chart=_surface),
    Item(chart=_residuals),
    Item(chart=_holdout, tables=lambda material: [page_tables.checks(material.fits.values())]),
    Item(chart=_curves),
    Item(chart=_tuning),
    Item(chart=_cost),
)
