"""logs: a cell's name -> the files that tell what it and its batch job said. Called by cli."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm.core import paths, text
from dlm.core.errors import UserError, close_matches
from dlm.record.outcomes import State
from dlm.record.run import run_directory
from dlm.submit.ledger import CellNow
from dlm.submit.state import cells_now, reconciled

if TYPE_CHECKING:
    from dlm.plan.cells import Cell, Plan


@dataclass(frozen=True, kw_only=True)
class CellStatus:
    """One cell now; None is not known."""

    cell_id: str
    state: State
    step: int
    steps: int
    loss: float | None = None  # the last one known; of the planned last step when done
    tokens_per_sec: float | None = None
    eta_sec: float | None = None  # of a running cell, at its present rate
    attempts: int = 0
    steps_redone: int = 0  # because attempts ended between two checkpoints
    gpu_hours: float = 0.0  # of all attempts
    reason: str | None = None  # what the state rests on: the last failure, the process, SLURM's word


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A sweep as a whole; FLOPs in the plan's convention."""

    counts: Mapping[State, int]
    done_flops: float  # finished cells whole, the others as far as they are
    total_flops: float
    gpu_hours: float
    planned_gpu_hours: float  # 0 on machines without GPUs
    steps_redone: int
    eta_sec: float | None  # when the running cells will have ended; None when none tells

    @property
    def fraction(self) -> float:
        """Share of the FLOPs that is done, 0 to 1."""
        return self.done_flops / self.total_flops if self.total_flops else 0.0


def sweep_status(sweep_dir: Path, plan: Plan) -> list[CellStatus]:
    """Every cell of the plan, in its order."""
    return sweep_now(sweep_dir, plan)[0]


def sweep_now(sweep_dir: Path, plan: Plan) -> tuple[list[CellStatus], list[str]]:
    """``sweep_status``, and warnings where squeue or sacct did not answer."""
    now, warnings = cells_now([(cell.cell_id, cell.steps) for cell in plan.cells], sweep_dir)
    return [_status(cell, now[cell.cell_id]) for cell in plan.cells], warnings


def _status(cell: Cell, now: CellNow) -> CellStatus:
    if now.result is not None:
        return CellStatus(
            cell_id=cell.cell_id,
            state=now.state,
            step=now.result.step,
            steps=cell.steps,
            loss=now.result.loss,
            tokens_per_sec=now.result.tokens_per_sec,
            attempts=now.result.attempts,
            steps_redone=now.result.steps_redone,
            gpu_hours=now.result.gpu_hours,
        )
    said = now.status
    step = min(said.step, cell.steps) if said is not None else 0
    rate = said.tokens_per_sec if said is not None else None
    return CellStatus(
        cell_id=cell.cell_id,
        state=now.state,
        step=step,
        steps=cell.steps,
        loss=said.loss if said is not None else None,
        tokens_per_sec=rate,
        eta_sec=_eta_sec(cell, step, rate) if now.state is State.RUNNING else None,
        attempts=said.attempts if said is not None else 0,
        steps_redone=said.steps_redone if said is not None else 0,
        gpu_hours=said.gpu_hours if said is not None else 0.0,
        reason=_reason(now),
    )


def _reason(now: CellNow) -> str | None:
    """What the state rests on; of one that is being tried again also why its last try failed."""
    if now.before is not None and now.state in (State.RUNNING, State.SUBMITTED):
        return f"{now.reason}; before, {now.before}"
    return now.reason


def _eta_sec(cell: Cell, step: int, tokens_per_sec: float | None) -> float | None:
    if tokens_per_sec is None or not math.isfinite(tokens_per_sec) or tokens_per_sec <= 0:
        return None
    return (cell.steps - step) * cell.tokens / cell.steps / tokens_per_sec


def sweep_progress(cells: Sequence[CellStatus], plan: Plan) -> Progress:
    """How far a sweep is, in FLOPs: a cell counts by its steps, whatever became of it."""
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
    """The cells for a program: plain numbers under the names of CellStatus."""
    return [dataclasses.asdict(cell) for cell in cells]


def status_rows(cells: Sequence[CellStatus]) -> list[dict[str, Any]]:
    """The cells for a person; None where a thing is not known."""
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
    """One line under the table: the states, the share of the FLOPs that is done, when the running cells will end."""
    progress = sweep_progress(cells, plan)
    states = ", ".join(f"{progress.counts[state]} {state}" for state in State if progress.counts.get(state))
    said = [states, f"{100 * progress.fraction:.1f} % of {progress.total_flops:.3g} FLOPs"]
    if progress.gpu_hours or progress.planned_gpu_hours:
        said.append(f"{progress.gpu_hours:,.3g} GPU-hours used of {progress.planned_gpu_hours:,.3g} planned")
    if progress.steps_redone:
        said.append(f"{progress.steps_redone:,} steps redone")
    if progress.eta_sec is not None:
        said.append(f"running cells end in {text.duration(progress.eta_sec)}")
    return "; ".join(said)


def find_run(cell: str, sweep_dir: Path | None = None) -> Path:
    """The run directory behind an id, a part of one, or a path. Raises UserError where there is none, or several."""
    if (path := Path(cell).absolute()).parent.name == "runs" and path.is_dir():
        return path
    folders = [sweep_dir] if sweep_dir is not None else sorted(path.parent for path in paths.workdir().glob("*/runs"))
    runs = [run for folder in folders for run in sorted((folder / "runs").glob("*")) if run.is_dir()]
    found = [run for run in runs if run.name == cell] or [run for run in runs if cell in run.name]
    if not found:
        near = close_matches(cell, [run.name for run in runs])
        hint = f"did you mean {' or '.join(near)}?" if near else f"none of {len(runs)} runs has that in its name"
        raise UserError(f"no run of {cell!r} in {sweep_dir or paths.workdir()}: {hint}")
    if len(found) > 1:
        some = ", ".join(f"{run.name} in {run.parents[1].name}" for run in found[:3])
        raise UserError(f"{cell!r} is {len(found)} runs ({some}, ...): give more of the name, or the sweep too")
    return found[0]


def logs_of(run_dir: Path) -> list[Path]:
    """What the cell wrote, all attempts, then what its latest batch job did. Raises UserError where that is nothing."""
    sweep_dir, name = run_dir.parents[1], run_dir.name
    records, _, _ = reconciled(sweep_dir, [name])
    job_id = records[name].job_id if name in records else None
    paths = [run_directory(sweep_dir, name) / log for log in ("log.txt", "err.txt")]
    if job_id is not None:
        paths.append(sweep_dir / "ledger" / f"slurm-{job_id}.txt")
    said = [path for path in paths if path.is_file() and path.stat().st_size]
    if not said:
        now = cells_now([(name, None)], sweep_dir)[0][name]
        raise UserError(f"{name} has said nothing yet: it is {now.state}{f' ({now.reason})' if now.reason else ''}")
    return said
