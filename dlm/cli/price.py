"""Estimate the cost of a sweep, refuse a sweep that is too expensive, and ask for confirmation before it starts."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import typer

from dlm.cli.options import StartOptions
from dlm.cli.screen import show_plan
from dlm.cli.targets import warn
from dlm.core import text
from dlm.core.errors import UserError
from dlm.plan import cost, grid
from dlm.plan.cells import Cell, Plan
from dlm.plan.definition import SweepSpec
from dlm.record.run import gpu_hours_used
from dlm.submit import local
from dlm.submit.cell_now import CellNow

MIN_SIZES = 4  # model sizes per budget: an isoFLOP parabola passes exactly through three, which leaves no residual
MIN_CURVES = 2  # budgets with at least MIN_SIZES sizes: a line through the isoFLOP minima needs two points


def price_here(plan: Plan, *, left: Collection[str]) -> tuple[Plan, list[str]]:
    """Estimate the cost of a plan on this machine, and show the plan.

    Args:
        plan: The plan of the sweep.
        left: The ids of the cells that are not done.

    Returns:
        (the plan with its estimates, the overrides for its jobs). The overrides make cells that were planned for GPUs
        run on a CPU if this machine has no GPU.

    Raises:
        UserError: The cells that are not done would take longer than max_local_hours of the definition.
    """
    hardware = plan.spec.hardware
    gpus = [] if hardware.device == "cpu" else local.visible_gpus()
    if gpus:
        at_once = max(len(gpus) // max(hardware.gpus_per_node, 1), 1)
        priced = cost.with_estimates(plan)
    else:
        at_once = len(os.sched_getaffinity(0))
        priced = cost.with_estimates(plan, rates=_measured_rates(plan))
    show_plan(priced)
    each = [cell.estimate.hours or 0.0 for cell in priced.cells if cell.cell_id in left]
    hours = max(sum(each) / at_once, *each)
    if hours > plan.spec.max_local_hours:
        raise _too_long(plan, hours, at_once)
    print(
        f"about {text.duration(3600 * hours)} of training here, {at_once} cells at a time, "
        "and some seconds to start each"
    )
    return priced, [] if gpus or hardware.device == "cpu" else ["trainer=cpu"]


def _measured_rates(plan: Plan) -> dict[str, float]:
    """Measure the training speed of one core of this machine. Returns model name -> FLOP/s."""
    models = cost.measured_models([cell.model for cell in plan.cells])
    rates = cost.measure_flops_per_sec(models, block_size=max(cell.block_size for cell in plan.cells))
    shown = ", ".join(f"{name} {rate / 1e9:.3g}" for name, rate in rates.items())
    print(f"measured here, one core: {shown} GFLOP/s", flush=True)
    return rates


def _too_long(plan: Plan, hours: float, at_once: int) -> UserError:
    """Return the error that refuses a plan because it would take ``hours`` on this machine, and names alternatives."""
    spec = plan.spec
    gpu_hours = sum(cell.estimate.gpu_hours or 0 for cell in cost.with_estimates(plan).cells)
    on_gpus = f" (about {gpu_hours:,.3g} GPU-hours on {spec.hardware.device})" if gpu_hours else ""
    unprepared = f" ({plan.data} has to be prepared first)" if plan.data_hash is None else ""
    return UserError(
        f"this machine would train {len(plan.cells)} cells of up to {text.flops(max(spec.budgets))} FLOPs for about "
        f"{text.duration(3600 * hours)}, {at_once} at a time at the rate measured just now; max_local_hours is "
        f"{spec.max_local_hours:g}. Nothing was started. Use a SLURM cluster{on_gpus} with "
        f"LAUNCHER=submitit_slurm{unprepared}, or {_smaller_budget(spec, hours)}"
    )


def _smaller_budget(spec: SweepSpec, hours: float) -> str:
    """Suggest a top budget that fits max_local_hours on this machine and still suffices to fit a law, else the demo.

    Args:
        spec: The definition of the sweep.
        hours: The time in hours that the cells which are not done take here with the budgets of the definition.
    """
    budget = float(f"{max(spec.budgets) * spec.max_local_hours / hours:.0e}")
    try:
        plan = grid.make_plan(spec.with_budgets(budget * fraction for fraction in spec.budget_fractions))
        num_sizes = Counter(cell.budget_flops for cell in plan.cells)
    except UserError:  # no cell is left
        num_sizes = Counter()
    if sum(sizes >= MIN_SIZES for sizes in num_sizes.values()) < MIN_CURVES:
        return f"the demo, `make sweep` alone (no budget that fits here gives a law with the models of {spec.name})"
    return f"a smaller budget, BUDGET={text.flops(budget)}, or the demo, `make sweep` alone"


def agree_on_cost(plan: Plan, folder: Path, options: StartOptions, *, left: Mapping[str, CellNow]) -> float | None:
    """Check the cost of a sweep against its limits, and ask on a terminal whether to start it.

    Without a terminal and without --yes, the sweep is accepted if its cost is within --max-gpu-hours or, where that is
    not given, within max_gpu_hours of the definition.

    Args:
        plan: The plan with its estimates.
        folder: The folder of the sweep.
        options: The options of the command, of which --yes and --max-gpu-hours are used.
        left: The current states of the cells that are not done, by cell id.

    Returns:
        The GPU-hours that the sweep may use in total; None sets no limit.

    Raises:
        UserError: The sweep costs more GPU-hours than are allowed.
    """
    spec, given = plan.spec, options.max_gpu_hours
    used = gpu_hours_used(folder)
    to_go = sum(_gpu_hours_to_go(cell, left[cell.cell_id]) for cell in plan.cells if cell.cell_id in left)
    total = used + to_go
    if given is not None and not any(cell.estimate.gpu_hours for cell in plan.cells):
        warn("this plan asks for no GPUs, so --max-gpu-hours limits nothing")
    if given is not None and total > given:
        so_far = f"{used:,.4g} used and " if used else ""
        raise UserError(
            f"{so_far}{to_go:,.4g} GPU-hours to go are more than --max-gpu-hours {given:,.4g}: raise it, or lower the "
            "budget"
        )
    too_much = spec.max_gpu_hours is not None and total > spec.max_gpu_hours
    if not options.yes and sys.stdin.isatty() and sys.stdout.isatty():
        typer.confirm("Start it?", default=True, abort=True)
    elif not options.yes and too_much and given is None:
        raise UserError(
            f"the plan costs {total:,.4g} GPU-hours, max_gpu_hours is {spec.max_gpu_hours:,.4g}: "
            "confirm with YES=1 (--yes), lower the budget or raise max_gpu_hours"
        )
    if given is not None:
        return given
    return None if too_much else spec.max_gpu_hours


def _gpu_hours_to_go(cell: Cell, now: CellNow) -> float:
    """Return the GPU-hours of the remaining steps of a cell."""
    done = 0 if now.status is None else min(now.status.step, cell.steps)
    return (cell.estimate.gpu_hours or 0.0) * min((1 - done / cell.steps) / cell.own_share, 1)
