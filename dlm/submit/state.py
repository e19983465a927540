"""Find out what became of every cell from the ledger, the run directories and SLURM."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Sequence
from pathlib import Path

from dlm.core.errors import ExitCode
from dlm.core.lease import live_holder, server_time
from dlm.record.outcomes import State, names_cause, state_of_exit
from dlm.record.run import Status, finished, read_status, run_directory
from dlm.submit.job import Job, job_name
from dlm.submit.ledger import CellNow, CellRecord, Ledger, not_started, submitted_cells
from dlm.submit.slurm import Answer, Slurm, TaskState, ended_state, live_state

GONE = "it was done, and its result.json is gone or not whole"


KILLERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGUSR1)


CANNOT_START = 53  # the "signal" of a job that slurmd could not set up (tried, SLURM 22.05)


def cell_now(
    run_dir: Path,
    *,
    record: CellRecord | None = None,
    task: TaskState | None = None,
    slurm_silent: bool = False,
    now: float | None = None,
) -> CellNow:
    """The one state of a cell that is not done. ``task`` is what SLURM says of its latest job.

    ``slurm_silent``: it did not answer.

    ``now`` is the sweep's files.server_time.
    """
    status, before = read_status(run_dir), record.before if record is not None else None
    holder = live_holder(run_dir, now=now)
    if holder is not None:
        reason = f"process {holder['pid']} on {holder['host']}"
        return CellNow(state=State.RUNNING, reason=reason, status=status, before=before)
    live = live_state(task)
    if live is not None and task is not None:
        return CellNow(state=live, reason=f"SLURM says {task}", status=status, before=before)
    state, said = _last_word(run_dir, record or CellRecord(), status, task, slurm_silent)
    return CellNow(state=state, reason=said, status=status, before=before)


def _last_word(
    run_dir: Path, record: CellRecord, status: Status | None, task: TaskState | None, slurm_silent: bool
) -> tuple[State, str | None]:
    """(state, reason) of a cell that nobody is running."""
    if record.cancelled is not None:
        return State.CANCELLED, record.cancelled
    if record.unconfirmed and slurm_silent:
        return State.SUBMITTED, f"submission {record.submission} was cut off, and SLURM does not answer"
    if record.job_id is not None:
        if status is not None and status.submission is None and _is_newer(run_dir, record.job_id):
            return _own_word(status)  # run by hand since
        own = status if status is not None and status.submission == record.submission else None
        refused = None if own is not None or task is None else not_started(run_dir, record.submission)
        if refused is not None:
            return State.CANCELLED, refused
        return _word_of_job(run_dir, record.job_id, own, task, slurm_silent)
    if record.ending is not None and (status is None or record.ending.time >= status.updated):
        if record.ending.state is State.DONE:
            return State.LOST, GONE
        return record.ending.state, record.ending.reason
    return _own_word(status)


def _own_word(status: Status | None) -> tuple[State, str | None]:
    if status is None:
        return State.PLANNED, None
    if status.state is State.DONE:
        return State.LOST, GONE
    if status.exit_code is None:
        return State.LOST, f"its last word was {status.state} at step {status.step}, and no process holds it"
    return status.state, status.reason


def _word_of_job(
    run_dir: Path, job_id: str, own: Status | None, task: TaskState | None, slurm_silent: bool
) -> tuple[State, str | None]:
    """Of a job that has left the queue: its own last word (of this submission) where SLURM saw it end that way."""
    if task is None and slurm_silent:
        return State.SUBMITTED, f"job {job_id}; SLURM does not answer"
    if own is not None and own.exit_code is not None and (task is None or _agree(own.exit_code, task)):
        return _own_word(own)
    if task is None:
        return State.LOST, f"SLURM does not know job {job_id} any more"
    if task.signal == CANNOT_START:
        return State.LOST, (
            f"job {job_id} could not start or could not write its log ({task}): do the nodes see the workdir?"
        )
    if task.word == "FAILED" and task.exit_code:
        said = last_line(run_dir / "log.txt") if task.exit_code == ExitCode.BUG or names_cause(task.exit_code) else None
        words = f"job {job_id} ended with {exit_words(task.exit_code)}"
        return state_of_exit(task.exit_code), f"{words}: {said}" if said else words
    return ended_state(task), f"SLURM says {task} of job {job_id}"


def _is_newer(run_dir: Path, job_id: str) -> bool:
    """Whether the last word of a run was said after its job began, by the clock of the file server."""
    try:
        began = (run_dir.parents[1] / "ledger" / f"slurm-{job_id}.txt").stat().st_mtime
        return (run_dir / "status.json").stat().st_mtime > began
    except OSError:
        return False


def _agree(exit_code: int, task: TaskState) -> bool:
    """Whether a cell that said it ends with ``exit_code`` did. SLURM may have the code of another of its processes."""
    failed = task.word == "FAILED" and exit_code not in (ExitCode.DONE, ExitCode.PREEMPTED)
    if exit_code == ExitCode.BUG and names_cause(task.exit_code):
        return False  # another process of it knew the cause
    return failed or (task.exit_code == exit_code and not task.signal)


def exit_words(exit_code: int) -> str:
    """An exit code for a person: srun's is 128 and more when a signal ended a task, sacct's the signal alone."""
    number = exit_code - 128 if exit_code > 128 else exit_code
    if number in KILLERS:
        return f"a process that {signal.Signals(number).name} ended"
    return f"exit code {exit_code}"


def local_ending(job: Job, exit_code: int, *, steps: int | None = None) -> tuple[State, str | None]:
    """(state, reason) of a process that has just ended: its exit code reconciled with what it wrote."""
    if exit_code == 0:
        if finished(job.run_dir, job.name, steps) is not None:
            return State.DONE, None
        return State.FAILED, "it exited 0 without a result.json of the planned last step"
    state, status = state_of_exit(exit_code), read_status(job.run_dir)
    if exit_code < 0:
        return state, f"killed by {signal.Signals(-exit_code).name}"
    if status is not None and status.exit_code == exit_code and status.reason:
        return state, status.reason
    return state, last_line(job.run_dir / "log.txt") or f"exit code {exit_code}"


def last_line(log: Path, limit: int = 300) -> str | None:
    """The last line of a log that says anything; None when there is none."""
    if not log.is_file():
        return None
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - 65536))
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines()]
    said = [line for line in lines if line]
    return said[-1][:limit] if said else None


def cells_now(cells: Sequence[tuple[str, int | None]], sweep_dir: Path) -> tuple[dict[str, CellNow], list[str]]:
    """Every cell (id, planned steps) as it is now, and warnings; SLURM is asked once, of what is not done."""
    now = {}
    for name, steps in cells:
        run_dir = run_directory(sweep_dir, name)
        result = finished(run_dir, name, steps)
        if result is not None:
            now[name] = CellNow(state=State.DONE, status=read_status(run_dir), result=result)
    left = [name for name, _ in cells if name not in now]
    records, answer, warnings = reconciled(sweep_dir, left)
    clock = server_time(sweep_dir)
    for name in left:
        record = records.get(name)
        task = answer.states.get(record.job_id) if record is not None and record.job_id else None
        run_dir = run_directory(sweep_dir, name)
        now[name] = cell_now(run_dir, record=record, task=task, slurm_silent=answer.silent, now=clock)
    return {name: now[name] for name, _ in cells}, warnings


def reconciled(
    sweep_dir: Path, cell_ids: Sequence[str], *, repair: bool = False
) -> tuple[dict[str, CellRecord], Answer, list[str]]:
    """(the ledger's records, SLURM's answer, warnings): a submission that was cut off is looked up by its name.

    ``repair`` writes what was found into the ledger, and releases what a node failed to launch; only for who holds the
    sweep's submission lease.
    """
    ledger = Ledger(sweep_dir)
    records = ledger.read()
    mine = {name: records[name] for name in cell_ids if name in records}
    cut_off = {record.submission for record in mine.values() if record.unconfirmed and record.submission}
    title = sweep_dir.absolute().name
    jobs = {record.job_id: job_name(title, str(record.submission)) for record in mine.values() if record.job_id}
    answer = Slurm().states(jobs, names=[job_name(title, submission) for submission in cut_off])
    if repair:
        held = [task for task in jobs if task in answer.states and answer.states[task].held_after_launch_failure]
        Slurm().release(held)
    for submission in sorted(cut_off):
        array_id = answer.arrays.get(job_name(title, submission))
        places = {name: place for place, name in enumerate(submitted_cells(ledger, submission))}
        if array_id is not None:
            ids = {name: f"{array_id}_{place}" for name, place in places.items()}
            for name in ids.keys() & mine.keys():
                records[name] = dataclasses.replace(records[name], job_id=ids[name])
            if repair:
                ledger.submitted(submission, ids)
        elif not answer.silent:
            for name in places.keys() & mine.keys():
                records[name] = dataclasses.replace(records[name], submission=None)
            if repair:
                ledger.refused(submission, "it never reached sbatch")
    return records, answer, list(answer.warnings)
