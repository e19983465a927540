"""Read what a run directory, its .wandb files and a W&B server know of a cell: one history, one result and a state.

The run directory is trusted most, then its .wandb files, then the server. A later source is read only where the
earlier ones are incomplete, or to verify them, and fills in what they lack.
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
from dlm.submit.ledger import CellNow

# What reading a config of an unexpected shape can raise.
UNREADABLE = (UserError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
LIVE = (State.RUNNING, State.SUBMITTED)
# What W&B's word for the state of a run means, where nothing else tells the state. Any other word means LOST.
WANDB_STATES = {"running": State.RUNNING, "pending": State.SUBMITTED, "preempting": State.RUNNING,
                "preempted": State.PREEMPTED, "failed": State.FAILED}  # fmt: skip


def describe(error: Exception) -> str:
    """Say in words what is wrong with a config; ``error`` is one of UNREADABLE."""
    if isinstance(error, UserError):
        return str(error)
    return f"it has no {error}" if isinstance(error, KeyError) else f"it is of another shape: {error}"


class Server(Protocol):
    """Runs on a W&B server, such as wandb_server.Project. Histories are there once they have been asked for."""

    runs: dict[str, WandbRun]

    def read_histories(self, run_ids: Iterable[str]) -> None:
        """Fill in ``history`` of these runs."""


@dataclass(kw_only=True)
class WandbSource:
    """What the .wandb files or the W&B server know of a run."""

    source: str  # as in runs.csv: wandb (local files) or wandb_api
    run: WandbRun
    history: History  # merged on the optimiser step

    @property
    def where(self) -> str:
        """The source in the words of a warning."""
        return "the W&B file" if self.source == "wandb" else "the W&B server"

    @property
    def result(self) -> Result | None:
        """The result that the run logged at its end."""
        return logged_result(self.run.summary)


@dataclass(kw_only=True)
class Candidate:
    """A cell that is to be collected, before anything of its run is read."""

    name: str  # the id of the cell
    sweep: str
    run_id: str  # in W&B
    config: Any  # checked when the recipe is derived from it
    data_hash: str | None = None  # as the plan has it


@dataclass(kw_only=True)
class FoundCell(Candidate):
    """A cell with everything that was found of it."""

    run_dir: Path
    recipe: Recipe
    now: CellNow
    stored: History | None = None  # what history.parquet holds
    metrics: History = field(init=False)  # what metrics.jsonl holds
    merged: History = field(init=False)  # all sources together, a later one where the earlier ones have nothing
    in_wandb: list[WandbSource] = field(default_factory=list)  # the most trusted first
    source: str = "run_dir"  # where ``now.result`` is from
    warnings: list[str] = field(default_factory=list)

    def warn(self, *lines: str) -> None:
        """Add warnings that name this cell."""
        self.warnings += [f"{self.name}: {line}" for line in lines]

    def stored_with(self, key: Key) -> History | None:
        """What history.parquet holds, if it was made of all that has been read so far and of what ``key`` names."""
        return self.stored if self.stored is not None and self.stored.key == self.merged.key + key else None

    @property
    def lacks_result(self) -> bool:
        """Whether the run has ended and no result is known, not even one of another cell in its run directory."""
        return self.now.result is None and self.now.state not in LIVE and read_result(self.run_dir) is None

    @property
    def is_incomplete(self) -> bool:
        """Whether a further source may know more: the result, or steps up to the one that the run reached."""
        history, status, steps = self.merged, self.now.status, self.recipe.steps
        if self.now.state in LIVE:
            return False
        if history.last_step is None or history.warnings:  # nothing, or torn
            return True
        if self.now.result is not None:
            return not history.reached(steps)
        return status is None or status.step >= steps or history.last_step < min(status.step, steps)


def read_run_directories(cells: Sequence[FoundCell], stored: Mapping[str, History], root: Path) -> None:
    """Read metrics.jsonl of every cell, where history.parquet (``stored``) does not hold it already."""

    def read(cell: FoundCell) -> History:
        path = cell.run_dir / "metrics.jsonl"
        if not path.is_file():
            return cell.merged
        key = key_of([one for one in (path, cell.run_dir / "config.yaml") if one.is_file()], root)
        return cell.stored_with(key) or from_metrics(path, cell.name, key)

    for cell in cells:
        cell.stored, cell.merged = stored.get(cell.name), History(run_id=cell.name, key=[])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # pyarrow releases Python's lock while it parses
        for cell, history in zip(cells, pool.map(read, cells), strict=True):
            cell.metrics = cell.merged = history
            cell.warn(*history.warnings)


def read_local_wandb(cell: FoundCell, root: Path, *, verify: bool) -> None:
    """Read the .wandb files of a cell where the run directory is incomplete, or to verify it."""
    files = wandb_files(cell.run_dir)
    if files and (verify or cell.is_incomplete):
        run = read_wandb_run(cell.run_dir, cell.run_id, accepts=lambda attempt: _may_be_of(attempt, cell))
        key = key_of(files, root)
        history = from_rows(run.history, cell.name, key, [])
        _add_source(cell, WandbSource(source="wandb", run=run, history=history), key)


def id_of(config: Mapping[str, Any], data_hash: str | None) -> str:
    """The cell id that follows from a config; without a hash of the data, the id that the run wrote into it.

    Raises what is in UNREADABLE.
    """
    if data_hash is None and isinstance(config.get("cell_id"), str):
        return str(config["cell_id"])
    return cell_id(config, steps=derive(config).steps, data_hash=data_hash)


def _may_be_of(attempt: WandbRun, cell: FoundCell) -> bool:
    """Whether an attempt has the config of this cell; yes where its config does not tell."""
    try:
        return id_of(attempt.config, attempt.data_hash or cell.data_hash) == cell.name
    except UNREADABLE:
        return True


def read_server(cells: Iterable[FoundCell], server: Server, *, verify: bool) -> None:
    """Add the server's runs to their cells; ask for a history only where it knows more, or to verify."""
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
    """Whether the last values of a run on the server promise more of its history than was found so far."""
    last, found, steps = run.summary.get("step"), cell.merged, cell.recipe.steps
    if not isinstance(last, (int, float)) or found.last_step is None or found.warnings:
        return True
    return last > found.last_step or (last >= steps and not found.reached(steps))


def _add_source(cell: FoundCell, one: WandbSource, key: Key) -> None:
    """Add a source to a cell: the part of the history that the earlier ones lack, and the result if they have none.

    Args:
        cell: The cell.
        one: The source.
        key: What the history of the source was read from.
    """
    if cell.is_incomplete and one.history.num_rows:
        cell.merged = cell.stored_with(key) or filled(cell.merged, one.history, cell.merged.key + key)
    cell.in_wandb.append(one)
    result = one.result if cell.lacks_result else None
    if result is not None and (result.cell_id, result.step) == (cell.name, cell.recipe.steps):
        cell.now = dataclasses.replace(cell.now, state=State.DONE, reason=None, result=result)
        cell.source = one.source


def settle(cell: FoundCell) -> None:
    """Once all sources are read: pass on their warnings, and take the state from W&B where nothing else tells it."""
    for one in cell.in_wandb:
        cell.warn(*one.run.warnings, *one.history.warnings)
        if one.run.unread is not None:
            cell.warn(f"its history on the W&B server could not be read: {one.run.unread}")
    if cell.now.result is not None and not cell.merged.reached(cell.recipe.steps):
        ends = "is nowhere" if cell.merged.last_step is None else f"ends at step {cell.merged.last_step}"
        cell.warn(f"its history {ends}, of {cell.recipe.steps} steps: no source that was read has the rest")
    if cell.now.state is State.PLANNED and cell.in_wandb:
        runs = [one.run for one in cell.in_wandb]
        telling = next((run for run in runs if run.exit_code is not None or run.state is not None), runs[0])
        state, reason = _state_in_wandb(telling)
        cell.now = dataclasses.replace(cell.now, state=state, reason=reason)


def _state_in_wandb(run: WandbRun) -> tuple[State, str]:
    """(state, reason) of a cell that only W&B knows, and that left no result there."""
    if run.exit_code is not None:
        return state_of_exit(run.exit_code) if run.exit_code else State.LOST, "by its exit code in W&B"
    if run.state is None:
        return State.LOST, "its .wandb file does not record its end"
    return WANDB_STATES.get(run.state, State.LOST), f"W&B says {run.state}"
