"""Estimate the cost of cells on given hardware: hours, GPU-hours, memory and devices.

The estimated time is the FLOPs of a cell divided by a rate. The rate is an assumed share of the devices' peak, or it
has just been measured on this machine.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dlm.core.configs import load_base, load_choice
from dlm.core.errors import ExitCode, UserError
from dlm.core.flops import flops_per_token
from dlm.core.memory import GIB, micro_batch_limit, training_bytes
from dlm.core.objectives import OBJECTIVES
from dlm.core.recipe import accumulation
from dlm.core.shape import ModelShape, load_shape, shape_from_config
from dlm.plan.cells import Cell, Estimate, Plan
from dlm.plan.definition import Hardware
from dlm.plan.grid import cell_config
from dlm.plan.speed import (
    MEMORY_GIB,
    OTHER_MEMORY_GIB,
    assumed_share,
    interpolate,
    is_compiled,
    trainer_of,
)


def with_estimates(plan: Plan, *, rates: Mapping[str, float] | None = None) -> Plan:
    """Return the plan with an estimate for each cell.

    Args:
        plan: The plan.
        rates: Model -> training FLOP/s measured on this machine; the cells are to run on its CPUs. None: the cells are
            to run on the hardware of the definition, at an assumed share of its peak.
    """
    return dataclasses.replace(plan, cells=tuple(estimated(plan.cells, plan.spec.hardware, rates=rates)))


def estimated(cells: Iterable[Cell], hardware: Hardware, *, rates: Mapping[str, float] | None = None) -> list[Cell]:
    """Return cells with an estimate for each; ``rates`` as in ``with_estimates``."""
    used = hardware if rates is None else Hardware(device="cpu", gpus_per_node=0)
    return [dataclasses.replace(cell, estimate=_estimate(cell, used, rates)) for cell in cells]


def estimated_like(cell: Cell, others: Iterable[Cell]) -> Cell:
    """Return a cell with an estimate at the speed of the cell of ``others`` that is nearest in size and has one."""
    known = [other for other in others if other.estimate.hours is not None]
    if not known:
        return cell
    near = min(known, key=lambda other: abs(math.log(other.num_params / cell.num_params)))
    more = _all_flops(cell) / _all_flops(near)
    gpus = near.estimate.gpus_per_node * near.estimate.nodes
    estimate = dataclasses.replace(
        near.estimate,
        hours=(near.estimate.hours or 0.0) * more,
        gpu_hours=(near.estimate.gpu_hours or 0.0) * more,
        memory_gib=memory_gib(cell, max(gpus, 1), on_gpu=gpus > 0, device=near.estimate.device),
    )
    return dataclasses.replace(cell, estimate=estimate)


def _all_flops(cell: Cell) -> float:
    """Return the FLOPs of the training and the validations that a cell does itself (full_masked_head)."""
    return cell.flops["full_masked_head"] * cell.own_share + validation_flops(cell)


def shape_of(cell: Cell) -> ModelShape:
    """Return the shape of the model of a cell: that of its choice in configs/model with the keys that the cell sets."""
    return shape_from_config({**load_choice("model", cell.groups["model"]), **_model_keys(cell)})


def _model_keys(cell: Cell) -> dict[str, Any]:
    return {key.removeprefix("model."): value for key, value in cell.overrides.items() if key.startswith("model.")}


def validation_flops(cell: Cell) -> float:
    """Return the FLOPs of the forward passes of all validations of a cell.

    They count towards the hours but not towards the budget, which covers training only. The value is an upper bound,
    because the validation split may hold fewer sequences than ``validation.num_sequences``. Only the validations after
    the branch point of a cell count.
    """
    asked = {
        name: cell.overrides.get(f"validation.{name}", default) for name, default in load_base()["validation"].items()
    }
    objective = OBJECTIVES[cell.objective]
    draws = asked["draws"] if objective.is_bound else 1
    passes = asked["num_sequences"] * draws * math.ceil(asked["times"] * cell.own_share)
    per_token = flops_per_token(
        shape_of(cell), convention="full_masked_head", block_size=cell.block_size, objective=objective
    )
    return float(passes * cell.block_size * per_token / 3)


def _estimate(cell: Cell, hardware: Hardware, rates: Mapping[str, float] | None) -> Estimate:
    gpus = 0 if hardware.device == "cpu" else hardware.gpus_per_node * hardware.nodes
    rate, basis = _rate(cell, hardware, gpus, rates)
    hours = None if rate is None else _all_flops(cell) / rate / 3600
    return Estimate(
        hours=hours,
        gpu_hours=None if hours is None else hours * gpus,
        memory_gib=memory_gib(cell, max(gpus, 1), on_gpu=gpus > 0, device=hardware.device),
        nodes=hardware.nodes,
        gpus_per_node=gpus // hardware.nodes,
        device=hardware.device,
        basis=basis,
    )


def _rate(cell: Cell, hardware: Hardware, gpus: int, rates: Mapping[str, float] | None) -> tuple[float | None, str]:
    """Return the FLOP/s (full_masked_head) of a cell, None if not known, and a description of its source."""
    if rates is not None:
        measured = rate_of(cell.num_params, rates)
        return measured, f"measured here, {measured:.3g} full_masked_head FLOP/s a cell"
    if gpus:
        share, how = hardware.mfu, ""
        if share is None:
            compiled = is_compiled(cell, on_gpu=True)
            share = assumed_share(cell.num_params, hardware.device, compiled=compiled)
            how = ", compiled" if compiled else ", not compiled"
        return hardware.peak * share * gpus, f"{gpus} x {hardware.device} at an assumed {share:.0%} of the peak{how}"
    return None, "not measured on this machine yet"


def memory_gib(cell: Cell, devices: int, *, on_gpu: bool, device: str = "") -> float:
    """Estimate an upper limit of the training memory on each of ``devices`` devices, in GiB (dlm.core.memory)."""
    # A batch that does not divide evenly over the devices is refused earlier.
    batch_size = max(cell.global_batch_size // devices * devices, devices)
    micro, _ = accumulation(
        batch_size=batch_size,
        micro_batch_size=None,
        world_size=devices,
        limit=sequences_at_once(cell, on_gpu=on_gpu, device=device),
    )
    needed = training_bytes(
        shape_of(cell),
        OBJECTIVES[cell.objective],
        trainer_of(cell, on_gpu=on_gpu),
        tokens=micro * cell.block_size,
        compiled=is_compiled(cell, on_gpu=on_gpu),
    )
    return needed / GIB


def sequences_at_once(cell: Cell, *, on_gpu: bool, device: str) -> int:
    """Return how many sequences of a cell a device computes at once at most.

    Training asks the GPU for its memory; a plan takes it from MEMORY_GIB.
    """
    return micro_batch_limit(
        shape_of(cell),
        OBJECTIVES[cell.objective],
        trainer_of(cell, on_gpu=on_gpu),
        block_size=cell.block_size,
        memory_bytes=MEMORY_GIB.get(device, OTHER_MEMORY_GIB) * GIB if on_gpu else None,
    )


def measure_flops_per_sec(models: list[str], *, like: Cell, seconds: float = 1.0) -> dict[str, float]:
    """Measure the training FLOP/s (full_masked_head) of one process with one thread on this machine.

    Args:
        models: The model sizes to measure.
        like: The cell whose sequences, micro-batch, optimiser and keys of the model the measured models have.
        seconds: The duration of each measurement.

    Returns:
        Model -> FLOP/s.
    """
    micro, _ = accumulation(
        batch_size=like.global_batch_size,
        micro_batch_size=like.overrides.get("data.micro_batch_size"),
        world_size=1,
        limit=sequences_at_once(like, on_gpu=False, device="cpu"),
    )
    sizes = {"block_size": like.block_size, "batch_size": micro}
    optimizer = cell_config(like.groups, like.overrides)["optimizer"]
    request = {"models": models, "keys": _model_keys(like), "optimizer": optimizer, **sizes, "seconds": seconds}
    done = subprocess.run(
        [sys.executable, "-m", "dlm.train.measure", json.dumps(request)], capture_output=True, text=True, check=False
    )
    if done.returncode == ExitCode.USER_ERROR:
        raise UserError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(f"measuring this machine failed:\n{done.stderr}")
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return rates


def measured_models(models: Sequence[str]) -> list[str]:
    """Choose the sizes to measure for a plan: the smallest and the largest below 7M parameters, or 6M if none is."""
    shapes = sorted((load_shape(name) for name in set(models)), key=lambda shape: shape.num_params)
    small = [shape.name for shape in shapes if shape.num_params < 7e6]
    return list(dict.fromkeys([small[0], small[-1]])) if small else ["6M"]


def rate_of(num_params: int, rates: Mapping[str, float]) -> float:
    """Interpolate the FLOP/s at a model size from the measured sizes, linearly in log N and log rate.

    Outside the measured range, the rate of the nearest measured size is used.

    Args:
        num_params: N, non-embedding.
        rates: Model -> measured training FLOP/s.
    """
    points = sorted((math.log(load_shape(name).num_params), math.log(rate)) for name, rate in rates.items())
    return math.exp(interpolate(math.log(num_params), points))
