"""Combine the run directory, the .wandb files and a W&B server into one history, result and state of each cell.

The run directory is trusted most, then its .wandb files, then the server. A less trusted source is read only where the
more trusted sources are incomplete, or to verify them, and fills in values that they lack.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dlm.collect.history import History, Key, filled, from_metrics, from_rows, key_of
from dlm.collect.wandb_file import WandbRun, read_wandb_run, wandb_files
from dlm.core.errors import UserError
from dlm.core.identity import cell_id
from dlm.core.recipe import Recipe, derive
from dlm.record.outcomes import State, state_of_exit
from dlm.record.run import Result, read_result
from dlm.record.wandb import logged_result
from dlm.submit.cell_now import CellNow

# The exceptions that reading a config of an unexpected shape can raise.
UNREADABLE = (UserError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
LIVE = (State.RUNNING, State.SUBMITTED)
# The meaning of W&B's states of a run, for runs whose state no other source gives. Any other W&B state means LOST.
WANDB_STATES = {"running": State.RUNNING, "pending": State.SUBMITTED, "preempting": State.RUNNING,
                "preempted": State.PREEMPTED, "failed": State.FAILED}  # fmt: skip


def describe(error: Exception) -> str:
    """Describe what is wrong with a config; ``error`` is one of UNREADABLE."""
    if isinstance(error, UserError):
        return str(error)
    return f"it has no {error}" if isinstance(error, KeyError) else f"it is of another shape: {error}"


class Server(Protocol):
    """Runs on a W&B server, such as wandb_server.Project. Histories are empty until ``read_histories`` is called."""

    runs: dict[str, WandbRun]

    def read_histories(self, run_ids: Iterable[str]) -> None:
        """Fill in ``history`` of these runs."""


@dataclass(kw_only=True)
class WandbSource:
    """One source of a run in W&B: its .wandb files or the server."""

    source: str  # as in runs.csv: wandb (local files) or wandb_api
    run: WandbRun
    history: History  # merged on the optimiser step

    @property
    def where(self) -> str:
        """The name of the source in warnings."""
        return "the W&B file" if self.source == "wandb" else "the W&B server"

    @property
    def result(self) -> Result | None:
        """The result that the run logged at its end."""
        return logged_result(self.run.summary)


@dataclass(kw_only=True)
class Candidate:
    """A cell to be collected, before the data of its run are read."""

    name: str  # the id of the cell
    sweep: str
    run_id: str  # the id of the run in W&B
    config: Any  # checked when the recipe is derived from it
    data_hash: str | None = None  # from the plan


@dataclass(kw_only=True)
class FoundCell(Candidate):
    """A cell with the data of its run from all sources."""

    run_dir: Path
    recipe: Recipe
    now: CellNow
    stored: History | None = None  # the history in history.parquet
    metrics: History = field(init=False)  # the history in metrics.jsonl
    merged: History = field(init=False)  # of all sources; a less trusted source only fills gaps
    in_wandb: list[WandbSource] = field(default_factory=list)  # the most trusted source first
    source: str = "run_dir"  # the source of ``now.result``
    warnings: list[str] = field(default_factory=list)

    def warn(self, *lines: str) -> None:
        """Add warnings that name this cell."""
        self.warnings += [f"{self.name}: {line}" for line in lines]

    def stored_with(self, key: Key) -> History | None:
        """Return ``stored`` if it was made from all sources read so far plus the source ``key``; otherwise None."""
        return self.stored if self.stored is not None and self.stored.key == self.merged.key + key else None

    @property
    def lacks_result(self) -> bool:
        """Whether the run has ended, no result is known, and its run directory holds no result of any other cell."""
        return self.now.result is None and self.now.state not in LIVE and read_result(self.run_dir) is None

    @property
    def last_step(self) -> int:
        """The last step of a whole run: the planned one, or that at which a callback stopped it."""
        result = self.now.result
        return result.step if result is not None and result.stopped_early else self.recipe.steps

    @property
    def is_incomplete(self) -> bool:
        """Whether less trusted sources may add the result, or steps of the history that the run reached."""
        history, status, steps = self.merged, self.now.status, self.last_step
        if self.now.state in LIVE:
            return False
        if history.last_step is None or history.warnings:  # an empty or damaged history
            return True
        if self.now.result is not None:
            return not history.reached(steps)
        return status is None or status.step >= steps or history.last_step < min(status.step, steps)


def read_run_directories(cells: Sequence[FoundCell], stored: Mapping[str, History], root: Path) -> None:
    """Read metrics.jsonl of every cell, unless history.parquet (``stored``) already holds its current content."""

    def read(cell: FoundCell) -> History:
        path = cell.run_dir / "metrics.jsonl"
        if not path.is_file():
            return cell.merged
        key = key_of([one for one in (path, cell.run_dir / "config.yaml") if one.is_file()], root)
        return cell.stored_with(key) or from_metrics(path, cell.name, key)

    for cell in cells:
        cell.stored, cell.merged = stored.get(cell.name), History(run_id=cell.name, key=[])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # pyarrow releases the GIL while it parses
        for cell, history in zip(cells, pool.map(read, cells), strict=True):
            cell.metrics = cell.merged = history
            cell.warn(*history.warnings)


def read_local_wandb(cell: FoundCell, root: Path, *, verify: bool) -> None:
    """Read the .wandb files of a cell if its run directory is incomplete, or to verify the run directory."""
    files = wandb_files(cell.run_dir)
    if files and (verify or cell.is_incomplete):
        run = read_wandb_run(cell.run_dir, cell.run_id, accepts=lambda attempt: _may_be_of(attempt, cell))
        key = key_of(files, root)
        history = from_rows(run.history, cell.name, key, [])
        _add_source(cell, WandbSource(source="wandb", run=run, history=history), key)


def id_of(config: Mapping[str, Any], data_hash: str | None) -> str:
    """Compute the cell id that follows from a config. Without ``data_hash``, the id that the config states counts.

    Raises one of UNREADABLE when the config cannot be read.
    """
    if data_hash is None and isinstance(config.get("cell_id"), str):
        return str(config["cell_id"])
    return cell_id(config, steps=derive(config).steps, data_hash=data_hash)


def _may_be_of(attempt: WandbRun, cell: FoundCell) -> bool:
    """Whether an attempt has the config of this cell; true if its config cannot be read."""
    try:
        return id_of(attempt.config, attempt.data_hash or cell.data_hash) == cell.name
    except UNREADABLE:
        return True


def read_server(cells: Iterable[FoundCell], server: Server, *, verify: bool) -> None:
    """Add the server's runs to their cells; request a history only where it may add steps, or to verify."""
    there = [(cell, server.runs[cell.run_id]) for cell in cells if cell.run_id in server.runs]
    read = {
        cell.run_id
        for cell, run in there
        if verify or (cell.is_incomplete and _knows_more(cell, run) and cell.stored_with(run.key()) is None)
    }
    server.read_histories(sorted(read))
    for cell, run in there:
        stored = cell.stored_with(run.key()) if cell.run_id not in read else None
        history = stored or from_rows(run.history, cell.name, run.key(), [])
        _add_source(cell, WandbSource(source="wandb_api", run=run, history=history), run.key())


def _knows_more(cell: FoundCell, run: WandbRun) -> bool:
    """Whether the summary of a run on the server indicates more history than was found so far."""
    last, found, steps = run.summary.get("step"), cell.merged, cell.recipe.steps
    if not isinstance(last, (int, float)) or found.last_step is None or found.warnings:
        return True
    return last > found.last_step or (last >= steps and not found.reached(steps))


def _add_source(cell: FoundCell, one: WandbSource, key: Key) -> None:
    """Add a source to a cell. It fills gaps in the history, and supplies the result if earlier sources have none.

    Args:
        cell: The cell.
        one: The source.
        key: The key of the files or the run that the history of the source was read from.
    """
    if cell.is_incomplete and one.history.num_rows:
        cell.merged = cell.stored_with(key) or filled(cell.merged, one.history, cell.merged.key + key)
    cell.in_wandb.append(one)
    result = one.result if cell.lacks_result else None
    if result is not None and result.is_of(cell.name, cell.recipe.steps):
        cell.now = dataclasses.replace(cell.now, state=State.DONE, reason=None, result=result)
        cell.source = one.source


def settle(cell: FoundCell) -> None:
    """Finish a cell after all sources are read: add their warnings, and take a state from W&B if it is unknown."""
    for one in cell.in_wandb:
        cell.warn(*one.run.warnings, *one.history.warnings)
        if one.run.unread is not None:
            cell.warn(f"its history on the W&B server could not be read: {one.run.unread}")
    if cell.now.result is not None and not cell.merged.reached(cell.last_step):
        ends = "is nowhere" if cell.merged.last_step is None else f"ends at step {cell.merged.last_step}"
        cell.warn(f"its history {ends}, of {cell.last_step} steps: no source that was read has the rest")
    if cell.now.state is State.PLANNED and cell.in_wandb:
        runs = [one.run for one in cell.in_wandb]
        telling = next((run for run in runs if run.exit_code is not None or run.state is not None), runs[0])
        state, reason = _state_in_wandb(telling)
        cell.now = dataclasses.replace(cell.now, state=state, reason=reason)


def _state_in_wandb(run: WandbRun) -> tuple[State, str]:
    """Return (state, reason) of a cell that only W&B knows and that logged no result."""
    if run.exit_code is not None:
        return state_of_exit(run.exit_code) if run.exit_code else State.LOST, "by its exit code in W&B"
    if run.state is None:
        return State.LOST, "its .wandb file does not record its end"
    return WANDB_STATES.get(run.state, State.LOST), f"W&B says {run.state}"
