"""Write one page that compares several sets of runs: their laws and minima, their multiplier, and how they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.core import text
from dlm.core.files import write_atomic, write_json
from dlm.fit.between import multiplier_of
from dlm.fit.comparison import HEADS, side_by_side
from dlm.fit.laws import LAW_NAMES
from dlm.fit.multiplier import Multiplier
from dlm.report import words
from dlm.report.chart import Chart
from dlm.report.charts.overlay import Side, bound_notes, growth_panels, isoflop_overlay, multiplier_table
from dlm.report.look import Paper
from dlm.report.page import placed_parts, scripts, template
from dlm.report.table import Table
from dlm.report.together import Part

if TYPE_CHECKING:
    import pandas as pd

    from dlm.fit.result import FitResult

# The columns of runs.csv in which a recipe can differ; what only counts or measures is not among them.
RECIPE = (
    "convention", "estimator", "objective", "model", "budget", "data", "data_hash", "block_size", "global_batch_size",
    "learning_rate", "weight_decay", "dropout", "schedule", "seed", "device", "git_sha",
)  # fmt: skip
SAME_TEXT = ("data", "data_hash")  # columns that must be equal for losses to be compared
MOST_VALUES = 8  # of a column that a cell of the table names; the others are counted


Pair = tuple[Side, Side, Multiplier | str]  # two sides, and what the second needs against the first


@dataclass(frozen=True, kw_only=True)
class RunSet:
    """A set of runs with its fits."""

    name: str
    place: str  # where it was read from
    runs: pd.DataFrame
    fits: Mapping[str, FitResult]  # of `fit_sweep`
    definition: Mapping[str, Any] | None = None  # of the sweep, as plain values; None for a table


def sides_of(sets: Sequence[RunSet]) -> list[Side]:
    """Return a side for each objective of each set; its name says the objective if a set has several, or another."""
    found = [(one, label) for one in sets for label in dict.fromkeys(fit.label for fit in one.fits.values())]
    needs_label = len(found) > len(sets) or len({label for _, label in found}) > 1
    return [
        Side(
            name=f"{one.name}, {words.objective(label)}" if needs_label else one.name,
            fits={fit.law: fit for fit in one.fits.values() if fit.label == label},
        )
        for one, label in found
    ]


def write_comparison(folder: Path, sets: Sequence[RunSet], *, paper: Paper | None = None) -> tuple[Path, list[str]]:
    """Write report/report.html, its figures and comparison.json into a folder.

    Args:
        folder: The folder.
        sets: Two or more sets of runs.
        paper: As in ``write_report``.

    Returns:
        (the path of the page, the verdict in sentences).
    """
    sides = sides_of(sets)
    pairs = [_pair(sides, side) for side in sides[1:]]
    parts = [*_laws(sides, pairs), *_numbers(sides), *_differences(sets)]
    names = [one.name for one in sets]
    verdict = [*lead(pairs), *_of_text(sets)]
    page = template("versus.html.j2").render(
        title=f"{text.listed(names)}, compared",
        facts={one.name: f"{text.counted(len(one.runs), 'run')}, {one.place}" for one in sets},
        lead=verdict,
        is_refusal=not any(isinstance(pair[2], Multiplier) for pair in pairs),
        parts=placed_parts(parts, folder / "report" / "figures", paper),
        reload_sec=None,
        **scripts(has_figures=True),
    )
    write_json(folder / "comparison.json", _as_json(sets, sides, pairs))
    write_atomic(folder / "report" / "report.html", page)
    return folder / "report" / "report.html", verdict


def _pair(sides: Sequence[Side], side: Side) -> Pair:
    """Compare a side with the first one of its objective, or with the first of all if it is the only one."""
    first = next(one for one in sides if one.objective == side.objective)
    if first is side:
        first = sides[0]
    return first, side, multiplier_of(first.fits, side.fits, names=(first.name, side.name))


def lead(pairs: Sequence[Pair]) -> list[str]:
    """Return the verdict on each pair, or why there is none."""
    return [
        f"{one.verdict()[0].upper()}{one.verdict()[1:]}."
        if isinstance(one, Multiplier)
        else f"{first.name} and {side.name}: no compute multiplier is given, because {one}."
        for first, side, one in pairs
    ]


def _of_text(sets: Sequence[RunSet]) -> list[str]:
    """Warn if the runs were trained on different texts, whose losses do not compare."""
    differ = [name for name in SAME_TEXT if len({_values(one.runs, name) for one in sets}) > 1]
    if not differ:
        return []
    return [
        f"The sets differ in {text.listed(differ)}. Losses on different texts or tokenizers cannot be compared: a "
        "part of the difference is that of the texts."
    ]


def _laws(sides: Sequence[Side], pairs: Sequence[Pair]) -> list[Part]:
    """Return the minima of all sides in one figure, and their laws if they count compute alike."""
    minima = isoflop_overlay(sides)
    parts = [] if minima is None else [Part(name="minima", title=minima.title, chart=minima)]
    tables = [multiplier_table(one) for _, _, one in pairs if isinstance(one, Multiplier)]
    drawn = [side for side in sides if side.convention is not None]
    counted = {side.name: side.convention for side in drawn}
    title = "How do loss and best size grow with compute?"
    if len(set(counted.values())) > 1:
        said = text.listed([f"{name} counts FLOPs as {convention}" for name, convention in counted.items()])
        why = f"{said}: their laws are not drawn over one axis of compute. `dlm reconcile` refits all under each count."
        return [*parts, Part(name="laws", title=title, chart=None, notes=[why])]
    if not drawn:
        return parts
    only = pairs[0][2] if len(pairs) == 1 else ""
    chart = Chart(
        name="laws",
        title=title,
        sentence="The law of each set within its own runs, with its runs and isoFLOP minima.",
        panels=growth_panels(drawn, only),
        notes=bound_notes(sides),
    )
    return [*parts, Part(name="laws", title=title, chart=chart, tables=tables)]


def _numbers(sides: Sequence[Side]) -> list[Part]:
    """Tabulate the exponents and the best use of the highest C that all laws reach."""
    laws = {
        f"{side.name}: {LAW_NAMES[fit.law]}": fit
        for side in sides
        for fit in side.fits.values()
        if fit.params and fit.points is not None
    }
    if not laws:
        return []
    top = min(fit.points.top_flops for fit in laws.values() if fit.points is not None)
    found = side_by_side(laws, at=top)
    table = Table(
        heads=HEADS,
        rows=[row.cells() for row in found.rows],
        words=("method", "status"),
        caption=f"The best use of {text.flops(top)} FLOPs, with 95 % intervals.",
        is_wide=True,
    )
    return [Part(name="numbers", title="Exponents and best sizes", chart=None, tables=[table])]


def _differences(sets: Sequence[RunSet]) -> list[Part]:
    tables = [
        Table(heads=(what, *[one.name for one in sets]), rows=rows, words=(what, *[one.name for one in sets]))
        for what, rows in (("key of the definition", definitions(sets)), ("column of the runs", recipes(sets)))
        if rows
    ]
    title = "How the sets differ"
    notes = [] if tables else ["Their definitions and recipes are the same in every key."]
    return [Part(name="differences", title=title, chart=None, tables=tables, notes=notes)]


def definitions(sets: Sequence[RunSet]) -> list[tuple[str, ...]]:
    """Return the keys in which the definitions differ: the key, and its value in each set."""
    flat = [_flat(one.definition or {}) for one in sets]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, *[one.get(key, words.MISSING) for one in flat]) for key in keys if key != "name"]
    return [row for row in rows if len(set(row[1:])) > 1] if all(one.definition is not None for one in sets) else []


def _flat(definition: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the values of a definition as texts, by their dotted keys."""
    found: dict[str, str] = {}
    for key, value in definition.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            listed = isinstance(value, list | tuple)
            found[f"{prefix}{key}"] = ", ".join(map(str, value)) if listed else str(value)
    return found


def recipes(sets: Sequence[RunSet]) -> list[tuple[str, ...]]:
    """Return the columns of RECIPE in which the runs differ: the column, and its values in each set."""
    rows = [(name, *[_values(one.runs, name) for one in sets]) for name in RECIPE]
    return [row for row in rows if len(set(row[1:])) > 1]


def _values(runs: pd.DataFrame, name: str) -> str:
    """Return the distinct values of a column as a text."""
    if name not in runs:
        return words.MISSING
    values = sorted(runs[name].dropna().unique().tolist())
    shown = [text.flops(value) if name == "budget" else str(value) for value in values]
    more = len(shown) - MOST_VALUES
    return ", ".join([*shown[:MOST_VALUES], *([f"and {more} more"] if more > 0 else [])]) or words.MISSING


def _as_json(sets: Sequence[RunSet], sides: Sequence[Side], pairs: Sequence[Pair]) -> dict[str, Any]:
    return {
        "sets": {one.name: one.place for one in sets},
        "multipliers": {
            f"{side.name} against {first.name}": one.to_dict() if isinstance(one, Multiplier) else {"refused": one}
            for first, side, one in pairs
        },
        "fits": {f"{side.name}/{law}": fit.to_dict() for side in sides for law, fit in side.fits.items()},
    }
