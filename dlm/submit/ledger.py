"""Keep a log of all submissions of a sweep, and derive from it a record of every cell.

Complete lines are appended to `ledger/ledger.jsonl`: an intent before a job array is submitted or the first process is
started, then the ids of the queued jobs, then how each process on this machine ended.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dlm.core.errors import UserError
from dlm.core.files import append_jsonl, numbered_lines, write_json
from dlm.core.typed import MisfitError, read_typed, typed
from dlm.record.outcomes import OUTCOMES, State
from dlm.submit.cell_now import CellRecord, Ending
from dlm.submit.job import Job

BY_CANCEL = "by dlm cancel"
RESTARTS = "restarts.json"  # a file in a run directory: which submission started the cell, and how often for nothing
NOT_STARTED = "not_started.json"  # a file in a run directory that states why ``admit`` did not start the cell


class Ledger:
    """The submission log of one sweep. Its ``folder`` also holds the batch scripts and their lists of jobs.

    Later lines override earlier ones whatever their time stamps, because the clocks of the machines that write the
    lines may differ.
    """

    def __init__(self, sweep_dir: Path) -> None:
        self.folder = sweep_dir / "ledger"
        self.path = self.folder / "ledger.jsonl"
        self.title = sweep_dir.absolute().name  # the name of the sweep
        self._cancelled: tuple[int, frozenset[str]] = (-1, frozenset())  # (size of the log when it was read, cell ids)

    def _append(self, event: str, **values: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        append_jsonl(self.path, {"event": event, "time": time.time(), **values})

    def intent(
        self,
        submission: str,
        jobs: Sequence[Job],
        *,
        cluster: str,
        code: Path,
        name: str | None = None,
        logs: Path | None = None,
        at_once: int | None = None,
        gpus: int | None = None,
    ) -> None:
        """Record the jobs that are about to be submitted to the ``Cluster`` with the name ``cluster``.

        Args:
            submission: The name of the submission.
            jobs: Its jobs.
            cluster: The name of the cluster.
            code: The snapshot of the code that the jobs import.
            name: The name of the job array in the cluster; None for ``job_name`` of the sweep.
            logs: The folder of the logs of batch scripts; None: that of the ledger.
            at_once: How many of the jobs may run at once; None if there is no limit.
            gpus: The number of GPUs of each job; None if it is not known.
        """
        again = {job.name: job.was for job in jobs if job.was is not None}
        failed = {name: now for name, now in again.items() if OUTCOMES[now.state].is_failure}
        self._append(
            "intent",
            submission=submission,
            cluster=cluster,
            code=code.name,
            user=os.getuid(),
            name=name,
            at_once=at_once,
            gpus=gpus,
            logs=None if logs is None else str(logs),
            cells=[job.name for job in jobs],
            was={name: now.state for name, now in again.items()},
            reasons={name: f"{now.state}: {now.reason}" for name, now in failed.items()},
            steps={name: now.status.step for name, now in again.items() if now.status is not None},
            micro_batch={job.name: job.micro_batch for job in jobs if job.micro_batch is not None},
        )

    def submitted(self, submission: str, ids: Mapping[str, str]) -> None:
        """Record that the cluster has accepted the submission; ``ids`` maps cell ids to job ids."""
        self._append("submitted", submission=submission, ids=dict(ids))

    def refused(self, submission: str, reason: str) -> None:
        """Record that the cluster has not accepted the submission."""
        self._append("refused", submission=submission, reason=reason)

    def cancelled(self, cell_ids: Sequence[str]) -> None:
        """Record that these cells are cancelled: they must not run until they are submitted again."""
        self._append("cancelled", cells=list(cell_ids), reason=BY_CANCEL)

    def ended(self, cell_id: str, *, state: State, exit_code: int, reason: str | None) -> None:
        """Record how a process on this machine ended."""
        self._append("ended", cell=cell_id, state=state, exit_code=exit_code, reason=reason)

    def cancelled_now(self) -> frozenset[str]:
        """Return the ids of the cancelled cells. Frequent calls are cheap: the log is read only if it has grown."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != self._cancelled[0]:
            self._cancelled = size, frozenset(name for name, record in self.read().items() if record.cancelled)
        return self._cancelled[1]

    def read(self) -> dict[str, CellRecord]:
        """Return the record of each cell. Lines that a crash truncated and lines of an unknown kind are ignored.

        So are damaged lines, because a cell must not be lost with the line of another one; see ``check``.
        """
        return self.read_all()[0]

    def check(self) -> None:
        """Raise UserError, which names the first damaged line, before anything is submitted or cancelled.

        The line may be all that is known of a job, which must not be submitted a second time.
        """
        for damage in self.read_all()[1]:
            raise UserError(damage)

    def read_all(self) -> tuple[dict[str, CellRecord], list[str]]:
        """Return (the record of each cell, a line in words about each damaged line of the log)."""
        cells, damages = defaultdict[str, CellRecord](CellRecord), list[str]()
        for number, content in numbered_lines(self.path):
            event = content.get("event") if isinstance(content, dict) else None
            kind = _EVENTS.get(event) if isinstance(event, str) else None
            try:
                line = typed(kind or _Line, content)
            except MisfitError as error:
                damages.append(
                    f"{self.path}, line {number}, is damaged: {error}; restore that line, or delete it once no job "
                    "that it may stand for is in the queue"
                )
                continue
            if kind is not None:
                cells |= line.changed(cells)
        return dict(cells), damages


Records = Mapping[str, CellRecord]  # by cell id; yields an empty record for a new cell


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One line of the log."""

    event: str
    time: float

    def changed(self, cells: Records) -> dict[str, CellRecord]:
        """Return the records that this line changes, by cell id."""
        return {}


@dataclass(frozen=True, kw_only=True)
class _Intent(_Line):
    submission: str
    cluster: str
    cells: tuple[str, ...]
    was: Mapping[str, str]
    name: str | None = None
    logs: str | None = None
    at_once: int | None = None
    gpus: int | None = None
    user: int | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    micro_batch: Mapping[str, int] = field(default_factory=dict)

    def changed(self, cells: Records) -> dict[str, CellRecord]:
        return {cell_id: self._record(cell_id, place, cells[cell_id]) for place, cell_id in enumerate(self.cells)}

    def _record(self, cell_id: str, place: int, before: CellRecord) -> CellRecord:
        failures, failed_at = before.failures, before.failed_at
        if self.was.get(cell_id) == State.FAILED:
            step = self.steps.get(cell_id, 0)
            failures = failures + 1 if step <= failed_at else 1
            failed_at = max(step, failed_at)
        return CellRecord(
            previous=replace(before, previous=None),
            submissions=before.submissions + 1,
            submission=self.submission,
            place=place,
            cluster=self.cluster,
            array_name=self.name,
            logs=self.logs,
            at_once=self.at_once,
            gpus=self.gpus,
            user=self.user,
            failures=failures,
            failed_at=failed_at,
            before=self.reasons.get(cell_id, before.before),
            micro_batch=self.micro_batch.get(cell_id, before.micro_batch),
        )


@dataclass(frozen=True, kw_only=True)
class _OfSubmission(_Line):
    submission: str

    def latest(self, cells: Records) -> dict[str, CellRecord]:
        """Return the records of the cells whose latest submission this line is about."""
        return {name: record for name, record in cells.items() if record.submission == self.submission}


@dataclass(frozen=True, kw_only=True)
class _Submitted(_OfSubmission):
    ids: Mapping[str, str]

    def changed(self, cells: Records) -> dict[str, CellRecord]:
        latest = self.latest(cells).items()
        return {name: replace(record, job_id=self.ids[name]) for name, record in latest if name in self.ids}


@dataclass(frozen=True, kw_only=True)
class _Refused(_OfSubmission):
    def changed(self, cells: Records) -> dict[str, CellRecord]:
        return {name: record.previous or CellRecord() for name, record in self.latest(cells).items()}


@dataclass(frozen=True, kw_only=True)
class _Cancelled(_Line):
    cells: tuple[str, ...]
    reason: str = BY_CANCEL

    def changed(self, cells: Records) -> dict[str, CellRecord]:
        return {name: replace(cells[name], cancelled=self.reason) for name in self.cells}


@dataclass(frozen=True, kw_only=True)
class _Ended(_Line):
    cell: str
    state: State
    reason: str | None

    def changed(self, cells: Records) -> dict[str, CellRecord]:
        ending = Ending(state=self.state, reason=self.reason, time=self.time)
        return {self.cell: replace(cells[self.cell], ending=ending)}


_EVENTS: Mapping[str, type[_Line]] = {
    "intent": _Intent,
    "submitted": _Submitted,
    "refused": _Refused,
    "cancelled": _Cancelled,
    "ended": _Ended,
}


def refuse(run_dir: Path, submission: str | None, reason: str) -> None:
    """Write into a run directory why a job did not start its cell.

    The reason is not written to the ledger, because nodes that append to the same file on a network file system can
    overwrite each other's lines.
    """
    write_json(run_dir / NOT_STARTED, {"submission": submission, "reason": reason})


@dataclass(frozen=True, kw_only=True)
class _Refusal:
    """The content of not_started.json."""

    submission: str | None
    reason: str


def not_started(run_dir: Path, submission: str | None) -> str | None:
    """Return why the job of a submission did not start its cell, at first or when it was requeued; None if it did."""
    path, status = run_dir / NOT_STARTED, run_dir / "status.json"
    try:
        refusal = read_typed(path, _Refusal)
        if status.is_file() and status.stat().st_mtime > path.stat().st_mtime:  # the cell was started since
            return None
        return refusal.reason if refusal.submission == submission else None
    except (OSError, UserError):
        return None


@dataclass(frozen=True, kw_only=True)
class Restarts:
    """The content of restarts.json: which submission started a cell last."""

    submission: str | None = None
    step: int = -1  # of the newest checkpoint at that start
    fruitless: int = 0  # how many starts in a row have gained no step since the one before


def read_restarts(run_dir: Path) -> Restarts | None:
    """Return how jobs have started a cell; None if no job has started it. Raises UserError for a damaged file."""
    path = run_dir / RESTARTS
    return read_typed(path, Restarts) if path.is_file() else None


def last_start(run_dir: Path) -> str | None:
    """Return the submission whose job was the last to start a cell; None if no job has started it."""
    restarts = read_restarts(run_dir)
    return None if restarts is None else restarts.submission


@dataclass(frozen=True, kw_only=True)
class _Limits:
    """The content of limits.json."""

    max_gpu_hours: float | None


def write_max_gpu_hours(sweep_dir: Path, limit: float | None) -> None:
    """Limit the GPU-hours of the sweep: once they are used, no job starts its cell, not even one already queued."""
    write_json(sweep_dir / "ledger" / "limits.json", {"max_gpu_hours": limit})


def read_max_gpu_hours(sweep_dir: Path) -> float | None:
    """Return the limit that ``write_max_gpu_hours`` last wrote; None if there is no limit."""
    path = sweep_dir / "ledger" / "limits.json"
    return read_typed(path, _Limits).max_gpu_hours if path.is_file() else None
