"""Keep a log of all submissions of a sweep, and derive from it a record of every cell.

Complete lines are appended to `ledger/ledger.jsonl`: an intent before a job array is submitted or the first process is
started, then the ids of the queued jobs, then how each process on this machine ended.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dlm.core.files import append_jsonl, read_json, read_jsonl, write_json
from dlm.core.json_text import parse_json
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
        """Return the record of each cell. Lines that a crash truncated and lines of an unknown kind are ignored."""
        cells = defaultdict[str, CellRecord](CellRecord)
        for line in read_jsonl(self.path):
            if isinstance(line.get("time"), float):
                cells |= _changed(line, cells)
        return dict(cells)


def _changed(line: Mapping[str, Any], cells: Mapping[str, CellRecord]) -> dict[str, CellRecord]:
    """Return the records that one line of the log changes, by cell id.

    ``cells`` must yield an empty record for a new cell.
    """
    match line.get("event"):
        case "intent":
            return {name: _intended(line, name, place, cells[name]) for place, name in enumerate(line["cells"])}
        case "submitted" | "refused" as event:
            latest = {name: record for name, record in cells.items() if record.submission == line["submission"]}
            if event == "refused":
                return {name: record.previous or CellRecord() for name, record in latest.items()}
            ids = line["ids"]
            return {name: replace(record, job_id=ids[name]) for name, record in latest.items() if name in ids}
        case "cancelled":
            reason = line.get("reason", BY_CANCEL)
            return {name: replace(cells[name], cancelled=reason) for name in line["cells"]}
        case "ended":
            ending = Ending(state=State(line["state"]), reason=line["reason"], time=line["time"])
            return {line["cell"]: replace(cells[line["cell"]], ending=ending)}
    return {}


def _intended(line: Mapping[str, Any], cell_id: str, place: int, before: CellRecord) -> CellRecord:
    failures, failed_at = before.failures, before.failed_at
    if line["was"].get(cell_id) == State.FAILED:
        step = line.get("steps", {}).get(cell_id, 0)
        failures = failures + 1 if step <= failed_at else 1
        failed_at = max(step, failed_at)
    return CellRecord(
        previous=replace(before, previous=None),
        submissions=before.submissions + 1,
        submission=line["submission"],
        place=place,
        cluster=line["cluster"],
        array_name=line.get("name"),
        logs=line.get("logs"),
        at_once=line.get("at_once"),
        gpus=line.get("gpus"),
        user=line.get("user"),
        failures=failures,
        failed_at=failed_at,
        before=line.get("reasons", {}).get(cell_id, before.before),
        micro_batch=line.get("micro_batch", {}).get(cell_id, before.micro_batch),
    )


def refuse(run_dir: Path, submission: str | None, reason: str) -> None:
    """Write into a run directory why a job did not start its cell.

    The reason is not written to the ledger, because nodes that append to the same file on a network file system can
    overwrite each other's lines.
    """
    write_json(run_dir / NOT_STARTED, {"submission": submission, "reason": reason})


def not_started(run_dir: Path, submission: str | None) -> str | None:
    """Return why the job of a submission did not start its cell, at first or when it was requeued; None if it did."""
    path, status = run_dir / NOT_STARTED, run_dir / "status.json"
    try:
        refusal = parse_json(path.read_text())
        if status.is_file() and status.stat().st_mtime > path.stat().st_mtime:  # the cell was started since
            return None
        return str(refusal["reason"]) if refusal["submission"] == submission else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def last_start(run_dir: Path) -> str | None:
    """Return the submission whose job was the last to start a cell; None if no job has started it."""
    path = run_dir / RESTARTS
    return read_json(path)["submission"] if path.is_file() else None


def write_max_gpu_hours(sweep_dir: Path, limit: float | None) -> None:
    """Limit the GPU-hours of the sweep: once they are used, no job starts its cell, not even one already queued."""
    write_json(sweep_dir / "ledger" / "limits.json", {"max_gpu_hours": limit})


def read_max_gpu_hours(sweep_dir: Path) -> float | None:
    """Return the limit that ``write_max_gpu_hours`` last wrote; None if there is no limit."""
    path = sweep_dir / "ledger" / "limits.json"
    limit = read_json(path)["max_gpu_hours"] if path.is_file() else None
    return None if limit is None else float(limit)
