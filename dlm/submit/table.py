"""Summarise the state of every cell of a sweep and the progress of the sweep, for `dlm status`."""

from __future__ import annotations

import dataclasses
from collections import Counter
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
    job = now.record.job_id
    shown = CellStatus(cell_id=cell.cell_id, state=now.state, job=job, steps=cell.steps, reason=reason)
    latest = now.result or now.status
    if latest is None:
        return shown
    step, rate = min(latest.step, cell.steps or latest.step), latest.tokens_per_sec
    is_suspended = now.job is not None and now.job.is_suspended
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
    )


def fraction_done(cells: Sequence[CellStatus], plan: Plan) -> float:
    """Return the share of the planned FLOPs of a sweep that is done, from 0 to 1.

    Every cell contributes its FLOPs in proportion to the steps that it has done, whatever its state.
    """
    flops = {cell.cell_id: cell.flops[cell.convention] for cell in plan.cells}
    total = sum(flops.values())
    return sum(flops[cell.cell_id] * _share(cell) for cell in cells) / total if total else 0.0


def _share(cell: CellStatus) -> float:
    """Return the share of its steps that a cell has done; 0 if its number of steps is not known yet."""
    return cell.step / cell.steps if cell.steps else 0.0


def time_left_sec(cells: Sequence[CellStatus], plan: Plan) -> float | None:
    """Return the seconds until all cells that wait or run have ended at the present rate; None if none trains now.

    This is the time of the FLOPs that are left at the rate of the cells that train, but at least that of the slowest
    of them.
    """
    planned = {cell.cell_id: cell for cell in plan.cells}
    left, rate, longest = 0.0, 0.0, 0.0
    for cell in cells:
        of = planned[cell.cell_id]
        flops = of.flops[of.convention]
        if cell.state in (State.PLANNED, State.SUBMITTED, State.RUNNING, State.PREEMPTED):
            left += flops * (1 - _share(cell))
        if cell.eta_sec is not None and cell.tokens_per_sec is not None and of.tokens:
            rate += cell.tokens_per_sec * flops / of.tokens
            longest = max(longest, cell.eta_sec)
    return max(left / rate, longest) if rate else None


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


def summary_line(cells: Sequence[CellStatus], plan: Plan) -> str:
    """Return the line under the table.

    The line states the number of cells by state, the share of the FLOPs that is done, the GPU-hours, the steps redone
    and the time left.
    """
    counts = Counter(cell.state for cell in cells)
    total_flops = sum(cell.flops[cell.convention] for cell in plan.cells)
    used, planned = sum(cell.gpu_hours for cell in cells), sum(cell.estimate.gpu_hours or 0 for cell in plan.cells)
    redone = sum(cell.steps_redone for cell in cells)
    left = time_left_sec(cells, plan)
    parts = [
        ", ".join(f"{counts[state]} {state}" for state in State if counts[state]),
        f"{100 * fraction_done(cells, plan):.1f} % of {text.flops(total_flops)} FLOPs",
    ]
    if used or planned:
        parts.append(f"{used:,.3g} GPU-hours used of {planned:,.3g} planned")
    if redone:
        parts.append(f"{redone:,} steps redone")
    if left is not None:
        parts.append(f"at this rate, the sweep ends in {text.duration(left)}")
    return "; ".join(parts)
