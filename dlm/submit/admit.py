"""Decide at the start of a batch job whether its cell is to be started: `python -m dlm.submit.admit RUN_DIR`.

This check keeps a second process out of a cell that is still being trained, for instance on a node that SLURM considers
down, and it starts no further cell of a sweep that has used up its GPU-hours. It does not import torch, so it takes
only a tenth of a second.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from dlm.core.errors import NOTHING_TO_DO, ExitCode, UserError
from dlm.core.files import write_json
from dlm.core.lease import STALE_SEC, live_holder
from dlm.record.run import checkpoint_steps, finished, gpu_hours_used
from dlm.submit.cell_now import CellRecord
from dlm.submit.ledger import RESTARTS, Ledger, Restarts, read_max_gpu_hours, read_restarts, refuse

MOST_FRUITLESS = 3  # requeues in a row that gain no step; then the cell is not started again by itself
PATIENCE_SEC = 1.5 * STALE_SEC  # long enough for the lease of a process that died with its node to become stale


def admit(run_dir: Path, *, submission: str | None, patience_sec: float = PATIENCE_SEC) -> int:
    """Decide whether a job starts its cell, and print the reason if it does not.

    Args:
        run_dir: The run directory of the cell.
        submission: The name of the submission to which the job belongs; None if it belongs to none.
        patience_sec: How long to wait for another process to release the cell, in seconds.

    Returns:
        0 to start the cell, NOTHING_TO_DO not to start it, or ExitCode.PREEMPTED to try again later.
    """
    deadline = time.monotonic() + patience_sec
    while (holder := live_holder(run_dir)) is not None:
        if time.monotonic() >= deadline:
            print(f"dlm: process {holder['pid']} on {holder['host']} runs {run_dir.name}: trying again later")
            return ExitCode.PREEMPTED
        time.sleep(1)
    result = finished(run_dir, run_dir.name, None)
    if result is not None:
        print(f"dlm: {run_dir.name} is done: {result.loss:.4f} nats/token")
        return NOTHING_TO_DO
    sweep_dir = run_dir.parents[1]
    record = Ledger(sweep_dir).read().get(run_dir.name, CellRecord())
    if record.cancelled is not None or record.submission not in (None, submission):
        why = "cancelled" if record.cancelled is not None else f"submitted anew as {record.submission}"
        print(f"dlm: {run_dir.name} was {why}: not started")
        return NOTHING_TO_DO
    limit = read_max_gpu_hours(sweep_dir)
    if limit is not None and (used := gpu_hours_used(sweep_dir)) >= limit:
        reason = f"the sweep has used {used:.4g} of its {limit:g} GPU-hours: submit with more --max-gpu-hours"
        return _refused(run_dir, submission, reason)
    step, fruitless = _count_restart(run_dir, submission)
    if fruitless >= MOST_FRUITLESS:
        reason = f"{fruitless} times in a row it was requeued and gained no step since step {step}: see its log"
        return _refused(run_dir, submission, reason)
    return 0


def _refused(run_dir: Path, submission: str | None, reason: str) -> int:
    refuse(run_dir, submission, reason)
    print(f"dlm: {run_dir.name} is not started: {reason}")
    return NOTHING_TO_DO


def _count_restart(run_dir: Path, submission: str | None) -> tuple[int, int]:
    """Note that a job of the submission starts the cell.

    Returns:
        (the step of its newest checkpoint, how many starts in a row have gained no step since the one before).
    """
    before, step = read_restarts(run_dir) or Restarts(), max(checkpoint_steps(run_dir), default=0)
    is_again = before.submission == submission and step <= before.step
    fruitless = before.fruitless + 1 if is_again else 0
    write_json(run_dir / RESTARTS, {"submission": submission, "step": step, "fruitless": fruitless})
    return step, fruitless


if __name__ == "__main__":
    try:
        sys.exit(admit(Path(sys.argv[1]), submission=os.environ.get("DLM_SUBMISSION")))
    except UserError as mistake:
        print(f"dlm: {mistake}")
        sys.exit(ExitCode.USER_ERROR)
