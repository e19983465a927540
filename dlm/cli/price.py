"""Estimate the cost of a sweep, refuse a sweep that is too expensive, and ask for confirmation before it starts."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import typer

from dlm.cli.options import StartOptions
from dlm.cli.screen import show_plan
from dlm.cli.table import say
from dlm.cli.targets import warn
from dlm.core import paths, text
from dlm.core.errors import UserError
from dlm.plan import cost, grid
from dlm.plan.cells import Cell, Estimate, Plan
from dlm.plan.definition import SweepSpec, load_sweep
from dlm.plan.proof import expected_proof, proof_budget
from dlm.record.run import gpu_hours_used
from dlm.submit import local
from dlm.submit.cell_now import CellNow

MIN_SIZES = 4  # model sizes per budget: an isoFLOP parabola passes exactly through three, which leaves no residual
SHORT_HOURS = 1 / 6  # a sweep that takes less time on this machine starts without a question
MIN_CURVES = 2  # budgets with at least MIN_SIZES sizes: a line through the isoFLOP minima needs two points


def price_here(plan: Plan, *, left: Collection[str]) -> tuple[Plan, list[str], float]:
    """Estimate the cost of a plan on this machine, and show the plan.

    Args:
        plan: The plan of the sweep.
        left: The ids of the cells that are not done.

    Returns:
        (the plan with its estimates, the overrides for its jobs, the hours that what is not done takes). The overrides
        make cells that were planned for GPUs run on a CPU if this machine has no GPU.

    Raises:
        UserError: The cells that are not done would take longer than max_local_hours of the definition.
    """
    hardware = plan.spec.hardware
    gpus = [] if hardware.device == "cpu" else local.visible_gpus()
    if gpus:
        at_once = max(len(gpus) // max(hardware.gpus_per_node, 1), 1)
        rates = None
    else:
        at_once = len(os.sched_getaffinity(0))
        rates = _measured_rates(plan)
    priced = cost.with_estimates(plan, rates=rates)
    proof = cost.estimated(expected_proof(plan), hardware, rates=rates)
    show_plan(priced, proof=proof)
    hours = _hours_at_once([cell for cell in priced.cells if cell.cell_id in left], at_once)
    of_proof = _hours_at_once(proof, at_once)  # it starts when the other cells are done
    if hours > plan.spec.max_local_hours:
        raise _too_long(plan, hours, at_once)
    if hours + of_proof > plan.spec.max_local_hours:
        raise _too_long_proof(plan, hours, of_proof)
    cells = text.counted(at_once, "cell")
    say(
        f"about {text.duration(3600 * (hours + of_proof))} of training here, {cells} at a time, "
        "and some seconds to start each"
    )
    return priced, [] if gpus or hardware.device == "cpu" else ["trainer=cpu"], hours + of_proof


def _hours_at_once(cells: Sequence[Cell], at_once: int) -> float:
    """Return the hours that cells take if ``at_once`` of them run at a time."""
    each = [cell.estimate.hours or 0.0 for cell in cells]
    return max(sum(each) / at_once, *each, 0.0)


def _too_long_proof(plan: Plan, hours: float, of_proof: float) -> UserError:
    """Return the error that refuses a sweep because its proof run would take too long on this machine."""
    spec = plan.spec
    assert spec.proof is not None
    total = text.duration(3600 * (hours + of_proof))
    return UserError(
        f"the proof run of about {text.flops(proof_budget(spec))} FLOPs would take about "
        f"{text.duration(3600 * of_proof)} here, the sweep with it {total}; max_local_hours is "
        f"{spec.max_local_hours:g}. Nothing was started. Lower proof.factor (it is {spec.proof.factor:g}), raise "
        "max_local_hours, or leave the proof run out with --set proof=null"
    )


def _measured_rates(plan: Plan) -> dict[str, float]:
    """Measure the training speed of one core of this machine. Returns model name -> FLOP/s."""
    say("measuring the speed of this machine ...")
    models = cost.measured_models([cell.model for cell in plan.grid])
    rates = cost.measure_flops_per_sec(models, like=max(plan.grid, key=lambda cell: cell.num_params))
    shown = ", ".join(f"{name} {rate / 1e9:.3g}" for name, rate in rates.items())
    say(f"measured here, one core: {shown} GFLOP/s")
    return rates


def _too_long(plan: Plan, hours: float, at_once: int) -> UserError:
    """Return the error that refuses a plan because it would take ``hours`` on this machine, and names alternatives."""
    spec = plan.spec
    gpu_hours = sum(cell.estimate.gpu_hours or 0 for cell in cost.with_estimates(plan).cells)
    on_gpus = f" (about {gpu_hours:,.3g} GPU-hours on {spec.hardware.device})" if gpu_hours else ""
    unprepared = f" ({plan.data} has to be prepared first)" if plan.data_hash is None else ""
    cells = text.counted(len(plan.cells), "cell")
    return UserError(
        f"this machine would train {cells} of up to {text.flops(max(spec.budgets))} FLOPs for about "
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


def agree_on_cost(
    plan: Plan, folder: Path, options: StartOptions, *, left: Mapping[str, CellNow], local_hours: float | None = None
) -> float | None:
    """Check the cost of a sweep against its limits, and ask on a terminal whether to start it.

    The demonstration, and what takes less than SHORT_HOURS on this machine, is not asked about. Without a terminal and
    without --yes, the sweep is accepted if its cost is within --max-gpu-hours or, where that is not given, within
    max_gpu_hours of the definition.

    Args:
        plan: The plan with its estimates.
        folder: The folder of the sweep.
        options: The options of the command, of which --yes and --max-gpu-hours are used.
        left: The current states of the cells that are not done, by cell id.
        local_hours: The time that these cells take on this machine; None if they do not run here.

    Returns:
        The GPU-hours that the sweep may use in total; None sets no limit.

    Raises:
        UserError: The sweep costs more GPU-hours than are allowed.
    """
    spec, given = plan.spec, options.max_gpu_hours
    used = gpu_hours_used(folder)
    to_go = sum(_gpu_hours_to_go(cell, left[cell.cell_id]) for cell in plan.cells if cell.cell_id in left)
    proof = [cost.estimated_like(cell, plan.grid).estimate for cell in expected_proof(plan)]
    to_go += sum(estimate.gpu_hours or 0.0 for estimate in proof)
    total = used + to_go
    if given is not None and not any(cell.estimate.gpu_hours for cell in plan.cells):
        warn("this plan asks for no GPUs, so --max-gpu-hours limits nothing")
    if given is not None and total > given:
        so_far = f"{used:,.4g} used and " if used else ""
        raise UserError(
            f"{so_far}{to_go:,.4g} GPU-hours to go {_with_proof(proof)}are more than --max-gpu-hours {given:,.4g}: "
            "raise it, or lower the budget"
        )
    too_much = spec.max_gpu_hours is not None and total > spec.max_gpu_hours
    asks = too_much or local_hours is None or (local_hours >= SHORT_HOURS and not _is_demonstration(spec))
    if asks and not options.yes and sys.stdin.isatty() and sys.stdout.isatty():
        typer.confirm("Start it?", default=True, abort=True)
    elif not options.yes and too_much and given is None:
        raise UserError(
            f"the plan {_with_proof(proof)}costs {total:,.4g} GPU-hours, max_gpu_hours is {spec.max_gpu_hours:,.4g}: "
            "confirm with YES=1 (--yes), lower the budget or raise max_gpu_hours"
        )
    if given is not None:
        return given
    return None if too_much else spec.max_gpu_hours


def _is_demonstration(spec: SweepSpec) -> bool:
    """Whether a definition is that of sweeps/demo.yaml, unchanged."""
    path = paths.sweeps_dir() / "demo.yaml"
    return path.is_file() and spec == load_sweep(path)


def _with_proof(proof: Sequence[Estimate]) -> str:
    return f"(with the proof run, {sum(one.gpu_hours or 0 for one in proof):,.4g}) " if proof else ""


def _gpu_hours_to_go(cell: Cell, now: CellNow) -> float:
    """Return the GPU-hours of the remaining steps of a cell."""
    done = 0 if now.status is None else min(now.status.step, cell.steps)
    return (cell.estimate.gpu_hours or 0.0) * min((1 - done / cell.steps) / cell.own_share, 1)
