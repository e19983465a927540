"""sources: a cell's run directory, .wandb files and run on a server -> one history, result and state. Of collect.

The order of trust: the run directory, its .wandb files, the W&B server. A later source is read for what the earlier
ones leave open, or to be verified, and fills in what they lack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dlm.collect.history import History, Key, filled, from_rows, key_of, read_all
from dlm.collect.wandb_file import WandbRun, read_wandb_run, wandb_files
from dlm.core.errors import UserError
from dlm.core.identity import cell_id
from dlm.core.recipe import Recipe, derive
from dlm.record.outcomes import State, state_of_exit
from dlm.record.run import Result, read_result
from dlm.record.wandb import logged_result
from dlm.submit.ledger import CellNow

# What a config of another shape raises.
UNREADABLE = (UserError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


LIVE = (State.RUNNING, State.SUBMITTED)


# What W&B's own word for the state of a run says where nothing else says it.
STATES = {"running": State.RUNNING, "pending": State.SUBMITTED, "preempting": State.RUNNING,
          "preempted": State.PREEMPTED, "failed": State.FAILED}  # fmt: skip


def said_of(error: Exception) -> str:
    """What was wrong with a config, of whichever shape: one of UNREADABLE in words."""
    if isinstance(error, UserError):
        return str(error)
    return f"it has no {error}" if isinstance(error, KeyError) else f"it is of another shape: {error}"


class Server(Protocol):
    """Runs on a W&B server, as wandb_api.Project has them: histories only where they were asked for."""

    runs: dict[str, WandbRun]

    def read_histories(self, run_ids: Iterable[str]) -> None:
        """Fill in ``history`` of these runs."""


@dataclass(kw_only=True)
class Logged:
    """What one W&B source, named in the table and in words, knows of a run."""

    source: str  # wandb (local files) or wandb_api
    where: str  # "the W&B file" or "the W&B server"
    run: WandbRun
    key: Key
    history: History
    read: bool  # whether the rows behind ``history`` were read just now

    @classmethod
    def of(cls, run: WandbRun, name: str, *, source: str, key: Key, read: bool = True) -> Logged:
        """From a run as W&B tells it; its history merged on the optimiser step."""
        where = {"wandb": "the W&B file", "wandb_api": "the W&B server"}[source]
        return cls(
            source=source, where=where, run=run, key=key, history=from_rows(run.history, name, key, []), read=read
        )

    @property
    def result(self) -> Result | None:
        """The result that the run logged at its end."""
        return logged_result(self.run.summary)


@dataclass(kw_only=True)
class CellFiles:
    """One cell with everything that was found of it."""

    name: str
    sweep: str
    run_id: str  # in W&B
    run_dir: Path
    config: Mapping[str, Any]
    recipe: Recipe
    now: CellNow
    data_hash: str | None
    history: History  # of metrics.jsonl
    merged: History  # of all sources, a later one for what the earlier ones lack
    logged: list[Logged] = field(default_factory=list)  # by W&B, the most trusted first
    source: str = "run_dir"  # of ``now.result``
    warnings: list[str] = field(default_factory=list)

    def warn(self, lines: Iterable[str]) -> None:
        """Say something of this cell."""
        self.warnings += [f"{self.name}: {line}" for line in lines]

    @property
    def lacking(self) -> bool:
        """Whether a further source may know more: the result, or steps up to where the run is known to have come."""
        history, status, steps = self.merged, self.now.status, self.recipe.steps
        if self.now.state in LIVE:
            return False
        if history.last_step is None or history.warnings:  # nothing, or torn
            return True
        if self.now.result is not None:
            return not history.reached(steps)
        return status is None or status.step >= steps or history.last_step < min(status.step, steps)


def read_run_directories(cells: Sequence[CellFiles], stored: Mapping[str, History], root: Path) -> None:
    """Put beside each cell the history in its metrics.jsonl, read where that is not in history.parquet already."""
    tasks = {}
    for cell in cells:
        path = cell.run_dir / "metrics.jsonl"
        if path.is_file():
            key = key_of([one for one in (path, cell.run_dir / "config.yaml") if one.is_file()], root)
            if cell.name not in stored or stored[cell.name].key != key:
                tasks[cell.name] = (path, cell.name, key)
            else:
                cell.history = stored[cell.name]
    fresh = dict(zip(tasks, read_all(list(tasks.values())), strict=True))
    for cell in cells:
        cell.history = cell.merged = fresh.get(cell.name, cell.history)
        cell.warn(cell.history.warnings)


def take_local(cell: CellFiles, stored: Mapping[str, History], root: Path, *, verify: bool) -> None:
    """Put the .wandb files beside a cell, where they may know more or are to be verified."""
    if not (verify or cell.lacking):
        return
    run = read_wandb_run(cell.run_dir, cell.run_id, accepts=lambda config: _of_cell(config, cell))
    if run is not None:
        key = key_of(wandb_files(cell.run_dir), root)
        _take(cell, Logged.of(run, cell.name, source="wandb", key=key), stored)


def id_of(config: Mapping[str, Any], data_hash: str | None) -> str:
    """The id of the cell of a config; where nothing tells its data, the id that launch computed and wrote down.

    Raises what is in UNREADABLE.
    """
    if data_hash is None and isinstance(config.get("cell_id"), str):
        return str(config["cell_id"])
    return cell_id(config, steps=derive(config).steps, data_hash=data_hash)


def _of_cell(config: Mapping[str, Any], cell: CellFiles) -> bool:
    """Whether an attempt that had this config was one of this cell; one that does not tell may be."""
    record = config.get("record")
    said = record.get("data_hash") if isinstance(record, dict) else None
    try:
        return id_of(config, said if isinstance(said, str) else cell.data_hash) == cell.name
    except UNREADABLE:
        return True


def take_remote(cells: Iterable[CellFiles], server: Server, stored: Mapping[str, History], *, verify: bool) -> None:
    """Put the server's runs beside their cells; a history is asked for where it knows more, or is to be verified."""
    there = [cell for cell in cells if cell.run_id in server.runs]

    def in_store(cell: CellFiles) -> bool:
        key = cell.merged.key + server.runs[cell.run_id].key
        return cell.name in stored and stored[cell.name].key == key

    wanted = {cell.run_id for cell in there if cell.lacking and _knows_more(cell, server.runs[cell.run_id])}
    read = {cell.run_id for cell in there if verify or (cell.run_id in wanted and not in_store(cell))}
    server.read_histories(sorted(read))
    for cell in there:
        run = server.runs[cell.run_id]
        one = Logged.of(run, cell.name, source="wandb_api", key=run.key, read=cell.run_id in read)
        if not one.read and in_store(cell):
            one.history = stored[cell.name]
        _take(cell, one, stored)


def _knows_more(cell: CellFiles, run: WandbRun) -> bool:
    """Whether what a server says of a run without its history, the last values, promises more than was found."""
    last, found, steps = run.summary.get("step"), cell.merged, cell.recipe.steps
    if not isinstance(last, (int, float)) or found.last_step is None or found.warnings:
        return True
    return last > found.last_step or (last >= steps and not found.reached(steps))


def _take(cell: CellFiles, one: Logged, stored: Mapping[str, History]) -> None:
    """Put one source beside a cell: the history that the earlier ones lack, and the result if they have none."""
    if cell.lacking and one.history.num_rows:
        known, key = stored.get(cell.name), cell.merged.key + one.key
        cell.merged = known if known is not None and known.key == key else filled(cell.merged, one.history, key)
    cell.logged.append(one)
    if cell.now.result is not None or cell.now.state in LIVE or read_result(cell.run_dir) is not None:
        return
    result = one.result
    if result is not None and (result.cell_id, result.step) == (cell.name, cell.recipe.steps):
        cell.now = dataclasses.replace(cell.now, state=State.DONE, reason=None, result=result)
        cell.source = one.source


def settle(cell: CellFiles) -> None:
    """Say what W&B said, and take the state from it where nothing else tells."""
    for one in cell.logged:
        cell.warn(one.run.warnings + one.history.warnings)
        if one.run.unread is not None:
            cell.warn([f"its history on the W&B server could not be read: {one.run.unread}"])
    if cell.now.result is not None and not cell.merged.reached(cell.recipe.steps):
        ends = "is nowhere" if cell.merged.last_step is None else f"ends at step {cell.merged.last_step}"
        cell.warn([f"its history {ends}, of {cell.recipe.steps} steps: no source that was read has the rest"])
    if cell.now.state is State.PLANNED and cell.logged:
        runs = [one.run for one in cell.logged]
        speaks = next((run for run in runs if run.exit_code is not None or run.state is not None), runs[0])
        cell.now = dataclasses.replace(cell.now, **_word_of(speaks))


def _word_of(run: WandbRun) -> dict[str, Any]:
    """(state, reason) of a cell that only W&B knows, and that left no result there."""
    if run.exit_code is not None:
        return {"state": state_of_exit(run.exit_code) if run.exit_code else State.LOST, "reason": "W&B's last word"}
    if run.state is None:
        return {"state": State.LOST, "reason": "its .wandb file has no end"}
    return {"state": STATES.get(run.state, State.LOST), "reason": f"W&B says {run.state}"}
