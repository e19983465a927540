"""Describe the training and validation loss of every run against its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit.points import Array
from dlm.record.outcomes import OUTCOMES, State
from dlm.report.chart import Axis, Chart, Panel, Series
from dlm.report.charts.runs import Group, Row, column, groups, hover, rows_of
from dlm.report.look import FAINT, INK

if TYPE_CHECKING:
    import pandas as pd

HISTORY = ("run_id", "tokens", "train/loss", "val/loss")  # the columns of history.parquet that are drawn
KINDS = {"train/loss": "training loss", "val/loss": "validation loss"}
MOST_POINTS = 24_000  # of all curves of a chart: about 1.2 MB on the page
LEAST_POINTS = 4  # of one curve
MANY = 20  # runs of a budget, above which their training curves are faint
FAINT_LINE, CLEAR_LINE = 0.5, 0.85  # opacities
WIDE = 10.0  # ratio of the highest to the lowest loss from which the loss runs along a logarithmic axis
FAILED, UNFINISHED, LEFT_OUT = "failed", "not finished", "left out of the law"
ENDINGS = {FAILED: ("X", INK), UNFINISHED: ("s", FAINT), LEFT_OUT: ("D", FAINT)}


@dataclass(kw_only=True, eq=False)
class Curve:
    """The logged losses of one run: for each of KINDS, the tokens and the losses, each (n,)."""

    row: Row  # of runs.csv or excluded.csv
    ending: str = ""  # one of ENDINGS; '' for a run that counts
    losses: dict[str, tuple[Array, Array]] = field(default_factory=dict)


def read_history(sweep_dir: Path) -> pd.DataFrame | None:
    """Read the columns HISTORY of history.parquet; None if there is no such file.

    Raises:
        UserError: The file cannot be read.
    """
    path = Path(sweep_dir) / "history.parquet"
    if not path.is_file():
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table: pd.DataFrame = pq.read_table(path, columns=list(HISTORY)).to_pandas()
    except (pa.ArrowInvalid, OSError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({said}): remove it and run `dlm collect` again") from error
    return table


def curves_chart(
    history: pd.DataFrame | None,
    runs: pd.DataFrame,
    excluded: pd.DataFrame | None = None,
    *,
    budgets: Sequence[float] = (),
    most_points: int = MOST_POINTS,
) -> Chart | None:
    """Describe the curves of the runs in ``runs`` and ``excluded``; None if nothing was logged.

    Args:
        history: The logged steps, with the columns HISTORY.
        runs: The rows of runs.csv.
        excluded: The rows of excluded.csv: runs that failed, are not finished, or are left out for another reason.
        budgets: All budgets of the page, so that they look the same in each chart.
        most_points: With more points than this, each curve keeps the lowest and highest loss of even parts of it.
    """
    curves = [] if history is None else _curves(history, runs, excluded)
    if not curves:
        return None
    total = sum(len(x) for curve in curves for x, _ in curve.losses.values())
    allowed = _allowed([len(x) for curve in curves for x, _ in curve.losses.values()], most_points)
    for curve in curves:
        curve.losses = {kind: thinned(x, y, allowed) for kind, (x, y) in curve.losses.items()}
    drawn = sum(len(x) for curve in curves for x, _ in curve.losses.values())
    grouped = groups(column([curve.row for curve in curves], "budget"), budgets)
    kinds = [kind for kind in KINDS if any(kind in curve.losses for curve in curves)]
    return Chart(
        name="curves",
        title="How did each run learn?",
        sentence=(
            "Each line is the loss of one run as it reads more tokens; a budget in the legend shows or hides its runs, "
            "and a mark at the end of a line tells that the run failed, has not finished or is left out."
        ),
        panels=[_panel(kind, curves, grouped) for kind in kinds],
        notes=_notes(curves, drawn, total),
    )


def _curves(history: pd.DataFrame, runs: pd.DataFrame, excluded: pd.DataFrame | None) -> list[Curve]:
    """The runs of the tables that logged a loss, in the order of the history."""
    known = {str(row.get("run_id")): Curve(row=row, ending=_ending(row)) for row in rows_of(excluded)}
    known |= {str(row.get("run_id")): Curve(row=row) for row in rows_of(runs)}
    found = []
    for name, logged in history.groupby("run_id", sort=False):
        curve = known.get(str(name))
        if curve is None:
            continue
        tokens = logged["tokens"].to_numpy(dtype=np.float64)
        for kind in KINDS:
            loss = logged[kind].to_numpy(dtype=np.float64)
            usable = np.isfinite(loss) & (tokens > 0)
            if usable.any():
                curve.losses[kind] = (tokens[usable], loss[usable])
        if curve.losses:
            found.append(curve)
    return found


def _ending(row: Row) -> str:
    status = row.get("status", "")
    if status not in OUTCOMES:
        return LEFT_OUT
    return FAILED if OUTCOMES[State(status)].is_failure else LEFT_OUT if status == State.DONE else UNFINISHED


def _allowed(lengths: Sequence[int], most: int) -> int:
    """The largest number of points for each curve with which all curves together have at most ``most``."""
    allowed, rest, left = max(lengths), most, len(lengths)
    for length in sorted(lengths):  # what a short curve does not need, the longer ones may have
        allowed = rest // left
        if length > allowed:
            return max(allowed, LEAST_POINTS)
        rest, left = rest - length, left - 1
    return max(lengths)


def thinned(x: Array, y: Array, most: int) -> tuple[Array, Array]:
    """Keep about ``most`` of n points: the first, the last, and the lowest and the highest of even parts."""
    if len(x) <= most:
        return x, y
    kept = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), max((most - 2) // 2, 1)):
        kept |= {int(part[y[part].argmin()]), int(part[y[part].argmax()])}
    places = sorted(kept)
    return x[places], y[places]


def _panel(kind: str, curves: Sequence[Curve], grouped: Sequence[Group]) -> Panel:
    series = []
    for group in grouped:
        own = [curve for curve, is_own in zip(curves, group.rows, strict=True) if is_own and kind in curve.losses]
        if own:
            opacity = FAINT_LINE if len(own) > MANY and kind == "train/loss" else CLEAR_LINE
            series.append(_lines(kind, own, group, opacity=opacity))
    for ending in ENDINGS:
        ended = [curve for curve in curves if curve.ending == ending and kind in curve.losses]
        series += [_ends(kind, ended, ending)] if ended else []
    values = [y for one in series for y in one.y if math.isfinite(y)]
    is_wide = min(values) > 0 and max(values) > WIDE * min(values)
    return Panel(
        x=Axis(title="training tokens", kind="count", is_log=True),
        y=Axis(title=f"{KINDS[kind]}, nats/token", is_log=is_wide),
        title=KINDS[kind],
        series=series,
    )


def _lines(kind: str, curves: Sequence[Curve], group: Group, *, opacity: float) -> Series:
    """All curves of one budget as one series with gaps, which a browser draws faster than a series for each run."""
    x: list[float] = []
    y: list[float] = []
    texts: list[str] = []
    for curve in curves:
        tokens, losses = curve.losses[kind]
        short = str(curve.row.get("run_id", ""))
        x += [*(float(f"{value:.6g}") for value in tokens), math.nan]
        y += [*(float(f"{value:.4f}") for value in losses), math.nan]
        texts += [*[short] * (len(tokens) - 1), hover(curve.row), ""]
    return Series(
        x=x[:-1],
        y=y[:-1],
        mark="line and point" if kind == "val/loss" else "line",
        name=group.name,
        group=group.name,
        colour=group.look.colour,
        shape=group.look.shape,
        hover=texts[:-1],
        opacity=opacity,
    )


def _ends(kind: str, curves: Sequence[Curve], ending: str) -> Series:
    """The last logged loss of the runs with one ending."""
    shape, colour = ENDINGS[ending]
    last = [(*(values[-1] for values in curve.losses[kind]), curve.row) for curve in curves]
    return Series(
        x=[float(tokens) for tokens, _, _ in last],
        y=[float(loss) for _, loss, _ in last],
        name=ending,
        group=ending,
        colour=colour,
        shape=shape,
        hover=[hover(row, str(row.get("reason", ""))) for _, _, row in last],
        is_hollow=ending != FAILED,
    )


def _notes(curves: Sequence[Curve], drawn: int, total: int) -> list[str]:
    counts = {ending: sum(curve.ending == ending for curve in curves) for ending in ENDINGS}
    verbs = {ending: "" if ending == FAILED else "is " if counts[ending] == 1 else "are " for ending in ENDINGS}
    said = [f"{count} {verbs[ending]}{ending}" for ending, count in counts.items() if count]
    notes = [f"Of the {text.counted(len(curves), 'run')} shown, {text.listed(said)}."] if said else []
    if drawn < total:
        notes.append(
            f"{drawn:,} of {total:,} logged points are drawn: the first and the last of each curve, and the lowest and "
            "the highest of even parts between them."
        )
    return notes
