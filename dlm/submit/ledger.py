"""ledger: what was submitted, and every cell's state reconciled from all who know. Called by submit, status, collect.

`ledger/ledger.jsonl` grows by whole lines: an intent before sbatch (or before the first process), the ids after, and
how each local process ended. The truth about a cell is its result.json, then its lease, then SLURM, then its last word.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm.core.files import append_jsonl, read_json, read_jsonl, write_json
from dlm.record.outcomes import OUTCOMES, State
from dlm.record.run import Result, Status
from dlm.submit.job import Job

BY_CANCEL = "by dlm cancel"


NOT_STARTED = "not_started.json"  # in a run directory: what admit refused


EVENTS = ("intent", "submitted", "refused", "cancelled", "ended")


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


@dataclass(frozen=True, kw_only=True)
class CellNow:
    """A cell as it is now."""

    state: State
    reason: str | None = None
    status: Status | None = None  # its own last word, whoever is right about the state
    result: Result | None = None  # of the planned last step only
    before: str | None = None  # the last failure before this try


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
        failed = {name: now for name, now in again.items() if OUTCOMES[now.state].is_failure}
        self._append(
            "intent",
            submission=submission,
            cluster=cluster,
            code=code.name,
            cells=[job.name for job in jobs],
            was={name: now.state for name, now in again.items()},
            reasons={name: f"{now.state}: {now.reason}" for name, now in failed.items()},
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


def submitted_cells(ledger: Ledger, submission: str) -> list[str]:
    """The cells of a submission in the order of their tasks."""
    lines = [line for line in read_jsonl(ledger.path) if line.get("event") == "intent"]
    return next((line["cells"] for line in lines if line.get("submission") == submission), [])
