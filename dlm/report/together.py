"""What a report shows across its objectives: their laws in one figure, and repeated data with the fitted law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dlm.core import names
from dlm.fit.between import multiplier_of, overtaking
from dlm.fit.multiplier import Multiplier
from dlm.fit.result import FitResult
from dlm.report import words
from dlm.report.chart import Chart
from dlm.report.charts.overlay import multiplier_table, objectives_chart, objectives_of
from dlm.report.charts.repeated import repeated_chart, repeated_tables
from dlm.report.table import Table


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the page that concerns several objectives, or the repetition of data."""

    name: str  # unique on the page, made of slugs
    title: str
    chart: Chart | None
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()  # sentences that stand in the place of a chart


def together(fits: Mapping[str, FitResult], repeats: Mapping[str, FitResult]) -> list[Part]:
    """Return the parts for the fits of a sweep: those of `fit_sweep`, and of `fit_repeats` if there are any."""
    return [*_objectives(fits), *_repeated(repeats)]


def _objectives(fits: Mapping[str, FitResult]) -> list[Part]:
    labels = dict.fromkeys(fit.label for fit in fits.values())
    sides = objectives_of(fits, {label: words.objective(label) for label in labels})
    if len(sides) < 2:
        return []
    found = multiplier_of(sides[0].fits, sides[1].fits, names=(sides[0].name, sides[1].name)) if len(sides) == 2 else ""
    chart = objectives_chart(sides, found)
    if chart is None:
        return []
    return [
        Part(
            name="objectives",
            title=chart.title,
            chart=chart,
            tables=[multiplier_table(found)] if isinstance(found, Multiplier) else [],
        )
    ]


def _repeated(repeats: Mapping[str, FitResult]) -> list[Part]:
    if not repeats:
        return []
    found = list(repeats.values())
    crossing = overtaking(repeats)
    parts = []
    for fit in found:
        chart, name = repeated_chart(fit), words.objective(fit.label)
        refused = [f"No law of repeated data is fitted: {fit.warnings[0]}."] if fit.surface is None else []
        parts.append(
            Part(
                name=f"repeated-{names.slug(fit.label)}" if fit.label else "repeated",
                title=f"{name}: read again",
                chart=chart,
                notes=refused,
            )
        )
    tables = repeated_tables(found, crossing)
    refusal = [f"No crossing is given: {crossing}."] if isinstance(crossing, str) and crossing else []
    return [
        *parts,
        *(
            [Part(name="repeated-numbers", title="Repeated data in numbers", chart=None, tables=tables, notes=refusal)]
            if tables
            else []
        ),
    ]
