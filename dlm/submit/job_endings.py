"""Determine how a process of a cell ended, from its exit code and from the files that it wrote."""

from __future__ import annotations

import signal
from pathlib import Path

from dlm.record.outcomes import State, state_of_exit
from dlm.record.run import finished, read_status
from dlm.submit.job import Job

SHELL_SIGNALS = 128  # a shell, and srun, add this to the number of the signal that ended a process
KILLERS = (
    signal.SIGKILL,
    signal.SIGTERM,
    signal.SIGSEGV,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


def local_ending(job: Job, exit_code: int) -> tuple[State, str | None]:
    """Return the state of a process on this machine that has just ended, and the reason for it (None if it is done).

    Args:
        job: The job that the process ran.
        exit_code: The exit code as ``subprocess`` returns it: -n if signal n ended the process.
    """
    if exit_code == 0:
        if finished(job.run_dir, job.name, job.steps) is not None:
            return State.DONE, None
        return State.FAILED, "it exited 0 without a result.json of the planned last step"
    state, status = state_of_exit(exit_code), read_status(job.run_dir)
    if exit_code < 0:
        return state, f"killed by {signal.Signals(-exit_code).name}"
    if status is not None and status.exit_code == exit_code and status.reason:
        return state, status.reason
    return state, last_line(job.run_dir / "log.txt") or f"exit code {exit_code}"


def exit_words(exit_code: int) -> str:
    """Describe an exit code that SLURM reports for a job: "ended with exit code 3" or "lost a process to SIGKILL"."""
    number = exit_code - SHELL_SIGNALS if exit_code > SHELL_SIGNALS else exit_code
    if number in KILLERS:
        return f"lost a process to {signal.Signals(number).name}"
    return f"ended with exit code {exit_code}"


def last_line(log: Path) -> str | None:
    """Return the first 300 characters of the last non-blank line of a log; None if there is no such line or no log."""
    if not log.is_file():
        return None
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - 65536))
        text = stream.read().decode(errors="replace").strip()
    return text.splitlines()[-1].strip()[:300] if text else None
