"""Find the run directory that a user names, and the log files of its cell and its batch job."""

from __future__ import annotations

from pathlib import Path

from dlm.core import paths
from dlm.core.errors import UserError, hint
from dlm.submit.state import batch_log, cells_now


def find_run(cell: str, sweep_dir: Path | None = None) -> Path:
    """Find a run directory.

    Args:
        cell: A cell id, a part of a cell id, or the path of a run directory.
        sweep_dir: The folder of the sweep to search; None searches all sweeps of the work directory.

    Raises:
        UserError: No run matches ``cell``, or several runs do.
    """
    if (path := Path(cell).absolute()).parent.name == "runs" and path.is_dir():
        return path
    folders = [sweep_dir] if sweep_dir is not None else sorted(path.parent for path in paths.workdir().glob("*/runs"))
    runs = [run for folder in folders for run in sorted((folder / "runs").glob("[!.]*")) if run.is_dir()]
    found = [run for run in runs if run.name == cell] or [run for run in runs if cell in run.name]
    if not found:
        near = hint(cell, [run.name for run in runs], otherwise=f"none of {len(runs)} runs has that in its name")
        raise UserError(f"no run of {cell!r} in {sweep_dir or paths.workdir()}: {near}")
    if len(found) > 1:
        some = ", ".join(f"{run.name} in {run.parents[1].name}" for run in found[:3])
        raise UserError(f"{cell!r} matches {len(found)} runs ({some}, ...): give more of the name, or add the sweep")
    return found[0]


def logs_of(run_dir: Path) -> list[Path]:
    """Return the non-empty log files of a cell: the output of all its attempts, then that of its latest batch job.

    Raises:
        UserError: The cell has written no log yet.
    """
    now = cells_now([(run_dir.name, None)], run_dir.parents[1])[0][run_dir.name]
    logs = [run_dir / "log.txt", run_dir / "err.txt"]
    if now.record.job_id is not None:
        logs.append(batch_log(run_dir, now.record))
    written = [path for path in logs if path.is_file() and path.stat().st_size]
    if not written:
        reason = f" ({now.reason})" if now.reason else ""
        raise UserError(f"{run_dir.name} has said nothing yet: it is {now.state}{reason}")
    return written
