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
from typing import TYPE_CHECKING, Any

from dlm.collect.found import find_cells
from dlm.collect.history import HISTORY_COLUMNS, History, same, stored_histories, with_run_id, write_histories
from dlm.collect.row import did_not_learn, run_row
from dlm.collect.sources import CellFiles, Server, read_run_directories, settle, take_local, take_remote
from dlm.core.files import write_if_changed
from dlm.record.columns import EXCLUDED_COLUMNS, RUN_COLUMNS, RunRow

if TYPE_CHECKING:
    import pandas as pd

    from dlm.collect.mapping import Mapping as MappingFile


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


def collect(sweep_dir: Path, *, write: bool = True, verify: bool = False, server: Server | None = None) -> Collected:
    """Read every cell of a sweep (of its plan.json; without one, every run there is) and write the three files.

    ``verify`` also checks every history against its .wandb files and the ``server``; without it they are read for what
    the run directory lacks. Raises UserError when there is neither a plan nor a run.
    """
    sweep_dir = Path(sweep_dir)
    stored = stored_histories(sweep_dir / "history.parquet")
    there = find_cells(sweep_dir, {} if server is None else server.runs)
    cells = there.cells
    read_run_directories(cells, stored, sweep_dir)
    for cell in cells:
        take_local(cell, stored, sweep_dir, verify=verify)
    if server is not None:
        take_remote(cells, server, stored, verify=verify)
    for cell in cells:
        settle(cell)
    runs, excluded = _rows(cells)
    excluded += there.left_out
    found = [cell.merged for cell in cells if cell.merged.num_rows]
    warnings = there.warnings + [line for cell in cells for line in cell.warnings]
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


def collect_mapped(server: Server, mapping: MappingFile, folder: Path) -> Collected:
    """Runs that dlm did not launch, in dlm's terms -> the three files in ``folder``."""
    from dlm.collect.mapping import check_metrics, history_key, map_run, mapped_history, without_duplicates

    stored = stored_histories(folder / "history.parquet")
    fresh = {
        run_id
        for run_id, run in server.runs.items()
        if run_id not in stored or stored[run_id].key != history_key(run, mapping)
    }
    server.read_histories(run_id for run_id in server.runs if run_id in fresh)
    if len(fresh) == len(server.runs):
        check_metrics(mapping, server.runs.values(), "the project")
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
