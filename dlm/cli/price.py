"""Work out what a sweep costs here, and ask before it is spent."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dlm.cli.prepared import make_data_ready
from dlm.cli.targets import Chosen, warn
from dlm.core import text
from dlm.core.errors import UserError

if TYPE_CHECKING:
    from dlm.plan.cells import Cell, Plan
    from dlm.plan.definition import SweepSpec


MIN_SIZES = 4  # of one budget: fewer make no isoFLOP parabola with an error


@dataclass(frozen=True, kw_only=True)
class How:
    """What `dlm submit` and `dlm sweep` are told beside the plan."""

    launcher: str = "auto"
    yes: bool = False
    retry_failed: bool = False
    allow_dirty: bool = False
    max_gpu_hours: float | None = None  # None: the definition's
    extra: Sequence[str] = ()  # Hydra overrides of every job


def _measured(plan: Plan) -> dict[str, float]:
    """Training FLOP/s of one core of this machine, measured now: model -> rate."""
    from dlm.plan.cost import measure_flops_per_sec, measured_models

    models = measured_models([cell.model for cell in plan.cells])
    rates = measure_flops_per_sec(models, block_size=max(cell.block_size for cell in plan.cells))
    shown = ", ".join(f"{name} {rate / 1e9:.3g}" for name, rate in rates.items())
    print(f"measured here, one core: {shown} GFLOP/s", flush=True)
    return rates


def left_to_do(chosen: Chosen) -> list[Cell]:
    """The cells without the result of their planned last step."""
    from dlm.record.run import finished, run_directory

    return [
        cell
        for cell in chosen.plan.cells
        if finished(run_directory(chosen.sweep_dir, cell.cell_id), cell.cell_id, cell.steps) is None
    ]


def _local_hours(cells: Sequence[Cell], at_once: int) -> float:
    """Wall hours of ``cells``, ``at_once`` at a time."""
    hours = [cell.estimate.hours or 0.0 for cell in cells]
    return max(sum(hours) / at_once, *hours)


def _refuse_unpayable(chosen: Chosen, on_cluster: Plan, at_once: int) -> None:
    """Raise UserError when this machine would take longer than the definition allows; says what would do."""

    spec, hours = chosen.plan.spec, _local_hours(left_to_do(chosen), at_once)
    if hours <= spec.max_local_hours:
        return
    gpu_hours = sum(cell.estimate.gpu_hours or 0 for cell in on_cluster.cells)
    there = f" (about {gpu_hours:,.3g} GPU-hours on {spec.hardware.device})" if gpu_hours else ""
    smaller = max(spec.budgets) * spec.max_local_hours / hours
    unprepared = f" ({chosen.plan.data} has to be prepared first)" if chosen.plan.data_hash is None else ""
    raise UserError(
        f"this machine would train {len(chosen.plan.cells)} cells of up to {text.flops(max(spec.budgets))} FLOPs for "
        f"about {text.duration(hours * 3600)}, {at_once} at a time at the rate measured just now; max_local_hours is "
        f"{spec.max_local_hours:g}. Nothing was started. What would do: a SLURM cluster{there} with "
        f"LAUNCHER=submitit_slurm{unprepared}, or a smaller budget: {_smaller_budget(spec, smaller)}"
    )


def _smaller_budget(spec: SweepSpec, budget: float) -> str:
    """A budget of this definition that can be paid here and still gives a law; else the demo."""
    from dlm.plan.grid import make_plan

    rounded = float(f"{budget:.0e}")
    try:
        plan = make_plan(spec.with_budgets(rounded * fraction for fraction in spec.budget_fractions))
        curves = Counter(cell.budget_flops for cell in plan.cells)
    except UserError:  # no cell is left
        curves = Counter()
    if sum(sizes >= MIN_SIZES for sizes in curves.values()) < 2:  # a line through isoFLOP minima needs two
        return f"`make sweep` alone runs the demo (the models of {spec.name} need more than what is payable here)"
    return f"BUDGET={text.flops(rounded)}, or `make sweep` alone for the demo"


def agree_on_cost(chosen: Chosen, how: How) -> float | None:
    """Ask on a terminal; without one go ahead within max_gpu_hours. The GPU-hours that the sweep may then use.

    Raises UserError for what costs more than it may.
    """
    from dlm.record.run import gpu_hours_used

    spec = chosen.plan.spec
    used = gpu_hours_used(chosen.sweep_dir)
    gpu_hours = used + sum((cell.estimate.gpu_hours or 0) * _share_left(chosen, cell) for cell in left_to_do(chosen))
    if how.max_gpu_hours is not None and not any(cell.estimate.gpu_hours for cell in chosen.plan.cells):
        warn("this plan asks for no GPUs, so --max-gpu-hours limits nothing")
    priced = f"{f'{used:,.4g} used and ' if used else ''}{gpu_hours - used:,.4g} GPU-hours to go"
    if how.max_gpu_hours is not None and gpu_hours > how.max_gpu_hours:
        raise UserError(
            f"{priced} are more than --max-gpu-hours {how.max_gpu_hours:,.4g}: raise it, or lower the budget"
        )
    beyond = spec.max_gpu_hours is not None and gpu_hours > spec.max_gpu_hours
    if not how.yes and sys.stdin.isatty() and sys.stdout.isatty():
        import typer

        typer.confirm("Start it?", default=True, abort=True)
    elif not how.yes and beyond and how.max_gpu_hours is None:
        raise UserError(
            f"the plan costs {gpu_hours:,.4g} GPU-hours, max_gpu_hours is {spec.max_gpu_hours:,.4g}: "
            "confirm with YES=1 (--yes), lower the budget or raise max_gpu_hours"
        )
    if how.max_gpu_hours is not None:
        return how.max_gpu_hours
    return None if beyond else spec.max_gpu_hours


def _share_left(chosen: Chosen, cell: Cell) -> float:
    """Of a cell's steps, the share that is still to be done: the rest is in the GPU-hours used."""
    from dlm.record.run import read_status, run_directory

    status = read_status(run_directory(chosen.sweep_dir, cell.cell_id))
    return 1.0 if status is None else 1 - min(status.step, cell.steps) / cell.steps


def price_here(chosen: Chosen) -> tuple[Chosen, bool]:
    """The plan at this machine's price, shown, its data made sure of; and whether GPU cells have to run on the CPU.

    Raises UserError for what this machine cannot pay.
    """
    from dlm.cli.screen import show_plan
    from dlm.plan.cost import with_estimates
    from dlm.submit.local import visible_gpus

    hardware = chosen.plan.spec.hardware
    gpus = [] if hardware.device == "cpu" else visible_gpus()
    at_once = max(len(gpus) // max(hardware.gpus_per_node, 1), 1) if gpus else len(os.sched_getaffinity(0))
    rates = None if gpus else _measured(chosen.plan)
    priced = Chosen(chosen.sweep_dir, with_estimates(chosen.plan, rates=rates))
    show_plan(priced.plan)
    _refuse_unpayable(priced, chosen.plan, at_once)
    hours = text.duration(3600 * _local_hours(left_to_do(priced), at_once))
    print(f"about {hours} of training here, {at_once} cells at a time, and some seconds to start each")
    prepared = make_data_ready(chosen)
    return Chosen(chosen.sweep_dir, with_estimates(prepared.plan, rates=rates)), hardware.device != "cpu" and not gpus
