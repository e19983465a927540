"""Determine the resources that the job of a planned cell requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dlm.core.errors import UserError
from dlm.core.memory import GIB
from dlm.core.recipe import accumulation
from dlm.plan.cost import sequences_at_once
from dlm.plan.grid import cell_config
from dlm.submit.job import Resources, SlurmSettings

if TYPE_CHECKING:
    from dlm.plan.cells import Cell


# Host memory of one process in GiB, by whether it uses a GPU: Python, torch, the data loader, CUDA.
HOST_GIB = {False: 2, True: 8}


def cell_resources(
    cell: Cell,
    settings: SlurmSettings = SlurmSettings(),
    *,
    max_time_min: int | None = None,
    extra: Sequence[str] = (),
) -> Resources:
    """Return the resources that the job of a planned cell requests.

    Args:
        cell: The cell. Its overrides and its estimate supply the values that the launcher's keys leave open.
        settings: The launcher's keys.
        max_time_min: The longest time limit in minutes that the cluster allows; None if there is no limit. A cell that
            needs more time continues in another job.
        extra: Hydra overrides for the job, of which data.num_workers counts here.

    Raises:
        UserError: hydra.launcher.timeout_min is above ``max_time_min``.
    """
    gpus = settings.gpus_per_node if settings.gpus_per_node is not None else cell.estimate.gpus_per_node
    if settings.gpus_per_task is not None and settings.tasks_per_node is not None:
        gpus = settings.gpus_per_task * settings.tasks_per_node
    tasks = settings.tasks_per_node or gpus or cell.overrides.get("trainer.devices") or 1
    return Resources(
        nodes=settings.nodes or cell.overrides.get("trainer.num_nodes") or cell.estimate.nodes,
        tasks_per_node=tasks,
        gpus_per_node=gpus,
        cpus_per_task=settings.cpus_per_task or 1 + num_workers(cell, extra),
        mem_gib=host_memory_gib(cell, tasks=tasks, on_gpu=gpus > 0) if settings.mem_gb is None else settings.mem_gb,
        time_min=_time_limit(settings, time_limit_min(cell.estimate.hours), max_time_min),
    )


def num_workers(cell: Cell, extra: Sequence[str] = ()) -> int:
    """Return the number of processes that load the data of a task, besides the one that trains.

    Raises UserError if an override in ``extra`` gives no whole number.
    """
    given = [word for word in extra if word.lstrip("+").startswith("data.num_workers=")]
    if given:
        value = given[-1].partition("=")[2]
        if not value.isdecimal():
            raise UserError(f"--override {given[-1]}: give a whole number, 0 or above")
        return int(value)
    return int(cell_config(cell.groups, cell.overrides)["data"].get("num_workers") or 0)


def _time_limit(settings: SlurmSettings, planned: int | None, allowed: int | None) -> int | None:
    asked = settings.timeout_min
    if asked is not None and allowed is not None and asked > allowed:
        raise UserError(
            f"hydra.launcher.timeout_min is {asked}, the partition {settings.partition or '(default)'} allows "
            f"{allowed} minutes: lower it; a longer cell goes on in the next job"
        )
    return min((limit for limit in (asked or planned, allowed) if limit is not None), default=None)


def host_memory_gib(cell: Cell, *, tasks: int, on_gpu: bool) -> int | None:
    """Return the host memory that the processes of a cell need on a node, in GiB; None if the plan has no estimate.

    On a CPU, all training memory is host memory. With GPUs, one process gathers the training state for a checkpoint and
    keeps a copy of it while the checkpoint is written. The memory is rounded up to 2^k or 1.5 * 2^k GiB, so that many
    cells request the same resources and share job arrays.
    """
    if cell.estimate.memory_gib is None:
        return None
    state = 2 * 16 * cell.num_params_total / GIB
    needed = HOST_GIB[on_gpu] * tasks + (state if on_gpu else 1.5 * cell.estimate.memory_gib * tasks)
    power = 2 ** math.floor(math.log2(needed))
    return int(next(size for size in (power, 1.5 * power, 2 * power) if size >= needed))


def time_limit_min(hours: float | None) -> int | None:
    """Return the time limit in minutes for an estimated duration in hours; None if there is no estimate.

    The limit is 1.5 times the estimate plus ten minutes, rounded up to 30 * 2^k minutes so that cells share arrays.
    """
    if hours is None:
        return None
    needed = hours * 60 * 1.5 + 10
    return int(30 * 2 ** max(0, math.ceil(math.log2(needed / 30))))


def num_devices(resources: Resources) -> int:
    """Return the number of processes, each with its own device, that train a cell together."""
    return max(resources.gpus_per_node, resources.tasks_per_node) * resources.nodes


def dividing_micro_batch(cell: Cell, resources: Resources, *, at_most: int) -> int | None:
    """Return the largest micro-batch up to ``at_most`` that divides the batch share of a device; None if none does."""
    share = cell.global_batch_size // num_devices(resources)
    return max((size for size in range(1, at_most + 1) if share % size == 0), default=None)


def largest_micro_batch(cell: Cell, resources: Resources, *, asked: int | None = None) -> int:
    """Return the micro-batch of a cell that has never run out of memory.

    This is ``asked`` or, if ``asked`` is None, the micro-batch that training chooses on the planned device. Raises
    UserError if the batch cannot be divided evenly among the devices and into micro-batches.
    """
    micro, _ = accumulation(
        batch_size=cell.global_batch_size,
        micro_batch_size=asked,
        world_size=num_devices(resources),
        limit=sequences_at_once(cell, on_gpu=resources.gpus_per_node > 0, device=cell.estimate.device),
    )
    return micro


def smaller_micro_batch(cell: Cell, resources: Resources, before: int | None) -> int | None:
    """Return a micro-batch of at most half the previous one, in sequences, with the global batch size unchanged.

    Args:
        cell: The cell that ran out of memory.
        resources: The resources that the next job of the cell requests.
        before: The micro-batch of the previous job, in sequences; None if it was the one set for the cell or, where
            none is set, the one that training chooses.

    Returns:
        The micro-batch; None if the previous micro-batch was a single sequence.
    """
    if before is None:
        before = largest_micro_batch(cell, resources, asked=cell.overrides.get("data.micro_batch_size"))
    return dividing_micro_batch(cell, resources, at_most=before // 2)
