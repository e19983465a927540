"""Show what every cell of a sweep is doing, and how far the sweep is."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.core import text
from dlm.record.outcomes import State
from dlm.submit.ledger import CellNow
from dlm.submit.state import cells_now

if TYPE_CHECKING:
    from dlm.plan.cells import Cell, Plan


@dataclass(frozen=True, kw_only=True)
class CellStatus:
    """What is shown of one cell; None where a value is not known."""

    cell_id: str
    state: State
    step: int = 0
    steps: int  # planned
    loss: float | None = None  # the latest, in nats/token; of the planned last step when the cell is done
    tokens_per_sec: float | None = None
    eta_sec: float | None = None  # until a running cell ends, at its present rate
    attempts: int = 0
    steps_redone: int = 0  # because attempts ended between two checkpoints
    gpu_hours: float = 0.0  # of all attempts
    reason: str | None = None  # what the state is concluded from: the last failure, a process, a scheduler's words


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a sweep is. FLOPs are counted in the plan's convention."""

    counts: Mapping[State, int]
    done_flops: float  # those of every cell up to its present step
    total_flops: float
    gpu_hours: float
    planned_gpu_hours: float  # 0 on machines without GPUs
    steps_redone: int
    eta_sec: float | None  # until all running cells have ended; None when it is not known for any

    @property
    def fraction(self) -> float:
        """The share of the FLOPs that is done, from 0 to 1."""
        return self.done_flops / self.total_flops if self.total_flops else 0.0


def sweep_status(sweep_dir: Path, plan: Plan) -> list[CellStatus]:
    """The status of every cell of the plan, in its order."""
    return sweep_now(sweep_dir, plan)[0]


def sweep_now(sweep_dir: Path, plan: Plan) -> tuple[list[CellStatus], list[str]]:
    """``sweep_status``, and a warning for each question that a cluster did not answer."""
    now, warnings = cells_now([(cell.cell_id, cell.steps) for cell in plan.cells], sweep_dir)
    return [_status(cell, now[cell.cell_id]) for cell in plan.cells], warnings


def _status(cell: Cell, now: CellNow) -> CellStatus:
    shown = CellStatus(cell_id=cell.cell_id, state=now.state, steps=cell.steps, reason=_reason(now))
    latest = now.result or now.status
    if latest is None:
        return shown
    step = min(latest.step, cell.steps)
    return dataclasses.replace(
        shown,
        step=step,
        loss=latest.loss,
        tokens_per_sec=latest.tokens_per_sec,
        eta_sec=_eta_sec(cell, step, latest.tokens_per_sec) if now.state is State.RUNNING else None,
        attempts=latest.attempts,
        steps_redone=latest.steps_redone,
        gpu_hours=latest.gpu_hours,
    )


def _reason(now: CellNow) -> str | None:
    """What the state is concluded from; for a cell that is tried again also why its last try failed."""
    if now.record.before is not None and now.is_live:
        return f"{now.reason}; before, {now.record.before}"
    return now.reason


def _eta_sec(cell: Cell, step: int, tokens_per_sec: float | None) -> float | None:
    if tokens_per_sec is None or not math.isfinite(tokens_per_sec) or tokens_per_sec <= 0:
        return None
    return (cell.steps - step) * cell.tokens / cell.steps / tokens_per_sec


def sweep_progress(cells: Sequence[CellStatus], plan: Plan) -> Progress:
    """How far a sweep is: a cell counts by its steps, whatever became of it."""
    flops = {cell.cell_id: cell.flops[cell.convention] for cell in plan.cells}
    etas = [cell.eta_sec for cell in cells if cell.eta_sec is not None]
    return Progress(
        counts=Counter(cell.state for cell in cells),
        done_flops=sum(flops[cell.cell_id] * cell.step / cell.steps for cell in cells),
        total_flops=sum(flops.values()),
        gpu_hours=sum(cell.gpu_hours for cell in cells),
        planned_gpu_hours=sum(cell.estimate.gpu_hours or 0 for cell in plan.cells),
        steps_redone=sum(cell.steps_redone for cell in cells),
        eta_sec=max(etas) if etas else None,
    )


def status_values(cells: Sequence[CellStatus]) -> list[dict[str, Any]]:
    """The cells for a program: plain values under the names of CellStatus."""
    return [dataclasses.asdict(cell) for cell in cells]


def status_rows(cells: Sequence[CellStatus]) -> list[dict[str, Any]]:
    """The cells for a person, with the columns of the table as keys; None where a value is not known."""
    return [
        {
            "cell": cell.cell_id,
            "state": cell.state,
            "step": f"{cell.step:,}/{cell.steps:,}",
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
    """The line under the table: the number of cells by state, the share of the FLOPs, and the time left."""
    progress = sweep_progress(cells, plan)
    states = ", ".join(f"{progress.counts[state]} {state}" for state in State if progress.counts.get(state))
    parts = [states, f"{100 * progress.fraction:.1f} % of {text.flops(progress.total_flops)} FLOPs"]
    if progress.gpu_hours or progress.planned_gpu_hours:
        parts.append(f"{progress.gpu_hours:,.3g} GPU-hours used of {progress.planned_gpu_hours:,.3g} planned")
    if progress.steps_redone:
        parts.append(f"{progress.steps_redone:,} steps redone")
    if progress.eta_sec is not None:
        parts.append(f"running cells end in {text.duration(progress.eta_sec)}")
    return "; ".join(parts)
