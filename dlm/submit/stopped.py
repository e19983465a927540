"""Say whether a cell has stopped to be continued: `python -m dlm.submit.stopped RUN_DIR BEGAN`, after srun has failed.

When the ranks of a cell are told to stop, the first of them leaves with ExitCode.PREEMPTED, and srun then kills those
that have not left yet. The exit code of srun can be that of a killed rank, so the record of the cell decides.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from dlm.record.outcomes import State
from dlm.record.run import read_status


def has_stopped(run_dir: Path, *, submission: str | None, began: float) -> bool:
    """Whether the cell has recorded, since the job began, that it stopped to be continued.

    Args:
        run_dir: The run directory of the cell.
        submission: The name of the submission to which the job belongs.
        began: When the job began, in seconds since the epoch. An ending recorded earlier is that of another attempt.
    """
    status = read_status(run_dir)
    return (
        status is not None
        and (status.state, status.submission) == (State.PREEMPTED, submission)
        and status.updated >= began
    )


if __name__ == "__main__":
    folder, start = sys.argv[1:]
    sys.exit(not has_stopped(Path(folder), submission=os.environ.get("DLM_SUBMISSION"), began=float(start)))
