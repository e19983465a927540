"""Collect a sweep, or the runs of a W&B project, into runs.csv, excluded.csv and history.parquet.

runs.csv has one row per cell, in the order of the plan. A cell that is not done, or whose result does not match the
plan, goes to excluded.csv with the reason. Missing values are never filled in.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.collect.agreement import check_second_source
from dlm.collect.exclusion import Excluded
from dlm.collect.found import find_cells
from dlm.collect.history import HISTORY_COLUMNS, History, stored_histories, with_run_id, write_histories
from dlm.collect.row import COLUMN_TYPES, run_row
from dlm.collect.sources import Server, read_local_wandb, read_run_directories, read_server, settle
from dlm.core.files import write_if_changed
from dlm.core.names import encodable
from dlm.record.columns import EXCLUDED_COLUMNS, RUN_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

    from dlm.collect.mapping import RunMapping

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The tables of a sweep."""

    runs: pd.DataFrame  # the columns of record.RunRow
    excluded: pd.DataFrame  # the columns of record.RunRow, ``cause`` and ``reason``
    histories: Sequence[History]  # one for every cell that logged something
    warnings: list[str]  # about sources that disagree or are damaged
    unconfirmed: tuple[str, ...] = ()  # with ``verify``: the cells whose loss no second source has; see agreement.py

    @functools.cached_property
    def history(self) -> pd.DataFrame:
        """All logged steps of all cells, with HISTORY_COLUMNS. The table is read on first access."""
        import pandas as pd
        import pyarrow as pa

        if not self.histories:
            return pd.DataFrame(columns=list(HISTORY_COLUMNS))
        table: pd.DataFrame = pa.concat_tables([with_run_id(history) for history in self.histories]).to_pandas()
        return table


def collect(
    sweep_dir: Path,
    *,
    write: bool = True,
    verify: bool = False,
    server: Server | None = None,
    out: Path | None = None,
) -> Collected:
    """Read every cell of a sweep and write the three tables into the folder of the sweep, or into ``out``.

    Args:
        sweep_dir: The folder of the sweep. Without a plan.json, every run found there or on the server is a cell.
        write: Write the files. False leaves them unchanged.
        verify: Compare every run with its validation.csv, its .wandb files and the server, and read all files again. By
            default W&B's sources are read only where the run directory is incomplete.
        server: Runs on a W&B server, to complete and verify the files on disk.
        out: The folder of the tables. None: ``sweep_dir``.

    Raises:
        UserError: There is neither a plan nor a run.
    """
    sweep_dir = Path(sweep_dir)
    folder = sweep_dir if out is None else out
    stored = stored_histories(folder / "history.parquet")
    found = find_cells(sweep_dir, {} if server is None else server.runs)
    read_run_directories(found.cells, {} if verify else stored, sweep_dir)
    for cell in found.cells:
        read_local_wandb(cell, sweep_dir, verify=verify)
    if server is not None:
        read_server(found.cells, server, verify=verify)
    for cell in found.cells:
        settle(cell)
    results = [(cell.config["data"]["name"], cell.now.result) for cell in found.cells]
    entropies = {data: result.unigram_entropy for data, result in results if result is not None}
    rows = [run_row(cell, entropies) for cell in found.cells]
    unconfirmed = [
        cell.name
        for cell, (row, excluded) in zip(found.cells, rows, strict=True)
        if verify and excluded is None and not check_second_source(cell, row)
    ]
    rows += found.left_out
    histories = [cell.merged for cell in found.cells if cell.merged.num_rows]
    warnings = found.warnings + [line for cell in found.cells for line in cell.warnings]
    if unconfirmed:
        have = "1 run has" if len(unconfirmed) == 1 else f"{len(unconfirmed)} runs have"
        warnings.append(f"{have} no second source, so nothing confirms the loss: {', '.join(unconfirmed)}")
    collected = _tables(folder if write else None, rows, histories, stored, warnings)
    return replace(collected, unconfirmed=tuple(unconfirmed))


def collect_mapped(server: Server, mapping: RunMapping, folder: Path) -> Collected:
    """Collect runs that dlm did not launch into the three tables in ``folder``.

    Args:
        server: The runs of a W&B project.
        mapping: How the names in the configs and histories of these runs translate into columns.
        folder: Where to write. An unchanged history in the history.parquet of this folder is not requested again.
    """
    from dlm.collect.mapped import map_history, map_run, mark_duplicates
    from dlm.collect.mapping import check_metrics

    stored = stored_histories(folder / "history.parquet")
    runs = server.runs
    fresh = [one for one in runs if one not in stored or stored[one].key != runs[one].key(mapping.hash)]
    server.read_histories(fresh)
    if len(fresh) == len(runs):
        check_metrics(mapping, runs.values(), "the project")
    histories = {one: map_history(runs[one], mapping) if one in fresh else stored[one] for one in runs}
    mapped = [map_run(run, histories[run_id], mapping) for run_id, run in runs.items()]
    mark_duplicates(mapped)
    warnings = [f"{run_id}: {line}" for run_id, run in runs.items() for line in run.warnings]
    warnings += [f"{run_id}: {line}" for run_id, history in histories.items() for line in history.warnings]
    one_short = [str(one.row["run_id"]) for one in mapped if one.is_one_short and one.excluded is None]
    if one_short:
        warnings.append(
            "finished runs whose last step is one below columns.steps count as whole, because many programs count "
            f"steps from 0: {len(one_short)} (first: {one_short[0]}); columns.step_offset: 1 states that"
        )
    rows = [(one.row, one.excluded) for one in mapped]
    return _tables(folder, rows, list(histories.values()), stored, warnings)


def _tables(
    folder: Path | None,
    rows: Sequence[tuple[Row, Excluded | None]],
    histories: Sequence[History],
    stored: Mapping[str, History],
    warnings: list[str],
) -> Collected:
    """Make the tables and write them into ``folder``, unless ``folder`` is None."""
    from dlm.fit.csv_file import as_csv

    runs = [row for row, excluded in rows if excluded is None]
    left_out = [
        {**row, "cause": str(excluded.cause), "reason": str(excluded)} for row, excluded in rows if excluded is not None
    ]
    collected = Collected(
        runs=_frame(runs, RUN_COLUMNS),
        excluded=_frame(left_out, EXCLUDED_COLUMNS),
        histories=histories if folder is None else _write_history(folder / "history.parquet", histories, stored),
        warnings=warnings,
    )
    if folder is not None:
        write_if_changed(folder / "runs.csv", as_csv(collected.runs))
        write_if_changed(folder / "excluded.csv", as_csv(collected.excluded))
    return collected


def _frame(rows: list[Row], columns: tuple[str, ...]) -> pd.DataFrame:
    """Make a data frame with exactly ``columns``; integer columns stay integer even where values are missing."""
    import pandas as pd

    rows = [{name: encodable(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows]
    table = pd.DataFrame(rows, columns=list(columns))
    numbers = {name: kind for name, kind in COLUMN_TYPES.items() if "str" not in kind}
    table = table.astype({name: "Int64" if "int" in kind else "float64" for name, kind in numbers.items()})
    whole = [name for name, kind in COLUMN_TYPES.items() if kind == "int" and not table[name].isna().any()]
    return table.astype(dict.fromkeys(whole, "int64"))


def _write_history(path: Path, found: Sequence[History], stored: Mapping[str, History]) -> Sequence[History]:
    """Write history.parquet unless it already holds exactly ``found``; return the histories as stored in the file."""
    same_runs = [history.run_id for history in found] == list(stored)
    if path.is_file() and same_runs and all(history.table is None for history in found):
        return found
    write_histories(path, found)
    return list(stored_histories(path).values())
