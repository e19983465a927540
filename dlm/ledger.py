"""ledger: what was submitted, and every cell's state reconciled from all who know. Called by submit, status, collect.

`ledger/ledger.jsonl` grows by whole lines: an intent before sbatch (or before the first process), the ids after, and
how each local process ended. The truth about a cell is its result.json, then its lease, then SLURM, then its last word.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm.cluster import Answer, Job, Slurm, TaskState, ended_state, job_name, live_state
from dlm.errors import ExitCode
from dlm.files import append_jsonl, live_holder, read_json, read_jsonl, server_time, write_json
from dlm.record import Result, State, Status, read_result, read_status

_BY_EXIT_CODE: dict[int, State] = {
    ExitCode.USER_ERROR: State.BAD_CONFIG,
    ExitCode.DIVERGED: State.DIVERGED,
    ExitCode.OUT_OF_MEMORY: State.OUT_OF_MEMORY,
    ExitCode.PREEMPTED: State.PREEMPTED,
}

GONE = "it was done, and its result.json is gone or not whole"
KILLERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGUSR1)
FAILURES = (State.FAILED, State.OUT_OF_MEMORY, State.DIVERGED, State.BAD_CONFIG, State.LOST)
BY_CANCEL = "by dlm cancel"
NOT_STARTED = "not_started.json"  # in a run directory: what admit refused
CANNOT_START = 53  # the "signal" of a job that slurmd could not set up (tried, SLURM 22.05)
EVENTS = ("intent", "submitted", "refused", "cancelled", "ended")


def run_directory(sweep_dir: Path, cell_id: str) -> Path:
    """Where a cell runs."""
    return sweep_dir / "runs" / cell_id


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a process of a cell ended, as its parent saw it."""

    state: State
    reason: str | None
    time: float


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """What the ledger says of one cell. All but the counts is of its latest submission."""

    submissions: int = 0
    submission: str | None = None
    cluster: str = "local"
    job_id: str | None = None  # SLURM's
    cancelled: str | None = None  # why it is not to run
    ending: Ending | None = None
    failures: int = 0  # submissions made because the cell had failed, and got no further than when it failed before
    failed_at: int = -1  # the step it had then
    micro_batch: int | None = None  # what it was given after it ran out of memory
    before: str | None = None  # the last failure that made it run again, and its reason

    @property
    def waits_here(self) -> bool:
        """A `dlm sweep` or `dlm submit` on this machine has it in its list, if that still lives."""
        here = self.submission is not None and self.cluster == "local"
        return here and self.cancelled is None and self.ending is None

    @property
    def unconfirmed(self) -> bool:
        """About to be submitted to SLURM, and nothing said since: its submitter died, or is at it."""
        return self.cluster == "slurm" and self.job_id is None and self.submission is not None


class Ledger:
    """The submission log of one sweep; ``folder`` also holds the batch scripts and their jobs files.

    The order of its lines counts, not their times: clocks of the machines that write them may differ.
    """

    def __init__(self, sweep_dir: Path) -> None:
        self.folder = sweep_dir / "ledger"
        self.path = self.folder / "ledger.jsonl"
        self._cancelled: tuple[int, frozenset[str]] = (-1, frozenset())  # (size of the log when read, names)

    def _append(self, event: str, **values: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        append_jsonl(self.path, {"event": event, "time": time.time(), **values})

    def intent(
        self,
        submission: str,
        *,
        cluster: str,
        jobs: Sequence[Job],
        code: Path,
        was: Mapping[str, CellNow],
    ) -> None:
        """What is about to be submitted; ``was`` holds the states that make cells run again."""
        again = {job.name: was[job.name] for job in jobs if job.name in was}
        self._append(
            "intent",
            submission=submission,
            cluster=cluster,
            code=code.name,
            cells=[job.name for job in jobs],
            was={name: now.state for name, now in again.items()},
            reasons={name: f"{now.state}: {now.reason}" for name, now in again.items() if now.state in FAILURES},
            steps={name: now.status.step for name, now in again.items() if now.status is not None},
            micro_batch={job.name: job.micro_batch for job in jobs if job.micro_batch is not None},
        )

    def submitted(self, submission: str, ids: Mapping[str, str]) -> None:
        """SLURM has taken the submission: cell -> task id."""
        self._append("submitted", submission=submission, ids=dict(ids))

    def refused(self, submission: str, reason: str) -> None:
        """SLURM has not."""
        self._append("refused", submission=submission, reason=reason)

    def cancelled(self, cell_ids: Sequence[str], reason: str = BY_CANCEL) -> None:
        """These are not to be started, nor shown as anything but cancelled, until they are submitted again."""
        self._append("cancelled", cells=list(cell_ids), reason=reason)

    def ended(self, cell_id: str, *, state: State, exit_code: int, reason: str | None) -> None:
        """A local process has ended."""
        self._append("ended", cell=cell_id, state=state, exit_code=exit_code, reason=reason)

    def cancelled_now(self) -> frozenset[str]:
        """The cells that are not to run; cheap to ask often, for the log is read when it has grown."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != self._cancelled[0]:
            self._cancelled = size, frozenset(name for name, record in self.read().items() if record.cancelled)
        return self._cancelled[1]

    def read(self) -> dict[str, CellRecord]:
        """Everything by cell; a line cut in half by a crash, or one that is not ours, is passed over."""
        cells: dict[str, CellRecord] = {}
        for line in read_jsonl(self.path):
            if not isinstance(line.get("time"), float) or line.get("event") not in EVENTS:
                continue
            for cell_id, changes in _changes(line, cells):
                cells[cell_id] = dataclasses.replace(cells.get(cell_id, CellRecord()), **changes)
        return cells


def _changes(line: Mapping[str, Any], cells: Mapping[str, CellRecord]) -> Iterable[tuple[str, dict[str, Any]]]:
    """(cell, changed fields of its CellRecord) of one ledger line."""
    if line["event"] == "intent":
        for cell_id in line["cells"]:
            yield cell_id, _intended(line, cell_id, cells.get(cell_id, CellRecord()))
    elif line["event"] == "submitted":
        for cell_id, job_id in line["ids"].items():
            if cells.get(cell_id, CellRecord()).submission == line["submission"]:
                yield cell_id, {"job_id": job_id}
    elif line["event"] == "refused":
        for cell_id, record in cells.items():
            if record.submission == line["submission"]:
                yield cell_id, {"submission": None}
    elif line["event"] == "cancelled":
        for cell_id in line["cells"]:
            yield cell_id, {"cancelled": line.get("reason", BY_CANCEL)}
    elif line["event"] == "ended":
        ending = Ending(state=State(line["state"]), reason=line["reason"], time=float(line["time"]))
        yield line["cell"], {"ending": ending}


def _intended(line: Mapping[str, Any], cell_id: str, before: CellRecord) -> dict[str, Any]:
    failures, failed_at = before.failures, before.failed_at
    if line["was"].get(cell_id) == State.FAILED:
        step = line.get("steps", {}).get(cell_id, 0)
        failures = failures + 1 if step <= failed_at else 1
        failed_at = max(step, failed_at)
    return {
        "submissions": before.submissions + 1,
        "submission": line["submission"],
        "cluster": line["cluster"],
        "job_id": None,
        "cancelled": None,
        "ending": None,
        "failures": failures,
        "failed_at": failed_at,
        "before": line.get("reasons", {}).get(cell_id, before.before),
        "micro_batch": line.get("micro_batch", {}).get(cell_id, before.micro_batch),
    }


@dataclass(frozen=True, kw_only=True)
class CellNow:
    """A cell as it is now."""

    state: State
    reason: str | None = None
    status: Status | None = None  # its own last word, whoever is right about the state
    result: Result | None = None  # of the planned last step only
    before: str | None = None  # the last failure before this try


def state_of_exit(exit_code: int) -> State:
    """The state behind a non-zero exit code; one below zero is a signal: LOST."""
    return State.LOST if exit_code < 0 else _BY_EXIT_CODE.get(exit_code, State.FAILED)


def finished(run_dir: Path, cell_id: str, steps: int | None) -> Result | None:
    """The result of a cell when it is whole, its own and of the planned last step."""
    result = read_result(run_dir)
    if result is None or result.cell_id != cell_id or steps not in (None, result.step):
        return None
    return result


def cell_now(
    cell_id: str,
    run_dir: Path,
    *,
    steps: int | None = None,
    record: CellRecord | None = None,
    task: TaskState | None = None,
    slurm_silent: bool = False,
    now: float | None = None,
) -> CellNow:
    """The one state of a cell. ``task`` is what SLURM says of its latest job; ``slurm_silent``: it did not answer.

    ``now`` is the sweep's files.server_time.
    """
    result, status = finished(run_dir, cell_id, steps), read_status(run_dir)
    if result is not None:
        return CellNow(state=State.DONE, status=status, result=result)
    holder = live_holder(run_dir, now=now)
    if holder is not None:
        reason = f"process {holder['pid']} on {holder['host']}"
        return CellNow(state=State.RUNNING, reason=reason, status=status)
    live = live_state(task)
    if live is not None and task is not None:
        return CellNow(state=live, reason=f"SLURM says {task}", status=status)
    state, said = _last_word(run_dir, record or CellRecord(), status, task, slurm_silent)
    return CellNow(state=state, reason=said, status=status)


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
        said = last_line(run_dir / "log.txt") if task.exit_code in (ExitCode.BUG, *_BY_EXIT_CODE) else None
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


def refuse(run_dir: Path, submission: str | None, reason: str) -> None:
    """Say in a run directory why a job did not start its cell.

    Not in the ledger: nodes that append to one file over a network file system can overwrite each other's lines.
    """
    write_json(run_dir / NOT_STARTED, {"submission": submission, "reason": reason})


def not_started(run_dir: Path, submission: str | None) -> str | None:
    """Why the job of that submission did not start the cell; None when it did, or has not begun."""
    try:
        said = json.loads((run_dir / NOT_STARTED).read_text())
        return str(said["reason"]) if said["submission"] == submission else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_max_gpu_hours(sweep_dir: Path, limit: float | None) -> None:
    """What jobs that begin from now on go by, those that wait already too."""
    write_json(sweep_dir / "ledger" / "limits.json", {"max_gpu_hours": limit})


def read_max_gpu_hours(sweep_dir: Path) -> float | None:
    """The latest ``write_max_gpu_hours``; None sets no limit."""
    path = sweep_dir / "ledger" / "limits.json"
    limit = read_json(path)["max_gpu_hours"] if path.is_file() else None
    return None if limit is None else float(limit)


def _agree(exit_code: int, task: TaskState) -> bool:
    """Whether a cell that said it ends with ``exit_code`` did. SLURM may have the code of another of its processes."""
    failed = task.word == "FAILED" and exit_code not in (ExitCode.DONE, ExitCode.PREEMPTED)
    if exit_code == ExitCode.BUG and task.exit_code in _BY_EXIT_CODE:
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
    left = [name for name, steps in cells if finished(run_directory(sweep_dir, name), name, steps) is None]
    records, answer, warnings = reconciled(sweep_dir, left)
    clock = server_time(sweep_dir)
    now = {}
    for name, steps in cells:
        record = records.get(name)
        task = answer.states.get(record.job_id) if record is not None and record.job_id else None
        run_dir = run_directory(sweep_dir, name)
        one = cell_now(name, run_dir, steps=steps, record=record, task=task, slurm_silent=answer.silent, now=clock)
        now[name] = dataclasses.replace(one, before=record.before if record is not None else None)
    return now, warnings


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


def submitted_cells(ledger: Ledger, submission: str) -> list[str]:
    """The cells of a submission in the order of their tasks."""
    lines = [line for line in read_jsonl(ledger.path) if line.get("event") == "intent"]
    return next((line["cells"] for line in lines if line.get("submission") == submission), [])
