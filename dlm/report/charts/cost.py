"""Describe what the runs cost, next to what the plan expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm.core import text
from dlm.fit.points import Array, Mask
from dlm.report.chart import Axis, Chart, Panel, Series
from dlm.report.charts.runs import Group, Row, column, groups, hover, rows_of
from dlm.report.look import FAINT, INK

if TYPE_CHECKING:
    import pandas as pd

STILL = "planned, cost not known yet"
OTHER = "#6b7785"  # the colour of costs without an estimate


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What the plan expects one cell to cost."""

    cell_id: str
    sec: float  # from the first step to the last, on the devices of the cell
    gpu_hours: float | None = None  # 0 on a machine without GPUs; None if the plan does not know it
    own_share: float = 1.0  # of its steps; those before are its trunk's


def planned_of(estimate: Mapping[str, Mapping[str, Any]]) -> list[Planned]:
    """Read what estimate.json says of each cell, and its own_share; a cell of unknown time is left out."""
    return [
        Planned(
            cell_id=name,
            sec=3600.0 * cell["hours"],
            gpu_hours=cell.get("gpu_hours"),
            own_share=cell.get("own_share", 1.0),
        )
        for name, cell in estimate.items()
        if cell.get("hours") is not None
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Costs:
    """The cost of each cell: GPU-hours, or seconds of one process on machines without GPUs."""

    rows: Sequence[Row]  # of runs.csv, then of excluded.csv
    is_gpu: bool
    used: Array  # (n,); NaN where it is not known, as for runs that are not finished on a CPU
    planned: Array  # (n,); NaN for cells without an estimate

    @property
    def both(self) -> Mask:
        """Which cells have both numbers, (n,)."""
        return np.isfinite(self.used) & np.isfinite(self.planned)

    @property
    def open(self) -> Mask:
        """Which planned cells have no known cost yet, (n,)."""
        return ~np.isfinite(self.used) & np.isfinite(self.planned)

    def shown(self, value: float) -> str:
        """A sum in words: '12.5 GPU-hours', or '3.5 h of process time'."""
        return f"{value:,.3g} GPU-hours" if self.is_gpu else f"{text.duration(value)} of process time"

    def axis(self, title: str, *, is_log: bool = False) -> Axis:
        """An axis of costs."""
        if self.is_gpu:
            return Axis(title=f"{title}, GPU-hours", is_log=is_log)
        return Axis(title=f"{title}, process time", kind="duration", is_log=is_log)


def costs_of(runs: pd.DataFrame, excluded: pd.DataFrame | None = None, planned: Sequence[Planned] = ()) -> Costs:
    """Bring together what each cell cost and what it was expected to cost."""
    finished, others = rows_of(runs), rows_of(excluded)
    rows = [*finished, *others]
    hours = column(rows, "gpu_hours")
    expected = {cell.cell_id: cell for cell in planned}
    estimates = [expected.get(str(row.get("run_id"))) for row in rows]
    is_gpu = bool((hours > 0).any()) or any(bool(cell.gpu_hours) for cell in planned)
    if is_gpu:
        used = np.where(hours > 0, hours, np.nan)
        plan = [None if cell is None else cell.gpu_hours for cell in estimates]
    else:
        done = np.array([row.get("status", "done") == "done" for row in rows], dtype=bool)
        share = np.array([own_share(row, cell) for row, cell in zip(rows, estimates, strict=True)])
        used = np.where(done, share * training_sec(rows), np.nan)  # the tokens of other runs are planned, not read
        plan = [None if cell is None else cell.sec for cell in estimates]
    plans = np.array([np.nan if value is None else value for value in plan], dtype=np.float64)
    return Costs(rows=rows, is_gpu=is_gpu, used=used, planned=plans)


def own_share(row: Row, planned: Planned | None) -> float:
    """Return the share of the tokens of a run that it trained itself; NaN for a branch of which no plan knows it."""
    if planned is not None:
        return planned.own_share
    return np.nan if row.get("parent") else 1.0


def training_sec(rows: Sequence[Row]) -> Array:
    """The training time of each finished run, (n,): its tokens over its tokens per second."""
    with np.errstate(all="ignore"):
        return column(rows, "tokens") / column(rows, "tokens_per_sec")


def cost_chart(
    runs: pd.DataFrame,
    excluded: pd.DataFrame | None = None,
    planned: Sequence[Planned] = (),
    *,
    budgets: Sequence[float] = (),
) -> Chart | None:
    """Describe the cost per budget and per cell, against the plan; None if no cost is known.

    Args:
        runs: The rows of runs.csv.
        excluded: The rows of excluded.csv, whose runs may have cost something too.
        planned: What the plan expects each cell to cost (``planned_of``); may be empty.
        budgets: All budgets of the page, so that they look the same in each chart.
    """
    costs = costs_of(runs, excluded, planned)
    if not np.isfinite(costs.used).any():
        return None
    grouped = groups(column(costs.rows, "budget"), budgets)
    panels = [_bars(costs, grouped)]
    panels += [_cells(costs, grouped)] if costs.both.any() else []
    return Chart(
        name="cost",
        title="What did it cost, and what was planned?",
        sentence=cost_sentence(costs),
        panels=panels,
        notes=_notes(costs),
    )


def _bars(costs: Costs, grouped: Sequence[Group]) -> Panel:
    """The sums of each budget: planned and used of the same cells, used of others, and planned for what is left."""
    alone = np.isfinite(costs.used) & ~np.isfinite(costs.planned)
    bars = (
        ("planned", FAINT, costs.planned, costs.both),
        ("used", INK, costs.used, costs.both),
        ("used, without an estimate", OTHER, costs.used, alone),
        (STILL, FAINT, costs.planned, costs.open),
    )
    names = [group.name.removesuffix(" FLOPs") for group in grouped]  # short, so that they fit on a narrow screen
    series = [
        Series(
            x=names,
            y=[float(values[group.rows & which].sum()) for group in grouped],
            mark="bar",
            name=name,
            group=name,
            colour=colour,
            is_hollow=name == STILL,
            hover=[
                f"{text.counted(int((group.rows & which).sum()), 'cell')}, "
                f"{costs.shown(float(values[group.rows & which].sum()))}"
                for group in grouped
            ],
        )
        for name, colour, values, which in bars
        if which.any()
    ]
    return Panel(x=Axis(title="budget, FLOPs"), y=costs.axis("sum"), title="per budget", series=series)


def _cells(costs: Costs, grouped: Sequence[Group]) -> Panel:
    """Used against planned cost of each cell, with the line of equal values."""
    values = np.concatenate([costs.planned[costs.both], costs.used[costs.both]])
    ends = [float(values.min()), float(values.max())]
    series = [Series(x=ends, y=ends, mark="line", name="used = planned", group="equal", colour=INK, dash="dash")]
    for group in grouped:
        places = np.flatnonzero(group.rows & costs.both).tolist()
        if places:
            series.append(
                Series(
                    x=costs.planned[places].tolist(),
                    y=costs.used[places].tolist(),
                    name=group.name,
                    group=group.name,
                    colour=group.look.colour,
                    shape=group.look.shape,
                    hover=[hover(costs.rows[place], _effort(costs, place)) for place in places],
                )
            )
    return Panel(
        x=costs.axis("planned", is_log=True), y=costs.axis("used", is_log=True), title="per cell", series=series
    )


def _effort(costs: Costs, place: int) -> str:
    row = costs.rows[place]
    used = f"{costs.shown(float(costs.used[place]))}, {costs.used[place] / costs.planned[place] - 1:+.0%}"
    again = [f"{row['attempts']:.0f} attempts"] if row.get("attempts", 1) > 1 else []
    again += [f"{row['steps_redone']:.0f} steps redone"] if row.get("steps_redone") else []
    return ", ".join([used, *again])


def cost_sentence(costs: Costs) -> str:
    """State what the runs cost, those that were left out included, and what the plan expected of the same runs."""
    count, num_both = int(np.isfinite(costs.used).sum()), int(costs.both.sum())
    said = f"{text.counted(count, 'run')} cost {costs.shown(float(np.nansum(costs.used)))}"
    if not num_both:
        return f"{said}; there is no estimate to compare this with."
    planned, same = float(costs.planned[costs.both].sum()), float(costs.used[costs.both].sum())
    expected = f"the plan expected {costs.shown(planned)} ({same / planned - 1:+.0%})."
    if num_both == count:
        return f"{said}; {expected}"
    return f"{said}. Of these, {num_both} have an estimate: they cost {costs.shown(same)}, and {expected}"


def _notes(costs: Costs) -> list[str]:
    notes = []
    if costs.open.any():
        left = costs.shown(float(costs.planned[costs.open].sum()))
        notes.append(f"{text.counted(int(costs.open.sum()), 'planned cell')} without a known cost: {left} by the plan.")
    unknown = int((~np.isfinite(costs.used) & ~np.isfinite(costs.planned)).sum())
    if unknown:
        notes.append(f"Neither the cost nor an estimate of {text.counted(unknown, 'run')} is known.")
    attempts, redone = column(costs.rows, "attempts"), column(costs.rows, "steps_redone")
    several = int((attempts > 1).sum())
    if several:
        steps = np.nansum(column(costs.rows, "steps"))
        notes.append(
            f"{text.counted(several, 'run')} took more than one attempt; {np.nansum(redone):,.0f} of {steps:,.0f} "
            "steps were computed again after interruptions."
        )
    return notes
