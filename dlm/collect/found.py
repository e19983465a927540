"""cells: a sweep's plan, its run directories, the runs on a server -> the cells to collect. Called by collect and sync.

Each with its config, what follows from it and its state. What is no cell gets a row of excluded.csv instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm.collect.history import History
from dlm.collect.sources import UNREADABLE, CellFiles, said_of
from dlm.collect.wandb_file import WandbRun, config_in_wandb
from dlm.core.configs import load_yaml
from dlm.core.errors import UserError
from dlm.core.identity import cell_id
from dlm.core.recipe import Recipe, derive
from dlm.plan.cells import Plan
from dlm.plan.grid import cell_config
from dlm.plan.store import read_plan
from dlm.record.outcomes import State
from dlm.record.run import read_result, run_directory
from dlm.record.wandb import logged_result
from dlm.submit.ledger import CellNow
from dlm.submit.state import cells_now

Row = dict[str, Any]


@dataclass(kw_only=True)
class Cells:
    """What there is to collect."""

    cells: list[CellFiles] = field(default_factory=list)
    left_out: list[Row] = field(default_factory=list)  # of excluded.csv
    warnings: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class _Known:
    """A cell before anything of its run was read."""

    config: Any
    sweep: str
    run_id: str  # in W&B
    data_hash: str | None = None


def run_directories(sweep_dir: Path) -> list[Path]:
    """The folders in which something ran, in order of their names."""
    signs = ("config.yaml", "metrics.jsonl", "result.json", "wandb")
    return sorted({path.parent for sign in signs for path in sweep_dir.glob(f"runs/*/{sign}")})


def config_of(run_dir: Path) -> dict[str, Any]:
    """The config that a run had: of its config.yaml, else of its .wandb files. Raises UserError when there is none."""
    path = run_dir / "config.yaml"
    config = load_yaml(path) if path.is_file() else config_in_wandb(run_dir)
    if not isinstance(config, dict) or "sweep" not in config:
        what = f"{path} is not the config of a run" if path.is_file() else f"{run_dir} has no config.yaml"
        raise UserError(f"{what}: move that folder away")
    return config


def sweep_names(sweep_dir: Path) -> list[str]:
    """The names that its runs logged under, which are not the folder's once that was moved or copied."""
    if (sweep_dir / "plan.json").is_file():
        return [read_plan(sweep_dir).spec.name]
    names = set()
    for run_dir in run_directories(sweep_dir):
        with contextlib.suppress(UserError):  # the others tell
            names.add(str(config_of(run_dir)["sweep"]))
    return sorted(names) or [sweep_dir.absolute().name]


def find_cells(sweep_dir: Path, remote: Mapping[str, WandbRun]) -> Cells:
    """The cells of the plan; without one, every run that there is. Raises UserError when there is neither."""
    found = Cells()
    run_dirs = run_directories(sweep_dir)
    if (sweep_dir / "plan.json").is_file():
        plan = read_plan(sweep_dir)
        known = _planned(plan)
        found.left_out += [_beside(one, plan.spec.name, known) for one in run_dirs if one.name not in known]
    else:
        title = sweep_dir.absolute().name
        known = _run(run_dirs, title, found)
        for run_id, run in sorted(remote.items(), key=lambda item: _worth(item[1]), reverse=True):
            name = run.config.get("cell_id")
            if isinstance(name, str) and name and name not in known:
                sweep = run.config.get("sweep")
                sweep = sweep if isinstance(sweep, str) else run.group or title
                known[name] = _Known(config=run.config, sweep=sweep, run_id=run_id)
        known = dict(sorted(known.items()))
    if not known and not run_dirs and remote:
        raise UserError(f"none of the {len(remote)} runs in that project was launched by dlm: give --mapping FILE too")
    if not known and not run_dirs:
        raise UserError(f"{sweep_dir} holds neither a plan.json nor a run: give the folder of a sweep")
    recipes = _recipes(known, found)
    now, found.warnings = _states(sweep_dir, {name: recipe.steps for name, recipe in recipes.items()})
    for name, recipe in recipes.items():
        one, history = known[name], History(run_id=name, key=[])
        found.cells.append(
            CellFiles(
                name=name,
                sweep=one.sweep,
                run_id=one.run_id,
                run_dir=run_directory(sweep_dir, name),
                config=one.config,
                recipe=recipe,
                now=now[name],
                data_hash=one.data_hash,
                history=history,
                merged=history,
            )
        )
    found.left_out += _unknown_remotes(remote, {cell.run_id for cell in found.cells}, known)
    return found


def _worth(run: WandbRun) -> tuple[bool, bool, str]:
    """Of several runs of one cell on a server the one with a result counts, else a finished one, else the latest."""
    heartbeat = run.version.partition("@")[2]
    return logged_result(run.summary) is not None, run.state == "finished", heartbeat


def _planned(plan: Plan) -> dict[str, _Known]:
    return {
        cell.cell_id: _Known(
            config=cell_config(cell.groups, cell.overrides),
            sweep=plan.spec.name,
            run_id=f"{plan.spec.name}-{cell.cell_id}",
            data_hash=plan.data_hash if cell.groups["data"] == plan.data else None,
        )
        for cell in plan.cells
    }


def _run(run_dirs: Iterable[Path], title: str, found: Cells) -> dict[str, _Known]:
    """The cells of run directories, where no plan says what they were to be."""
    known = {}
    for run_dir in run_dirs:
        try:
            config = config_of(run_dir)
        except UserError as error:
            found.left_out.append(_row(run_dir.name, title, f"another config: its config cannot be read ({error})"))
            continue
        sweep = str(config["sweep"])
        known[run_dir.name] = _Known(config=config, sweep=sweep, run_id=f"{sweep}-{run_dir.name}")
    return known


def _row(run_id: str, sweep: str, reason: str, *, source: str = "", status: str = "") -> Row:
    return {"run_id": run_id, "sweep": sweep, "status": status, "source": source, "reason": reason}


def _recipes(known: Mapping[str, _Known], found: Cells) -> dict[str, Recipe]:
    """What follows from each config."""
    recipes = {}
    for name, one in known.items():
        try:
            _check_columns(one.config)
            recipes[name] = derive(one.config)
        except UNREADABLE as error:
            reason = f"another config: its config cannot be read ({said_of(error)})"
            found.left_out.append(_row(name, one.sweep, reason))
    return recipes


def _check_columns(config: Mapping[str, Any]) -> None:
    """Raises what is in UNREADABLE where a config lacks what goes into a row as it is."""
    float(config["optimizer"]["lr"])
    int(config["seed"])
    for node in ("objective", "scheduler", "data"):
        if not isinstance(config[node]["name"], str):
            raise TypeError(f"{node}.name is {config[node]['name']!r}")


def _states(sweep_dir: Path, steps: Mapping[str, int]) -> tuple[dict[str, CellNow], list[str]]:
    """What every cell is doing; nothing where there is no folder yet: all that is known is on a server."""
    if not sweep_dir.is_dir():
        return {name: CellNow(state=State.PLANNED) for name in steps}, []
    return cells_now(list(steps.items()), sweep_dir)


def _beside(run_dir: Path, sweep: str, known: Mapping[str, Any]) -> Row:
    """The row of a run directory that is no planned cell: a copy of one, or of another definition."""
    result = read_result(run_dir)
    try:
        config = config_of(run_dir)
        data_hash = None if result is None else result.data_hash
        of = config.get("cell_id") or cell_id(config, steps=derive(config).steps, data_hash=data_hash)
    except UNREADABLE as error:
        reason = f"another config: no cell of the plan, and its config cannot be read ({said_of(error)})"
        return _row(run_dir.name, sweep, reason)
    if of in known and run_dir.with_name(of).is_dir():
        return _row(run_dir.name, sweep, f"duplicate: a second run directory of {of}; runs/{of} counts")
    if of in known:
        return _row(run_dir.name, sweep, f"another config: it is of {of}, which has no folder: give it that name")
    return _row(run_dir.name, sweep, f"another config: {of} is no cell of the plan")


def _unknown_remotes(remote: Mapping[str, WandbRun], wanted: set[str], known: Mapping[str, _Known]) -> list[Row]:
    """Rows of the runs on the server that are of no cell; ``wanted`` are those that are."""
    rows = []
    for run_id, run in remote.items():
        of = run.config.get("cell_id")
        ours = known.get(of) if isinstance(of, str) else None
        if run_id in wanted or (ours is not None and ours.run_id == run_id):  # the latter has its row
            continue
        reason = "another config: dlm did not launch it: a --mapping can tell what it is"
        if ours is not None:
            reason = f"duplicate: it is of {of}, whose run here is {ours.run_id}"
        elif of is not None:
            reason = "another config: of no cell here"
        rows.append(_row(run_id, run.group or "", reason, source="wandb_api", status=run.state or ""))
    return rows
