"""ledger: what was submitted, and every cell's state reconciled from all who know. Called by submit, status, collect.

`ledger/ledger.jsonl` grows by whole lines: an intent before sbatch (or before the first process), the ids after, and
how each local process ended. The truth about a cell is its result.json, then its lease, then SLURM, then its last word.
"""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm.cluster import Job, Slurm, TaskState, ended_state, live_state
from dlm.errors import ExitCode
from dlm.files import append_jsonl, live_holder, read_jsonl
from dlm.record import Result, State, Status, read_result, read_status

_BY_EXIT_CODE: dict[int, State] = {
    ExitCode.USER_ERROR: State.BAD_CONFIG,
    ExitCode.DIVERGED: State.DIVERGED,
    ExitCode.OUT_OF_MEMORY: State.OUT_OF_MEMORY,
    ExitCode.PREEMPTED: State.PREEMPTED,
}

GONE = "it was done, and its result.json is gone or not whole"
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
    """What the ledger says of one cell."""

    submissions: int = 0
    failures: int = 0  # submissions that were made because the cell had failed
    submitted: float = 0.0  # seconds since the epoch, of the latest
    job_id: str | None = None  # SLURM's, of the latest
    cancelled: float = 0.0  # seconds since the epoch, of the latest `dlm cancel`
    ending: Ending | None = None

    @property
    def waits_here(self) -> bool:
        """A `dlm sweep` or `dlm submit` on this machine has it in its list, if that still lives."""
        return self.job_id is None and self.submitted > max(self.cancelled, self.ending.time if self.ending else 0.0)

    @property
    def is_cancelled(self) -> bool:
        """Stopped by `dlm cancel` and not submitted since."""
        return self.cancelled > self.submitted


class Ledger:
    """The submission log of one sweep; ``folder`` also holds the batch scripts and their jobs files."""

    def __init__(self, sweep_dir: Path) -> None:
        self.folder = sweep_dir / "ledger"
        self.path = self.folder / "ledger.jsonl"
        self._cancelled: tuple[int, frozenset[str]] = (-1, frozenset())  # (size of the log when read, names)

    def _append(self, event: str, **values: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        append_jsonl(self.path, {"event": event, "time": time.time(), **values})

    def intent(
        self, submission: str, *, cluster: str, jobs: Iterable[Job], code: Path, was: Mapping[str, State]
    ) -> None:
        """What is about to be submitted; ``was`` holds the state that made a cell run again."""
        names = [job.name for job in jobs]
        again = {name: was[name] for name in names if name in was}
        self._append("intent", submission=submission, cluster=cluster, code=code.name, cells=names, was=again)

    def submitted(self, submission: str, ids: Mapping[str, str]) -> None:
        """SLURM has taken the submission: cell -> task id."""
        self._append("submitted", submission=submission, ids=dict(ids))

    def refused(self, submission: str, reason: str) -> None:
        """SLURM has not."""
        self._append("refused", submission=submission, reason=reason)

    def cancelled(self, cell_ids: Sequence[str]) -> None:
        """These are not to be started, nor shown as anything but cancelled, until they are submitted again."""
        self._append("cancelled", cells=list(cell_ids))

    def ended(self, cell_id: str, *, state: State, exit_code: int, reason: str | None) -> None:
        """A local process has ended."""
        self._append("ended", cell=cell_id, state=state, exit_code=exit_code, reason=reason)

    def cancelled_now(self) -> frozenset[str]:
        """The cells that are not to run; cheap to ask often, for the log is read when it has grown."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != self._cancelled[0]:
            self._cancelled = size, frozenset(name for name, record in self.read().items() if record.is_cancelled)
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
    when = float(line["time"])
    if line["event"] == "intent":
        for cell_id in line["cells"]:
            before = cells.get(cell_id, CellRecord())
            failed = line["was"].get(cell_id) == State.FAILED
            yield (
                cell_id,
                {
                    "submissions": before.submissions + 1,
                    "failures": before.failures + failed,
                    "submitted": when,
                    "job_id": None,
                },
            )
    elif line["event"] == "submitted":
        for cell_id, job_id in line["ids"].items():
            yield cell_id, {"job_id": job_id, "submitted": when}
    elif line["event"] == "cancelled":
        for cell_id in line["cells"]:
            yield cell_id, {"cancelled": when}
    elif line["event"] == "ended":
        yield (
            line["cell"],
            {"ending": Ending(state=State(line["state"]), reason=line["reason"], time=when)},
        )


@dataclass(frozen=True, kw_only=True)
class CellNow:
    """A cell as it is now."""

    state: State
    reason: str | None = None
    status: Status | None = None  # its own last word, whoever is right about the state
    result: Result | None = None  # of the planned last step only


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
) -> CellNow:
    """The one state of a cell. ``task`` is what SLURM says of its latest job; ``slurm_silent``: it did not answer."""
    result, status = finished(run_dir, cell_id, steps), read_status(run_dir)
    if result is not None:
        return CellNow(state=State.DONE, status=status, result=result)
    holder = live_holder(run_dir)
    if holder is not None:
        reason = f"process {holder['pid']} on {holder['host']}"
        return CellNow(state=State.RUNNING, reason=reason, status=status)
    live = live_state(task)
    if live is not None and task is not None:
        return CellNow(state=live, reason=f"SLURM says {task.word}", status=status)
    state, said = _last_word(record or CellRecord(), status, task, slurm_silent)
    return CellNow(state=state, reason=said, status=status)


def _last_word(
    record: CellRecord, status: Status | None, task: TaskState | None, slurm_silent: bool
) -> tuple[State, str | None]:
    """(state, reason) of a cell that nobody is running: the latest who spoke."""
    if record.is_cancelled:
        return State.CANCELLED, "by dlm cancel"
    spoke = status.updated if status is not None else 0.0
    if record.job_id is not None and (record.submitted > spoke or (status and status.exit_code is None)):
        return _word_of_slurm(record.job_id, task, slurm_silent)
    if record.ending is not None and record.ending.time >= spoke:
        if record.ending.state is State.DONE:
            return State.LOST, GONE
        return record.ending.state, record.ending.reason
    if status is None:
        return State.PLANNED, None
    if status.state is State.DONE:
        return State.LOST, GONE
    if status.state is State.RUNNING or status.exit_code is None:
        return State.LOST, f"its last word was {status.state} at step {status.step}, and no process holds it"
    return status.state, status.reason


def _word_of_slurm(job_id: str, task: TaskState | None, slurm_silent: bool) -> tuple[State, str]:
    if task is None and slurm_silent:
        return State.SUBMITTED, f"job {job_id}; SLURM does not answer"
    if task is None:
        return State.LOST, f"SLURM does not know job {job_id} any more"
    if task.exit_code and task.word == "FAILED":
        return state_of_exit(task.exit_code), f"job {job_id} ended with exit code {task.exit_code}"
    return ended_state(task), f"SLURM says {task.word} of job {job_id}"


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
    """Every cell (id, planned steps) as it is now, and warnings; SLURM is asked once, if it was ever used."""
    records = Ledger(sweep_dir).read()
    ids = [records[name].job_id for name, _ in cells if name in records]
    answer = Slurm().states(job_id for job_id in ids if job_id)
    now = {}
    for name, steps in cells:
        record = records.get(name)
        task = answer.states.get(record.job_id) if record is not None and record.job_id else None
        run_dir = run_directory(sweep_dir, name)
        now[name] = cell_now(name, run_dir, steps=steps, record=record, task=task, slurm_silent=answer.silent)
    return now, list(answer.warnings)
