"""Sum up how far a sweep has come: its cells by state, its FLOPs, its hours, and the time until it ends.

Speeds are measured, never assumed. Where nothing has been measured, the hours left are those of the plan's estimate,
and the time until the end is unknown.
"""

from __future__ import annotations

import heapq
import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dlm.core import text
from dlm.record.outcomes import OUTCOMES, State

if TYPE_CHECKING:
    from dlm.plan.cells import Cell, Plan
    from dlm.submit.table import CellStatus

WAITING = (State.SUBMITTED, State.PREEMPTED, State.PLANNED)  # states of cells that have steps left and do not run
SPEED = "full_masked_head"  # speeds are FLOPs per second in this convention, which counts what a run computes

REFILL_SEC = 60.0  # how long after the end of a cell its place counts as taken: the next one may still import torch


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The sums over the cells of a sweep; None where a value is unknown."""

    cells: int
    done: int
    running: int
    waiting: int  # the cells in the states WAITING
    failed: int
    states: Mapping[str, int]  # the number of cells in each state that a cell is in
    convention: str
    flops: float  # planned FLOPs; those of a branch without the steps of its trunk
    flops_done: float  # partial runs included
    unit: str  # of the hours: GPU-hours, or process-hours if no cell uses a GPU
    hours_used: float  # of all attempts, from the first step of each on
    hours_planned: float | None
    hours_left: float | None  # of the cells that run or wait
    steps_redone: int
    at_once: int  # how many cells run at once: now, or just before a cell ended whose place is taken again in a moment
    eta_sec: float | None  # the time until every cell has ended that runs, or that a queue or a process will start
    eta_unknown: str | None  # why the time is unknown; None if it is known, and if nothing is left
    proof_to_come: bool  # a proof run will follow, whose size the law decides: it is in none of these sums

    def values(self) -> dict[str, Any]:
        """Return the object that `dlm status --summary --json` prints."""
        return {**asdict(self), "flops_share": self.flops_done / self.flops if self.flops else None}

    def lines(self, name: str) -> list[str]:
        """Return the sums in words, one line each; ``name`` is the sweep's."""
        order = sorted(self.states, key=lambda state: state != State.DONE)  # the finished cells first
        counts = ", ".join(f"{self.states[state]} {state}" for state in order)
        lines = [f"{name}: {text.counted(self.cells, 'cell')}: {counts}"]
        if self.flops:
            share = math.floor(1000 * self.flops_done / self.flops) / 10  # 100 % only if nothing is missing
            lines.append(f"FLOPs: {share:.1f} % of {text.flops(self.flops)} done ({self.convention})")
        planned = f" of {self.hours_planned:,.3g} planned" if self.hours_planned else ""
        left = "" if not self.hours_left else f", about {self.hours_left:,.3g} left"
        if self.hours_used or planned or left:
            lines.append(f"{self.unit}: {self.hours_used:,.3g} used{planned}{left}")
        if self.steps_redone:
            lines.append(f"steps redone after an interruption: {self.steps_redone:,}")
        if self.eta_sec is not None:
            many = text.counted(self.at_once, "cell")
            lines.append(f"ends in: about {text.duration(self.eta_sec)}, if {many} at a time run on as now")
        elif self.eta_unknown:
            lines.append(f"ends in: unknown, because {self.eta_unknown}")
        if self.proof_to_come:
            lines.append("the proof run is not counted yet: the law decides its size")
        return lines


def progress_of(cells: Sequence[CellStatus], plan: Plan, *, clock: float | None = None) -> Progress:
    """Sum up the cells of a plan, given in the plan's order; ``clock`` is the present time, seconds since the epoch.

    A cell that has not ended takes as long for each FLOP as the cell nearest to it in size that has trained, and
    besides as long as the finished cells took after their last step. The time until the end follows from starting the
    waiting cells, the longest first and branches last, whenever one of the cells that run at once has ended.

    This rule assumes that as many cells run at once as now, that a cell is as fast as others of its size, and that
    nothing fails. It does not count the time in which a process starts, nor that a branch waits for its trunk. It was
    checked on sweeps/smoke.yaml on two cores, whose cells took 36 s in all: it said 4 s too little after a quarter of
    the FLOPs and after a half, and 1 s too little after three quarters, because every process takes a second to start.
    """
    now_sec = time.time() if clock is None else clock
    pairs = list(zip(plan.cells, cells, strict=True))
    counts = Counter(cell.state for cell in cells)
    speeds = _Speeds(pairs)
    left = {now.cell_id: speeds.seconds_left(of, now) for of, now in pairs if now.state in (State.RUNNING, *WAITING)}
    uses_gpus = any(now.gpu_hours or of.estimate.gpu_hours for of, now in pairs)
    planned = [of.estimate.gpu_hours if uses_gpus else of.estimate.hours for of, _ in pairs]
    at_once = cells_at_once(cells, now_sec)
    eta_sec, unknown = _until_the_end(pairs, left, at_once=at_once)
    return Progress(
        cells=len(cells),
        done=counts[State.DONE],
        running=counts[State.RUNNING],
        waiting=sum(counts[state] for state in WAITING),
        failed=sum(number for state, number in counts.items() if OUTCOMES[state].is_failure),
        states={str(state): counts[state] for state in State if counts[state]},
        convention=plan.cells[0].convention,
        flops=sum(of.flops[of.convention] * of.own_share for of, _ in pairs),
        flops_done=sum(of.flops[of.convention] * of.own_share * share_done(of, now) for of, now in pairs),
        unit="GPU-hours" if uses_gpus else "process-hours",
        hours_used=sum(now.gpu_hours if uses_gpus else _used_sec(of, now) / 3600 for of, now in pairs),
        hours_planned=None if None in planned else sum(hours or 0.0 for hours in planned),
        hours_left=_hours_left(pairs, left, uses_gpus=uses_gpus),
        steps_redone=sum(cell.steps_redone for cell in cells),
        at_once=at_once,
        eta_sec=eta_sec,
        eta_unknown=unknown,
        proof_to_come=plan.spec.proof is not None and not any(cell.is_proof for cell in plan.cells),
    )


def share_done(cell: Cell, now: CellStatus) -> float:
    """Return the share of its own steps that a cell has done; 0 if its number of steps is not known yet."""
    return 1.0 if now.state is State.DONE else own_steps_done(cell, now.step)


def own_steps_done(cell: Cell, step: int) -> float:
    """Return the share of its own steps that a cell has done at a step, which counts those of its trunk too."""
    before = cell.branch_step or 0  # the steps of its trunk
    return max(step - before, 0) / (cell.steps - before) if cell.steps > before else 0.0


def _used_sec(cell: Cell, now: CellStatus) -> float:
    """Return the seconds of the steps that the cell has trained itself, those that were lost included."""
    if not now.wall_sec or not now.step:
        return 0.0
    own = max(now.step - (cell.branch_step or 0), 0)
    return now.wall_sec * (own + now.steps_redone) / now.step


class _Speeds:
    """What the cells of a sweep have measured: FLOPs per second, and seconds after the last step."""

    def __init__(self, pairs: Sequence[tuple[Cell, CellStatus]]) -> None:
        found = defaultdict[tuple[str, int], list[float]](list)
        for cell, now in pairs:
            if now.wall_sec and now.step and cell.steps:
                done = cell.flops[SPEED] * now.step / cell.steps
                found[cell.objective, cell.num_params].append(done / now.wall_sec)
        self._rates = {kind: statistics.median(rates) for kind, rates in found.items()}
        self._near: dict[tuple[str, int], float | None] = {}
        after = [now.after_sec for _, now in pairs if now.after_sec is not None]
        self._after_sec = statistics.median(after) if after else 0.0

    def seconds_left(self, cell: Cell, now: CellStatus) -> float | None:
        """Return the seconds that a cell still takes; None if neither a measurement nor an estimate tells."""
        share = 1 - share_done(cell, now)
        if not cell.steps:
            return None
        if now.eta_sec is not None:
            return now.eta_sec + self._after_sec
        if rate := self._rate(cell):
            return share * cell.own_share * cell.flops[SPEED] / rate + self._after_sec
        return None if cell.estimate.hours is None else 3600 * cell.estimate.hours * share

    def _rate(self, cell: Cell) -> float | None:
        kind = (cell.objective, cell.num_params)
        if kind not in self._near:
            nearest = min(self._rates, key=lambda other: _distance(kind, other), default=None)
            self._near[kind] = None if nearest is None else self._rates[nearest]
        return self._near[kind]


def _distance(one: tuple[str, int], other: tuple[str, int]) -> tuple[float, bool]:
    """Return how unlike the speeds of two kinds of cells may be: by their size first, then by their objective."""
    return abs(math.log(one[1] / other[1])), one[0] != other[0]


def _hours_left(
    pairs: Sequence[tuple[Cell, CellStatus]], left: Mapping[str, float | None], *, uses_gpus: bool
) -> float | None:
    """Return the hours of all GPUs or processes that the cells take which run or wait; None if one is unknown."""
    total = 0.0
    for cell, now in pairs:
        if now.cell_id not in left:
            continue
        seconds = left[now.cell_id]
        gpus = now.gpus or cell.estimate.nodes * cell.estimate.gpus_per_node if uses_gpus else 1
        if seconds is None or not gpus:
            return None
        total += gpus * seconds / 3600
    return total


def cells_at_once(cells: Sequence[CellStatus], clock: float) -> int:
    """Return how many cells run at once: those that run now, or that ran when a cell ended within REFILL_SEC.

    When a cell has ended, some seconds pass before the next one is seen to run in its place.
    """
    ends = [math.inf if cell.state is State.RUNNING else cell.ended for cell in cells]
    spans = [(cell.started, end) for cell, end in zip(cells, ends, strict=True) if cell.started and end]
    recent = [end for _, end in spans if 0 <= clock - end <= REFILL_SEC]
    before = [sum(began < moment <= end for began, end in spans) for moment in recent]
    return max(ends.count(math.inf), *before, 0)


def _until_the_end(
    pairs: Sequence[tuple[Cell, CellStatus]], left: Mapping[str, float | None], *, at_once: int
) -> tuple[float | None, str | None]:
    """Return (the seconds until every cell has ended that runs or will be started, why this is unknown)."""
    running = [now for _, now in pairs if now.state is State.RUNNING]
    expected = [(of, now) for of, now in pairs if now.state in WAITING and now.is_expected]
    if not running and not (at_once and expected):
        return None, "no cell runs now" if any(now.state in WAITING for _, now in pairs) else None
    if suspended := next((now.cell_id for now in running if now.is_suspended), None):
        return None, f"{suspended} is suspended"
    if not any(now.wall_sec for _, now in pairs):
        return None, "no cell has measured its speed yet"
    known: dict[str, float] = {}
    for name in (now.cell_id for now in (*running, *(now for _, now in expected))):
        if (seconds := left[name]) is not None:
            known[name] = seconds
    if len(known) < len(running) + len(expected):
        return None, "the steps of some cells are not known yet"
    ends = [known[now.cell_id] for now in running] + [0.0] * (at_once - len(running))
    heapq.heapify(ends)
    for branches in (False, True):
        each = (known[now.cell_id] for of, now in expected if (of.parent is not None) is branches)
        for seconds in sorted(each, reverse=True):
            heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends), None
