"""Move the directory of a finished run to where nothing looks for runs, so that the run can be repeated."""

from __future__ import annotations

import itertools
from pathlib import Path

from dlm.core.lease import Lease
from dlm.record.run import Result

FOLDER = "set_aside"
RERUN = "--rerun"  # the flag of `python -m dlm.launch` that asks for this


def set_aside(run_dir: Path) -> Path:
    """Move a run directory into set_aside/, beside the folder runs/ of its sweep, and return the new path.

    Raises UserError if another process runs the cell.
    """
    with Lease(run_dir, doing="run or moved"):
        folder = (run_dir.parents[1] if run_dir.parent.name == "runs" else run_dir.parent) / FOLDER
        folder.mkdir(exist_ok=True)
        numbered = (folder / f"{run_dir.name}-{number}" for number in itertools.count(1))
        place = next(path for path in numbered if not path.exists())
        run_dir.rename(place)
        (place / "lease.json").unlink(missing_ok=True)  # that of this process
    return place


def in_words(place: Path, result: Result) -> str:
    """Return the line that says where an earlier run is, and that it is trained anew."""
    return f"{result.cell_id} is trained anew: its earlier run ({result.loss:.4f} nats/token) is now in {place}"
