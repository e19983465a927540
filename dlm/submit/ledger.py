"""Keep a log of what was submitted, and read from it what is known of every cell.

`ledger/ledger.jsonl` grows by whole lines: an intent before a job array is submitted or the first process starts, then
the ids of its jobs, then how each process on this machine ended.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.core.files import append_jsonl, read_json, read_jsonl, write_json
from dlm.record.outcomes import OUTCOMES, State
from dlm.record.run import Result, Status
from dlm.submit.job import JobState

if TYPE_CHECKING:
    from dlm.submit.cluster import Request

LOCAL = "local"  # the cluster whose jobs are processes of this machine: they have no ids
BY_CANCEL = "by dlm cancel"
NOT_STARTED = "not_started.json"  # in a run directory: why ``admit`` did not start the cell


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a process of a cell ended, as its parent saw it."""

    state: State
    reason: str | None
    time: float


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """What the ledger says of one cell. Everything but the counts is about its latest submission."""

    submissions: int = 0
    submission: str | None = None
    place: int = 0  # among the cells of its submission: the number of its task in the job array
    cluster: str = LOCAL
    job_id: str | None = None  # in the queue of the cluster
    cancelled: str | None = None  # why it is not to run
    ending: Ending | None = None
    failures: int = 0  # consecutive submissions of the failed cell without progress since the failure before
    failed_at: int = -1  # the furthest step at which it had failed
    micro_batch: int | None = None  # the smaller one that it got after it ran out of memory
    before: str | None = None  # the state and reason of the last failure that made it run again

    @property
    def waits_here(self) -> bool:
        """Whether a `dlm sweep` or `dlm submit` on this machine still has the cell in its list, if that is alive."""
        here = self.submission is not None and self.cluster == LOCAL
        return here and self.cancelled is None and self.ending is None

    @property
    def unconfirmed(self) -> bool:
        """Whether the submission to a queue was announced but not confirmed: its submitter died, or is still busy."""
        return self.cluster != LOCAL and self.job_id is None and self.submission is not None


@dataclass(frozen=True, kw_only=True)
class CellNow:
    """A cell as it is now."""

    state: State
    reason: str | None = None  # what the state is concluded from
    status: Status | None = None  # its own last word, which the state may contradict
    result: Result | None = None  # only of the planned last step
    record: CellRecord = CellRecord()
    job: JobState | None = None  # its latest job in a queue
    is_silent: bool = False  # the cluster of its latest job did not answer
    is_host_oom: bool = False  # its cluster ended it because it used too much memory of the host

    @property
    def is_live(self) -> bool:
        """Whether the cell waits or runs."""
        return self.state in (State.SUBMITTED, State.RUNNING)


class Ledger:
    """The submission log of one sweep. Its ``folder`` also holds the batch scripts and their lists of jobs.

    The order of its lines counts, not their times: the clocks of the machines that write them may differ.
    """

    def __init__(self, sweep_dir: Path) -> None:
        self.folder = sweep_dir / "ledger"
        self.path = self.folder / "ledger.jsonl"
        self.title = sweep_dir.absolute().name  # of the sweep
        self._cancelled: tuple[int, frozenset[str]] = (-1, frozenset())  # size of the log when read, cell ids

    def _append(self, event: str, **values: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        append_jsonl(self.path, {"event": event, "time": time.time(), **values})

    def intent(self, request: Request, *, cluster: str) -> None:
        """Write what is about to be submitted to the ``Cluster`` of that name."""
        again = {job.name: job.was for job in request.jobs if job.was is not None}
        failed = {name: now for name, now in again.items() if OUTCOMES[now.state].is_failure}
        self._append(
            "intent",
            submission=request.submission,
            cluster=cluster,
            code=request.code.name,
            cells=[job.name for job in request.jobs],
            was={name: now.state for name, now in again.items()},
            reasons={name: f"{now.state}: {now.reason}" for name, now in failed.items()},
            steps={name: now.status.step for name, now in again.items() if now.status is not None},
            micro_batch={job.name: job.micro_batch for job in request.jobs if job.micro_batch is not None},
        )

    def submitted(self, submission: str, ids: Mapping[str, str]) -> None:
        """Write that the cluster has accepted the submission; ``ids`` are the job ids by cell."""
        self._append("submitted", submission=submission, ids=dict(ids))

    def refused(self, submission: str, reason: str) -> None:
        """Write that the cluster has not accepted the submission."""
        self._append("refused", submission=submission, reason=reason)

    def cancelled(self, cell_ids: Sequence[str]) -> None:
        """Write that these cells are not to run, and count as cancelled, until they are submitted again."""
        self._append("cancelled", cells=list(cell_ids), reason=BY_CANCEL)

    def ended(self, cell_id: str, *, state: State, exit_code: int, reason: str | None) -> None:
        """Write how a process on this machine ended."""
        self._append("ended", cell=cell_id, state=state, exit_code=exit_code, reason=reason)

    def cancelled_now(self) -> frozenset[str]:
        """The cells that are not to run. Cheap to ask often: the log is read only when it has grown."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != self._cancelled[0]:
            self._cancelled = size, frozenset(name for name, record in self.read().items() if record.cancelled)
        return self._cancelled[1]

    def read(self) -> dict[str, CellRecord]:
        """What the log says of each cell. Lines that a crash cut in half, and unknown ones, are ignored."""
        cells = defaultdict[str, CellRecord](CellRecord)
        for line in read_jsonl(self.path):
            if isinstance(line.get("time"), float):
                cells |= _changed(line, cells)
        return dict(cells)


def _changed(line: Mapping[str, Any], cells: Mapping[str, CellRecord]) -> dict[str, CellRecord]:
    """The records that one line of the log changes, by cell; ``cells`` gives an empty one for a new cell."""
    match line.get("event"):
        case "intent":
            return {name: _intended(line, name, place, cells[name]) for place, name in enumerate(line["cells"])}
        case "submitted" | "refused" as event:
            latest = {name: record for name, record in cells.items() if record.submission == line["submission"]}
            if event == "refused":
                return {name: replace(record, submission=None) for name, record in latest.items()}
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
        submissions=before.submissions + 1,
        submission=line["submission"],
        place=place,
        cluster=line["cluster"],
        failures=failures,
        failed_at=failed_at,
        before=line.get("reasons", {}).get(cell_id, before.before),
        micro_batch=line.get("micro_batch", {}).get(cell_id, before.micro_batch),
    )


def refuse(run_dir: Path, submission: str | None, reason: str) -> None:
    """Write into a run directory why a job did not start its cell.

    Not into the ledger: nodes that append to one file on a network file system can overwrite each other's lines.
    """
    write_json(run_dir / NOT_STARTED, {"submission": submission, "reason": reason})


def not_started(run_dir: Path, submission: str | None) -> str | None:
    """Why the job of that submission did not start the cell; None when it did, or has not begun."""
    try:
        refusal = json.loads((run_dir / NOT_STARTED).read_text())
        return str(refusal["reason"]) if refusal["submission"] == submission else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_max_gpu_hours(sweep_dir: Path, limit: float | None) -> None:
    """Set the GPU-hours after which no job of the sweep starts any more, jobs that wait already included."""
    write_json(sweep_dir / "ledger" / "limits.json", {"max_gpu_hours": limit})


def read_max_gpu_hours(sweep_dir: Path) -> float | None:
    """The limit of the latest ``write_max_gpu_hours``; None when there is none."""
    path = sweep_dir / "ledger" / "limits.json"
    limit = read_json(path)["max_gpu_hours"] if path.is_file() else None
    return None if limit is None else float(limit)
