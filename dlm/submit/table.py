"""Show the state of every cell of a sweep, for `dlm status`; `progress.py` sums the cells up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.core import text
from dlm.record.outcomes import State
from dlm.submit.cell_now import CellNow
from dlm.submit.state import cells_now

if TYPE_CHECKING:
    from dlm.plan.cells import Cell, Plan


@dataclass(frozen=True, kw_only=True)
class CellStatus:
    """The values that `dlm status` shows for one cell; None where a value is unknown."""

    cell_id: str
    state: State
    job: str | None = None  # the id of its latest job in the queue of a cluster
    step: int = 0
    steps: int  # the planned last step; 0 if it is not known, of a run that no definition planned
    loss: float | None = None  # the latest loss in nats/token; that of the planned last step when the cell is done
    tokens_per_sec: float | None = None
    eta_sec: float | None = None  # the time until a running cell ends, at its present rate
    attempts: int = 0
    steps_redone: int = 0  # steps that were trained again because an attempt ended between two checkpoints
    gpu_hours: float = 0.0  # of all attempts
    gpus: int | None = None  # the number of GPUs that its latest submission asked for
    wall_sec: float | None = None  # of the steps up to ``step``, those of a trunk and validations included
    started: float | None = None  # when its latest attempt took its first step, seconds since the epoch
    ended: float | None = None  # when that attempt ended
    after_sec: float | None = None  # the time that a finished cell took after its last step
    is_expected: bool = False  # a queue holds the cell, or a process on this machine has still to start it
    is_suspended: bool = False  # the cluster has stopped its processes, and will let them go on
    reason: str | None = None  # evidence for the state: the last failure, a process, or what the scheduler reports


def sweep_status(sweep_dir: Path, plan: Plan) -> list[CellStatus]:
    """Return the status of every cell of the plan, in the order of the plan."""
    return sweep_now(sweep_dir, plan)[0]


def sweep_now(sweep_dir: Path, plan: Plan) -> tuple[list[CellStatus], list[str]]:
    """Return (the statuses that ``sweep_status`` returns, a warning for each unanswered query to a cluster)."""
    now, warnings = cells_now([(cell.cell_id, cell.steps or None) for cell in plan.cells], sweep_dir)
    return [_status(cell, now[cell.cell_id]) for cell in plan.cells], warnings


def _status(cell: Cell, now: CellNow) -> CellStatus:
    reason = now.reason
    if now.record.before is not None and now.is_live:  # the cell has failed before and is being tried again
        reason = f"{now.reason}; before, {now.record.before}"
    is_suspended = now.job is not None and now.job.is_suspended
    shown = CellStatus(
        cell_id=cell.cell_id,
        state=now.state,
        job=now.record.job_id,
        steps=cell.steps,
        gpus=now.record.gpus,
        is_expected=now.state is State.SUBMITTED or (now.state is State.PLANNED and now.record.waits_here),
        is_suspended=is_suspended,
        reason=reason,
    )
    latest = now.result or now.status
    if latest is None:
        return shown
    step, rate = min(latest.step, cell.steps or latest.step), latest.tokens_per_sec
    tokens_left = (cell.steps - step) * cell.tokens / cell.steps if cell.steps else 0.0
    return dataclasses.replace(
        shown,
        step=step,
        loss=latest.loss,
        tokens_per_sec=rate,
        eta_sec=tokens_left / rate if now.state is State.RUNNING and rate and not is_suspended else None,
        attempts=latest.attempts,
        steps_redone=latest.steps_redone,
        gpu_hours=latest.gpu_hours,
        wall_sec=_wall_sec(cell, now, step),
        started=None if now.status is None else now.status.started,
        ended=_ended(now),
        after_sec=_after_sec(now),
    )


def _wall_sec(cell: Cell, now: CellNow, step: int) -> float | None:
    """Return the seconds of the steps of a cell up to its latest; None if they are not known."""
    if now.result is not None:
        return now.result.wall_sec
    rate = None if now.status is None else now.status.tokens_per_sec
    return step * cell.tokens / cell.steps / rate if rate and cell.steps else None


def _ended(now: CellNow) -> float | None:
    """Return when the latest attempt of a cell ended, by the clock of its node."""
    if now.result is not None:
        return now.result.finished
    return now.status.updated if now.status is not None and now.status.exit_code is not None else None


def _after_sec(now: CellNow) -> float | None:
    """Return the seconds of the last validation and checkpoint of a cell that was done in one attempt."""
    if now.result is None or now.status is None or now.result.attempts != 1:
        return None
    return max(now.result.finished - now.status.started - now.result.wall_sec, 0.0)


def status_values(cells: Sequence[CellStatus]) -> list[dict[str, Any]]:
    """Return the cells as dictionaries of plain values, with the fields of CellStatus as keys, for JSON output."""
    return [dataclasses.asdict(cell) for cell in cells]


def status_rows(cells: Sequence[CellStatus]) -> list[dict[str, Any]]:
    """Return the rows of the table for a reader: column heading -> formatted value; None where a value is unknown."""
    return [
        {
            "cell": cell.cell_id,
            "state": cell.state,
            "job": cell.job,
            "step": f"{cell.step:,}/{cell.steps:,}" if cell.steps else None,
            "loss": None if cell.loss is None else f"{cell.loss:.4f}",
            "tokens/s": None if cell.tokens_per_sec is None else f"{cell.tokens_per_sec:,.0f}",
            "ETA": None if cell.eta_sec is None else text.duration(cell.eta_sec),
            "attempts": cell.attempts,
            "redone": cell.steps_redone or None,
            "reason": None if cell.state is State.DONE else cell.reason,
        }
        for cell in cells
    ]
