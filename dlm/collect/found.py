"""Find the cells of a sweep in its plan, in its run directories and among the runs on a W&B server.

A run that belongs to none of the cells gets a row in excluded.csv instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm import record
from dlm.collect.exclusion import Cause, Excluded
from dlm.collect.sources import UNREADABLE, Candidate, FoundCell, describe, id_of
from dlm.collect.wandb_file import WandbRun, config_in_wandb
from dlm.core.configs import load_yaml
from dlm.core.errors import UserError
from dlm.core.recipe import derive
from dlm.plan.cells import Plan
from dlm.plan.grid import cell_config
from dlm.plan.store import read_plan
from dlm.record.outcomes import State
from dlm.record.run import read_result, run_directory
from dlm.record.wandb import logged_result
from dlm.submit.cell_now import CellNow
from dlm.submit.state import cells_now

Row = dict[str, Any]


@dataclass(kw_only=True)
class Found:
    """The cells to collect, and the runs that are left out."""

    cells: list[FoundCell] = field(default_factory=list)
    left_out: list[tuple[Row, Excluded]] = field(default_factory=list)  # incomplete rows for excluded.csv
    warnings: list[str] = field(default_factory=list)

    def leave_out(
        self, run_id: str, sweep: str, cause: Cause, details: str, *, source: str = "", status: str = ""
    ) -> None:
        """Add a run that belongs to no cell, or whose config cannot be read."""
        row = {"run_id": run_id, "sweep": sweep, "status": status, "source": source}
        self.left_out.append((row, Excluded(cause, details)))


def run_directories(sweep_dir: Path) -> list[Path]:
    """Return the folders of runs/ that hold files of a run, in order of their names."""
    signs = ("config.yaml", "metrics.jsonl", "result.json", "wandb")
    return sorted({path.parent for sign in signs for path in sweep_dir.glob(f"runs/*/{sign}")})


def config_of(run_dir: Path) -> dict[str, Any]:
    """Read the config of a run from config.yaml, or else from a .wandb file. Raises UserError if neither has it."""
    path = run_dir / "config.yaml"
    config = load_yaml(path) if path.is_file() else config_in_wandb(run_dir)
    if not isinstance(config, dict) or "sweep" not in config:
        what = f"{path} is not the config of a run" if path.is_file() else f"{run_dir} has no config.yaml"
        raise UserError(f"{what}: move that folder away")
    return config


def sweep_names(sweep_dir: Path) -> list[str]:
    """Return the sweep names under which the runs were logged; a moved or copied folder may have another name."""
    if (sweep_dir / "plan.json").is_file():
        return [read_plan(sweep_dir).spec.name]
    names = set()
    for run_dir in run_directories(sweep_dir):
        with contextlib.suppress(UserError):  # the other runs have the name
            names.add(str(config_of(run_dir)["sweep"]))
    return sorted(names) or [sweep_dir.absolute().name]


def find_cells(sweep_dir: Path, remote: Mapping[str, WandbRun]) -> Found:
    """Find the cells of the plan; without a plan, every run in the folder or on the server is a cell.

    Args:
        sweep_dir: The folder of the sweep.
        remote: The runs on a W&B server by their ids; {} without a server.

    Raises:
        UserError: There is neither a plan nor a run.
    """
    found = Found()
    run_dirs = run_directories(sweep_dir)
    if (sweep_dir / "plan.json").is_file():
        plan = read_plan(sweep_dir)
        candidates = _planned(plan)
        for run_dir in run_dirs:
            if run_dir.name not in candidates:
                _leave_out_directory(found, run_dir, plan.spec.name, candidates)
    else:
        title = sweep_dir.absolute().name
        candidates = _on_server(remote, title) | _in_folder(run_dirs, title, found)
        candidates = dict(sorted(candidates.items()))
    if not candidates and not run_dirs and remote:
        raise UserError(f"none of the {len(remote)} runs in that project was launched by dlm: give --mapping FILE too")
    if not candidates and not run_dirs:
        raise UserError(f"{sweep_dir} holds neither a plan.json nor a run: give the folder of a sweep")
    _add_cells(found, candidates.values(), sweep_dir)
    _leave_out_runs(found, remote, candidates)
    return found


def _planned(plan: Plan) -> dict[str, Candidate]:
    """Return the cells of the plan by their ids."""
    return {
        cell.cell_id: Candidate(
            name=cell.cell_id,
            config={
                **cell_config(cell.groups, cell.overrides),
                "forecast": cell.forecast,
                "parent": cell.parent,
                "role": cell.role,
            },
            sweep=plan.spec.name,
            run_id=record.run_id(plan.spec.name, cell.cell_id),
            data_hash=plan.data_hash if cell.groups["data"] == plan.data else None,
        )
        for cell in plan.cells
    }


def _in_folder(run_dirs: Iterable[Path], title: str, found: Found) -> dict[str, Candidate]:
    """Return the cells of run directories by their ids, for a sweep without a plan."""
    candidates = {}
    for run_dir in run_dirs:
        name = run_dir.name
        try:
            config = config_of(run_dir)
        except UserError as error:
            found.leave_out(name, title, Cause.OTHER_CONFIG, f"its config cannot be read ({error})")
            continue
        sweep = str(config["sweep"])
        candidates[name] = Candidate(name=name, config=config, sweep=sweep, run_id=record.run_id(sweep, name))
    return candidates


def _on_server(remote: Mapping[str, WandbRun], title: str) -> dict[str, Candidate]:
    """Return the cells of runs on a server by their ids, for a sweep without a plan; the best run of each counts."""
    candidates = dict[str, Candidate]()
    for run_id, run in sorted(remote.items(), key=lambda item: _worth(item[1]), reverse=True):
        name, sweep = run.config.get("cell_id"), run.config.get("sweep")
        if isinstance(name, str) and name:
            sweep = sweep if isinstance(sweep, str) else run.group or title
            candidates.setdefault(name, Candidate(name=name, config=run.config, sweep=sweep, run_id=run_id))
    return candidates


def _worth(run: WandbRun) -> tuple[bool, bool, str]:
    """Return a sort key for runs of one cell: runs with a result rank highest, then finished runs, then the latest."""
    heartbeat = run.version.partition("@")[2]
    return logged_result(run.summary) is not None, run.state == "finished", heartbeat


def _add_cells(found: Found, candidates: Iterable[Candidate], sweep_dir: Path) -> None:
    """Turn candidates into cells with their recipes and states; leave out cells whose config cannot be read."""
    cells = []
    for one in candidates:
        try:
            _check_columns(one.config)
            recipe = derive(one.config)
            run_dir = run_directory(sweep_dir, one.name)  # the name may come from a server
        except UNREADABLE as error:
            details = f"its config cannot be read ({describe(error)})"
            found.leave_out(one.name, one.sweep, Cause.OTHER_CONFIG, details)
            continue
        now = CellNow(state=State.PLANNED)
        cells.append(FoundCell(**vars(one), run_dir=run_dir, recipe=recipe, now=now))
    if sweep_dir.is_dir():  # otherwise everything that is known is on a server
        states, found.warnings = cells_now([(cell.name, cell.recipe.steps) for cell in cells], sweep_dir)
        for cell in cells:
            cell.now = states[cell.name]
    found.cells = cells


def _check_columns(config: Mapping[str, Any]) -> None:
    """Check that a config has the values that runs.csv takes from it. Raises one of UNREADABLE if it does not."""
    float(config["optimizer"]["lr"])
    int(config["seed"])
    for node in ("objective", "scheduler", "data"):
        if not isinstance(config[node]["name"], str):
            raise TypeError(f"{node}.name is {config[node]['name']!r}")


def _leave_out_directory(found: Found, run_dir: Path, sweep: str, candidates: Mapping[str, Any]) -> None:
    """Leave out a run directory that is not a planned cell, such as a copy or a cell of another definition."""
    result = read_result(run_dir)
    cause = Cause.OTHER_CONFIG
    try:
        config = config_of(run_dir)
        name = config.get("cell_id") or id_of(config, None if result is None else result.data_hash)
    except UNREADABLE as error:
        details = f"no cell of the plan, and its config cannot be read ({describe(error)})"
    else:
        if name not in candidates:
            details = f"{name} is no cell of the plan"
        elif run_dir.with_name(name).is_dir():
            cause, details = Cause.DUPLICATE, f"a second run directory of {name}; runs/{name} counts"
        else:
            details = f"it is a run of {name}, which has no folder: give this folder that name"
    found.leave_out(run_dir.name, sweep, cause, details)


def _leave_out_runs(found: Found, remote: Mapping[str, WandbRun], candidates: Mapping[str, Candidate]) -> None:
    """Leave out the runs on the server that belong to none of ``candidates``."""
    run_ids = {one.run_id for one in candidates.values()}
    for run_id, run in remote.items():
        if run_id in run_ids:
            continue
        name, cause = run.config.get("cell_id"), Cause.OTHER_CONFIG
        if isinstance(name, str) and name in candidates:
            cause, details = Cause.DUPLICATE, f"it is a run of {name}, whose run here is {candidates[name].run_id}"
        elif name is not None:
            details = f"it is a run of {name}, which is no cell here"
        else:
            details = "dlm did not launch it: a --mapping can tell what it is"
        found.leave_out(run_id, run.group or "", cause, details, source="wandb_api", status=run.state or "")
