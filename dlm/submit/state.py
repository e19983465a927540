"""Find the state of every cell from its run directory, the ledger and the cluster that its job was submitted to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from dlm.core.errors import ExitCode, unknown
from dlm.core.lease import live_holder, server_time
from dlm.record.outcomes import State, names_cause, state_of_exit
from dlm.record.run import Status, finished, read_status, run_directory
from dlm.submit.cell_now import CellNow, CellRecord, JobState
from dlm.submit.cluster import Answer, Cluster
from dlm.submit.job import job_name
from dlm.submit.job_endings import exit_words, last_line
from dlm.submit.ledger import Ledger, last_start, not_started
from dlm.submit.local import LocalPool
from dlm.submit.slurm import Slurm

CLUSTERS: dict[str, Callable[[], Cluster]] = {LocalPool.name: LocalPool, Slurm.name: Slurm}  # names as in the ledger


def cluster_called(name: str) -> Cluster:
    """The cluster that a ledger calls ``name``. Raises UserError for one that this version of dlm does not know."""
    if name not in CLUSTERS:
        raise unknown("cluster in the ledger", name, CLUSTERS)
    return CLUSTERS[name]()


def cells_now(
    cells: Sequence[tuple[str, int | None]], sweep_dir: Path, *, repair: bool = False
) -> tuple[dict[str, CellNow], list[str]]:
    """Find the current state of every cell; each cluster is queried once, about the cells that are not done.

    Args:
        cells: Pairs of a cell id and the planned last step of the cell; None accepts a result of any step.
        sweep_dir: The folder of the sweep.
        repair: Record in the ledger how interrupted submissions ended, and release jobs that the cluster holds back.
            Only for a process that keeps other submissions out (``submitting``).

    Returns:
        (cell id -> current state, a warning for each query that a cluster did not answer and for each damaged line of
        the ledger).
    """
    now = {}
    for name, steps in cells:
        run_dir = run_directory(sweep_dir, name)
        result = finished(run_dir, name, steps)
        if result is not None:
            now[name] = CellNow(state=State.DONE, status=read_status(run_dir), result=result)
    left = {name: steps for name, steps in cells if name not in now}
    records, answers, damages = _reconciled(sweep_dir, list(left), repair=repair)
    now = {name: dataclasses.replace(cell, record=records.get(name, CellRecord())) for name, cell in now.items()}
    clock = server_time(sweep_dir)
    for name, steps in left.items():
        record = records.get(name, CellRecord())
        answer = answers.get(record.cluster, Answer())
        now[name] = cell_now(run_directory(sweep_dir, name), record, answer, steps=steps, clock=clock)
    warnings = [*damages, *(warning for answer in answers.values() for warning in answer.warnings)]
    return {name: now[name] for name, _ in cells}, warnings


def cell_now(
    run_dir: Path, record: CellRecord, answer: Answer, *, steps: int | None = None, clock: float | None = None
) -> CellNow:
    """Infer the state of a cell that had no result when the caller looked for one.

    A live process takes precedence, then a job in a queue, then the last recorded state of the cell.

    Args:
        run_dir: The run directory of the cell.
        record: The record of the cell in the ledger.
        answer: The answer of the cluster to which the cell was last submitted.
        steps: The planned last step; None accepts a result of any step.
        clock: The ``server_time`` of the sweep.
    """
    holder = live_holder(run_dir, now=clock)
    status = read_status(run_dir)  # read after the lease: a process writes its final status before it frees the lease
    job = answer.states.get(record.job_id or "")
    known = CellNow(state=State.PLANNED, status=status, record=record, job=job, is_silent=answer.silent)
    if holder is not None:
        suspended = "suspended: " if job is not None and job.is_suspended else ""
        now = CellNow(state=State.RUNNING, reason=f"{suspended}process {holder['pid']} on {holder['host']}")
    elif job is not None and job.is_live:
        now = CellNow(state=job.state, reason=job.words)
    else:
        now = _last_word(run_dir, known)
    if now.state is State.DONE:  # the cell may have finished since the caller looked for a result
        result = finished(run_dir, run_dir.name, steps)
        lost = CellNow(state=State.LOST, reason="it was done, but its result.json is missing or incomplete")
        now = lost if result is None else CellNow(state=State.DONE, result=result)
    return dataclasses.replace(now, status=status, record=record, job=job, is_silent=answer.silent)


def _last_word(run_dir: Path, known: CellNow) -> CellNow:
    """Infer the state of a cell that no process runs and no queue holds from what was last recorded about it."""
    record, status = known.record, known.status
    if record.cancelled is not None:
        return CellNow(state=State.CANCELLED, reason=record.cancelled)
    if record.unconfirmed and known.is_silent:
        reason = f"submission {record.submission} was cut off, and the scheduler does not answer"
        return CellNow(state=State.SUBMITTED, reason=reason)
    if record.job_id is not None:
        if status is not None and status.submission is None and _is_newer(run_dir, record):
            return _own_word(status)  # a user ran the cell by hand after the job
        return _word_of_job(run_dir, known)
    if record.ending is not None and (status is None or record.ending.time >= status.updated):
        return CellNow(state=record.ending.state, reason=record.ending.reason)
    return _own_word(status)


def _own_word(status: Status | None) -> CellNow:
    if status is None:
        return CellNow(state=State.PLANNED)
    if status.exit_code is None and status.state is not State.DONE:
        reason = f"its last word was {status.state} at step {status.step}, and no process holds it"
        return CellNow(state=State.LOST, reason=reason)
    return CellNow(state=status.state, reason=status.reason)


def _word_of_job(run_dir: Path, known: CellNow) -> CellNow:
    """Infer the state of a cell whose job has left the queue.

    The status that the cell wrote during this submission is used unless it contradicts what the cluster reports about
    the end of the job.
    """
    record, job, job_id = known.record, known.job, known.record.job_id
    own = known.status if known.status is not None and known.status.submission == record.submission else None
    refusal = not_started(run_dir, record.submission) if job is not None else None
    if refusal is not None:
        return CellNow(state=State.CANCELLED, reason=refusal)
    if job is None and known.is_silent:
        return CellNow(state=State.SUBMITTED, reason=f"job {job_id}; the scheduler does not answer")
    if own is not None and own.exit_code is not None and (job is None or _agree(own.exit_code, job)):
        return _own_word(own)
    if job is None:
        return CellNow(state=State.LOST, reason=f"the scheduler does not know job {job_id} any more")
    if job.has_failed and job.exit_code:
        has_begun = last_start(run_dir) in (None, record.submission)
        is_ours = job.exit_code == ExitCode.BUG or names_cause(job.exit_code)
        line = _last_line(run_dir, record, has_begun=has_begun) if is_ours else None
        words = f"job {job_id} {exit_words(job.exit_code)}"
        return CellNow(state=state_of_exit(job.exit_code), reason=f"{words}: {line}" if line else words)
    return CellNow(state=job.state, reason=f"job {job_id}: {job.words}", is_host_oom=job.is_host_oom)


def _last_line(run_dir: Path, record: CellRecord, *, has_begun: bool) -> str | None:
    """Return the last line that a run has printed in its latest job, or that of the batch script if there is none."""
    own = last_line(run_dir / "log.txt") if has_begun else None  # else the log is that of an earlier job
    return own or last_line(batch_log(run_dir, record))


def batch_log(run_dir: Path, record: CellRecord) -> Path:
    """Return the log that the batch script of a cell's job writes, named as submitit names it."""
    ledger = run_dir.parents[1] / "ledger"
    if (old := ledger / f"slurm-{record.job_id}.txt").is_file():  # of an earlier version
        return old
    return (ledger if record.logs is None else Path(record.logs)) / f"{record.job_id}_0_log.out"


def _is_newer(run_dir: Path, record: CellRecord) -> bool:
    """Whether a run wrote status.json after its batch job began.

    Compares the modification times of status.json and of the job's log, both by the clock of the file server.
    """
    try:
        began = batch_log(run_dir, record).stat().st_mtime
        return (run_dir / "status.json").stat().st_mtime > began
    except OSError:
        return False


def _agree(exit_code: int, job: JobState) -> bool:
    """Whether the exit code that a cell recorded is consistent with what the cluster reports.

    The cluster may report the exit code of another process of the same cell.
    """
    if exit_code == ExitCode.BUG and names_cause(job.exit_code):
        return False  # the exit code of another process of the cell states the cause
    both_failed = job.has_failed and exit_code not in (ExitCode.DONE, ExitCode.PREEMPTED)
    return both_failed or job.exit_code == exit_code


def _reconciled(
    sweep_dir: Path, cell_ids: Sequence[str], *, repair: bool
) -> tuple[dict[str, CellRecord], dict[str, Answer], list[str]]:
    """Read the ledger, query the clusters, and complete the records of interrupted submissions from the answers.

    The cells of an interrupted submission get job ids if the cluster knows the job array. If the cluster answers and
    does not know the array, it never received the submission, and the cells count as not submitted. With ``repair``,
    these changes are written to the ledger too.

    Returns:
        (cell id -> record, name of a cluster -> its answer, a line about each damaged line of the ledger). The records
        cover all cells of the ledger; only the clusters of ``cell_ids`` are queried.
    """
    ledger = Ledger(sweep_dir)
    records, damages = ledger.read_all()
    answers = dict[str, Answer]()
    mine = [records[name] for name in cell_ids if name in records]
    for cluster in sorted({record.cluster for record in mine}):
        its = [record for record in mine if record.cluster == cluster]
        names = {record: record.array_name or job_name(ledger.title, str(record.submission)) for record in its}
        jobs = {record.job_id: name for record, name in names.items() if record.job_id}
        for record in its:  # it counts again if the cluster does not know the submission that was cut off
            last = record.previous
            if record.unconfirmed and last is not None and last.job_id is not None and last.cluster == cluster:
                jobs[last.job_id] = last.array_name or job_name(ledger.title, str(last.submission))
        arrays = {str(record.submission): name for record, name in names.items() if record.unconfirmed}
        users = {record.user for record in its}
        answer = answers[cluster] = cluster_called(cluster).states(
            jobs,
            names=arrays.values(),
            users=[user for user in users if user is not None] if None not in users else (),
            release=repair,
        )
        for submission, name in arrays.items():
            cells = {cell: record for cell, record in records.items() if record.submission == submission}
            if name in answer.arrays:
                ids = {cell: f"{answer.arrays[name]}_{record.place}" for cell, record in cells.items()}
                records |= {cell: dataclasses.replace(record, job_id=ids[cell]) for cell, record in cells.items()}
                if repair:
                    ledger.submitted(submission, ids)
            elif not answer.silent:
                records |= {cell: record.previous or CellRecord() for cell, record in cells.items()}
                if repair:
                    ledger.refused(submission, "the scheduler never got it")
    return records, answers, damages
