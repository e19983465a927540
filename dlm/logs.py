"""logs: a cell's name -> the files that tell what it and its batch job said. Called by cli."""

from __future__ import annotations

from pathlib import Path

from dlm import locate
from dlm.errors import UserError, close_matches
from dlm.ledger import cells_now, reconciled, run_directory


def find_run(cell: str, sweep_dir: Path | None = None) -> Path:
    """The run directory behind an id, a part of one, or a path. Raises UserError where there is none, or several."""
    if (path := Path(cell).absolute()).parent.name == "runs" and path.is_dir():
        return path
    folders = [sweep_dir] if sweep_dir is not None else sorted(path.parent for path in locate.workdir().glob("*/runs"))
    runs = [run for folder in folders for run in sorted((folder / "runs").glob("*")) if run.is_dir()]
    found = [run for run in runs if run.name == cell] or [run for run in runs if cell in run.name]
    if not found:
        near = close_matches(cell, [run.name for run in runs])
        hint = f"did you mean {' or '.join(near)}?" if near else f"none of {len(runs)} runs has that in its name"
        raise UserError(f"no run of {cell!r} in {sweep_dir or locate.workdir()}: {hint}")
    if len(found) > 1:
        some = ", ".join(f"{run.name} in {run.parents[1].name}" for run in found[:3])
        raise UserError(f"{cell!r} is {len(found)} runs ({some}, ...): give more of the name, or the sweep too")
    return found[0]


def logs_of(run_dir: Path) -> list[Path]:
    """What the cell wrote, all attempts, then what its latest batch job did. Raises UserError where that is nothing."""
    sweep_dir, name = run_dir.parents[1], run_dir.name
    records, _, _ = reconciled(sweep_dir, [name])
    job_id = records[name].job_id if name in records else None
    paths = [run_directory(sweep_dir, name) / log for log in ("log.txt", "err.txt")]
    if job_id is not None:
        paths.append(sweep_dir / "ledger" / f"slurm-{job_id}.txt")
    said = [path for path in paths if path.is_file() and path.stat().st_size]
    if not said:
        now = cells_now([(name, None)], sweep_dir)[0][name]
        raise UserError(f"{name} has said nothing yet: it is {now.state}{f' ({now.reason})' if now.reason else ''}")
    return said
