"""Describe the loss over learning rate and batch around the best of each size, and the law of the best rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit.hparams.cells import AXES, LEAST_VALUES, SLACK, Runs, runs_of
from dlm.fit.hparams.fit import fit_hparams
from dlm.fit.hparams.result import WORDS, Hparams
from dlm.fit.points import Array
from dlm.report.chart import Axis, Chart, Panel, Series
from dlm.report.charts.runs import Group, Row, column, groups, hover, rows_of

if TYPE_CHECKING:
    import pandas as pd

NEEDED = ("params", "tokens", "loss", "learning_rate")
MOST = 0.1  # share of the loss above the best of a cell up to which its runs are shown
REPLICATES = 400
ENDS = (0.025, 0.975)
SETTINGS = {  # the axis of each setting
    "lr": Axis(title="learning rate", is_log=True),
    "batch": Axis(title="batch, tokens", kind="count", is_log=True),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuned:
    """The runs that can be read, n of them, and where each lies among the runs of its size and tokens."""

    rows: Sequence[Row]
    runs: Runs
    above: Array  # share of the loss above the best run of the same size and tokens, (n,)
    budget: Array  # (n,)


def tuning_chart(runs: pd.DataFrame, *, budgets: Sequence[float] = ()) -> Chart | None:
    """Describe the runs of one objective that differ in learning rate or batch alone.

    Args:
        runs: The rows of runs.csv, tuning runs included.
        budgets: All budgets of the page, so that they look the same in each chart.

    Returns:
        The chart; None if no size and number of tokens was run with three learning rates or batches.
    """
    tuned = _read(runs)
    if tuned is None:
        return None
    lines = {name: _lines(tuned, axis) for axis, name in enumerate(AXES)}
    shown = [name for name, cells in lines.items() if cells]
    if not shown:
        return None
    fitted, notes = _fitted(runs)
    grouped = groups(tuned.budget, budgets)
    panels = [_around(tuned, name, lines[name], grouped, is_first=name == shown[0]) for name in shown]
    panels += [] if fitted is None else [_stars(fitted, name, tuned, grouped) for name in list(fitted.powers)[:1]]
    drawn = {place for cells in lines.values() for own in cells for place in own}
    far = sum(bool(tuned.above[place] > MOST) for place in drawn)
    return Chart(
        name="tuning",
        title="How much does the learning rate matter, and which is best?",
        sentence=_sentence(shown, fitted),
        panels=panels,
        notes=[
            *notes,
            *([f"{text.counted(far, 'run')} more than {MOST:.0%} above the best not shown."] if far else []),
        ],
    )


def _read(table: pd.DataFrame) -> Tuned | None:
    """Read the runs that have all numbers that are needed; None if there are none."""
    if any(name not in table for name in NEEDED):
        return None
    numbers = table[list(NEEDED)].to_numpy(dtype=np.float64)
    usable = (np.isfinite(numbers) & (numbers > 0)).all(axis=1)
    usable &= (table["role"] != "proof").to_numpy() if "role" in table else True
    if not usable.any():
        return None
    frame = table[usable]
    for names in (("batch_tokens",), ("global_batch_size", "block_size")):
        if any(name in frame and not (frame[name] > 0).all() for name in names):
            frame = frame.drop(columns=[name for name in names if name in frame])
    runs, rows = runs_of(frame), rows_of(frame)
    above = np.empty(len(rows))
    for number in np.unique(runs.cell):
        own = runs.cell == number
        above[own] = np.expm1(runs.log_loss[own] - runs.log_loss[own].min())
    return Tuned(rows=rows, runs=runs, above=above, budget=column(rows, "budget"))


def _lines(tuned: Tuned, axis: int) -> list[list[int]]:
    """The runs of each cell along one setting, rising; the other setting is that of the best run of the cell."""
    found = []
    for number in np.unique(tuned.runs.cell):
        own = np.flatnonzero(tuned.runs.cell == number)
        settings = tuned.runs.settings[own]
        other = settings[:, 1 - axis]
        same = np.nan_to_num(np.abs(other - other[tuned.above[own].argmin()])) < SLACK
        places, values = own[same], settings[same, axis]
        if len(np.unique(np.round(values[np.isfinite(values)], 6))) >= LEAST_VALUES:
            found.append(places[np.argsort(values, kind="stable")].tolist())
    return found


def _fitted(runs: pd.DataFrame) -> tuple[Hparams | None, list[str]]:
    """The law of the best settings, or a note that says why these runs show none."""
    try:
        return fit_hparams(runs[runs["loss"].notna()], replicates=REPLICATES), []
    except UserError as error:
        return None, [f"No law of the best settings: {error}."]


def _around(
    tuned: Tuned, name: str, lines: Sequence[Sequence[int]], grouped: Sequence[Group], *, is_first: bool
) -> Panel:
    """The loss above the best of the cell along one setting, a line for each cell."""
    axis, series, named = AXES.index(name), [], set[str]()
    for own in lines:
        near = [place for place in own if tuned.above[place] <= MOST]
        group = next(group for group in grouped if group.rows[own[0]])
        series.append(
            Series(
                x=np.exp(tuned.runs.settings[near, axis]).tolist(),
                y=tuned.above[near].tolist(),
                mark="line and point",
                name=group.name if is_first and group.name not in named else "",
                group=group.name,
                colour=group.look.colour,
                shape=group.look.shape,
                hover=[hover(tuned.rows[place], f"{tuned.above[place]:.2%} above the best") for place in near],
                opacity=0.85,
            )
        )
        named.add(group.name)
    series.sort(key=lambda one: [group.name for group in grouped].index(one.group))
    return Panel(
        x=SETTINGS[name],
        y=Axis(title="loss above the best run", kind="percent"),
        title=f"loss over {WORDS[name]}",
        series=series,
    )


def _stars(fitted: Hparams, name: str, tuned: Tuned, grouped: Sequence[Group]) -> Panel:
    """The best setting of each cell, and the law of it with its 95 % interval, a line for each budget."""
    power = fitted.powers[name]
    cells = [cell for cell in fitted.used if name in cell.best]
    places = [_nearest(tuned, cell.params, cell.tokens) for cell in cells]
    series = []
    for group in grouped:
        own = sorted(
            (cell for cell, place in zip(cells, places, strict=True) if group.rows[place]), key=lambda c: c.tokens
        )
        if not own:
            continue
        log_n, log_d = np.log([cell.params for cell in own]), np.log([cell.tokens for cell in own])
        law = np.exp(power.logs(log_n, log_d))
        low, high = np.exp(np.nanquantile(power.drawn(log_n, log_d), ENDS, axis=0))
        tokens = [cell.tokens for cell in own]
        texts = [
            f"N {text.count(cell.params)}, D {text.count(cell.tokens)}, {text.counted(cell.num_runs, 'run')}\n"
            f"best {WORDS[name]} {text.number(cell.best[name], digits=3)}\n"
            f"by the law {text.number(best, digits=3)} ({text.number(ends[0], digits=3)} to "
            f"{text.number(ends[1], digits=3)})"
            for cell, best, ends in zip(own, law, zip(low, high, strict=True), strict=True)
        ]
        look = group.look
        series += [
            Series(
                x=tokens,
                y=law.tolist(),
                mark="line",
                group=group.name,
                colour=look.colour,
                low=low.tolist(),
                high=high.tolist(),
            ),
            Series(
                x=tokens,
                y=[cell.best[name] for cell in own],
                group=group.name,
                colour=look.colour,
                shape=look.shape,
                hover=texts,
                is_outlined=True,
            ),
        ]
    return Panel(
        x=Axis(title="training tokens D", kind="count", is_log=True),
        y=Axis(title=f"best {WORDS[name]}", kind=SETTINGS[name].kind, is_log=True),
        title=f"best {WORDS[name]}",
        series=series,
    )


def _nearest(tuned: Tuned, params: float, tokens: float) -> int:
    """The run that is nearest to a size and a number of tokens."""
    return int(np.hypot(tuned.runs.log_n - np.log(params), tuned.runs.log_d - np.log(tokens)).argmin())


def _sentence(shown: Sequence[str], fitted: Hparams | None) -> str:
    said = (
        f"Each line shows how the loss of one size on one number of tokens rises when the "
        f"{text.listed([WORDS[name] for name in shown])} is not the best."
    )
    if fitted is None:
        return said
    name = next(iter(fitted.powers))
    said += f" Beside it, the best {WORDS[name]} of each: found (marks), and by the law with its interval (lines)."
    return f"{said} A factor of two from the best {WORDS[name]} costs {fitted.cost_of_two()[name]:.2%} of the loss."
