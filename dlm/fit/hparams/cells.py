"""Group runs by what they train and on how much, so that the runs of a group differ in learning rate and batch only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dlm.core import text
from dlm.core.errors import UserError
from dlm.fit.budgets import group
from dlm.fit.points import Array, Mask

if TYPE_CHECKING:
    import pandas as pd

AXES = ("lr", "batch")  # the columns of `Runs.settings`
SAME = ("block_size", "schedule", "weight_decay", "dropout", "data_hash")  # equal for all runs of a cell, where known
TOKENS_TOLERANCE = 0.05  # tokens that differ by at most this share are equal, because batches come in whole steps
SLACK = 1e-6  # difference of logs that rounding makes
NEAR = float(np.log(4.0)) + SLACK  # settings further from the best run than a factor of four are on no parabola
MOST_EXCESS = float(np.log(1.1))  # runs with a loss higher by a larger factor have nearly diverged
LEAST_VALUES = 3  # settings of a cell: fewer show no curvature
BATCH_COLUMNS = "'batch_tokens', or 'global_batch_size' and 'block_size'"


@dataclass(frozen=True, kw_only=True, eq=False)
class Runs:
    """The runs of all cells, as logs. `settings` are log learning rate and log batch in tokens, (n, 2)."""

    log_n: Array  # (n,)
    log_d: Array  # (n,)
    log_loss: Array  # (n,)
    settings: Array  # (n, 2); the column of the batch is NaN if the batches are not known
    cell: Any  # number of the cell of each run, (n,), integers

    def take(self, keep: Mask) -> Runs:
        """The runs where `keep`, (n,), is true."""
        return replace(self, **{name: values[keep] for name, values in vars(self).items()})


def runs_of(frame: pd.DataFrame) -> Runs:
    """Read the runs of a table as `dlm.fit.rows.read_runs` returns it.

    Raises:
        UserError: If there is no column of learning rates, or a value is not a number above 0.
    """
    if "learning_rate" not in frame:
        raise UserError(
            "the runs have no column 'learning_rate': needed are params, tokens, loss and learning_rate, and to fit "
            f"the batch also {BATCH_COLUMNS}"
        )
    n, d, loss, rate = (_positive(frame, name) for name in ("params", "tokens", "loss", "learning_rate"))
    settings = np.stack([np.log(rate), np.log(_batch(frame))], axis=1)
    return Runs(log_n=np.log(n), log_d=np.log(d), log_loss=np.log(loss), settings=settings, cell=_numbers(frame, n, d))


def _batch(frame: pd.DataFrame) -> Array:
    """The tokens of an optimiser step of each run, (n,); NaN if the table does not hold them."""
    if "batch_tokens" in frame:
        return _positive(frame, "batch_tokens")
    if "global_batch_size" in frame and "block_size" in frame:
        return _positive(frame, "global_batch_size") * _positive(frame, "block_size")
    return np.full(len(frame), np.nan)


def _positive(frame: pd.DataFrame, name: str) -> Array:
    try:
        values = frame[name].to_numpy(dtype=np.float64)
    except ValueError as error:
        raise UserError(f"the column '{name}' holds a word, and needs numbers above 0: {error}") from error
    wrong = ~(np.isfinite(values) & (values > 0))
    if wrong.any():
        value = values[wrong][0]
        said = "empty" if np.isnan(value) else f"{value:g}"
        raise UserError(
            f"the column '{name}' is {said} in {text.counted(int(wrong.sum()), 'row')}: give numbers above 0"
        )
    return values


def _numbers(frame: pd.DataFrame, params: Array, tokens: Array) -> Any:
    """The number of the cell of each run, (n,): one for each size, number of tokens and value of `SAME`."""
    same = [frame[name].astype(str).tolist() for name in SAME if name in frame]
    level = np.empty_like(tokens)
    for size in np.unique(params):
        own = params == size
        level[own] = group(tokens[own], TOKENS_TOLERANCE)
    keys = [*zip(params.tolist(), level.tolist(), *same, strict=True)]
    places = {key: place for place, key in enumerate(dict.fromkeys(sorted(keys)))}
    return np.array([places[key] for key in keys], dtype=np.int64)


def varied(runs: Runs) -> list[int]:
    """The axes with `LEAST_VALUES` or more values in a cell: [0] for rates, [1] for batches, [0, 1] for both."""
    counts = np.array([_values(runs.settings[runs.cell == k]) for k in np.unique(runs.cell)])
    both = (counts >= LEAST_VALUES).all(axis=1).any()
    if both:
        return [0, 1]
    return [axis for axis in range(len(AXES)) if (counts[:, axis] >= LEAST_VALUES).any()][:1]


def _values(settings: Array) -> list[int]:
    """The number of distinct values of each axis; a value that is not known counts as none."""
    return [len(np.unique(np.round(column[np.isfinite(column)], 6))) for column in settings.T]


def tried(runs: Runs) -> dict[int, Array]:
    """The lowest and the highest settings of each cell, (2, 2), by its number."""
    numbers = np.unique(runs.cell).tolist()
    return {k: np.exp([f(runs.settings[runs.cell == k], axis=0) for f in (np.min, np.max)]) for k in numbers}


def near_best(runs: Runs, axes: Sequence[int]) -> Runs:
    """The runs of cells that vary on every axis of `axes`, without those that lie far from the best run of their cell.

    Where only one axis is fitted, runs of a cell at another value of the other axis than its best run are left out too.
    """
    keep = np.zeros(len(runs.cell), dtype=bool)
    others = [axis for axis in range(len(AXES)) if axis not in axes]
    for number in np.unique(runs.cell):
        own = np.flatnonzero(runs.cell == number)
        settings = runs.settings[own]
        best = _best(settings, runs.log_loss[own])
        off = np.abs(settings - settings[best])
        near = (off[:, list(axes)] <= [_reach(off[:, axis], settings[:, axis]) for axis in axes]).all(axis=1)
        near &= (np.nan_to_num(off[:, others]) < SLACK).all(axis=1)
        near &= runs.log_loss[own] - runs.log_loss[own[best]] <= MOST_EXCESS
        if all(count >= LEAST_VALUES for count in np.array(_values(settings[near]))[list(axes)]):
            keep[own[near]] = True
    return runs.take(keep)


def _reach(off: Array, values: Array) -> float:
    """The distance from the best run up to which runs count: a factor of four, or what holds `LEAST_VALUES` values."""
    distances = np.sort(off[np.unique(np.round(values, 6), return_index=True)[1]])
    return max(NEAR, float(distances[min(LEAST_VALUES, len(distances)) - 1]) + SLACK)


def _best(settings: Array, log_loss: Array) -> int:
    """The first run of the setting with the lowest mean loss."""
    rounded = np.round(np.nan_to_num(settings), 6)
    _, place = np.unique(rounded, axis=0, return_inverse=True)
    place = place.ravel()
    mean = np.bincount(place, weights=log_loss) / np.bincount(place)
    return int(np.flatnonzero(place == mean.argmin())[0])
