"""collect: run directories, .wandb files, runs on a W&B server -> runs.csv, excluded.csv, history.parquet. Of cli.

One row per cell, in the order of the plan. A cell that is not done, or whose result is not what was planned, goes to
excluded.csv with the reason. What is missing stays missing. The run directory counts, then local .wandb files, then
the server; ``verify`` reads them all and reports where they disagree.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dlm.errors import UserError
from dlm.files import write_if_changed
from dlm.groups import load_yaml
from dlm.history import (
    HISTORY_COLUMNS,
    History,
    key_of,
    read_all,
    same,
    stored_histories,
    with_run_id,
    write_histories,
)
from dlm.identity import cell_id
from dlm.ledger import CellNow, cells_now, run_directory, state_of_exit
from dlm.recipe import Recipe, derive
from dlm.record import EXCLUDED_COLUMNS, RUN_COLUMNS, RunRow, State, read_result
from dlm.runrow import CellFiles, Logged, did_not_learn, run_row
from dlm.wandb_file import WandbRun, read_wandb_run, wandb_files

if TYPE_CHECKING:
    import pandas as pd

    from dlm.mapping import Mapping as MappingFile

# What W&B's own word for the state of a run says where nothing else says it.
STATES = {"running": State.RUNNING, "pending": State.SUBMITTED, "preempting": State.RUNNING,
          "preempted": State.PREEMPTED, "failed": State.FAILED}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a sweep has to show: data frames with the columns of record.RunRow, and what did not agree."""

    runs: pd.DataFrame
    excluded: pd.DataFrame  # and a column ``reason``
    histories: Sequence[History]  # of every cell that logged something
    warnings: list[str]

    @functools.cached_property
    def history(self) -> pd.DataFrame:
        """Every logged step of every cell, read when it is asked for: columns HISTORY_COLUMNS."""
        import pandas as pd
        import pyarrow as pa

        if not self.histories:
            return pd.DataFrame(columns=list(HISTORY_COLUMNS))
        table: pd.DataFrame = pa.concat_tables([with_run_id(history) for history in self.histories]).to_pandas()
        return table


class Server(Protocol):
    """Runs on a W&B server, as wandb_api.Project has them: histories only where they were asked for."""

    runs: dict[str, WandbRun]

    def read_histories(self, run_ids: Iterable[str]) -> None:
        """Fill in ``history`` of these runs."""


def collect(sweep_dir: Path, *, write: bool = True, verify: bool = False, server: Server | None = None) -> Collected:
    """Read every cell of a sweep (of its plan.json; without one, every run there is) and write the three files.

    ``verify`` also checks every history against its .wandb files and the ``server``; without it they are read for what
    the run directory lacks. Raises UserError when there is neither a plan nor a run.
    """
    sweep_dir = Path(sweep_dir)
    stored = stored_histories(sweep_dir / "history.parquet")
    remote = {} if server is None else server.runs
    cells, left_out, warnings = _cells(sweep_dir, remote)
    for cell, history in zip(cells, _histories(cells, stored, sweep_dir), strict=True):
        cell.history = history
        cell.warn(history.warnings)
    for cell in cells:
        _take_local(cell, sweep_dir, verify=verify)
    if server is not None:
        _take_remote(cells, server, stored, verify=verify)
    for cell in cells:
        _settle(cell, stored)
    runs, excluded = _rows(cells)
    excluded += left_out
    found = [history for cell in cells if (history := cell.best_history).num_rows]
    warnings += [line for cell in cells for line in cell.warnings]
    if write:
        found = _write_history(sweep_dir / "history.parquet", found, stored)
    collected = Collected(
        runs=frame(runs, RUN_COLUMNS), excluded=frame(excluded, EXCLUDED_COLUMNS), histories=found, warnings=warnings
    )
    if write:
        write_tables(sweep_dir, collected.runs, collected.excluded)
    return collected


def _rows(cells: Iterable[CellFiles]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of runs.csv, rows of excluded.csv)."""
    runs, excluded = [], []
    entropies = _entropies(cells)
    for cell in cells:
        row, reason = run_row(cell)
        reason = reason or did_not_learn(cell, row, entropies)
        if reason is None:
            runs.append(row)
        else:
            excluded.append({**row, "reason": reason})
    return runs, excluded


def _cells(sweep_dir: Path, remote: Mapping[str, WandbRun]) -> tuple[list[CellFiles], list[dict[str, Any]], list[str]]:
    """Every cell with its config, recipe and state; rows of excluded.csv of what is no cell; and warnings."""
    from dlm.plan import cell_config, read_plan

    hashes: dict[str, str | None] = {}
    sweeps: dict[str, str] = {}
    title = sweep_dir.name
    beside: dict[str, Any] = {}  # run directories that are no planned cell
    if (sweep_dir / "plan.json").is_file():
        plan = read_plan(sweep_dir)
        known = {cell.cell_id: cell_config(cell.groups, cell.overrides) for cell in plan.cells}
        hashes = {cell.cell_id: plan.data_hash for cell in plan.cells if cell.groups["data"] == plan.data}
        found = sorted(path.parent.name for path in sweep_dir.glob("runs/*/config.yaml"))
        beside = {name: sweep_dir / "runs" / name / "config.yaml" for name in found if name not in known}
    else:
        known = {path.parent.name: load_yaml(path) for path in sorted(sweep_dir.glob("runs/*/config.yaml"))}
        known |= _configs_in_wandb(sweep_dir, known)
        for run in remote.values():
            name = run.config.get("cell_id")
            if name and name not in known:
                known[name], sweeps[name] = run.config, run.group or title
        known = dict(sorted(known.items()))
    if not known:
        raise UserError(f"{sweep_dir} holds neither a plan.json nor a run: give the folder of a sweep")
    recipes, unreadable = _recipes(known, title)
    known = {name: known[name] for name in recipes}
    now, warnings = _states(sweep_dir, {name: recipe.steps for name, recipe in recipes.items()})
    cells = [
        CellFiles(
            name=name,
            sweep=sweeps.get(name, title),
            run_dir=run_directory(sweep_dir, name),
            config=config,
            recipe=recipes[name],
            now=now[name],
            data_hash=hashes.get(name),
            history=History(run_id=name, key=[]),
        )
        for name, config in known.items()
    ]
    left_out = [*unreadable, *(_beside(name, path, title, known) for name, path in beside.items())]
    left_out += _unknown_remotes(remote, {cell.run_id for cell in cells})
    return cells, left_out, warnings


def _recipes(known: Mapping[str, Any], sweep: str) -> tuple[dict[str, Recipe], list[dict[str, Any]]]:
    """What follows from each config; and a row of excluded.csv of each that cannot be read."""
    recipes, unreadable = {}, []
    for name, config in known.items():
        try:
            recipes[name] = derive(config)
        except (UserError, KeyError, TypeError, AttributeError) as error:
            reason = f"another config: its config cannot be read ({type(error).__name__}: {error})"
            unreadable.append({"run_id": name, "sweep": sweep, "status": "", "source": "", "reason": reason})
    return recipes, unreadable


def _states(sweep_dir: Path, steps: Mapping[str, int]) -> tuple[dict[str, CellNow], list[str]]:
    """What every cell is doing; nothing where there is no folder yet: all that is known is on a server."""
    if not sweep_dir.is_dir():
        return {name: CellNow(state=State.PLANNED) for name in steps}, []
    return cells_now(list(steps.items()), sweep_dir)


def _configs_in_wandb(sweep_dir: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Cell -> the config that its .wandb files hold, of run directories without a config.yaml."""
    configs = {}
    for run_dir in sorted({path.parent for path in sweep_dir.glob("runs/*/wandb") if path.parent.name not in known}):
        run = read_wandb_run(run_dir, f"{sweep_dir.name}-{run_dir.name}")
        if run is not None and "cell_id" in run.config:
            configs[run_dir.name] = run.config
    return configs


def _beside(name: str, config_path: Path, sweep: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a run directory that is no planned cell: a copy of one, or of another definition."""
    row = {"run_id": name, "sweep": sweep, "status": "", "source": ""}
    result = read_result(config_path.parent)
    try:
        config = load_yaml(config_path)
        data_hash = None if result is None else result.data_hash
        of = config.get("cell_id") or cell_id(config, steps=derive(config).steps, data_hash=data_hash)
    except (UserError, KeyError, TypeError, AttributeError) as error:
        return {**row, "reason": f"another config: no cell of the plan, and its config.yaml cannot be read ({error})"}
    if of in known:
        return {**row, "reason": f"duplicate: a second run directory of {of}; runs/{of} counts"}
    return {**row, "reason": f"another config: {of} is no cell of the plan"}


def _unknown_remotes(remote: Mapping[str, WandbRun], wanted: set[str]) -> list[dict[str, Any]]:
    """Rows of the runs on the server that are of no cell."""
    rows = []
    for name, run in remote.items():
        if name in wanted:
            continue
        why = "of no cell here" if "cell_id" in run.config else "dlm did not launch it: a --mapping can tell what it is"
        rows.append({"run_id": name, "sweep": run.group or "", "source": "wandb_api", "status": run.state or "",
                     "reason": f"another config: {why}"})  # fmt: skip
    return rows


def _histories(cells: Sequence[CellFiles], stored: Mapping[str, History], root: Path) -> Iterable[History]:
    """The history in each cell's metrics.jsonl; read where it changed since history.parquet was written."""
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
    return [fresh.get(cell.name, cell.history) for cell in cells]


def _take_local(cell: CellFiles, root: Path, *, verify: bool) -> None:
    """Put the .wandb files beside a cell, where they are needed or to be verified."""
    lacking = cell.now.result is None or not cell.history.num_rows
    local = read_wandb_run(cell.run_dir, cell.run_id) if verify or lacking else None
    if local is not None:
        key = key_of(wandb_files(cell.run_dir), root)
        cell.logged.append(Logged.of(local, cell.name, source="wandb", key=key))


def _take_remote(cells: Iterable[CellFiles], server: Server, stored: Mapping[str, History], *, verify: bool) -> None:
    """Put the server's runs beside their cells; a history is asked for where it is needed, new or to be verified."""
    there = [cell for cell in cells if cell.run_id in server.runs]

    def to_be_read(cell: CellFiles) -> bool:
        known = cell.name in stored and stored[cell.name].key == server.runs[cell.run_id].key
        whole = cell.best_history.num_rows and cell.now.result is not None
        return verify or not (known or whole)

    read = [cell.run_id for cell in there if to_be_read(cell)]
    server.read_histories(read)
    for cell in there:
        run = server.runs[cell.run_id]
        cell.logged.append(Logged.of(run, cell.name, source="wandb_api", key=run.key, read=cell.run_id in read))


def _settle(cell: CellFiles, stored: Mapping[str, History]) -> None:
    """Say what W&B said, and take the state from it where nothing else tells."""
    for one in cell.logged:
        if cell.name in stored and stored[cell.name].key == one.history.key:
            one.history = stored[cell.name]
        cell.warn(one.run.warnings + one.history.warnings)
    if cell.now.state is State.PLANNED and cell.logged:
        cell.now = dataclasses.replace(cell.now, **_word_of(cell.logged[0].run))


def collect_mapped(server: Server, mapping: MappingFile, folder: Path) -> Collected:
    """Runs that dlm did not launch, in dlm's terms -> the three files in ``folder``."""
    from dlm.mapping import history_key, map_run, mapped_history, without_duplicates

    stored = stored_histories(folder / "history.parquet")
    fresh = {
        run_id
        for run_id, run in server.runs.items()
        if run_id not in stored or stored[run_id].key != history_key(run, mapping)
    }
    server.read_histories(run_id for run_id in server.runs if run_id in fresh)
    mapped = []
    for run_id, run in server.runs.items():
        history = mapped_history(run, mapping) if run_id in fresh else stored[run_id]
        mapped.append(map_run(run, history, mapping))
    without_duplicates(mapped)
    warnings = [f"{run_id}: {line}" for run_id, run in server.runs.items() for line in run.warnings]
    warnings += [f"{one.row['run_id']}: {line}" for one in mapped for line in one.history.warnings]
    found = _write_history(folder / "history.parquet", [one.history for one in mapped], stored)
    runs = frame([one.row for one in mapped if one.reason is None], RUN_COLUMNS)
    excluded = [{**one.row, "reason": one.reason} for one in mapped if one.reason is not None]
    collected = Collected(runs=runs, excluded=frame(excluded, EXCLUDED_COLUMNS), histories=found, warnings=warnings)
    write_tables(folder, collected.runs, collected.excluded)
    return collected


def _word_of(run: WandbRun) -> dict[str, Any]:
    """(state, reason) of a cell that only W&B knows, and that left no result there."""
    if run.exit_code is not None:
        return {"state": state_of_exit(run.exit_code) if run.exit_code else State.LOST, "reason": "W&B's last word"}
    if run.state is None:
        return {"state": State.LOST, "reason": "its .wandb file has no end"}
    return {"state": STATES.get(run.state, State.LOST), "reason": f"W&B says {run.state}"}


def _entropies(cells: Iterable[CellFiles]) -> dict[str, float]:
    """Unigram entropy (nats/token) of each data set's validation text, from the results that state it."""
    stated = {}
    for cell in cells:
        if cell.now.result is not None:
            stated[cell.config["data"]["name"]] = cell.now.result.unigram_entropy
    return stated


def frame(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> pd.DataFrame:
    """A data frame with exactly ``columns``; whole numbers stay whole where some are missing."""
    import pandas as pd

    table = pd.DataFrame(rows, columns=list(columns))
    kinds = {item.name: str(item.type) for item in dataclasses.fields(RunRow)}
    dtypes = {"int": "Int64", "int | None": "Int64", "float": "float64", "float | None": "float64"}
    table = table.astype({name: dtypes[kind] for name, kind in kinds.items() if kind in dtypes})
    whole = [name for name, kind in kinds.items() if kind == "int" and not table[name].isna().any()]
    return table.astype(dict.fromkeys(whole, "int64"))


def _write_history(path: Path, found: Sequence[History], stored: Mapping[str, History]) -> list[History]:
    """Write history.parquet unless it holds exactly that; the histories as they lie in it."""
    if path.is_file() and same(found, stored):
        return list(found)
    write_histories(path, found)
    return list(stored_histories(path).values())


def write_tables(folder: Path, runs: pd.DataFrame, excluded: pd.DataFrame) -> None:
    """Write runs.csv and excluded.csv."""
    write_if_changed(folder / "runs.csv", runs.to_csv(index=False))
    write_if_changed(folder / "excluded.csv", excluded.to_csv(index=False))
