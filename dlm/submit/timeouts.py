"""Count how often a cell was stopped at the time limit of its job: `python -m dlm.submit.timeouts RUN_DIR MOST`.

The exit code is 0 if the job may be requeued. Batch scripts ask only if hydra.launcher.max_num_timeout is set.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from dlm.core.errors import ExitCode, UserError
from dlm.core.files import write_json
from dlm.core.typed import read_typed
from dlm.submit.ledger import refuse

TIMEOUTS = "timeouts.json"  # a file in a run directory: how often which submission reached its time limit


@dataclass(frozen=True, kw_only=True)
class _Timeouts:
    submission: str | None = None
    count: int = 0


def may_go_on(run_dir: Path, *, submission: str | None, most: int) -> bool:
    """Note that a job of the submission has reached its time limit, and decide whether to requeue it.

    If not, the reason is recorded, and `dlm status` shows the cell as cancelled.
    """
    path = run_dir / TIMEOUTS
    before = read_typed(path, _Timeouts) if path.is_file() else _Timeouts()
    count = before.count + 1 if before.submission == submission else 1
    write_json(path, {"submission": submission, "count": count})
    if count <= most:
        return True
    reason = f"it reached its time limit {count} times, and hydra.launcher.max_num_timeout is {most}: submit it again"
    refuse(run_dir, submission, reason)
    print(f"dlm: {run_dir.name} is not requeued: {reason}")
    return False


if __name__ == "__main__":
    folder, number = sys.argv[1:]
    try:
        sys.exit(not may_go_on(Path(folder), submission=os.environ.get("DLM_SUBMISSION"), most=int(number)))
    except UserError as mistake:
        print(f"dlm: {mistake}")
        sys.exit(ExitCode.USER_ERROR)
