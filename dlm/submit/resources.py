"""Turn a planned cell into the resources that its job asks for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dlm.core.errors import UserError
from dlm.core.recipe import accumulation
from dlm.plan.cost import GIB
from dlm.submit.job import Resources, SlurmSettings

if TYPE_CHECKING:
    from dlm.plan.cells import Cell


HOST_GIB = {False: 2, True: 8}  # memory of one process on the host: Python, torch, the loader; on a GPU CUDA's too


def trainer_overrides(resources: Resources, group: str) -> tuple[str, ...]:
    """The trainer that fits what a job is given; ``group`` is the cell's own, which stands unless it is cpu."""
    nodes, gpus = resources.nodes, resources.gpus_per_node
    if not gpus:
        several = resources.tasks_per_node * nodes > 1
        return (f"trainer.devices={resources.tasks_per_node}", f"trainer.num_nodes={nodes}") if several else ()
    fitting = "multi_node" if nodes > 1 else "multi_gpu" if gpus > 1 else "single_gpu"
    chosen = (f"trainer={fitting}",) if group == "cpu" else ()
    return (*chosen, f"trainer.devices={gpus}", f"trainer.num_nodes={nodes}")


def cell_resources(
    cell: Cell, settings: SlurmSettings | None = None, *, cpus_per_task: int = 1, max_time_min: int | None = None
) -> Resources:
    """What a planned cell needs: the launcher's keys where they are set, else the plan's estimate.

    A cell that needs longer than ``max_time_min``, the partition's limit, goes on in another job. Raises UserError for
    a hydra.launcher.timeout_min above it.
    """
    settings = settings or SlurmSettings()
    gpus = settings.gpus_per_node if settings.gpus_per_node is not None else cell.estimate.gpus_per_node
    tasks = settings.tasks_per_node or gpus or cell.overrides.get("trainer.devices") or 1
    return Resources(
        nodes=settings.nodes or cell.overrides.get("trainer.num_nodes") or cell.estimate.nodes,
        tasks_per_node=tasks,
        gpus_per_node=gpus,
        cpus_per_task=settings.cpus_per_task or cpus_per_task,
        mem_gib=settings.mem_gb or host_memory_gib(cell, tasks=tasks, on_gpu=gpus > 0),
        time_min=_time_limit(settings, time_limit_min(cell.estimate.hours), max_time_min),
    )


def _time_limit(settings: SlurmSettings, planned: int | None, allowed: int | None) -> int | None:
    asked = settings.timeout_min
    if asked is not None and allowed is not None and asked > allowed:
        raise UserError(
            f"hydra.launcher.timeout_min is {asked}, the partition {settings.partition or '(default)'} allows "
            f"{allowed} minutes: lower it; a longer cell goes on in the next job"
        )
    return min((limit for limit in (asked or planned, allowed) if limit is not None), default=None)


def host_memory_gib(cell: Cell, *, tasks: int, on_gpu: bool) -> int | None:
    """Host memory of a node, on a coarse grid so that arrays are few: what its processes are, and hold.

    On a CPU that is all of training; beside GPUs one process gathers the state for a checkpoint, and keeps a copy of it
    while that is written. None where the plan has no estimate.
    """
    if cell.estimate.memory_gib is None:
        return None
    state = 2 * 16 * cell.num_params_total / GIB
    needed = HOST_GIB[on_gpu] * tasks + (state if on_gpu else 1.5 * cell.estimate.memory_gib * tasks)
    power = 2 ** math.floor(math.log2(needed))
    return int(next(size for size in (power, 1.5 * power, 2 * power) if size >= needed))


def time_limit_min(hours: float | None) -> int | None:
    """A time limit from an estimate: half as much again and ten minutes, on a coarse grid so that arrays are few."""
    if hours is None:
        return None
    needed = hours * 60 * 1.5 + 10
    return int(30 * 2 ** max(0, math.ceil(math.log2(needed / 30))))


def num_devices(resources: Resources) -> int:
    return max(resources.gpus_per_node, resources.tasks_per_node) * resources.nodes


def dividing_micro_batch(cell: Cell, resources: Resources, *, at_most: int) -> int | None:
    """The largest micro-batch up to ``at_most`` that divides the share of a device; None when there is none."""
    share = cell.global_batch_size // num_devices(resources)
    return max((size for size in range(1, at_most + 1) if share % size == 0), default=None)


def smaller_micro_batch(cell: Cell, resources: Resources, before: int | None) -> int | None:
    """Half the micro-batch, the global batch kept; None when it is one sequence already."""
    devices = num_devices(resources)
    if before is None:
        before, _ = accumulation(
            batch_size=cell.global_batch_size,
            micro_batch_size=cell.overrides.get("data.micro_batch_size"),
            world_size=devices,
            num_params=cell.num_params,
        )
    return dividing_micro_batch(cell, resources, at_most=before // 2)
