"""Fit the best learning rate and batch as power laws of N and D, from runs of any table that vary them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit.hparams import cells as of_cells
from dlm.fit.hparams import laws, words
from dlm.fit.hparams.cells import AXES, LEAST_VALUES, Runs
from dlm.fit.hparams.curves import Curves, curves_of
from dlm.fit.hparams.result import Cell, Hparams
from dlm.fit.points import NAN, Array

if TYPE_CHECKING:
    import pandas as pd

REPLICATES = 2000
LEAST_REPLICATES = 100


def fit_hparams(
    source: str | Path | pd.DataFrame, *, objective: str | None = None, replicates: int = REPLICATES, seed: int = 0
) -> Hparams:
    """Fit lr*(N, D) = c N^x D^y and B*(D) = c D^z to the runs of one objective.

    The runs of a cell have the same size and tokens. Over log rate (and log batch) their log loss is a parabola whose
    curvature is that of all cells. A cell whose minimum lies outside the settings tried enters no law. The laws are
    weighted least squares through the minima of the other cells. Intervals come from draws with the noise of the runs
    and the scatter of the cells about the laws.

    Args:
        source: A CSV file, a folder with a runs.csv, or a DataFrame, with the columns params, tokens, loss and
            learning_rate, and for the batch `batch_tokens`, or `global_batch_size` and `block_size`.
        objective: The objective whose runs are fitted; required if the table holds several objectives.
        replicates: Number of draws for the intervals, 100 or more.
        seed: Seed of the draws.

    Raises:
        UserError: If no cell has three learning rates or batches, the loss does not turn upward over them, or no cell
            has its minimum within those tried. The message says what to run.
    """
    from dlm.fit.rows import one_objective, read_runs

    if replicates < LEAST_REPLICATES or seed < 0:
        raise UserError(
            f"replicates is {replicates}, seed {seed}: give {LEAST_REPLICATES} or more, and a seed of 0 or above"
        )
    frame = one_objective(read_runs(source), objective)
    if frame.empty:
        raise UserError("there are no runs: give at least one row of params, tokens, loss and learning_rate")
    name = str(source) if isinstance(source, str | Path) else "a table"
    return fit_frame(frame, name, replicates=replicates, seed=seed)


def fit_frame(frame: pd.DataFrame, name: str, *, replicates: int = REPLICATES, seed: int = 0) -> Hparams:
    """As `fit_hparams`, for a table that `read_runs` returned and that holds one objective; `name` is its source."""
    runs = of_cells.runs_of(frame[frame["weight"] > 0] if "weight" in frame else frame)
    axes = of_cells.varied(runs)
    if not axes:
        raise UserError(
            f"no size and number of tokens was run with {LEAST_VALUES} or more learning rates or batches, so the runs "
            "do not show the best ones: add runs at 1/2 and 2 times the rate, for example with `tune` in a definition"
        )
    near = of_cells.near_best(runs, axes)
    curves, found = _without_edges(near, axes, of_cells.tried(runs))
    used = near.take(np.isin(near.cell, curves.numbers))
    vertices, curvature, squares = curves.solve(curves.log_loss[:, None])
    sigma = float(np.sqrt(squares[0] / curves.dof)) if curves.dof > 0 else NAN
    at = curves.mean(used.log_n), curves.mean(used.log_d)
    fitted = laws.fit_powers(curves, vertices[0], curvature[0], sigma, at, axes, replicates, seed)
    return Hparams(
        objective=_only(frame, "objective") or "",
        optimizer=_only(frame, "optimizer"),
        powers=fitted.powers,
        curvature=curvature[0],
        curvatures=fitted.curvatures,
        noise=sigma,
        cells=found,
        num_runs=len(used.cell),
        source=f"{name}: {text.counted(len(used.cell), 'run')} in {text.counted(curves.num_cells, 'cell')}",
        warnings=(
            *words.refused(found),
            *words.undetermined(fitted.powers, *at),
            *words.batches(used, axes),
            *words.failed(fitted.curvatures),
        ),
        notes=tuple(words.left_out(runs, near, axes, has_interaction=len(curves.pairs) == 3)),
    )


def _only(frame: pd.DataFrame, column: str) -> str | None:
    """The one value of a column, as text; None if there is no such column, or it has several values."""
    values: list[str] = frame[column].dropna().astype(str).unique().tolist() if column in frame else []
    return values[0] if len(values) == 1 else None


def _without_edges(near: Runs, axes: Sequence[int], tried: Mapping[int, Array]) -> tuple[Curves, tuple[Cell, ...]]:
    """The parabolas of the cells with a minimum within the settings tried, and all cells in the order of N and D."""
    rest, found = near, dict[int, Cell]()
    while len(rest.cell):
        curves = curves_of(rest, axes)
        vertices, curvature, _ = curves.solve(curves.log_loss[:, None])
        if not np.isfinite(curvature).all():
            lowest = np.array([_lowest(rest, number, axes) for number in curves.numbers])
            raise words.no_minimum(_cells(rest, axes, lowest, tried, beyond=0.0))
        now = _cells(rest, axes, vertices[0], tried)
        found |= now
        edges = [number for number, cell in now.items() if not cell.usable]
        if not edges:
            return curves, tuple(found[number] for number in sorted(found))
        rest = rest.take(~np.isin(rest.cell, edges))
    raise words.one_side(tuple(found[number] for number in sorted(found)))


def _lowest(runs: Runs, number: int, axes: Sequence[int]) -> Array:
    """The settings of the run with the lowest loss of a cell, (k,)."""
    own = np.flatnonzero(runs.cell == number)
    lowest: Array = runs.settings[own[runs.log_loss[own].argmin()]][list(axes)]
    return lowest


def _whole(logs: Array) -> float:
    """The geometric mean of numbers, without the last digits, which the logs have lost."""
    return float(f"{np.exp(logs.mean()):.12g}")


def _cells(
    runs: Runs, axes: Sequence[int], best: Array, tried: Mapping[int, Array], *, beyond: float = 1e-9
) -> dict[int, Cell]:
    """The cells by number, with the logs of their best settings, (G, k), and whether these lie within those tried.

    `tried` holds the lowest and the highest settings of all runs of a cell, (2, 2), by its number. A setting beyond
    the outermost one by a share of at most `beyond` counts as inside; with 0, the outermost does not.
    """
    cells = {}
    for number, vertex in zip(np.unique(runs.cell).tolist(), np.exp(best).tolist(), strict=True):
        own = runs.cell == number
        ends = {AXES[axis]: (float(tried[number][0, axis]), float(tried[number][1, axis])) for axis in axes}
        named = dict(zip(ends, vertex, strict=True))
        reason, then = words.edge(ends, named, slack=beyond)
        cells[number] = Cell(
            params=_whole(runs.log_n[own]),
            tokens=_whole(runs.log_d[own]),
            num_runs=int(own.sum()),
            tried=ends,
            best=named,
            reason=reason,
            next=then,
        )
    return cells
