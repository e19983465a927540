"""collect: run directories and their offline W&B files -> runs.csv, excluded.csv, history.parquet. Called by cli.

One row per cell, in the order of the plan. A cell that is not done, or whose result is not what was planned, goes to
excluded.csv with the reason. What is missing stays missing. The run directory counts; W&B is checked against it.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.crosscheck import history_rows
from dlm.errors import UserError
from dlm.files import read_jsonl, write_atomic, write_if_changed
from dlm.groups import load_yaml
from dlm.ledger import cells_now, run_directory
from dlm.recipe import derive
from dlm.record import EXCLUDED_COLUMNS, RUN_COLUMNS, RunRow
from dlm.runrow import CellFiles, did_not_learn, run_row
from dlm.wandb_file import read_wandb_run

if TYPE_CHECKING:
    import pandas as pd

HISTORY_COLUMNS = (
    "run_id", "step", "tokens", "time", "train/loss", "val/loss", "val/loss_se", "lr", "grad_norm",
    "tokens_per_sec", "mfu",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a sweep has to show: data frames with the columns of record.RunRow, and what did not agree."""

    runs: pd.DataFrame
    excluded: pd.DataFrame  # and a column ``reason``
    history: pd.DataFrame  # every logged step of every cell
    warnings: list[str]


def collect(sweep_dir: Path, *, write: bool = True) -> Collected:
    """Read every cell of a sweep (of its plan.json; without one, every run directory) and write the three files.

    Raises UserError when there is neither a plan nor a run.
    """
    import pandas as pd

    sweep_dir = Path(sweep_dir)
    cells, warnings = _cells(sweep_dir)
    entropies = _entropies(cells)
    runs: list[dict[str, Any]] = []
    excluded: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []
    for cell in cells:
        metrics = history_rows(read_jsonl(cell.run_dir / "metrics.jsonl"), cell.warnings, cell.name)
        wandb = read_wandb_run(cell.run_dir, f"{sweep_dir.name}-{cell.name}")
        row, reason = run_row(cell, sweep_dir.name, metrics, wandb)
        reason = reason or did_not_learn(cell, row, entropies)
        (runs if reason is None else excluded).append(row if reason is None else {**row, "reason": reason})
        logged = metrics or (history_rows(wandb.history, cell.warnings, cell.name) if wandb else [])
        history += [{"run_id": cell.name, **logged_row} for logged_row in logged]
        warnings += cell.warnings
    collected = Collected(
        runs=_frame(runs, RUN_COLUMNS),
        excluded=_frame(excluded, EXCLUDED_COLUMNS),
        history=pd.DataFrame(history, columns=list(HISTORY_COLUMNS)),
        warnings=warnings,
    )
    if write:
        _write(sweep_dir, collected)
    return collected


def _cells(sweep_dir: Path) -> tuple[list[CellFiles], list[str]]:
    """Every cell with its config, recipe and state; and warnings."""
    from dlm.plan import cell_config, read_plan

    hashes: dict[str, str | None] = {}
    if (sweep_dir / "plan.json").is_file():
        plan = read_plan(sweep_dir)
        known = {cell.cell_id: cell_config(cell.groups, cell.overrides) for cell in plan.cells}
        hashes = {cell.cell_id: plan.data_hash for cell in plan.cells if cell.groups["data"] == plan.data}
    else:
        known = {path.parent.name: load_yaml(path) for path in sorted(sweep_dir.glob("runs/*/config.yaml"))}
    if not known:
        raise UserError(f"{sweep_dir} holds neither a plan.json nor a run: give the folder of a sweep")
    recipes = {name: derive(config) for name, config in known.items()}
    now, warnings = cells_now([(name, recipe.steps) for name, recipe in recipes.items()], sweep_dir)
    return [
        CellFiles(
            name=name,
            run_dir=run_directory(sweep_dir, name),
            config=config,
            recipe=recipes[name],
            now=now[name],
            data_hash=hashes.get(name),
        )
        for name, config in known.items()
    ], warnings


def _entropies(cells: Iterable[CellFiles]) -> dict[str, float]:
    """Unigram entropy (nats/token) of each data set's validation text, from the results that state it."""
    stated = {}
    for cell in cells:
        if cell.now.result is not None:
            stated[cell.config["data"]["name"]] = cell.now.result.unigram_entropy
    return stated


def _frame(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> pd.DataFrame:
    """A data frame with exactly ``columns``; whole numbers stay whole where some are missing."""
    import pandas as pd

    frame = pd.DataFrame(rows, columns=list(columns))
    kinds = {item.name: str(item.type) for item in dataclasses.fields(RunRow)}
    dtypes = {"int": "int64", "int | None": "Int64", "float": "float64", "float | None": "float64"}
    return frame.astype({name: dtypes[kind] for name, kind in kinds.items() if kind in dtypes})


def _write(sweep_dir: Path, collected: Collected) -> None:
    write_if_changed(sweep_dir / "runs.csv", collected.runs.to_csv(index=False))
    write_if_changed(sweep_dir / "excluded.csv", collected.excluded.to_csv(index=False))
    buffer = io.BytesIO()
    collected.history.to_parquet(buffer, index=False)
    write_atomic(sweep_dir / "history.parquet", buffer.getvalue())
