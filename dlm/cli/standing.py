"""Say how far a sweep is when its report is made: what is done, what is missing, and what runs now."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dlm.cli.targets import Sweep
from dlm.core import text
from dlm.record.outcomes import State

if TYPE_CHECKING:
    import pandas as pd

    from dlm.collect.tables import Collected

MOST_NAMED = 6  # cells that run now; the others are counted
TO_COME = (State.PLANNED, State.SUBMITTED, State.RUNNING, State.PREEMPTED)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a sweep is."""

    to_come: int  # cells that have not ended
    lines: tuple[str, ...]  # sentences for the report; none if every cell is done


def standing_of(sweep: Sweep, collected: Collected) -> Standing:
    """Return how far a sweep is, from its tables; cells that run are looked at for the time that they still take."""
    states = {row["run_id"]: row["status"] for row in collected.excluded.to_dict("records")}
    done = set(collected.runs["run_id"])
    cells = [cell for cell in sweep.plan.cells if cell.cell_id not in done]
    if not cells:
        return Standing(to_come=0, lines=())
    of_cell = {cell.cell_id: states.get(cell.cell_id) or State.PLANNED for cell in cells}
    counts = Counter(of_cell.values())
    others = text.listed([f"{count} {_shown(state)}" for state, count in counts.items()])
    lines = [
        f"{len(sweep.plan.cells) - len(cells)} of {text.counted(len(sweep.plan.cells), 'cell')} can be used; {others}."
    ]
    lines += _budgets(sweep, collected.runs)
    running = [name for name, state in of_cell.items() if state == State.RUNNING]
    if running:
        lines += _running(sweep, running)
    return Standing(to_come=sum(counts[state] for state in TO_COME), lines=tuple(lines))


def _shown(state: str) -> str:
    """Return the state in words; a cell that is done and left out all the same is not called done."""
    if state == State.DONE:
        return "left out"
    return state.replace("_", " ")


def _budgets(sweep: Sweep, runs: pd.DataFrame) -> list[str]:
    """Say of which budgets no cell, or not every cell, can be used."""
    planned = Counter(cell.budget_flops for cell in sweep.plan.grid)
    usable = set(runs["run_id"])
    done = Counter(cell.budget_flops for cell in sweep.plan.grid if cell.cell_id in usable)
    missing = [text.flops(budget) for budget in sorted(planned) if not done[budget]]
    partly = [
        f"{done[budget]} of {planned[budget]} at {text.flops(budget)} FLOPs"
        for budget in sorted(planned)
        if 0 < done[budget] < planned[budget]
    ]
    said = [f"No cell can be used at {text.listed(missing)} FLOPs."] if missing else []
    return [*said, f"Of some budgets, a part of the cells can be used: {text.listed(partly)}."] if partly else said


def _running(sweep: Sweep, names: list[str]) -> list[str]:
    """Say which cells run, and how long the sweep still takes; nothing if all have ended since the tables were read."""
    from dlm.submit.progress import progress_of
    from dlm.submit.table import sweep_now

    cells = sweep_now(sweep.folder, sweep.plan)[0]
    running = [cell for cell in cells if cell.cell_id in names and cell.state is State.RUNNING]
    if not running:
        return []
    shown = []
    for cell in running[:MOST_NAMED]:
        left = "" if cell.eta_sec is None else f", about {text.duration(cell.eta_sec)} left"
        shown.append(f"{cell.cell_id} (step {cell.step:,} of {cell.steps:,}{left})" if cell.steps else cell.cell_id)
    more = len(running) - len(shown)
    progress = progress_of(cells, sweep.plan)
    known = f"about {text.duration(progress.eta_sec)}" if progress.eta_sec is not None else None
    return [
        f"Running now: {'; '.join(shown)}{f'; and {more} more' if more > 0 else ''}.",
        f"Until every cell has ended: {known or f'unknown, because {progress.eta_unknown}'}.",
    ]
