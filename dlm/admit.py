"""admit: `python -m dlm.admit RUN_DIR`, first thing in a batch job -> whether its cell is to be started now.

No torch, a tenth of a second. It keeps a second process out of a live cell: one whose node SLURM has given up may still
be training. And it stops a sweep that has spent its GPU-hours from starting more.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from dlm.errors import NOTHING_TO_DO, ExitCode
from dlm.files import STALE_SEC, live_holder
from dlm.ledger import Ledger, finished
from dlm.record import gpu_hours_used

PATIENCE_SEC = 1.5 * STALE_SEC  # a holder that died with its node is known to be dead before that


def admit(run_dir: Path, *, max_gpu_hours: float | None, patience_sec: float = PATIENCE_SEC) -> int:
    """0 to start the cell, NOTHING_TO_DO, or ExitCode.PREEMPTED to try again later; says why."""
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
    if max_gpu_hours is not None and (used := gpu_hours_used(sweep_dir)) >= max_gpu_hours:
        reason = f"the sweep has used {used:.4g} of its {max_gpu_hours:g} GPU-hours: submit with more --max-gpu-hours"
        Ledger(sweep_dir).cancelled([run_dir.name], reason)
        print(f"dlm: {run_dir.name} is not started: {reason}")
        return NOTHING_TO_DO
    return 0


def main() -> int:
    """The command."""
    limit = os.environ.get("DLM_MAX_GPU_HOURS")
    return admit(Path(sys.argv[1]), max_gpu_hours=None if limit is None else float(limit))


if __name__ == "__main__":
    sys.exit(main())
